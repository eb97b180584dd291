"""Each ZeRO stage holds what its paper says, counted tensor by tensor on two real ranks."""

import json

import pytest

from minimind_ds.memory import expected

RANKS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory, deepspeed):
    out = tmp_path_factory.mktemp("memory")
    deepspeed(RANKS, "tests/ranks/memory.py", str(out))
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_rank_holds_its_share_of_parameters_gradients_and_optimizer(measured, stage, dtype):
    for rank in measured:
        case = rank[f"{dtype}_{stage}"]
        want = expected(case["parameters"], stage=stage, ranks=RANKS, half=dtype == "bf16")
        assert case["after"]["parameters"] == pytest.approx(want["parameters"], rel=0.01)
        assert case["after"]["optimizer"] == pytest.approx(want["optimizer"], rel=0.01)
        # At stage 2 the gradient of a parameter that lies across both shares is held whole.
        width = 2 if dtype == "bf16" else 4
        across = case["largest"] * width if stage == 2 else 0
        assert 0.99 * want["gradients"] <= case["before"]["gradients"] <= 1.01 * (want["gradients"] + across)


def test_only_stage_3_keeps_gradients_after_the_step(measured):
    for name, case in measured[0].items():
        assert (case["after"]["gradients"] > 0) == name.endswith("3"), name


def test_stage_3_on_n_ranks_holds_one_nth_of_everything():
    for half in (False, True):
        one, n = (sum(expected(10**6, stage=3, ranks=ranks, half=half).values()) for ranks in (1, 8))
        # Both precisions come to 16 bytes a parameter: 4 + 8 + 4, or 2 + 12 + 2.
        assert n == one / 8 == 16 * 10**6 / 8
