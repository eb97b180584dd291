"""LoRA: adapters beside frozen weights, merged, written and read; test_lora_stages.py trains them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate, load_tokenizer
from minimind_ds.convert import export, minimind, weight_files
from minimind_ds.distributed.world import World
from minimind_ds.inference import chat
from minimind_ds.model import lora, loss
from minimind_ds.model.lora import Lora
from minimind_ds.training.prepare import prepare
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.numeric

SIZES = dict(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=4096)
# The experts of "square" have square weights, which the original would adapt.
CONFIGS = {"dense": ModelConfig(**SIZES), "moe": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=2),
           "square": ModelConfig(**SIZES, use_moe=True, moe_intermediate_size=32)}
EVERY = {"dense": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "moe": "q_proj,k_proj,v_proj,o_proj,gate"}


def base_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return {name: (tensor if tensor.dim() == 1 else 4 * tensor).to(dtype) for name, tensor in minimind.fresh(config)}


def drawn(config, what, dtype=torch.float32):
    """Adapters that matter: no B is zero."""
    generator = torch.Generator().manual_seed(7)
    return {name: 0.1 * torch.randn(shape, generator=generator, dtype=dtype)
            for name, shape in lora.shapes(config, what).items()}


def adapters_of(config, targets=None, **more):
    return Lora(**{"rank": 4, "alpha": 6.0, "targets": lora.find_targets(config, targets), **more})


def model_of(config, state, kernels="auto"):
    model = MiniMindForCausalLM(config, kernels).to(next(iter(state.values())).dtype)
    model.load_weights(state)
    return model


def batch_of(lengths=(5, 40, 1, 18)):
    samples = []
    for length in lengths:
        ids = torch.randint(0, 6400, (length,), generator=torch.Generator().manual_seed(length))
        samples.append(Sample(ids, torch.cat((ids[1:], torch.tensor([-100])))))
    return collate([samples], 64)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(batch_of(), return_logits=True).logits


def assert_close(logits, expected):
    """Equal to 1e-5 of the largest logit: law 4's; adapters left out or merged twice change the first digit."""
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def exported(weight, to, out, **more):
    export.run(weight, to, out, **{"dtype": None, "preset": None, "tokenizer": None, "overwrite": False, **more})
    return out


def program(name, *words):
    return subprocess.run([sys.executable, str(ROOT / "launch" / name), *map(str, words)], env=environment(),
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_fresh_adapters_change_no_bit_and_only_they_train(name):
    config = CONFIGS[name]
    model, what = model_of(config, base_of(config)), adapters_of(config, EVERY[name])
    expected = logits_of(model)
    fresh = lora.fresh(config, what, seed=3)
    assert all(fresh[n].std().sub(0.02).abs() < 0.006 for n in fresh if n.endswith("A.weight"))
    torch.rand(5)
    again = lora.fresh(config, what, seed=3)
    assert all(torch.equal(fresh[n], again[n]) for n in fresh)
    lora.attach(model, what, fresh)
    assert torch.equal(logits_of(model), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(fresh)
    assert len(fresh) == 2 * config.num_hidden_layers * len(EVERY[name].split(","))


@pytest.mark.parametrize("name, targets", [("dense", EVERY["dense"]), ("moe", "q_proj,v_proj")])
def test_an_adapter_folder_for_peft_is_what_peft_would_load(name, targets, tmp_path):
    # PEFT's published format: "base_model.model." and the module's name, lora_A (r, in) and lora_B (out, r); the
    # module's weight becomes W + lora_alpha / r * B A.
    config = CONFIGS[name]
    base, what = base_of(config), adapters_of(config, targets)
    matrices = drawn(config, what)
    weight_files.save_safetensors(tmp_path / "base.safetensors", base, config)
    lora.save_adapters(tmp_path / "sft_lora.safetensors", matrices, what, config)
    load_tokenizer().save(tmp_path / "tokenizer")
    hf = exported(tmp_path / "base.safetensors", "hf", tmp_path / "hf")
    merged = exported(tmp_path / "base.safetensors", "hf", tmp_path / "merged", lora=tmp_path / "sft_lora.safetensors")
    out = exported(hf, "peft", tmp_path / "peft", lora=tmp_path / "sft_lora.safetensors")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"], settings["r"]) == ("LORA", "CAUSAL_LM", what.rank)
    assert settings["target_modules"] == targets.split(",") and settings["base_model_name_or_path"] == str(hf)
    model, read = AutoModelForCausalLM.from_pretrained(hf), load_file(out / "adapter_model.safetensors")
    assert len(read) == len(matrices)
    with torch.no_grad():
        for full in [full for full in read if full.endswith(".lora_A.weight")]:
            assert full.startswith("base_model.model.")
            module = model.get_submodule(full.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            assert isinstance(module, torch.nn.Linear)
            B, A = read[full.replace("lora_A", "lora_B")], read[full]
            module.weight += settings["lora_alpha"] / settings["r"] * B @ A
        ids = batch_of([40]).input_ids
        expected = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        assert_close(model(ids).logits, expected)
        assert (AutoModelForCausalLM.from_pretrained(hf)(ids).logits - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(out).vocab_size == 6400


def test_what_peft_cannot_hold_is_refused_in_a_line(tmp_path):
    config = CONFIGS["moe"]
    what = adapters_of(config, EVERY["moe"])
    lora.save_adapters(tmp_path / "sft_lora.safetensors", drawn(config, what), what, config)
    for weight, more, said in ((None, {}, "name them with --lora"),
                               (None, {"lora": tmp_path}, "no adapters for the router"),
                               (tmp_path, {"lora": tmp_path}, "it is the folder that PEFT loads the base from")):
        with pytest.raises(ValueError, match=said):
            exported(weight, "peft", tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_gradients_of_a_and_b_are_those_of_the_merged_weights(name):
    # The oracle knows nothing of adapters: autograd through W + s * B A put in the place of W, in fp64.
    config = CONFIGS[name]
    base, what = base_of(config, torch.float64), adapters_of(config, EVERY[name])
    state = drawn(config, what, torch.float64)
    leaves = {n: tensor.clone().requires_grad_() for n, tensor in state.items()}
    merged = dict(base)
    for module in {n.rpartition(".lora.")[0] for n in leaves}:
        merged[f"{module}.weight"] = (base[f"{module}.weight"]
                                      + 1.5 * leaves[f"{module}.lora.B.weight"] @ leaves[f"{module}.lora.A.weight"])
    out = functional_call(model_of(config, base, "reference"), merged, (batch_of(),))
    (out.loss_sum + out.aux_loss).backward()
    model = model_of(config, base, "reference")
    lora.attach(model, what, state)
    ours = model(batch_of())
    (ours.loss_sum + ours.aux_loss).backward()
    # fp64 in another order of products.
    torch.testing.assert_close(ours.loss_sum, out.loss_sum, rtol=1e-12, atol=0)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == leaves.keys()
    for n, leaf in leaves.items():
        assert leaf.grad.norm() > 0 and (found[n] - leaf.grad).norm() <= 1e-10 * leaf.grad.norm(), n


def test_a_frozen_head_gives_the_same_loss_and_gradient_of_what_it_reads():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (loss.CHUNK + 3, 11))
    labels = torch.randint(0, 11, (len(hidden),), generator=generator)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    value = loss.cross_entropy_sum(ours, weight, labels, backend="reference")
    expected = F.cross_entropy(theirs @ weight.T, labels, reduction="sum")
    (0.3 * value).backward()
    (0.3 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_adapters_alone_and_in_training_alone():
    config = CONFIGS["dense"]
    what = adapters_of(config, dropout=0.5)
    model = model_of(config, base_of(config))
    lora.attach(model, what, drawn(config, what))
    evaluated = logits_of(model)
    with torch.no_grad():
        first, second = (model.train()(batch_of(), return_logits=True).logits for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(logits_of(model), evaluated)
    lora.attach(plain := model_of(config, base_of(config)), what, lora.fresh(config, what, seed=0))
    assert torch.equal(plain.train()(batch_of(), return_logits=True).logits,
                       logits_of(model_of(config, base_of(config))))


def written(tmp_path, config, what, dtype=torch.float32):
    """A base and adapters in files; the paths, and the logits of the two together, unmerged."""
    base, state = base_of(config, dtype), drawn(config, what)
    weight_files.save_safetensors(tmp_path / "base.safetensors", base, config)
    what = dataclasses.replace(what, base=lora.fingerprint(base))
    lora.save_adapters(tmp_path / "lora.safetensors", state, what, config)
    model = model_of(config, {n: tensor.float() for n, tensor in base.items()})
    lora.attach(model, what, state)
    return tmp_path / "base.safetensors", tmp_path / "lora.safetensors", logits_of(model)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_merged_weights_give_the_logits_of_weights_and_adapters_apart(tmp_path, name):
    config = CONFIGS[name]
    base, adapters, expected = written(tmp_path, config, adapters_of(config, EVERY[name]))
    state, _ = export.load(base, lora=adapters)
    assert_close(logits_of(model_of(config, state)), expected)
    assert (logits_of(model_of(config, base_of(config))) - expected).abs().max() > 0.1
    merged = exported(base, "minimind", tmp_path / "merged.pth", lora=adapters, dtype="fp32")
    model = MiniMindForCausalLM(config)
    model.load_minimind(torch.load(merged, weights_only=True))
    assert_close(logits_of(model), expected)


@pytest.mark.parametrize("preset", ["debug", "debug-moe"])
def test_a_merged_folder_gives_the_same_logits_in_transformers(tmp_path, preset):
    from transformers import AutoModelForCausalLM

    from minimind_ds import PRESETS

    config = PRESETS[preset]
    base, adapters, expected = written(tmp_path, config, adapters_of(config, "q_proj,k_proj,v_proj,o_proj"))
    load_tokenizer(None).save(tmp_path / "tokenizer")
    done = program("export.py", "--weight", base, "--lora", adapters, "--to", "hf", "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    heard, _ = chat.load_model(str(base), lora=str(adapters))
    batch, begin = batch_of(), 0
    for length in (5, 40, 1, 18):
        ids = batch.input_ids[:, begin:begin + length]
        for model in (theirs, heard):
            with torch.no_grad():
                assert_close(model(ids).logits[0], expected[0, begin:begin + length])
        begin += length


def test_merging_rounds_once_at_the_end(tmp_path):
    config = CONFIGS["dense"]
    base, adapters, _ = written(tmp_path, config, adapters_of(config), torch.bfloat16)
    state, _ = export.load(base, lora=adapters)
    name = "model.layers.0.self_attn.q_proj"
    parts = drawn(config, adapters_of(config))
    exact = base_of(config, torch.bfloat16)[f"{name}.weight"].double() + 1.5 * (
        parts[f"{name}.lora.B.weight"].double() @ parts[f"{name}.lora.A.weight"].double())
    # Half a unit in fp32's last place, where rounding to bf16 on the way is off by 1e-3.
    assert (state[f"{name}.weight"] - exact).abs().max() < 1e-6
    assert state["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16


def test_a_file_carries_what_its_adapters_are(tmp_path):
    config = CONFIGS["moe"]
    what = adapters_of(config, "gate,v_proj", dropout=0.25)
    _, path, _ = written(tmp_path, config, what)
    state, found, theirs = lora.load_adapters(path)
    assert theirs == config and dataclasses.replace(found, base=None) == what
    assert found.targets == ("v_proj", "gate") and len(found.base) == 64
    assert all(torch.equal(state[n], tensor) for n, tensor in drawn(config, what).items())


def test_other_weights_are_refused_and_the_same_ones_in_another_file_are_not(tmp_path):
    config = CONFIGS["dense"]
    base, adapters, _ = written(tmp_path, config, adapters_of(config), torch.bfloat16)
    wide = {n: tensor.float() for n, tensor in base_of(config, torch.bfloat16).items()}
    weight_files.save_safetensors(tmp_path / "wide.safetensors", wide, config)
    export.load(tmp_path / "wide.safetensors", lora=adapters)
    wide["model.norm.weight"] = wide["model.norm.weight"] + 1e-6
    weight_files.save_safetensors(tmp_path / "moved.safetensors", wide, config)
    with pytest.raises(ValueError, match="lora.safetensors beside .*moved.safetensors.*trained on other weights"):
        export.load(tmp_path / "moved.safetensors", lora=adapters)


def product(state, module, scale):
    return scale * state[f"{module}.lora.B.weight"].float() @ state[f"{module}.lora.A.weight"].float()


@pytest.mark.parametrize("name, modules", [
    ("dense", ["self_attn.q_proj", "self_attn.o_proj"]),
    ("square", ["self_attn.q_proj", "self_attn.o_proj",
                *[f"mlp.experts.{e}.{kind}_proj" for e in range(4) for kind in ("gate", "up", "down")]]),
])
@pytest.mark.parametrize("rank", [4, 16, 20])
def test_the_original_s_file_has_its_names_its_rank_and_its_factor_and_comes_back(tmp_path, name, modules, rank):
    config, square = CONFIGS[name], [f"model.layers.{i}.{module}" for i in range(2) for module in modules]
    what = adapters_of(config, rank=rank)
    assert what.targets == ("q_proj", "o_proj")
    _, adapters, _ = written(tmp_path, config, what)
    exported(None, "minimind_lora", tmp_path / "lora_32.pth", lora=adapters, dtype="fp32")
    theirs = torch.load(tmp_path / "lora_32.pth", weights_only=True)
    # As its save_lora writes: every square Linear, 16 being the rank of its apply_lora.
    shape = {"A": (max(rank, 16), 32), "B": (32, max(rank, 16))}
    assert {n: tuple(t.shape) for n, t in theirs.items()} == {f"{m}.lora.{p}.weight": shape[p]
                                                              for m in square for p in "AB"}
    back, found, _ = lora.load_adapters(tmp_path / "lora_32.pth", config)
    assert (found.rank, found.scale, found.targets, found.base) == (max(rank, 16), 1, what.targets, None)
    for module in square:
        expected = torch.zeros(32, 32)
        if "self_attn" in module:
            expected = product(drawn(config, what), module, what.scale)
            torch.testing.assert_close(product(back, module, found.scale), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(product(theirs, module, 1), expected, rtol=0, atol=1e-6)


def test_a_file_that_does_not_fit_is_answered_in_one_line(tmp_path):
    config, other = CONFIGS["dense"], ModelConfig(**{**SIZES, "hidden_size": 64})
    what = adapters_of(config)
    base, path, _ = written(tmp_path, config, what)
    theirs = lora.to_minimind(drawn(config, what), what, config)
    names = list(theirs)
    uneven = {**theirs, names[2]: torch.zeros(8, 32), names[3]: torch.zeros(32, 8)}
    facts = json.dumps({"rank": 4, "alpha": "much", "targets": ["q_proj"], "dropout": 0.0, "base": None})
    damaged = {"lora": facts, "config": json.dumps(config.to_dict())}
    save_file(drawn(config, what), tmp_path / "damaged.safetensors", metadata=damaged)
    fewer = {**damaged, "lora": facts.replace('"much"', "4.0")}
    save_file(drawn(config, what), tmp_path / "fewer.safetensors", metadata=fewer)
    files = {"uneven": uneven, "missing": {n: theirs[n] for n in names[:-2]}, "whole": base_of(config),
             "half": {**theirs, names[1]: torch.zeros(32, 8)}, "experts": {
                 **theirs, "model.layers.0.mlp.experts.0.up_proj.lora.A.weight": torch.ones(16, 32),
                 "model.layers.0.mlp.experts.0.up_proj.lora.B.weight": torch.ones(32, 16)},
             "odd": {"model.lora.A.weight": torch.tensor(1.0)}, "stray": {**theirs, "extra": torch.ones(1)}}
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\3\4 torn")
    for name, model, said in [
        ("absent", config, "no such file"),
        ("base.safetensors", config, "no LoRA adapters of a run, but a whole model's weights, or PEFT's adapters"),
        ("lora.safetensors", other, "hidden_size is 32 there and 64 here"),
        ("damaged.safetensors", config, "alpha is 'much'; it must be a number above 0"),
        ("fewer.safetensors", config, "4 unexpected .*o_proj.lora.A.weight"),
        ("uneven.pth", config, r"several ranks \(8, 16\)"),
        ("missing.pth", config, r"2 missing \(model.layers.1.self_attn.o_proj.lora.A.weight"),
        ("half.pth", config, r"B.weight \(32, 8\) instead of \(32, 16\)"),
        ("experts.pth", config, "adapts experts"),
        ("whole.pth", config, "model.embed_tokens.weight, which is no LoRA adapter: it looks like a whole model"),
        ("stray.pth", config, "extra, which is no LoRA adapter$"),
        ("odd.pth", config, "no adapter's A"),
        ("torn.pth", config, "not a readable .pth"),
        ("missing.pth", other, r"\(16, 32\) instead of \(16, 64\)"),
        ("missing.pth", None, "does not say of which model"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            lora.load_adapters(tmp_path / name, model)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds LoRA adapters, not a whole model"):
        export.load(path)
    wide = adapters_of(config, "q_proj,k_proj")
    with pytest.raises(ValueError, match="square projections only, .* q_proj, k_proj"):
        lora.to_minimind(drawn(config, wide), wide, config)
    with pytest.raises(ValueError, match="with --weight"):
        exported(None, "hf", tmp_path / "out", lora=path)
    with pytest.raises(ValueError, match="with --lora"):
        exported(base, "minimind_lora", tmp_path / "out")
    done = program("export.py", "--weight", path, "--to", "hf", "--out", tmp_path / "out")
    assert done.returncode == 2 and "not a whole model" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset, flags, said", [
    ("debug", ["--lora_rank", "4"], "--lora_rank is 4: .*--from_weight"),
    ("debug", ["--lora_rank", "-1"], "--lora_rank is -1; it must be at least 0"),
    ("debug", ["--lora_targets", "q_proj"], "--lora_targets is 'q_proj' without --lora_rank"),
    ("debug", ["--lora_alpha", "4"], "--lora_alpha is 4.0 without --lora_rank"),
    ("debug", ["--lora_dropout", "0.1"], "--lora_dropout is 0.1 without --lora_rank"),
    ("debug", ["--lora_rank", "4", "--from_weight", "W", "--lora_alpha", "0"], "--lora_alpha is 0.0; .* above 0"),
    ("debug", ["--lora_rank", "4", "--from_weight", "W", "--lora_dropout", "1"], "--lora_dropout is 1.0; .*below 1"),
    ("debug", ["--lora_rank", "4", "--from_weight", "W.pth", "--lora_targets", "q_proj,lm_head"],
     "'lm_head': no such projection in the layers; choose from q_proj, k_proj, v_proj, o_proj, gate_proj"),
    ("debug", ["--lora_rank", "4", "--from_weight", "W.pth", "--lora_targets", ","], "',': no such projection"),
    ("debug-moe", ["--lora_rank", "4", "--from_weight", "W.pth", "--lora_targets", "q_proj,up_proj"],
     "up_proj: experts are stacked .* choose from q_proj, k_proj, v_proj, o_proj, gate$"),
    ("debug", ["--lora_rank", "4", "--from_weight", "ADAPTERS"], "holds LoRA adapters, not a whole model"),
])
def test_a_wrong_flag_is_answered_in_one_line(tmp_path, preset, flags, said):
    config = CONFIGS["dense"]
    _, adapters, _ = written(tmp_path, config, adapters_of(config))
    flags = [str(adapters) if flag == "ADAPTERS" else flag for flag in flags]
    with pytest.raises(ValueError, match=said) as error:
        prepare("sft", ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--preset", preset, "--save_dir",
                        str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--dtype", "fp32", *flags],
                World(0, 1, 0, 1, torch.device("cpu")))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*") if (tmp_path / "run").exists() else [])


def test_a_model_without_a_square_projection_asks_for_names():
    config = ModelConfig(**SIZES, head_dim=24)
    with pytest.raises(ValueError, match="name some of q_proj, .* with --lora_targets"):
        lora.find_targets(config, None)
    assert lora.find_targets(config, "o_proj, q_proj") == ("q_proj", "o_proj")
