"""Optimizers and settings of users' DeepSpeed files, on real ranks: law 3's curves, values as in run.yaml."""

import json
import math

import pytest

from tests.distributed.ranks.configs import COLUMNS, COMPILED, RESUMED

pytestmark = pytest.mark.numeric

# What prepare() says against a column at each stage; None: it trains.
REFUSED = {
    "Lion on the CPU": ("for this machine's processor", None, None, None),
    "Muon, clipped": (None, *["--grad_clip 0"] * 3),
    "Lamb": ("for this machine's processor", *["needs whole matrices"] * 3),
    "prescaled, scattered": (None, None, "reduce_scatter", "reduce_scatter"),
    "predivided": (None, None, None, "gradient_predivide_factor is not supported at stage 3"),
    "predivided by the ranks": (None, None, None, "gradient_predivide_factor is not supported at stage 3"),
    "summed": ("gradient_allreduce_op is 'sum'",) * 4,
}
# Their update is the control's, whatever becomes of the gradients on the way.
AS_CONTROL = ("AdamW of torch", "prescaled", "predivided", "predivided by the ranks", "prescaled, scattered",
              "not contiguous", "round robin", "no sub-groups")
# Users' files that say something unlike all others.
FILES = {
    "one_cycle": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                  "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2,
                                                               "cycle_first_step_size": 2}},
                  "zero_optimization": {"stage": 2}},
    "loggers": {"comms_logger": {"enabled": True, "verbose": True, "prof_all": True}, "wall_clock_breakdown": True,
                "zero_optimization": {"stage": 1}, "steps_per_print": 1, "memory_breakdown": True,
                "flops_profiler": {"enabled": True, "profile_step": 1}},
    "gradients_in_fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
                          "zero_optimization": {"stage": 2}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, deepspeed, request):
    """What the one start of two ranks found, by mode, and what it printed."""
    which = "all" if request.config.getoption("--slow") else "quick"
    out = tmp_path_factory.mktemp("configs")
    for name, config in FILES.items():
        (out / f"{name}.json").write_text(json.dumps(config))
    modes = ("curves", "values", "files")
    ended = deepspeed(2, "tests/distributed/ranks/configs.py", str(out), f"curves:{which}", "values:16", "files")
    results = {mode: json.loads((out / "found" / f"{mode}.json").read_text()) for mode in modes}
    return {**results, "printed": (ended.stdout + ended.stderr).lower()}


def columns(names) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in COMPILED else name for name in names]


@pytest.fixture(scope="module")
def curves(found):
    """By column and stage."""
    return {name: {int(stage): case for stage, case in cases.items()} for name, cases in found["curves"].items()}


@pytest.mark.parametrize("name", columns(COLUMNS))
def test_one_curve_at_every_stage_or_a_refusal(curves, name):
    first = None
    for stage, case in curves[name].items():
        refused = REFUSED.get(name, (None,) * 4)[stage]
        if refused:
            assert refused in case["refused"]
            continue
        assert "refused" not in case, case
        control = curves["control"][0] if name in AS_CONTROL else first or case
        first = first or case
        for key in ("loss", "grad_norm"):
            here, there = ([line[key] for line in one["lines"]] for one in (case, control))
            if key == "grad_norm" and name == "Muon" and stage > 0:
                # DeepSpeed has the norm of the orthogonal update only, which is another number.
                assert here == [None] * len(here)
                continue
            # Law 3's bound; 2e-7 measured.
            assert here == pytest.approx(there, rel=1e-5), (stage, key)


def test_optimizers_differ_and_learn(curves):
    """That the columns are no copies of the control."""
    losses = {name: case[0]["lines"][-1]["loss"] for name, case in curves.items() if "lines" in case[0]}
    other = [name for name in losses if name not in (*AS_CONTROL, "control", "AdamW", "AdamW on the CPU")]
    assert len({round(losses[name], 4) for name in other}) == len(other), losses
    assert all(abs(losses[name] / losses["control"] - 1) > 1e-3 for name in other), losses


@pytest.mark.parametrize("name", columns(RESUMED))
def test_a_resume_goes_on_bit_for_bit(curves, name):
    for stage in curves[name].keys() & set(RESUMED[name]):
        one, other = curves[name][stage]["ended"]
        assert one["weights"] == other["weights"] and one["weights"]
        for key in ("loss", "grad_norm", "lr"):
            assert one["lines"][0][key] == other["lines"][0][key]


def test_muons_groups_keep_their_ratio_and_both_are_logged(curves):
    for case in curves["Muon"].values():
        for line in case.get("lines", []):
            muon, adam = sorted(line["lr_groups"], reverse=True)
            # 0.02 beside --learning_rate 1e-2.
            assert muon / adam == pytest.approx(2.0)


def test_files_unlike_each_other_train_and_the_rate_in_the_metrics_is_the_steps_own(found):
    files = found["files"]
    assert set(files) == set(FILES)
    for case in files.values():
        assert len(case["lines"]) == 2 and all(math.isfinite(line["loss"]) for line in case["lines"])
    # The first step is taken at the cycle's lower end, the second half way up.
    assert [line["lr"] for line in files["one_cycle"]["lines"]] == pytest.approx([1e-4, 5.05e-3], rel=1e-3)
    # Their only effect is what they print.
    for words in ("comm op: all_reduce", "flops profiler", "MA 0."):
        assert words.lower() in found["printed"], words


def held_as_said(case: dict) -> None:
    """That a run.yaml's numbers are those of every group."""
    run, params = case["run"], case["resolved"]["optimizer"]["params"]
    for group in case["held"]:
        if case["rate"] is not None:
            share = params.get("muon_lr", params["lr"]) / params["lr"] if group.get("use_muon") else 1
            assert group["lr"] == pytest.approx(case["rate"] * share, rel=1e-12)
            assert params["lr"] == run["learning_rate"]
        if "weight_decay" in group:
            assert group["weight_decay"] == run["weight_decay"]
        if "betas" in group and "adam_beta1" in run:
            assert list(group["betas"]) == [run["adam_beta1"], run["adam_beta2"]]
        if "eps" in group:
            assert group["eps"] == run["adam_epsilon"]
    assert case["resolved"]["gradient_clipping"] == run["grad_clip"]
    # No number of the optimizer's is missing from run.yaml, but those that a scheduler sets.
    schedule = case["config"].get("scheduler", {}).get("type")
    assert ("learning_rate" in run) == (schedule != "OneCycle")
    if "betas" in params and schedule != "OneCycle":
        assert {"adam_beta1", "adam_beta2"} <= set(run)


def check_values(cases: list[dict], count: int) -> None:
    """That every case was refused in a line, or trained with the values that its run.yaml says."""
    trained = [case for case in cases if "refused" not in case]
    assert len(cases) == count and len(trained) >= count // 4
    for case in trained:
        held_as_said(case)
        # A flag that was given is in run.yaml with its value.
        for name, value in zip(case["flags"][::2], case["flags"][1::2]):
            assert case["run"][name.removeprefix("--")] == float(value)
    for case in cases:
        if "refused" in case:
            assert "drawn_0.json" in case["refused"] and "\n" not in case["refused"]


def test_what_run_yaml_says_is_what_the_optimizer_holds(found):
    check_values(found["values"], 16)


@pytest.mark.slow
def test_what_run_yaml_says_is_what_the_optimizer_holds_in_many_runs(tmp_path, deepspeed):
    deepspeed(1, "tests/distributed/ranks/configs.py", str(tmp_path), "values:500")
    check_values(json.loads((tmp_path / "found" / "values.json").read_text()), 500)
