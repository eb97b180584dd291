"""Readers of a run's own folder, written by anyone: checkpoints, metrics, attempts, DONE; and of the token cache."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import tempfile

import torch

from minimind_ds import checkpoint
from minimind_ds.checkpoint import full_state, reading, weights
from minimind_ds.checkpoint.async_save import facts_of
from minimind_ds.convert import minimind, vocabulary
from minimind_ds.data.build import seal_of
from minimind_ds.data.store import TokenStore, open_or_build
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.resilience import restarts
from minimind_ds.training import resume
from minimind_ds.training.boards import wandb_id
from minimind_ds.training.evaluations import Evaluations, recorded
from minimind_ds.training.metrics import keep_until
from minimind_ds.training.prepare import PreparedRun, check_writable
from minimind_ds.training.spikes import SpikeDetector, taken_losses
from tests.config.try_configs import prepared_with
from tests.fuzz import mutate
from tests.fuzz.data_targets import RECORDS, tokenizer
from tests.fuzz.harness import Target

MODEL = ("model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
         "intermediate_size: 16}\n")
ZERO2 = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}


@functools.cache
def home() -> pathlib.Path:
    """A folder for what all inputs share, gone with the process that made it."""
    folder, owner = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_shared_")), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@functools.cache
def prepared() -> PreparedRun:
    """A run of one rank at stage 2."""
    (home() / "zero2.json").write_text(json.dumps(ZERO2))
    (home() / "run.yaml").write_text(MODEL)
    with contextlib.redirect_stderr(io.StringIO()):
        return prepared_with(home() / "zero2.json", home(), "--config", str(home() / "run.yaml"), "--eval_fraction",
                             "0.2", "--patience", "2")


@functools.cache
def states() -> tuple[dict, dict]:
    """The model's and the optimizer's file of that run, as DeepSpeed lays them out at stage 2 on one rank."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    shapes = minimind.expected_shapes(prepared().model_config)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    slots, at = collections.OrderedDict(), 0
    for name, size in sizes.items():
        slots[name] = fragment_address(numel=size, start=at)
        at += size
    flat = torch.linspace(-1, 1, at)
    base = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": flat * 0, "exp_avg_sq": flat * 0}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]}
    optimizer = {"base_optimizer_state": base, "single_partition_of_fp32_groups": [flat],
                 "param_slice_mappings": [slots],
                 "zero_stage": ZeroStageEnum.gradients, "loss_scaler": LossScaler(1.0), "clip_grad": 1.0,
                 "partition_count": [1]}
    model = {"module": collections.OrderedDict((name, torch.zeros(shape)) for name, shape in shapes.items()),
             "buffer_names": [],
             "lr_scheduler": None, "param_shapes": [collections.OrderedDict((name, torch.Size(shape)) for name,
                                                                            shape in shapes.items())],
             "global_steps": 3, "global_samples": 3, "skipped_steps": 0, "frozen_param_shapes": None}
    return model, {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}


def saved(tree: object) -> bytes:
    torch.save(tree, out := io.BytesIO())
    return out.getvalue()


@functools.cache
def whole_state() -> bytes:
    shapes = minimind.expected_shapes(prepared().model_config)
    parts = {name: {key: torch.zeros(torch.Size(shape).numel()) for key in full_state.KEYS} for name,
             shape in shapes.items()}
    path = home() / "whole.safetensors"
    full_state.write_file(full_state.FullState(parts, step=3, groups=[{"lr": 1e-3}],
                                               counters=dict.fromkeys(full_state.COUNTERS, 3)), path)
    return path.read_bytes()


@functools.cache
def facts() -> dict:
    """What a manifest of this run says, as JSON gives it back."""
    return json.loads(json.dumps(resume.manifest_facts(prepared(), 3, 0, 3)))


def draw_checkpoint(draw: random.Random) -> dict:
    """-> {"files": of the checkpoint's folder, "manifest", "sealed": with its hash, "plant": as PLANTS, "latest"}."""
    model, optimizer = states()
    files, said, about = {}, facts(), draw.random()
    if about < 0.2:
        files["state/whole.safetensors"] = mutate.chewed(draw, whole_state()) if draw.random() < 0.8 else whole_state()
    else:
        if about < 0.6:
            model, optimizer = draw.choice(((mutate.altered(draw, model), optimizer),
                                            (model, mutate.altered(draw, optimizer))))
        try:
            files = {"state/mp_rank_00_model_states.pt": saved(model),
                     "state/zero_pp_rank_0_mp_rank_00_optim_states.pt": saved(optimizer)}
        except (RecursionError, RuntimeError):
            files = {"state/mp_rank_00_model_states.pt": b""}
    if draw.random() < 0.2:
        name = draw.choice(list(files))
        files[name] = mutate.chewed(draw, files[name])
    if about > 0.7:
        said = mutate.altered(draw, said, (*said, *said["identity"], *said["layout"]))
    manifest = {"format": 2, **(said if isinstance(said, dict) else {"step": said}),
                "files": {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name,
                          content in files.items()}}
    if about > 0.9:
        manifest = mutate.altered(draw, manifest,
                                  ("format", "files", "bytes", "sha256", "../x", "/etc/passwd", "state"))
    return {"files": files, "manifest": mutate.json_bytes(draw, manifest) if about > 0.85
            else json.dumps(manifest, default=str).encode(),
            "sealed": draw.random() < 0.9, "plant": draw.choice((*PLANTS, *[None] * 12)),
            "latest": draw.choice((b"step_00000003\n", b"\xff", b"", b"../x"))}


PLANTS = ("pipe manifest.json", "pipe manifest.sha256", "pipe state/x", "link state/x", "folder manifest.json",
          "pipe ../latest", "folder ../latest",
          "link ../latest", "folder ../step_00000009", "pipe ../step_00000008", "large manifest.json",
          "link manifest.json")


def plant(what: str | None, folder: pathlib.Path) -> None:
    """A pipe, a link to a device, a folder or a large file in place of a name."""
    if what is None:
        return
    kind, name = what.split(" ")
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir(exist_ok=True)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 36)


def write_checkpoint(case: dict, run: pathlib.Path) -> pathlib.Path:
    path = run / "checkpoints" / "step_00000003"
    for name, content in case["files"].items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "manifest.json").write_bytes(case["manifest"])
    (path / "manifest.sha256").write_text(facts_of(path / "manifest.json")["sha256"] + "\n" if case["sealed"]
                                          else "0" * 64 + "\n")
    (path.parent / "latest").write_bytes(case["latest"])
    plant(case["plant"], path)
    return path


def read_checkpoint(case: dict, folder: pathlib.Path) -> None:
    """As a resume, and as chat, export and --from_weight read one, whether or not the first refuses it."""
    path = write_checkpoint(case, folder)
    run = of_folder(folder)
    checkpoint.peek("auto", folder)
    first = None
    try:
        start = resume.look_for_resume_point(run)
        if start.path is not None:
            shapes = {name: torch.Size(shape) for name, shape in minimind.expected_shapes(run.model_config).items()}
            reading.read(start.path, start.layout or resume.layout_facts(run), shapes=shapes, fixed=set())
            for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
                if (file := start.path / "state" / name).exists():
                    deepspeed_compat.load_states(file)
    except ValueError as error:
        first = error
    weights.opened(path)
    source = weights.opened(path.parent)
    assert all(torch.isfinite(tensor).all() for tensor in source.state.values())
    vocabulary.recorded(source)
    if first is not None:
        raise first


def of_folder(folder: pathlib.Path, **changes) -> PreparedRun:
    return dataclasses.replace(prepared(), run=prepared().run.replace(save_dir=str(folder), **changes))


METRICS = [{"data": {"records": 40}}, *({"step": n, "epoch": 0, "loss": 2.0 - n / 9, "lr": 1e-3, "skipped": False,
                                         "tokens_per_s": 9.5, "step_s": 0.1}
                                        for n in range(1, 6)), {"step": 5, "eval_loss": 1.5},
           {"step": 6, "changed": {"patience": [0, 2]}}]
ATTEMPTS = {"job": "7", "began": 5.5, "running": True, "from": 3, "error": "x",
            "failures": [{"from": 3, "at": 5, "error": None}] * 2}
NOTES = ("metrics.jsonl", "attempts.json", "DONE", "wandb_id", "last.json", "best.json")


def draw_notes(draw: random.Random) -> dict:
    lines = [mutate.json_bytes(draw, mutate.altered(draw, line, tuple(METRICS[1])) if draw.random() < 0.4
                               else line) for line in METRICS]
    done = {"step": 6, "identity": facts()["identity"], "early": True}
    files = {"metrics.jsonl": draw.choice((b"\n", b"\n", b"\r", b"")).join(lines),
             "attempts.json": mutate.json_bytes(draw, mutate.altered(draw, ATTEMPTS, tuple(ATTEMPTS))),
             "wandb_id": mutate.chewed(draw, b"0a1b2c3d")}
    if draw.random() < 0.5:
        done = mutate.altered(draw, done,
                              ("step", "identity", "early", *done["identity"])) if draw.random() < 0.9 else done
        files["DONE"] = mutate.json_bytes(draw, done)
    place = draw.choice((*NOTES, "checkpoints", ".lock"))
    plant = f"{draw.choice(('pipe', 'link', 'folder', 'large'))} {place}" if draw.random() < 0.15 else None
    return {"files": files, "plant": plant, "step": draw.choice((0, 3, 6)), "job": draw.choice((None, "7"))}


def read_notes(case: dict, folder: pathlib.Path) -> None:
    """As a start reads what an earlier one left."""
    for name, content in case["files"].items():
        (folder / name).write_bytes(content)
    plant(case["plant"], folder)
    run, step = of_folder(folder), case["step"]
    if case["job"]:
        os.environ.update(SLURM_JOB_ID=case["job"], SLURM_RESTART_COUNT="1")
    try:
        check_writable(folder)
        held = checkpoint.lock(folder)
        resume.look_for_resume_point(run)
        restarts.has_own_checkpoint(folder)
        restarts.begin(folder, step)
        SpikeDetector(taken_losses(folder / "metrics.jsonl", step)).check(1.0)
        found = Evaluations(recorded(folder / "metrics.jsonl", step))
        found.gave_up(2)
        found.record(9, 1.0)
        keep_until(folder / "metrics.jsonl", step)
        wandb_id(folder)
        with restarts.Attempt(folder, 0):
            pass
        held.close()
    finally:
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            os.environ.pop(name, None)


@functools.cache
def store() -> tuple[pathlib.Path, TokenStore, list[int], dict[str, bytes]]:
    """A data file, its store, the ids of its samples and the store's files."""
    path = home() / "cached.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:6]))
    built = built_at(path, home() / "cache")
    return path, built, [built[i].input_ids.tolist() for i in range(len(built))], {file.name: file.read_bytes()
                                                                                   for file in built.folder.iterdir()}


def built_at(path: pathlib.Path, cache: pathlib.Path) -> TokenStore:
    return open_or_build(path, tokenizer(), kind="conversations", max_seq_len=64, cache_dir=cache)


def draw_cache(draw: random.Random) -> dict:
    files = dict(store()[3])
    if draw.random() < 0.5:
        meta = json.loads(files["meta.json"])
        meta = mutate.altered(draw, meta, tuple(meta))
        if isinstance(meta, dict) and draw.random() < 0.5:
            meta.pop("seal", None)
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                meta["seal"] = seal_of(meta)
        files["meta.json"] = mutate.json_bytes(draw, meta)
    else:
        name = draw.choice(list(files))
        files[name] = mutate.chewed(draw, files[name])
    # What an interrupted build leaves.
    entry = {"sizes": dict.fromkeys(("tokens.bin", "offsets.bin", "labelled.bin", "lines.bin"), 8), "hash": "x",
             "stats": {"longest": 1, "lines": 1}}
    part = {"chunks.jsonl": b"\n".join(mutate.json_bytes(draw,
                                                         mutate.altered(draw, entry, ("sizes", "hash", "stats")))
                                       for _ in range(2)),
            **{name: b"\0" * 32 for name in entry["sizes"]}} if draw.random() < 0.5 else {}
    return {"files": files, "part": part, "plant": f"{draw.choice(('pipe', 'folder'))} {draw.choice(list(files))}"
            if draw.random() < 0.1 else None}


def read_cache(case: dict, folder: pathlib.Path) -> None:
    """Whatever lies in the cache, what is read is what the data file holds."""
    path, built, samples, _ = store()
    here = folder / built.folder.name
    for name, content in case["files"].items():
        here.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
    plant(case["plant"], here)
    if case["part"]:
        part = here.with_name(f".{here.name}.part")
        part.mkdir()
        for name, content in case["part"].items():
            (part / name).write_bytes(content)
    found = built_at(path, folder)
    assert [found[i].input_ids.tolist() for i in range(len(found))] == samples, "other ids than the data file's"
    found.verify()


WARM = (prepared, states, whole_state, facts, store)
TARGETS = [
    Target("checkpoint", draw_checkpoint, read_checkpoint, 0.15, WARM),
    Target("notes of a run", draw_notes, read_notes, 1, WARM),
    Target("token cache", draw_cache, read_cache, 0.3, WARM),
]
