"""A router's softmax, top-k, normalisation and balance statistics in one pass over its logits, and their gradient.

Logits are read once and scores never written; what the balance loss needs of them is summed per group on the way, by
block and then over blocks, without atomics, so that it is the same in every run.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/router_facts.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on
from .operator import operator

# Numbers of a (tokens, experts) tile; upstream's guard against a zero sum of weights.
TILE = 2048
TINY = 1e-20


@triton.jit
def softmax(logits_ptr, token, expert, T, E: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK, E_PAD) scores; zero past E and past T."""
    inside = (token < T)[:, None] & (expert < E)[None, :]
    logits = tl.load(logits_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=float("-inf"))
    logits = tl.where((token < T)[:, None], logits.to(ACC), 0.0)
    # A maximum that is NaN or infinite makes the row's scores NaN, as PyTorch's.
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(inside, powers / tl.sum(powers, 1)[:, None], 0.0)


@triton.jit(do_not_specialize=["T", "n_groups"])
def route_kernel(logits_ptr, group_ptr, weights_ptr, experts_ptr, counts_ptr, sums_ptr, T, n_groups,
                 E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GROUPED: tl.constexpr, E_PAD: tl.constexpr,
                 K_PAD: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, ACC: tl.constexpr):
    """weights and experts (T, K); counts and sums (blocks, n_groups, E), zeros beforehand, if GROUPED."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, E_PAD)
    scores = softmax(logits_ptr, token, expert, T, E, ACC)
    # NaN counts as the largest, as in torch.topk, so that a choice is always a real expert.
    left = tl.where(scores == scores, scores, 2.0)
    left = tl.where((expert < E)[None, :], left, -1.0)
    chosen = tl.zeros([BLOCK, E_PAD], tl.int32)
    place = tl.arange(0, K_PAD)[None, :]
    weights = tl.zeros([BLOCK, K_PAD], ACC)
    experts = tl.zeros([BLOCK, K_PAD], tl.int64)
    for k in tl.static_range(K):
        best = left == tl.max(left, 1)[:, None]
        choice = tl.min(tl.where(best, expert[None, :], E_PAD), 1)
        here = expert[None, :] == choice[:, None]
        weights = tl.where(place == k, tl.sum(tl.where(here, scores, 0.0), 1)[:, None], weights)
        experts = tl.where(place == k, choice[:, None].to(tl.int64), experts)
        chosen += here.to(tl.int32)
        left = tl.where(here, -1.0, left)
    if NORM:
        weights = weights / (tl.sum(weights, 1) + TINY)[:, None]
    inside = (token < T)[:, None] & (place < K)
    place = token.to(tl.int64)[:, None] * K + place
    tl.store(weights_ptr + place, weights, mask=inside)
    tl.store(experts_ptr + place, experts, mask=inside)
    if GROUPED:
        group = tl.load(group_ptr + token, mask=token < T, other=-1).to(tl.int32)
        lowest = tl.min(tl.where(group >= 0, group, n_groups))
        for g in range(lowest, tl.minimum(tl.max(group), n_groups - 1) + 1):
            member = (group == g)[:, None]
            entry = (tl.program_id(0).to(tl.int64) * n_groups + g) * E + expert
            tl.store(counts_ptr + entry, tl.sum(tl.where(member, chosen, 0), 0).to(ACC), mask=expert < E)
            tl.store(sums_ptr + entry, tl.sum(tl.where(member, scores, 0.0), 0), mask=expert < E)


@triton.jit(do_not_specialize=["T", "n_groups"])
def route_gradient_kernel(logits_ptr, group_ptr, experts_ptr, dweights_ptr, dsums_ptr, dlogits_ptr, T, n_groups,
                          E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GROUPED: tl.constexpr,
                          E_PAD: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, ACC: tl.constexpr):
    """dlogits (T, E) from dweights (T, K) and dsums (n_groups, E); scores are made again."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, E_PAD)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    scores = softmax(logits_ptr, token, expert, T, E, ACC)
    dscores = tl.zeros([BLOCK, E_PAD], ACC)
    chosen = tl.zeros([BLOCK, E_PAD], tl.int32)
    for k in tl.static_range(K):
        place = token.to(tl.int64) * K + k
        here = expert[None, :] == tl.load(experts_ptr + place, mask=token < T, other=-1)[:, None]
        dweight = tl.load(dweights_ptr + place, mask=token < T, other=0.0).to(ACC)
        dscores += tl.where(here, dweight[:, None], 0.0)
        chosen += here.to(tl.int32)
    if NORM:
        # weight = score / (total + TINY): d score = (d weight - sum of d weight * weight) / (total + TINY).
        picked = tl.where(chosen > 0, scores, 0.0)
        total = tl.sum(picked, 1)[:, None] + TINY
        dscores = tl.where(chosen > 0, (dscores - tl.sum(dscores * (picked / total), 1)[:, None]) / total, 0.0)
    if GROUPED:
        group = tl.load(group_ptr + token, mask=token < T, other=-1).to(tl.int64)
        known = (group >= 0) & (group < n_groups)
        dsums = dsums_ptr + group[:, None] * E + expert[None, :]
        dscores += tl.load(dsums, mask=known[:, None] & (expert < E)[None, :], other=0.0).to(ACC)
    dlogits = scores * (dscores - tl.sum(tl.where(inside, dscores * scores, 0.0), 1)[:, None])
    tl.store(dlogits_ptr + token.to(tl.int64)[:, None] * E + expert[None, :],
             dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def constants(logits: Tensor, k: int, norm: bool, grouped: bool) -> dict:
    E, wide = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    E_PAD = max(2, triton.next_power_of_2(E))
    return dict(E=E, K=k, NORM=norm, GROUPED=grouped, E_PAD=E_PAD, BLOCK=max(16, TILE // E_PAD), TINY=TINY,
                ACC=tl.float64 if wide == torch.float64 else tl.float32)


def apply(logits: Tensor, k: int, norm: bool, group: Tensor | None,
          n_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> weights, experts (T, k), counts, sums (n_groups, E)."""
    (T, E), device, shape = logits.shape, logits.device, constants(logits, k, norm, group is not None)
    blocks, wide = triton.cdiv(T, shape["BLOCK"]), torch.promote_types(logits.dtype, torch.float32)
    weights = torch.empty(T, k, dtype=wide, device=device)
    experts = torch.empty(T, k, dtype=torch.int64, device=device)
    # Blocks write the groups they have tokens of.
    counts, sums = torch.zeros(2, blocks, n_groups, E, dtype=wide, device=device)
    with on(device):
        route_kernel[(blocks,)](logits, group, weights, experts, counts, sums, T, n_groups,
                                K_PAD=triton.next_power_of_2(k), **shape)
    return weights, experts, counts.sum(dim=0), sums.sum(dim=0)


def gradient(dweights: Tensor, dsums: Tensor, logits: Tensor, experts: Tensor, group: Tensor | None, norm: bool,
             n_groups: int) -> Tensor:
    """-> dlogits (T, E)."""
    T, shape = len(logits), constants(logits, experts.shape[1], norm, group is not None)
    dlogits = torch.empty_like(logits)
    with on(logits.device):
        route_gradient_kernel[(triton.cdiv(T, shape["BLOCK"]),)](
            logits, group, experts, dweights.contiguous(), dsums.contiguous(), dlogits, T, n_groups, **shape)
    return dlogits


def save(ctx, inputs, output):
    logits, _, ctx.norm, group, ctx.n_groups = inputs
    _, experts, counts, _ = output
    ctx.save_for_backward(logits, experts, group)
    ctx.mark_non_differentiable(experts, counts)


def formula(gradient, ctx, dweights: Tensor, _dexperts, _dcounts, dsums: Tensor):
    return gradient(dweights, dsums, *ctx.saved_tensors, ctx.norm, ctx.n_groups), None, None, None, None


def fake(logits, k, norm, group, n_groups):
    (T, E), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    return (logits.new_empty(T, k, dtype=wide), logits.new_empty(T, k, dtype=torch.int64),
            logits.new_empty(n_groups, E, dtype=wide), logits.new_empty(n_groups, E, dtype=wide))


choose_and_count = operator(
    "route", apply, gradient, save=save, formula=formula, fake=fake,
    fake_gradient=lambda dweights, dsums, logits, experts, group, norm, n_groups: logits.new_empty(logits.shape))


def route(logits: Tensor, k: int, norm: bool, group: Tensor | None = None,
          n_groups: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest experts of each token, their weights, and what a balance loss needs to know.

    Scores are softmax(logits) in fp32 (fp64 for fp64).  Equal scores go to the lower expert number; torch.topk leaves
    that open, and otherwise chooses the same.  A token with a NaN among its logits gets k experts with NaN weights.

    Args:
        logits: (T, E).
        k: experts per token, at most E.
        norm: divide a token's weights by their sum (plus 1e-20, as MiniMind).
        group: (T,) integers, the group of tokens whose statistics a token counts in; -1 for none (padding).  Tokens
            of a group are best side by side: a block of tokens takes one round for each group from its lowest to its
            highest.
        n_groups: how many groups there are.

    Returns:
        weights (T, k) in fp32 or wider, experts (T, k) int64, the likeliest first, and (n_groups, E) each: how often a
        group's tokens chose an expert, and the sum of its score over them.  Weights and sums have gradients.

    Raises:
        ValueError: a k that E does not allow, or groups without their number.
    """
    T, E = logits.shape
    if not 1 <= k <= E:
        raise ValueError(f"k is {k}; with {E} experts it must be from 1 to {E}")
    if (group is None) != (n_groups == 0) or (group is not None and group.shape != (T,)):
        raise ValueError(f"group must be ({T},) with n_groups > 0, or None with 0; n_groups is {n_groups}")
    return choose_and_count(logits.contiguous(), k, norm, None if group is None else group.contiguous(), n_groups)
