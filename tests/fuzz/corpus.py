"""What fuzzing and reports have found, each with what is right: name -> (target, input or what makes it, outcome).

Tracebacks, hangs, memory without bounds, silent nonsense; of each class at least one member.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile

import torch

from minimind_ds.config.model import PRESETS
from minimind_ds.convert import huggingface
from minimind_ds.data.build import seal_of
from tests.fuzz import run_folder_targets, tokenizer_targets, weight_targets
from tests.fuzz.data_targets import RECORDS, columns

YES, NO = "accepted", "refused"
GOOD = json.dumps(RECORDS[0]).encode()
FOREIGN = b'[1]\n{"step": "x"}\n{"step": 1e999}\n' + b"[" * 9000 + b"\n\xff\n5"
OURS = PRESETS["debug"].to_dict()


def broken_thrift() -> bytes:
    content = columns()["parquet"][0]
    return content[:-9] + b"\xff" * 4 + content[-5:]


def yaml(text: str) -> bytes:
    return text.encode() + b"\n"


def bomb() -> bytes:
    names = [f"a{i}" for i in range(30)]
    return yaml("a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip(["a", *names], names)))


def tokenizer(config: dict | None = None, added: dict | None = None, **changes) -> dict[str, bytes]:
    """A byte-level folder with something else in its tokenizer.json, its config, or one more added token."""
    spec, own = json.loads(json.dumps(tokenizer_targets.small()))
    for key, value in changes.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    if added:
        spec["added_tokens"].append({**tokenizer_targets.ENTRY, **added})
    return {"tokenizer.json": json.dumps(spec).encode(),
            "tokenizer_config.json": json.dumps({**own, **(config or {})}).encode()}


def letter(text: str = "a") -> int:
    return tokenizer_targets.small()[0]["model"]["vocab"][text]


def pth(tree: object, **options) -> tuple[str, bytes]:
    torch.save(tree, out := io.BytesIO(), **options)
    return "dense", out.getvalue()


def over_disks() -> tuple[str, bytes]:
    kind, content = pth({"a": torch.ones(2)})
    at = content.rindex(b"PK\6\7")
    return kind, content[:at + 16] + b"\x09" + content[at + 17:]


def inflating() -> tuple[str, bytes]:
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (8 << 20))
    return "dense", out.getvalue()


def weights(**changes) -> tuple[str, bytes]:
    return pth({**weight_targets.states()["dense"], **changes})


def safetensors(kind: str = "dense", **said) -> tuple[str, bytes, bytes]:
    """A file of a kind with other words in its metadata."""
    about = {**weight_targets.said_of()[kind], **said}
    content = weight_targets.save({name: tensor.clone() for name, tensor in weight_targets.states()[kind].items()},
                                  metadata={name: value if isinstance(value, str) else json.dumps(value) for name,
                                            value in about.items()})
    theirs = huggingface.to_hf_config(weight_targets.TINY, torch.float32)
    return kind, content, json.dumps(theirs).encode()


def lora(**changes) -> tuple[str, bytes, bytes]:
    return safetensors("lora", lora={**weight_targets.ADAPTERS.facts(), **changes})


def checkpoint(said: dict | None = None, plant: str | None = None, model: dict | None = None,
               optimizer: dict | None = None, **more) -> dict:
    """A checkpoint with other words in its manifest, other states, or something else in place of a file."""
    first, second = run_folder_targets.states()
    files = {"state/mp_rank_00_model_states.pt": run_folder_targets.saved({**first, **(model or {})}),
             "state/zero_pp_rank_0_mp_rank_00_optim_states.pt": run_folder_targets.saved({"optimizer_state_dict": {
                 **second["optimizer_state_dict"], **(optimizer or {})}})}
    listed = {name: {"bytes": len(content), "sha256": run_folder_targets.hashlib.sha256(content).hexdigest()}
              for name, content in files.items()}
    manifest = {"format": 2, **run_folder_targets.facts(), "files": listed, **(said or {})}
    return {"files": files, "manifest": json.dumps(manifest).encode(), "sealed": True, "plant": plant,
            "latest": b"step_00000003\n", **more}


def notes(plant: str | None = None, **files: bytes) -> dict:
    return {"files": {name.replace("_", "."): content for name, content in files.items()}, "plant": plant, "step": 3,
            "job": "7"}


def cache(name: str, at: int) -> dict:
    """A token cache with a byte changed, counted from the file's middle."""
    files = dict(run_folder_targets.store()[3])
    content = bytearray(files[name])
    content[len(content) // 2 + at] ^= 1
    files[name] = bytes(content)
    return {"files": files, "part": {}, "plant": None}


def other_cache(**changes) -> dict:
    """A token cache of other facts, sealed as they are."""
    files = dict(run_folder_targets.store()[3])
    meta = {name: value for name, value in json.loads(files["meta.json"]).items() if name != "seal"} | changes
    files["meta.json"] = json.dumps(meta | {"seal": seal_of(meta)}).encode()
    return {"files": files, "part": {}, "plant": None}


CORPUS = {
    # Data.
    "deep JSON on a line": ("lines", (b'{"text": ' + b"[" * 100_000, "text", "stop"), NO),
    "thousands of digits": ("lines", (b'{"text": ' + b"9" * 5000 + b"}", "text", "stop"), NO),
    "a lone surrogate": ("lines", (b'{"text": "\\ud800"}', "text", "stop"), NO),
    "a byte order mark in the middle": ("lines", (GOOD + b"\n\xef\xbb\xbf" + GOOD, "conversations", "stop"), NO),
    "a number beyond floats": ("lines", (b'{"text": "a", "n": 1e999}', "text", "stop"), NO),
    "UTF-16": ("lines", (GOOD.decode().encode("utf-16"), "conversations", "skip"), NO),
    "a key twice": ("lines", (b'{"text": "a", "text": "b"}', "text", "stop"), NO),
    "a good record": ("lines", (GOOD, "conversations", "stop"), YES),
    "gzip cut off": ("containers", (b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xab", "text", "stop"), NO),
    "an array without end": ("containers", (b'[{"text": "a"}', "text", "stop"), NO),
    "Parquet with its thrift broken": ("columns", lambda: (broken_thrift(), "text", "stop"), NO),
    "a link to itself": ("data paths", [["@/loop"], b"{}", b"{}"], NO),
    "a name that does not print": ("data paths", [["@/\ufeff\x1b[31m"], b"{}", b"{}"], NO),
    "a pipe": ("data paths", [["@/pipe"], b"{}", b"{}"], NO),
    "splits without end": ("data paths", [["@/splits"], b"{}", json.dumps({"splits": ["x" * 90] * 500}).encode()], NO),
    # YAML and flags.
    "an alias bomb": ("run YAML", bomb(), NO),
    "a loop of aliases": ("run YAML", yaml("a: &a [*a]"), NO),
    "adapters' layers of 3,000 characters and no rank": ("run YAML", yaml("lora_targets: " + "x" * 3000), NO),
    "a key twice in YAML": ("run YAML", yaml("epochs: 1\nepochs: 2"), NO),
    "an empty integer": ("run YAML", yaml("seed: !!int ''"), NO),
    "no boolean": ("run YAML", yaml("compile: !!bool 7"), NO),
    "an impossible date": ("run YAML", yaml("save_dir: 2001-99-99"), NO),
    "a NUL in YAML": ("run YAML", yaml('save_dir: "a\\0b"'), NO),
    "an object of Python's": ("run YAML", yaml("save_dir: !!python/object/apply:os.system [ls]"), NO),
    "an integer beyond floats": ("run YAML", yaml("learning_rate: " + "9" * 400), NO),
    "a length of 3,000 digits": ("run YAML", yaml("max_seq_len: -" + "9" * 3000), NO),
    "an infinite rate": ("run YAML", yaml("learning_rate: .inf"), NO),
    "a batch beyond memory": ("run YAML", yaml("batch_size: 99999999999999999999"), NO),
    "a betas of 5": ("run YAML", yaml("adam_beta1: .nan"), NO),
    "a name with a folder": ("run YAML", yaml("save_weight: ../../x"), NO),
    "a name of 300 characters": ("run YAML", yaml("save_weight: " + "x" * 300), NO),
    "layers without number": ("run YAML", yaml("model: {num_hidden_layers: 1000000000}"), NO),
    "a model larger than any memory": ("run YAML",
                                       yaml("model: {num_hidden_layers: 1024, hidden_size: 200000, head_dim: 64}"),
                                       NO),
    "heads that are text": ("run YAML", yaml("model: {num_attention_heads: 'x'}"), NO),
    "a rope of nothing": ("run YAML", yaml("model: {rope_theta: .nan}"), NO),
    "a whole run": ("run YAML", yaml("epochs: 1\nmodel: {num_hidden_layers: 2}"), YES),
    "-- as a value": ("flags", ["--epochs=--"], NO),
    "-- alone": ("flags", ["--data_path", "--"], NO),
    "a value of 3,000 characters": ("flags", ["--num_workers", "x" * 3000], NO),
    "a DeepSpeed file's name too long for a file": ("flags", ["--deepspeed", "x" * 300], YES),
    "a temperature that divides to infinity": ("flags of the other programs", ("chat", ["--temperature", "1e-320"]),
                                               NO),
    "a row beyond memory": ("flags", ["--pack_len", "1000000000"], NO),
    "a seed beyond 64 bits": ("flags", ["--seed", "9" * 30], NO),
    "the home of half a surrogate": ("flags", ["--num_hidden_layers=~\ud800"], NO),
    "a GPU of 3,000 characters": ("flags of the other programs", ("plan", ["--gpu", "x" * 3000]), NO),
    "half a surrogate in YAML": ("run YAML", yaml('save_dir: "\\ud800"'), NO),
    # DeepSpeed.
    "a size that is text": ("DeepSpeed JSON",
                            (b'{"zero_optimization": {"stage": 1, "allgather_bucket_size": "500000000"}}', 1), YES),
    "a partition that is text": ("DeepSpeed JSON",
                                 (b'{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "1"}}', 1), YES),
    **{f"DeepSpeed: {text[:60]}": ("DeepSpeed JSON", (text.encode(), 1), NO) for text in (
        '{"gradient_clipping": NaN}', '{"gradient_clipping": -1}', '{"gradient_accumulation_steps": 1e400}', "[1]",
        "{" * 400, '{"a": ' * 400,
        '{"zero_optimization": {"stage": 9}}', '{"zero_optimization": {"stage": true}}',
        '{"zero_optimization": {"offload_optimizer": "cpu"}}',
        '{"optimizer": {"type": "Adam", "params": {"betas": [5, 0.9]}}}',
        '{"optimizer": {"type": "Adam", "params": []}}',
        '{"optimizer": {"type": "Adam", "params": {"lr": "x"}}}', '{"scheduler": {"type": 5}}',
        '{"scheduler": {"params": {}}}',
        '{"train_batch_size": 1, "train_batch_size": 2}', '{"train_batch_size": ' + "9" * 5000 + "}",
        '{"flops_profiler": 5}', '{"zero_optimization": {"stage": 1, "allgather_bucket_size": 1' + "0" * 400 + "}}",
        '{"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": NaN}}}',
        '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "0"}}',
        '{"zero_optimization": {"stage": 1, "load_from_fp32_weights": "false"}}',
        '{"wandb": {"enabled": "maybe"}}', '{"comms_logger": []}', "{a: 1 /*", "{'")},
    # Models.
    "a rope that is a list": ("model configuration", ("theirs", {"model_type": "llama", "rope_scaling": ["x"]}), NO),
    "a rope of NaN": ("model configuration", ("ours", {**OURS, "rope_scaling": {"factor": float("nan")}}), NO),
    "a rope of text": ("model configuration", ("ours", {**OURS, "rope_scaling": {"factor": "x"}}), NO),
    "another activation, at length": ("model configuration", ("ours", {**OURS, "hidden_act": "x" * 3000}), NO),
    "a negative vocabulary": ("model configuration", ("ours", {**OURS, "vocab_size": -1}), NO),
    "a key that is a number": ("model configuration", ("ours", {**OURS, 5: 1}), NO),
    "a model as it is": ("model configuration", ("ours", OURS), YES),
    # Environment.
    "a machine of two lines": ("environment", {"MASTER_ADDR": "a b\nc"}, NO),
    "RANK=x": ("environment", {"RANK": "x"}, NO),
    "a restart count that is none": ("environment", {"SLURM_RESTART_COUNT": "-inf"}, NO),
    "an interface at length": ("environment", {"GLOO_SOCKET_IFNAME": "1" * 5000}, NO),
    "digits that are not ASCII": ("environment", {"WORLD_SIZE": "٣"}, NO),
    "tasks without end": ("environment",
                          {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1",
                                          "SLURM_TASKS_PER_NODE": "9" * 5000}, NO),
    # Weights.
    "NaN": ("pth", lambda: weights(**{"model.norm.weight": torch.full((16,), float("nan"))}), NO),
    "whole numbers": ("pth", lambda: weights(**{"model.norm.weight": torch.ones(16, dtype=torch.int64)}), NO),
    "complex numbers": ("pth", lambda: weights(**{"model.norm.weight": torch.ones(16, dtype=torch.complex64)}), NO),
    "a meta tensor": ("pth", lambda: weights(**{"model.norm.weight": torch.ones(16, device="meta")}), NO),
    "a sparse tensor": ("pth", lambda: pth({"a": torch.eye(3).to_sparse_csr()}), NO),
    "four bytes that say they are 32 GiB": ("pth", lambda: pth({"a": torch.ones(1).expand(1 << 33)}), NO),
    "a name that is a number": ("pth", lambda: pth({1: torch.ones(2)}), NO),
    "a file that unpacks to much": ("pth", inflating, NO),
    "a pickle cut off": ("pth",
                         lambda: ("dense", pth({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)[1][:60]),
                         NO),
    "a zip over several disks": ("pth", lambda: over_disks(), NO),
    "a zip cut off": ("pth", lambda: ("dense", pth({"a": torch.ones(2)})[1][:-30]), NO),
    "weights as they are": ("pth", weights, YES),
    "metadata that are no JSON": ("safetensors", lambda: safetensors(config="[" * 100_000), NO),
    "metadata of a huge model": ("safetensors",
                                 lambda: safetensors(config={**weight_targets.TINY.to_dict(),
                                                             "num_hidden_layers": 10**9}), NO),
    "a header beyond the file": ("safetensors", lambda: ("dense", b"\xff" * 8 + b"{}", b"{}"), NO),
    "a header at length": ("safetensors", lambda: ("dense", (5002).to_bytes(8, "little") + b'"' + b"x" * 5000 + b'"',
                                                   b"{}"), NO),
    **{f"adapters of {name} {value}": ("safetensors", lambda name=name, value=value: lora(**{name: value}), NO)
       for name, value in (
        ("rank", 10**400), ("rank", True), ("alpha", -1), ("alpha", [1]), ("dropout", 5), ("targets", "q"),
           ("targets", [1]), ("base", 5))},
    "adapters as they are": ("safetensors", lora, YES),
    # Tokenizers.
    "a control token with a letter's id": ("tokenizer folder", lambda: tokenizer(added={"id": letter()}), NO),
    "two control tokens with one id": ("tokenizer folder", lambda: tokenizer(added={"id": 3}), NO),
    "an id beyond the vocabulary": ("tokenizer folder", lambda: tokenizer(added={"id": 10**9}), NO),
    "a negative id": ("tokenizer folder", lambda: tokenizer(added={"id": -1}), NO),
    "an id that is no whole number": ("tokenizer folder", lambda: tokenizer(added={"id": 1.5}), NO),
    "a letter that ends texts": ("tokenizer folder", lambda: tokenizer({"eos_token": "a"}), NO),
    "half a surrogate as bos": ("tokenizer folder", lambda: tokenizer({"bos_token": "\ud800"}), NO),
    "a normaliser that replaces": ("tokenizer folder", lambda: tokenizer(normalizer={
        "type": "Replace", "pattern": {"String": "clock"}, "content": ""}), NO),
    "a normaliser that strips": ("tokenizer folder",
                                 lambda: tokenizer(normalizer={"type": "Strip", "strip_left": True,
                                                               "strip_right": True}), NO),
    "a normaliser that lowers": ("tokenizer folder", lambda: tokenizer(normalizer={"type": "Lowercase"}), NO),
    "a pattern that takes for ever": ("tokenizer folder", lambda: tokenizer(normalizer={
        "type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}), NO),
    "a vocabulary without a letter": ("tokenizer folder", lambda: tokenizer(vocab={
        piece: i for piece, i in tokenizer_targets.small()[0]["model"]["vocab"].items() if piece not in ("a", "cl")},
                                                                            merges=[]), NO),
    "dropout": ("tokenizer folder", lambda: tokenizer(dropout=0.9), YES),
    "canonical equivalents": ("tokenizer folder", lambda: tokenizer(normalizer={"type": "NFC"}), YES),
    "a template that counts for ever": ("tokenizer folder", lambda: tokenizer({
        "chat_template": "{% for x in range(10**12) %}a{% endfor %}"}), YES),
    # A run's folder.
    **{f"checkpoint: {what}": ("checkpoint", lambda what=what: checkpoint(plant=what), NO) for what in (
        "pipe manifest.json", "pipe manifest.sha256", "pipe state/x", "link state/x", "large manifest.json")},
    "checkpoint: latest is a pipe": ("checkpoint", lambda: checkpoint(plant="pipe ../latest"), YES),
    "checkpoint: latest is a folder": ("checkpoint", lambda: checkpoint(plant="folder ../latest"), YES),
    "checkpoint: as it is": ("checkpoint", checkpoint, YES),
    "checkpoint: a list of ranks": ("checkpoint",
                                    lambda: checkpoint({"layout": {**run_folder_targets.facts()["layout"],
                                                                   "ranks": [1]}}), NO),
    "checkpoint: steps that are text": ("checkpoint", lambda: checkpoint({"step": "x"}), NO),
    "checkpoint: a file outside": ("checkpoint",
                                   lambda: checkpoint({"files": {"../../x": {"bytes": 0, "sha256": ""}}}), NO),
    "checkpoint: no slices": ("checkpoint", lambda: checkpoint(optimizer={"param_slice_mappings": [{"a": 1.5}]}), NO),
    "checkpoint: no tensors": ("checkpoint", lambda: checkpoint(optimizer={"single_partition_of_fp32_groups": ["x"]}),
                               NO),
    "checkpoint: no states": ("checkpoint", lambda: checkpoint(
        {"files": {"state/x": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}}, files={"state/x": b""}), NO),
    "checkpoint: no zip": ("checkpoint", lambda: checkpoint(files={"state/mp_rank_00_model_states.pt": b"PK\3\4"}),
                           NO),
    **{f"a run's {name} is a {kind}": ("notes of a run", lambda kind=kind, name=name: notes(f"{kind} {name}"), NO)
       for kind, name in (
        ("pipe", "metrics.jsonl"), ("link", "metrics.jsonl"), ("folder", "metrics.jsonl"), ("pipe", "DONE"),
           ("large", "DONE"),
        ("pipe", "wandb_id"), ("pipe", ".lock"), ("folder", "attempts.json"), ("folder", "last.json"))},
    "a run's attempts.json is a pipe": ("notes of a run", lambda: notes("pipe attempts.json"), YES),
    "foreign attempts": ("notes of a run",
                         lambda: notes(attempts_json=b'{"job": "7", "began": "x", "running": 5, "failures": [[]]}'),
                         YES),
    "foreign metrics": ("notes of a run", lambda: notes(metrics_jsonl=FOREIGN), YES),
    "DONE of a list": ("notes of a run", lambda: notes(DONE=b"[1]"), NO),
    "DONE nested": ("notes of a run", lambda: notes(DONE=b'{"step": ' + b"[" * 9000), NO),
    "a byte in the middle of the tokens": ("token cache", lambda: cache("tokens.bin", 0), YES),
    "a cache of tokens without a size": ("token cache", lambda: other_cache(dtype=[]), YES),
    "a byte of the cache's own words": ("token cache", lambda: cache("meta.json", 3), YES),
    # Shell.
    "a machine that is an option": ("host file", (b"-oProxyCommand=touch${IFS}owned slots=1\n", []), NO),
    "a machine that is a command": ("host file", (b"$(touch${IFS}owned) slots=1\n", []), NO),
    "a machine as it is": ("host file", (b"node1 slots=1\n", ["$(touch owned)"]), YES),
    "a number that is a command": ("batch variables", {"SLURM_JOB_ID": "a[$(touch owned)]"}, NO),
    "flags that are patterns": ("batch variables", {"SLURM_JOB_ID": "7", "FLAGS": "* $(touch owned)"}, YES),
}
