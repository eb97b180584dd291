"""Each ZeRO stage holds what its paper says, counted tensor by tensor on two real ranks."""

import json

import pytest

RANKS = 2


def expected(n_parameters: int, *, stage: int, ranks: int, half: bool) -> dict[str, float]:
    """Bytes of n_parameters under ZeRO (arXiv:1910.02054, section 5), AdamW and fp32 masters.

    Written apart from memory_model.states on purpose: it is what proves the plan, not a part of it.  In fp32 stage 0
    updates the parameters themselves; the other stages keep masters apart.
    """
    width, masters = (2, 4) if half else (4, 0 if stage == 0 else 4)
    return {"parameters": width * n_parameters / (ranks if stage == 3 else 1),
            "optimizer": (masters + 8) * n_parameters / (ranks if stage >= 1 else 1),
            "gradients": width * n_parameters / (ranks if stage >= 2 else 1)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, deepspeed):
    out = tmp_path_factory.mktemp("memory")
    deepspeed(RANKS, "tests/distributed/ranks/memory.py", str(out))
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_rank_holds_its_share_of_parameters_gradients_and_optimizer(measured, stage, dtype):
    for rank in measured:
        case = rank[f"{dtype}_{stage}"]
        want = expected(case["parameters"], stage=stage, ranks=RANKS, half=dtype == "bf16")
        # Bytes, counted: what differs is DeepSpeed's padding and Adam's step counters.
        assert case["after"]["parameters"] == pytest.approx(want["parameters"], rel=0.01)
        assert case["after"]["optimizer"] == pytest.approx(want["optimizer"], rel=0.01)
        # At stage 2 the gradient of a parameter that lies across both shares is held whole; at stage 1 those of the
        # other share are let go once they are reduced.
        width = 2 if dtype == "bf16" else 4
        least = want["gradients"] / (RANKS if stage == 1 else 1)
        most = want["gradients"] + (case["largest"] * width if stage == 2 else 0)
        assert 0.99 * least <= case["before"]["gradients"] <= 1.01 * most


def test_only_stage_3_keeps_gradients_after_the_step(measured):
    for name, case in measured[0].items():
        assert (case["after"]["gradients"] > 0) == name.endswith("3"), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_the_plan_is_the_papers(measured, stage, dtype):
    case = measured[0][f"{dtype}_{stage}"]
    want = expected(case["parameters"], stage=stage, ranks=RANKS, half=dtype == "bf16")
    for kind in ("parameters", "optimizer"):
        assert case["planned"][kind] == want[kind], kind
