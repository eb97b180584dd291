"""A checkpoint goes on where it stopped on other ranks, at other ZeRO stages, in other splits of the same step."""

import json
import pathlib
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from minimind_ds.checkpoint import full_state, reshape
from minimind_ds.distributed.world import World
from minimind_ds.training.resume import look_for_resume_point
from minimind_ds.training.step import local_rows
from tests.distributed.ranks.reshape import BEFORE, COMPILED, SPLITS, run_of

pytestmark = pytest.mark.numeric

PROGRAM = "tests/distributed/ranks/reshape.py"
CPU = torch.device("cpu")
# Of the losses after the resume against the run without a break, relative.  bf16: another stage rounds gradients to
# bf16 at other places; measured 2e-5.  Tokens within rounding of two experts are part of it: were the closest of
# every micro-batch to go to the other, losses would move by 3e-5.
BOUNDS = {"dense": 1e-5, "frozen": 1e-5, "moe": 2e-4}


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, deepspeed):
    """Checkpoints of 2 ranks at every stage, on 1 rank offloaded one stage further, on 2 ranks two stages further."""
    out = tmp_path_factory.mktemp("reshape")
    deepspeed(2, PROGRAM, str(out), "write frozen,moe", "resume frozen 2 2", "program write 2")
    said = deepspeed(1, PROGRAM, str(out), "resume frozen,moe 2 1 offload", "program resume 3").stdout
    return out, read(out / "resume_1.json") | read(out / "resume_2.json"), said


def assert_whole(pairs: dict, curves: dict) -> None:
    """Every resumed state is the written one to the last bit; the curves go on as without a break."""
    for pair, found in pairs.items():
        assert found["wrong"] == [], pair
        source = pair.split()[0]
        for line, control in zip(found["curve"], curves[source], strict=True):
            # States are equal to the last bit; from there on it is law 3's bound.
            assert line["loss"] == pytest.approx(control["loss"], rel=BOUNDS[source.split("_")[0]]), pair
            # A scheduler of DeepSpeed's goes on too.
            assert line["lr"] == control["lr"], pair


def test_states_are_equal_to_the_last_bit_and_losses_go_on_at_another_stage_on_other_ranks(resumed):
    out, pairs, _ = resumed
    assert len(pairs) == 12
    curves = read(out / "write_2.json")
    assert_whole(pairs, curves)
    assert all(curve[-1]["loss"] < curve[0]["loss"] for curve in curves.values())
    rates = [line["lr"] for line in curves["moe_3_2"]]
    assert rates == sorted(set(rates))


def test_the_states_compared_are_those_of_a_run_under_way(resumed):
    out, _, _ = resumed
    for stage in range(4):
        state = load_file(out / f"frozen_{stage}_2.safetensors")
        moments = [value for key, value in state.items() if key.endswith(("exp_avg", "exp_avg_sq"))]
        assert len(moments) > 20 and all(value.norm() > 0 for value in moments)
        assert state["step"].tolist() == [BEFORE] and state["counters"].tolist() == [BEFORE, 8 * BEFORE, 0]
        frozen = {key.split()[0] for key in state if key.endswith(" weight")} - {
            key.split()[0] for key in state if key.endswith(" exp_avg")}
        assert frozen == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"}
        assert (state["model.layers.1.input_layernorm.weight weight"] == 1.5).all()
        # bf16 weights are their masters, rounded.
        state = load_file(out / f"moe_{stage}_2.safetensors")
        for key in [key for key in state if key.endswith(" weight")]:
            assert (state[key] == state[key.replace(" weight", " fp32")].bfloat16()).all(), key


def test_ranks_draw_anew_and_each_for_itself(resumed):
    _, pairs, _ = resumed
    seeds = [tuple(found["seeds"]) for found in pairs.values() if len(found["seeds"]) == 2]
    assert len(set(seeds)) == 1 and seeds[0][0] != seeds[0][1]


def test_the_program_says_that_it_reshapes_and_goes_on_from_the_checkpoint(resumed):
    out, _, said = resumed
    line = next(line for line in said.splitlines() if "resuming from" in line)
    assert line.endswith("step_00000002 after step 2, written on 2 ranks at ZeRO stage 2; now 1 rank at stage 3: "
                         "reshaped")
    whole, rest = ([json.loads(line) for line in (out / f"program_{half}" / "metrics.jsonl").read_text().splitlines()
                    if "loss" in json.loads(line)] for half in ("write", "resume"))
    assert [row["step"] for row in rest] == [3, 4, 5]
    for row, control in zip(rest, whole[2:], strict=True):
        assert row["loss"] == pytest.approx(control["loss"], rel=1e-5)
        assert (row["lr"], row["labelled_tokens"]) == (control["lr"], control["labelled_tokens"])


@pytest.mark.parametrize("then, now", [((2, "write"), (1, "resume")), ((2, "write"), (4, "resume")),
                                       ((4, "write"), (2, "resume")), ((2, "write"), (2, "resume"))])
def test_each_sample_of_the_epoch_is_seen_once_over_the_two_halves(tmp_path, then, now):
    seen, cut = Counter(), None
    for ranks, half in (then, now):
        for rank in range(ranks):
            world = World(rank, ranks, rank, ranks, CPU)
            prepared = run_of(world, tmp_path, half, "dense", 2)
            cut = cut or len(prepared.first_plan) // 3
            steps = range(cut) if half == "write" else range(cut, len(prepared.first_plan))
            for step in steps:
                for micro in range(SPLITS[half][ranks][1]):
                    seen.update(i for row in local_rows(prepared, prepared.first_plan, step, micro) for i in row)
    assert seen == Counter(range(len(prepared.stores[0].lengths)))


LAYOUT = {"ranks": 2, "ZeRO stage": 2, "offload": "none", "batch_size": 2, "accumulation_steps": 2, "dtype": "bf16",
          "optimizer": "AdamW", "scheduler": None, "sequence_parallel_size": 1, "expert_parallel.autoep_size": 1}


@pytest.mark.parametrize("now, said", [
    ({"ranks": 1, "ZeRO stage": 3}, "written on 2 ranks at ZeRO stage 2; now 1 rank at stage 3: reshaped"),
    ({"offload": "cpu"}, "written on 2 ranks at ZeRO stage 2; now 2 ranks at stage 2 with optimizer states on the "
     "CPU: reshaped"),
    ({"batch_size": 4, "accumulation_steps": 1}, "written with 2 rows x 2 micro-batches on each rank; now 4 rows x 1 "
     "micro-batches: reshaped"),
])
def test_the_log_says_what_is_reshaped(now, said):
    reshape.check(LAYOUT, LAYOUT | now, pathlib.Path("run"))
    assert reshape.note(LAYOUT, LAYOUT | now) == said


@pytest.mark.parametrize("now, word", [({"optimizer": "Lion", "ranks": 1}, "only Adam and AdamW"),
                                       ({"offload": "nvme"}, "NVMe")])
def test_what_cannot_be_reshaped_is_refused_in_one_line_that_says_what_to_do(now, word):
    with pytest.raises(ValueError, match=word) as caught:
        reshape.check(LAYOUT, LAYOUT | now, pathlib.Path("run"))
    assert "2 ranks at ZeRO stage 2" in str(caught.value) and "--from_resume none" in str(caught.value)


def test_the_loss_scale_of_fp16_goes_from_one_stages_form_to_anothers():
    # DeepSpeed has no fp16 on a CPU; these are its own classes: an object at stages 1 to 3, plain fields at stage 0.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

    options = {"init_scale": 2.0**16, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2,
               "consecutive_hysteresis": False}
    old, new, back = (DynamicLossScaler(**options) for _ in range(3))
    old.cur_scale, old.cur_iter, old.last_overflow_iter, old.cur_hysteresis = 512.0, 40, 33, 1
    taken = full_state.read_scaler({"loss_scaler": old})
    reshape.write_scaler({"loss_scaler": new}, taken)
    assert vars(new) == vars(old)
    stage_zero = vars(LossScaleConfig(torch.float16, True, 0, options))
    reshape.write_scaler(stage_zero, taken)
    assert [stage_zero[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter")] == [512.0, 40, 33]
    reshape.write_scaler({"loss_scaler": back}, full_state.read_scaler(stage_zero))
    # Stage 0 knows no hysteresis; it begins anew.
    assert vars(back) == vars(old) | {"cur_hysteresis": 2}
    assert full_state.read_scaler({"loss_scaler": LossScaler(128)}) == {}


@pytest.mark.parametrize("ranks, dtype, said", [(1, "bf16", "its dtype is 'fp32', this run's is 'bf16'"),
                                                (3, "fp32", "its rows per step is 8, this run's is 12")])
def test_another_precision_and_other_rows_per_step_are_refused(resumed, tmp_path, monkeypatch, ranks, dtype, said):
    monkeypatch.setitem(SPLITS["resume"], 3, (2, 2))
    prepared = run_of(World(0, ranks, 0, ranks, CPU), tmp_path, "resume", "frozen", 3, dtype=dtype,
                 resume=str(resumed[0] / "frozen_2_2"))
    with pytest.raises(ValueError, match=said):
        look_for_resume_point(prepared)


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory, deepspeed):
    out = tmp_path_factory.mktemp("shared")
    deepspeed(2, PROGRAM, str(out), "shared")
    return read(out / "shared_2.json")


@pytest.mark.slow
def test_experts_and_rows_over_ranks_resume_bit_for_bit_and_each_as_the_other(shared_out):
    assert len(shared_out) == 12
    for name, found in shared_out.items():
        assert found["wrong again"] == [] and found["wrong next"] == [], name
        assert found["again"] == found["whole"], name
        for line, control in zip(found["next"], found["whole"], strict=True):
            assert line["loss"] == pytest.approx(control["loss"], rel=BOUNDS["moe"]), name
    assert shared_out["torch rows experts 1"]["note"].endswith("2 ranks at stage 2, experts over 2: reshaped")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_every_pair_of_stages_and_of_1_2_and_4_ranks(tmp_path, deepspeed, model):
    pairs, curves = {}, {}
    for ranks in (1, 2, 4):
        deepspeed(ranks, PROGRAM, str(tmp_path), f"write {model}")
        curves |= read(tmp_path / f"write_{ranks}.json")
    for ranks in (1, 2, 4):
        deepspeed(ranks, PROGRAM, str(tmp_path), f"resume {model} 1,2,4 0,1,2,3", timeout=1200)
        pairs |= read(tmp_path / f"resume_{ranks}.json")
    assert len(pairs) == 12 * 12
    assert_whole(pairs, curves)


@pytest.mark.slow
def test_deepspeeds_own_adam_resumes_bit_for_bit_and_goes_to_other_layouts(tmp_path, deepspeed):
    # Compiling them takes minutes at first; PyTorch's extension cache keeps them.
    deepspeed(2, PROGRAM, str(tmp_path), "compiled", timeout=1200)
    cases = read(tmp_path / "compiled_2.json")
    assert cases.keys() == COMPILED.keys()
    for name, found in cases.items():
        assert found["adam"] == ("DeepSpeedCPUAdam" if "offload" in name else "FusedAdam")
        assert not any(found[key] for key in found if key.startswith("wrong")), name
        assert found["again"] == found["whole"], name
        pairs = {f"{COMPILED[name][0]}_{name} -> {other}": {"wrong": [], "curve": found[f"curve {other}"]}
                 for other in ("there", "torch")}
        assert_whole(pairs, {pair.split()[0]: found["whole"] for pair in pairs})
