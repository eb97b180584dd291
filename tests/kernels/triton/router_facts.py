"""Facts about the router's kernels, in the honest interpreter.  tests/kernels/test_triton_moe.py runs this file:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/router_facts.py
"""

import pytest
import torch
import torch.nn.functional as F

from minimind_ds.bench.kernels import interpreter
from minimind_ds.kernels.triton.router import route

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# T tokens, E experts, k, normalised, groups (the last fifth of the tokens belongs to none), dtype of the logits.
CASES = {
    "top-1": (1200, 4, 1, False, 3, FP32),
    "top-1 normalised": (600, 4, 1, True, 1, BF16),
    "top-2": (600, 4, 2, True, 7, FP32),
    "top-2 bf16": (600, 4, 2, True, 3, BF16),
    "top-3 of 6": (500, 6, 3, False, 1, FP64),
    "top-8 of 64": (70, 64, 8, True, 5, FP32),
    "all of 3": (40, 3, 3, True, 2, FP32),
    "one token": (1, 4, 2, True, 1, FP32),
    "one expert": (20, 1, 1, False, 2, FP32),
    "no groups": (30, 4, 2, True, 0, FP32),
    "more groups than tokens": (9, 4, 1, False, 30, FP32),
}
# ||ours - exact|| / ||exact||; above bf16 room for numpy's exponentials, whose last places are a processor's own.
BOUNDS = {BF16: 1e-2, FP32: 1e-6, FP64: 1e-13}


def textbook(logits, k, norm, group, n_groups):
    scores = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, FP32))
    weights, experts = scores.topk(k, dim=-1)
    if norm:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if group is None:
        return weights, experts, scores.new_zeros(0, logits.shape[1]), scores.new_zeros(0, logits.shape[1])
    member = (group == torch.arange(n_groups)[:, None]).to(scores.dtype)
    return weights, experts, member @ F.one_hot(experts, logits.shape[1]).sum(1).to(scores.dtype), member @ scores


def inputs(T, E, n_groups, dtype, seed=0):
    """Logits without ties within a row, and groups, side by side."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(64, generator=generator)[:E] for _ in range(T)]).double() / 8 - 4
    group = torch.randint(0, max(n_groups, 1), (T,), generator=generator).sort().values
    group[T - T // 5:] = -1
    return logits.to(dtype), group if n_groups else None


def run(function, logits, k, norm, group, n_groups):
    """weights, experts, counts, sums, and the logits' gradient of a weighted sum of weights and sums."""
    logits = logits.detach().clone().requires_grad_()
    weights, experts, counts, sums = function(logits, k, norm, group, n_groups)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (weights, sums))
    return [weights, experts, counts, sums, *torch.autograd.grad(loss, logits)]


def ours(*args):
    with interpreter.poisoned_outputs():
        return run(route, *args)


@pytest.mark.parametrize("name", CASES)
def test_route_equals_softmax_and_topk(name):
    T, E, k, norm, n_groups, dtype = CASES[name]
    logits, group = inputs(T, E, n_groups, dtype)
    got, want = ours(logits, k, norm, group, n_groups), run(textbook, logits, k, norm, group, n_groups)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    for i in (0, 3, 4):
        assert got[i].dtype == want[i].dtype and got[i].isfinite().all()
        assert (got[i] - want[i]).norm() <= BOUNDS[dtype if i == 4 else got[0].dtype] * want[i].norm().clamp(min=1e-3)


def test_route_gives_equal_scores_to_the_lower_expert():
    logits = torch.tensor([[1., 1, 1, 1], [0, 2, 2, 2], [-1e4, 0, -1e4, -1e4]])
    _, experts, _, _ = route(logits, 2, True)
    assert experts.tolist() == [[0, 1], [1, 2], [1, 0]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_route_keeps_a_broken_token_to_itself_and_its_choices_real(poison):
    logits, _ = inputs(20, 4, 0, FP32)
    broken = logits.clone()
    broken[7, 2] = poison
    group = torch.arange(20) // 5
    for k in (1, 2, 4):
        got, want = ours(broken, k, True, group, 4), ours(logits, k, True, group, 4)
        others = torch.arange(20) != 7
        assert got[0][7].isnan().all() and sorted(set(got[1][7].tolist())) == sorted(got[1][7].tolist())
        assert got[1].min() >= 0 and got[1].max() < 4
        assert all(torch.equal(got[i][others], want[i][others]) for i in (0, 1, 4))
        assert torch.equal(got[3][[0, 2, 3]], want[3][[0, 2, 3]])


def test_route_counts_groups_in_any_order_and_of_any_integer_type():
    logits, _ = inputs(700, 4, 0, FP32)
    group = torch.randint(-1, 9, (700,), generator=torch.Generator().manual_seed(1))
    want = run(textbook, logits, 2, False, group, 9)
    for dtype in (torch.int64, torch.int32):
        got = ours(logits, 2, False, group.to(dtype), 9)
        assert torch.equal(got[2], want[2]) and torch.allclose(got[3], want[3], rtol=1e-6)


def test_route_gives_the_same_bits_in_any_order_of_programs():
    args = (*inputs(1500, 4, 3, FP32), 2, True)
    logits, group, k, norm = args
    first = ours(logits, k, norm, group, 3)
    with interpreter.options(seed=5):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(logits, k, norm, group, 3)))


@pytest.mark.parametrize("k, norm", [(1, False), (2, True), (3, False)])
def test_route_passes_gradcheck_in_fp64(k, norm):
    logits, group = inputs(13, 4, 2, FP64)
    torch.autograd.gradcheck(lambda x: route(x, k, norm, group, 2)[::3], (logits.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("k, group, n_groups, word", [
    (0, None, 0, "k is 0"), (5, None, 0, "k is 5"), (1, torch.zeros(3, dtype=int), 0, "group"),
    (1, None, 2, "group"), (1, torch.zeros(4, dtype=int), 1, "group")])
def test_route_says_what_it_cannot_do(k, group, n_groups, word):
    with pytest.raises(ValueError, match=word):
        route(torch.zeros(3, 4), k, False, group, n_groups)
