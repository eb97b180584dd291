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
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .host import on

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


class Route(Function):
    @staticmethod
    def forward(ctx, logits, k, norm, group, n_groups):
        (T, E), device = logits.shape, logits.device
        wide = torch.promote_types(logits.dtype, torch.float32)
        shape = dict(E=E, K=k, NORM=norm, GROUPED=group is not None, E_PAD=max(2, triton.next_power_of_2(E)),
                     TINY=TINY, ACC=tl.float64 if wide == torch.float64 else tl.float32)
        block = max(16, TILE // shape["E_PAD"])
        blocks = triton.cdiv(T, block)
        weights = torch.empty(T, k, dtype=wide, device=device)
        experts = torch.empty(T, k, dtype=torch.int64, device=device)
        # Blocks write the groups they have tokens of.
        counts, sums = torch.zeros(2, blocks, n_groups, E, dtype=wide, device=device)
        with on(logits.device):
            route_kernel[(blocks,)](logits, group, weights, experts, counts, sums, T, n_groups, BLOCK=block,
                                    K_PAD=triton.next_power_of_2(k), **shape)
        counts, sums = counts.sum(dim=0), sums.sum(dim=0)
        ctx.save_for_backward(logits, experts, group)
        ctx.n_groups, ctx.shape, ctx.block = n_groups, shape, block
        ctx.mark_non_differentiable(experts, counts)
        return weights, experts, counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _dexperts, _dcounts, dsums):
        logits, experts, group = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        with on(logits.device):
            route_gradient_kernel[(triton.cdiv(len(logits), ctx.block),)](
                logits, group, experts, dweights.contiguous(), dsums.contiguous(), dlogits, len(logits), ctx.n_groups,
                BLOCK=ctx.block, **ctx.shape)
        return dlogits, None, None, None, None


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
    return Route.apply(logits.contiguous(), k, norm, None if group is None else group.contiguous(), n_groups)
