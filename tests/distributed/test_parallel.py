"""Rows and experts cut over ranks are the same training: gradients, curves and final weights.

Real deepspeed processes over gloo.  A control runs on one rank at stage 0 without any of it.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.distributed import sequence_parallel
from tests.routes import assert_clear

pytestmark = pytest.mark.numeric

# Of a mixture: the more steps, the more tokens that stand between two experts.
STEPS = 2

# The control of a case is its model's.
CASES = {f"experts, stage {stage}": dict(model="moe", stage=stage, experts=2) for stage in (1, 2, 3)}
CASES |= {f"rows, stage {stage}": dict(model="dense", stage=stage, accumulation=2, sequence=2) for stage in (0, 2, 3)}
CASES |= {f"rows and experts, stage {stage}": dict(model="moe", stage=stage, accumulation=2, sequence=2, experts=2)
          for stage in (1, 3)}
# Others that are made of the same code.
SLOW = {"rows, stage 1": dict(model="dense", stage=1, accumulation=2, sequence=2),
        "rows and experts, stage 2": dict(model="moe", stage=2, accumulation=2, sequence=2, experts=2),
        **{f"rows, experts whole, stage {stage}": dict(model="moe", stage=stage, accumulation=2, sequence=2)
           for stage in (0, 3)}}
# Four ranks on two cores are slow.  Two key heads over four ranks are repeated.
ONE_ROW = ["--eval_fraction", "0.02", "--batch_size", "1"]
FOUR = {"experts on 2 of 4 ranks": dict(model="moe", stage=2, accumulation=1, experts=2, flags=ONE_ROW),
        "experts on 4 ranks": dict(model="moe", stage=3, experts=4, flags=ONE_ROW),
        "rows on 4 ranks": dict(model="dense", stage=2, accumulation=2, sequence=4),
        "rows on 2, experts on 4 ranks": dict(model="moe", stage=1, sequence=2, experts=4)}
# Balance asked for over all ranks' tokens: what one rank with all rows in one micro-batch asks for.
GLOBAL = {"global": dict(model="moe", stage=2, flags=["--moe_balance", "global"]),
          "global, experts over ranks": dict(model="moe", stage=1, experts=2, flags=["--moe_balance", "global"]),
          "global, rows over ranks": dict(model="moe", stage=2, sequence=2,
                                          flags=["--moe_balance", "global", "--batch_size", "4"])}
TOGETHER = dict(model="moe", stage=0, flags=["--moe_balance", "batch", "--batch_size", "4"])
# One document of 16,384 tokens, whole on one rank and in halves on two.
LONG = dict(model="dense", steps=1, fields={"max_position_embeddings": 16384})


def start(deepspeed, ranks: int, out, cases: dict):
    listed = [{"name": name, **({"steps": STEPS} if case["model"] == "moe" else {}), **case}
              for name, case in cases.items()]
    deepspeed(ranks, "tests/distributed/ranks/parallel.py", str(out), json.dumps(listed))
    return out, json.loads((out / "cases.json").read_text())


@pytest.fixture(scope="module")
def long_flags(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "long.jsonl"
    answer = " ".join(f"word {i}" for i in range(9000))
    data.write_text(json.dumps({"conversations": [{"role": "user", "content": "Count."},
                                                  {"role": "assistant", "content": answer}]}) + "\n")
    return ["--data_path", str(data), "--pack_len", "16384", "--max_seq_len", "16384", "--batch_size", "1"]


@pytest.fixture(scope="module")
def control(tmp_path_factory, deepspeed, long_flags):
    # As many rows a step as the cases have.
    cases = {name: dict(model=name, stage=0, accumulation=2) for name in ("dense", "moe")}
    return start(deepspeed, 1, tmp_path_factory.mktemp("control"),
                 {**cases, "together": TOGETHER, "long": {**LONG, "stage": 0, "flags": long_flags}})


@pytest.fixture(scope="module")
def found(tmp_path_factory, deepspeed, long_flags, request):
    slow = SLOW if request.config.getoption("--slow") else {}
    return start(deepspeed, 2, tmp_path_factory.mktemp("found"),
                 {**CASES, **slow, **GLOBAL, "long": {**LONG, "stage": 2, "sequence": 2, "flags": long_flags}})


@pytest.fixture(scope="module")
def found_on_four(tmp_path_factory, deepspeed):
    return start(deepspeed, 4, tmp_path_factory.mktemp("four"), FOUR)


def assert_same(name: str, control, found, control_name: str):
    (folder, ours), (control_folder, theirs) = found, control
    assert_clear(theirs[control_name]["gaps"])
    for kind in ("grad", "weights"):
        a = load_file(folder / f"{name}_{kind}.safetensors")
        b = load_file(control_folder / f"{control_name}_{kind}.safetensors")
        assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
        for n in b:
            off = a[n] - b[n]
            if kind == "grad":
                # Law 3's; 6e-7 measured.
                assert off.norm() <= 1e-5 * b[n].norm().clamp(min=1e-8), (name, n)
            else:
                # Adam makes a whole step of a gradient that is rounding and nothing else, so one weight in a thousand
                # is left out; 4e-6 measured with all of them.
                assert off.abs().flatten().quantile(0.999) <= 1e-4 * b[n].abs().max(), (name, n)
    # Of all steps; 7e-7 measured.
    for key in ("loss", "aux", "norm", "labelled"):
        assert ours[name][key] == pytest.approx(theirs[control_name][key], rel=1e-5), (name, key)
    if "eval" in theirs[control_name]:
        assert ours[name]["eval"] == pytest.approx(theirs[control_name]["eval"], rel=1e-5)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_rows_and_experts_over_two_ranks_train_as_one_rank(name, control, found):
    assert_same(name, control, found, {**CASES, **SLOW}[name]["model"])


@pytest.mark.parametrize("name", GLOBAL)
def test_balance_over_all_ranks_is_that_of_one_rank_with_all_rows(name, control, found):
    assert control[1]["together"]["aux"] != pytest.approx(control[1]["moe"]["aux"], rel=1e-4)
    assert_same(name, control, found, "together")


def test_a_document_of_16384_tokens_trains_in_halves(control, found):
    assert control[1]["long"]["labelled"][0] > 16000
    assert_same("long", control, found, "long")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_rows_and_experts_over_four_ranks_train_as_one_rank(name, control, found_on_four):
    assert_same(name, control, found_on_four, FOUR[name]["model"])


@pytest.mark.parametrize("keys, ranks, word", [
    ({"sequence_parallel_size": 0}, 2, "must be a positive whole number"),
    ({"sequence_parallel_size": 2, "data_parallel_size": 2}, 2, "is not the 2 ranks"),
    ({"expert_parallel": {"enabled": True, "autoep_size": "2"}}, 2, "must be a positive whole number"),
    ({"expert_parallel": {"enabled": True, "autoep_size": 2, "comm_backend": "deepep"}}, 2, "comm_backend belongs to"),
    ({"expert_parallel": {"enabled": True, "preset_model": "mixtral"}}, 2, "'mixtral'"),
    ({"expert_parallel": 2}, 2, "must be an object"),
])
def test_keys_that_cannot_be_are_named(keys, ranks, word):
    with pytest.raises(ValueError, match=word):
        sequence_parallel.read_dims("ds.json", keys, ranks)


@pytest.mark.parametrize("dims, config, facts, word", [
    (ParallelDims(3), {}, {}, "does not divide 8 heads over 4 key heads; 1, 2, 4, 8 do"),
    (ParallelDims(2), {}, {"row_tokens": 127}, "choose another --pack_len"),
    (ParallelDims(4), {}, {"ranks": 2}, "does not divide the 2 ranks"),
    (ParallelDims(1, 2), {}, {}, "the model has no experts"),
    (ParallelDims(1, 3), {"use_moe": True}, {"ranks": 3}, "does not divide 4 experts"),
    (ParallelDims(1, 2), {"use_moe": True}, {"stage": 0}, "stage 1, 2 or 3"),
])
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(dims, config, facts, word):
    with pytest.raises(ValueError, match=word):
        sequence_parallel.check(dims, ModelConfig(**config), path="ds.json",
                       **{"ranks": 12, "row_tokens": 4096, "stage": 2, **facts})


def test_shares_of_a_batch_are_the_batch():
    from minimind_ds import Sample, collate

    rows = [[Sample(torch.arange(1, n + 1), torch.tensor([*range(2, n + 1), -100])) for n in row]
            for row in ([5, 3], [7])]
    batch = collate(rows, 10)
    shares = [batch.share(i, 4) for i in range(4)]
    for name in ("input_ids", "labels", "position_ids", "real_mask"):
        assert torch.equal(torch.cat([getattr(s, name).flatten() for s in shares]), getattr(batch, name).flatten())
    assert sum(s.n_tokens for s in shares) == batch.n_tokens and sum(s.n_labelled for s in shares) == batch.n_labelled
    for share in shares:
        assert share.cu_seqlens is batch.cu_seqlens and share.n_rows == 2
        assert torch.equal(share.labelled_index, (share.labels.flatten() != -100).nonzero().flatten())
    with pytest.raises(ValueError, match="20 tokens cannot be cut into 3"):
        batch.share(0, 3)
