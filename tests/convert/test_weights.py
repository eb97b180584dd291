"""Weights in and out: MiniMind's names, Hugging Face folders, files that are refused."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import save_file

from minimind_ds import PRESETS, MiniMindForCausalLM, ModelConfig, Sample, collate, load_tokenizer
from minimind_ds.config.errors import UserError
from minimind_ds.convert import export, huggingface, minimind, weight_files
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.numeric

SIZES = dict(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=4096)
CONFIGS = {
    "minimind-3": ModelConfig(**SIZES),
    "top1": ModelConfig(**SIZES, use_moe=True, moe_intermediate_size=24),
    "top2": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=2),
    "top2 not normalised": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=2, norm_topk_prob=False),
    "minimind2": ModelConfig(**SIZES, qk_norm=False, rms_norm_eps=1e-5),
    "untied": ModelConfig(**SIZES, tie_word_embeddings=False),
    "yarn": ModelConfig(**SIZES, inference_rope_scaling=True),
}


def state_of(config):
    torch.manual_seed(0)
    # Norms off 1 and weights large enough for attention and routing to matter.
    return {name: tensor + 0.3 * torch.randn_like(tensor) if tensor.dim() == 1 else 4 * tensor
            for name, tensor in minimind.fresh(config)}


def model_of(config, state):
    model = MiniMindForCausalLM(config, "reference").eval()
    model.load_weights(state)
    return model


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def minimind_shapes(config):
    """The original's state_dict(), written down from its class."""
    C, D, heads, kv = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    shapes = {"model.embed_tokens.weight": (config.vocab_size, C), "model.norm.weight": (C,),
              "lm_head.weight": (config.vocab_size, C)}
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes |= {p + "self_attn.q_proj.weight": (heads * D, C), p + "self_attn.k_proj.weight": (kv * D, C),
                   p + "self_attn.v_proj.weight": (kv * D, C), p + "self_attn.o_proj.weight": (C, heads * D),
                   p + "self_attn.q_norm.weight": (D,), p + "self_attn.k_norm.weight": (D,),
                   p + "input_layernorm.weight": (C,), p + "post_attention_layernorm.weight": (C,)}
        units = {"mlp.": config.intermediate_size}
        if config.use_moe:
            shapes[p + "mlp.gate.weight"] = (config.num_experts, C)
            units = {f"mlp.experts.{e}.": config.moe_intermediate_size for e in range(config.num_experts)}
        for unit, inner in units.items():
            shapes |= {p + unit + "gate_proj.weight": (inner, C), p + unit + "up_proj.weight": (inner, C),
                       p + unit + "down_proj.weight": (C, inner)}
    return shapes


@pytest.mark.parametrize("name", ["minimind-3", "top1", "top2"])
def test_pth_has_exactly_minimind_s_keys_and_shapes_and_comes_back(name, tmp_path):
    config, path = CONFIGS[name], tmp_path / "full_sft_32.pth"
    state = state_of(config)
    export.export_minimind(state, config, path, dtype=torch.float32)
    written = torch.load(path, weights_only=True)
    assert {key: tuple(t.shape) for key, t in written.items()} == minimind_shapes(config)
    assert same(weight_files.load_weights(path, config), state)
    model = MiniMindForCausalLM(config)
    model.load_minimind(written)
    assert same(minimind.check(model.state_dict(), config, "model"), state)
    export.export_minimind(state, config, path, dtype=torch.float16, overwrite=True)
    assert all(t.dtype == torch.float16 for t in torch.load(path, weights_only=True).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_folder_gives_our_logits_in_transformers_and_comes_back(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, tokenizer, folder = CONFIGS[name], load_tokenizer(), tmp_path / "hf"
    state = state_of(config)
    export.export_hf(state, config, tokenizer, folder, dtype=torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32,
                                                        output_loading_info=True)
    assert not any(info.values()), info
    # YaRN shows beyond 2048 positions.
    ids = torch.randint(0, 6400, (2200 if name == "yarn" else 50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(ids[None]).logits[0]
        batch = collate([[Sample(ids, torch.full_like(ids, -100))]], len(ids))
        ours = model_of(config, state)(batch, return_logits=True).logits[0]
    # Law 4's; positions or a norm's weight mistaken change the second digit.
    assert (ours - expected).abs().max() <= 1e-5
    assert same(weight_files.load_weights(folder, config), state)
    their_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert their_tokenizer("Hello 你好", add_special_tokens=False).input_ids == tokenizer.encode("Hello 你好")
    assert their_tokenizer.chat_template


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_an_exported_folder_says_the_umask(tmp_path, umask, mode):
    config, before = CONFIGS["minimind-3"], os.umask(umask)
    try:
        export.export_hf(state_of(config), config, load_tokenizer(), tmp_path / "hf", dtype=torch.float32)
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert set(files.values()) == {mode} and "model.safetensors" in files
    assert (tmp_path / "hf").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_hugging_face_folder_describes_the_model_it_came_from(tmp_path):
    for name in ("minimind-3", "top2", "minimind2", "untied"):
        values = json.loads(json.dumps(huggingface.to_hf_config(CONFIGS[name], torch.bfloat16)))
        assert huggingface.from_hf_config(values) == CONFIGS[name]
    for wrong in ({"model_type": "gpt2"}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "llama3"}}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).split("'")[-2] if "rope" in str(wrong)
                           else str(next(iter(wrong.values())))):
            huggingface.from_hf_config(huggingface.to_hf_config(CONFIGS["minimind-3"], torch.float32) | wrong)


def test_our_file_carries_its_configuration_and_leaves_nothing_else_behind(tmp_path):
    config = CONFIGS["top1"]
    path = tmp_path / weight_files.file_name("sft", config)
    assert path.name == "sft_32_moe.safetensors"
    weight_files.save_safetensors(path, state_of(config), config)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert weight_files.read_config(tmp_path) == config
    assert same(weight_files.load_weights(tmp_path, config), state_of(config))


def test_names_that_do_not_fit_are_listed():
    config = CONFIGS["minimind-3"]
    model, state = MiniMindForCausalLM(config), minimind.to_minimind(state_of(config), config)
    norm = state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\)"):
        model.load_minimind(state)
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\).*model.norm.weight \(31,\) instead of \(32,\)"):
        model.load_minimind({**state, "extra": norm, "model.norm.weight": norm[:31]})
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        model.load_minimind({**state, "model.norm.weight": norm, "lm_head.weight": state["lm_head.weight"] + 1})
    moe = CONFIGS["top1"]
    experts = minimind.to_minimind(state_of(moe), moe)
    del experts["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ValueError, match="layers.1.mlp.experts.gate_up_proj"):
        MiniMindForCausalLM(moe).load_minimind(experts)


def test_buffers_of_old_checkpoints_and_resume_files_are_read(tmp_path):
    config = CONFIGS["minimind-3"]
    buffers = {"model.freqs_cos": torch.ones(3), "freqs_sin": torch.ones(3)}
    old = {**minimind.to_minimind(state_of(config), config), **buffers}
    torch.save({"model": old, "epoch": 1}, tmp_path / "sft_resume.pth")
    assert same(weight_files.load_weights(tmp_path / "sft_resume.pth", config), state_of(config))


class Trap:
    """Unpickled by a careless loader, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")



def test_the_rows_of_a_pth_are_counted_without_its_values(tmp_path):
    state = {"model.embed_tokens.weight": torch.zeros(6400, 512)}
    torch.save({"model": state}, tmp_path / "w.pth")
    process = psutil.Process()
    before = process.io_counters().read_chars
    assert weight_files.embedding_rows(tmp_path / "w.pth") == 6400
    assert process.io_counters().read_chars - before < os.path.getsize(tmp_path / "w.pth") / 4
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert weight_files.embedding_rows(tmp_path / "old.pth") == 6400


def test_files_that_are_no_weights_are_refused_in_one_line_and_run_no_code(tmp_path):
    config, other = CONFIGS["minimind-3"], CONFIGS["top1"]
    trap = tmp_path / "sprung"
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"a": Trap(str(trap))}))
    torch.save({"a": Trap(str(trap))}, tmp_path / "zipped_trap.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\3\4 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    weight_files.save_safetensors(tmp_path / "other.safetensors", state_of(other), other)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        weight_files.save_safetensors(two / name, state_of(config), config)
    for name in ("absent", "trap.pth", "zipped_trap.pth", "torn.pth", "torn.safetensors", "empty.pth", "list.pth",
                 "nothing", "pickled", "other.safetensors", "two"):
        with pytest.raises(ValueError, match=name) as error:
            weight_files.load_weights(tmp_path / name, config)
        assert "\n" not in str(error.value)
    assert not trap.exists()
    with pytest.raises(ValueError, match="use_moe is True there and False here"):
        weight_files.load_weights(tmp_path / "other.safetensors", config)


def export_program(*words):
    return subprocess.run([sys.executable, str(ROOT / "launch" / "export.py"), *map(str, words)],
                          env=environment(), capture_output=True, text=True)


def test_export_program_writes_a_run_folder_in_both_formats(tmp_path):
    config, run = CONFIGS["top1"], tmp_path / "run"
    run.mkdir()
    state = {name: tensor.bfloat16() for name, tensor in state_of(config).items()}
    weight_files.save_safetensors(run / weight_files.file_name("sft", config), state, config)
    load_tokenizer().save(run / "tokenizer")
    done = export_program("--weight", run, "--to", "hf", "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"} <= {p.name for p in (tmp_path / "hf").iterdir()}
    assert same(weight_files.load_weights(tmp_path / "hf", config), state)
    export.run(tmp_path / "hf", "minimind", tmp_path / "full_sft_32_moe.pth", dtype=None, preset=None, tokenizer=None,
               overwrite=False)
    assert weight_files.load_weights(tmp_path / "full_sft_32_moe.pth",
                                     config)["model.norm.weight"].dtype == torch.float16


def test_bad_input_is_answered_in_one_line_and_writes_nothing(tmp_path):
    config = CONFIGS["minimind-3"]
    weight_files.save_safetensors(tmp_path / "sft_32.safetensors", state_of(config), config)
    torch.save(minimind.to_minimind(state_of(config), config), tmp_path / "a.pth")
    debug = replace(PRESETS["debug"], vocab_size=64)
    torch.save(minimind.to_minimind(state_of(debug), debug), tmp_path / "debug.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    asked = dict(to="hf", out=tmp_path / "hf", dtype=None, preset=None, tokenizer=None, overwrite=False)
    for weight, changes, what in [
        ("absent", {}, "no such file"),
        ("sft_32.safetensors", {}, "no tokenizer beside the weights"),
        ("sft_32.safetensors", {"tokenizer": "absent"}, "absent"),
        ("a.pth", {}, "name a preset"),
        ("a.pth", {"preset": "debug"}, "does not fit the model"),
        ("debug.pth", {}, "name a preset; its shapes are those of --preset debug$"),
        ("debug.pth", {"preset": "minimind-3"}, "does not fit the model.*; its shapes are those of --preset debug$"),
        ("debug.pth", {"preset": "debug"}, "no tokenizer beside the weights: name one with --tokenizer .a run's is"),
        ("sft_32.safetensors", {"to": "minimind", "out": tmp_path / "full"}, "exists"),
        ("sft_32.safetensors", {"to": "minimind", "out": tmp_path / "a.pth" / "b"}, "a.pth"),
    ]:
        with pytest.raises(ValueError, match=what) as error:
            export.run(tmp_path / weight, **{**asked, **changes})
        assert "\n" not in str(error.value)
    done = export_program("--weight", tmp_path / "absent", "--to", "hf", "--out", tmp_path / "hf")
    assert done.returncode == 2 and "no such file" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_s_files_are_regular_and_hold_each_tensor_once(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, tensors in ("model-1-of-2", "ab"), ("model-2-of-2", "bc"):
        save_file({tensor: torch.ones(2) for tensor in tensors}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="'b' is in model-2-of-2.safetensors and in another file beside it"):
        weight_files.read_state(tmp_path)
    os.mkfifo(tmp_path / "model-3-of-3.safetensors")
    with pytest.raises(UserError, match="model-3-of-3.safetensors is a pipe, not a regular file"):
        weight_files.read_state(tmp_path)


@pytest.mark.parametrize("broken, said", [
    (lambda w: w.index_fill(0, torch.tensor([3]), float("nan")), "is not finite: these weights are broken"),
    (lambda w: w.to(torch.int32), "holds int32; weights are"),
    (lambda w: w > 0, "holds bool"),
    (lambda w: w.to(torch.complex64), "holds complex64"),
    (lambda w: w.to("meta"), "is no plain tensor (strided, on meta)"),
    (lambda w: w.to_sparse(), "is no plain tensor (sparse_coo, on cpu)"),
])
def test_a_tensor_that_is_no_weight_is_named(tmp_path, broken, said):
    config = CONFIGS["minimind-3"]
    state = minimind.to_minimind(state_of(config), config)
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.save({**state, name: broken(state[name])}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as caught:
        weight_files.load_weights(tmp_path / "w.pth", config)
    assert said in str(caught.value) and (name in str(caught.value) or "meta" in said), caught.value


def test_a_small_file_that_unpacks_to_much_and_one_of_odd_names_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50 << 20))
    torch.save({3: torch.zeros(2)}, tmp_path / "odd.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    for name, said in [("bomb", "that unpack to"), ("odd", "holds no state dict"), ("pipe", "no such file or folder")]:
        with pytest.raises(ValueError, match=said):
            weight_files.read_state(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("out, to, said", [
    ("run", "hf", "is a run folder, with its checkpoints and metrics"),
    ("run/checkpoints/step_00000002", "hf", "is a run's own"), ("run/tokenizer", "hf", "is a run's own"),
    ("run/checkpoints/new", "hf", "is a run's own"), ("run/best/a.pth", "minimind", "is a run's own"),
    ("run/sft_32.safetensors", "minimind", "exists and is no .pth"), ("run/sft_32.safetensors", "hf", "is a file"),
    (".", "hf", "holds what no export writes, 'photos'"), ("photos", "hf", "holds what no export writes, 'cat.png'"),
    ("photos", "minimind", "exists and is no .pth"), ("/dev/null", "minimind", "exists and is no .pth")])
def test_nothing_but_an_earlier_export_is_replaced(tmp_path, out, to, said):
    config = CONFIGS["minimind-3"]
    run = tmp_path / "run"
    for folder in (run / "checkpoints" / "step_00000002", run / "tokenizer", run / "best", tmp_path / "photos"):
        folder.mkdir(parents=True)
    for file in (run / "checkpoints" / "step_00000002" / "manifest.json", run / "tokenizer" / "tokenizer.json",
                 tmp_path / "photos" / "cat.png"):
        file.write_text("precious")
    weight_files.save_safetensors(run / "sft_32.safetensors", state_of(config), config)
    load_tokenizer().save(tmp_path / "photos" / "tokenizer")
    model = tmp_path / "photos" / "tokenizer"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=re.escape(said)):
        export.run(run / "sft_32.safetensors", to, tmp_path / out, dtype=None, preset=None,
                   tokenizer=str(model), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_is_replaced_where_it_is_told_to_and_behind_a_link_not(tmp_path):
    config = CONFIGS["minimind-3"]
    give = dict(dtype=torch.float32, overwrite=True)
    for out in ("hf", "hf", "run/hf"):
        export.export_hf(state_of(config), config, load_tokenizer(), tmp_path / out, **give)
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("mine")
    export.export_hf(state_of(config), config, load_tokenizer(), tmp_path / "link", **give)
    assert (tmp_path / "hf" / "config.json").read_text() == "mine" and not (tmp_path / "link").is_symlink()
