"""The rest of the step in Triton: residual sum + RMSNorm, SwiGLU, and the loss of a token with its gradient.

All of it is bound by memory: each kernel reads its inputs once and writes its results once, rounds where the reference
rounds, computes in fp32 between, and recomputes in backward what costs less than storing it.  Sums over tokens (the
norms' weights) are partial sums per program, added in a fixed order: two runs give the same bits.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/elementwise_facts.py
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on
from .operator import for_compile, operator

# Numbers of a norm's tile forward and backward, and tiles that a backward program goes through.
TILE, BACK_TILE, TILES = 4096, 2048, 8
# Numbers of a SwiGLU block, widest block of logits.
BLOCK, LOGITS = 1024, 8192


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["n"])
def norm_kernel(x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, n, EPS: tl.constexpr, C: tl.constexpr,
                C_PAD: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """y (n, C), and x + residual (n, C) if ADD."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, C_PAD)
    inside = (row < n)[:, None] & (column < C)[None, :]
    place = row[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    if ADD:
        x = (x.to(ACC) + tl.load(residual_ptr + place, mask=inside, other=0.0).to(ACC)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, x, mask=inside)
    x = x.to(ACC)
    scale = tl.rsqrt(tl.sum(x * x, 1) / C + EPS)[:, None]
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + place, (weight * (x * scale)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def norm_gradient_kernel(dy_ptr, dsum_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, n, EPS: tl.constexpr,
                         C: tl.constexpr, C_PAD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
                         ADD: tl.constexpr, ACC: tl.constexpr):
    """dx (n, C), dsum included if ADD, and each program's share of the weight's gradient (programs, C)."""
    column = tl.arange(0, C_PAD)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros([ROWS, C_PAD], ACC)
    for turn in range(0, TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + turn) * ROWS + tl.arange(0, ROWS)
        inside = (row < n)[:, None] & (column < C)[None, :]
        place = row[:, None] * C + column[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(ACC)
        scale = tl.rsqrt(tl.sum(x * x, 1) / C + EPS)[:, None]
        x = x * scale
        dweight += dy * x
        dy = dy * weight
        dx = (dy - x * (tl.sum(dy * x, 1) / C)[:, None]) * scale
        if ADD:
            dx += tl.load(dsum_ptr + place, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + column, tl.sum(dweight, 0), mask=column < C)


@triton.jit(do_not_specialize=["n"])
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, n, I: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """y (n, I).

    Where the mask ends is a multiple of the constant I, so that the compiler sees whole 16 bytes inside or outside of
    it, for any n.  An end of which it knows nothing makes it load and store number by number.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n.to(tl.int64) * I
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(ACC)
    tl.store(y_ptr + place, (gate / (1 + tl.exp(-gate)) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def swiglu_gradient_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, I: tl.constexpr, BLOCK: tl.constexpr,
                           ACC: tl.constexpr):
    """dgate and dup (n, I); the mask is swiglu_kernel's."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n.to(tl.int64) * I
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(ACC)
    share = 1 / (1 + tl.exp(-gate))
    dgate = dy * up * share * (1 + gate * (1 - share))
    tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + place, (dy * (gate * share)).to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def token_loss_kernel(logits_ptr, labels_ptr, losses_ptr, V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One program a row: its loss, and softmax - one_hot in the logits' place.

    V up to BLOCK is read once and stays in registers; a larger V is read twice, part by part.  No static_range there:
    the compiler would load all parts ahead, at the cost of a second block on the SM.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if V <= BLOCK:
        column = tl.arange(0, BLOCK)
        place = logits_ptr + row * V + column
        logits = tl.load(place, mask=column < V, other=float("-inf")).to(ACC)
        most = tl.max(logits, 0)
        powers = tl.exp(logits - most)
        total = tl.sum(powers, 0)
        picked = tl.sum(tl.where(column == label, logits, 0.0), 0)
        share = powers / total - tl.where(column == label, 1.0, 0.0)
        tl.store(place, share.to(logits_ptr.dtype.element_ty), mask=column < V)
    else:
        most = tl.full([], float("-inf"), ACC)
        total = tl.zeros([], ACC)
        picked = tl.zeros([], ACC)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * V + column, mask=column < V, other=float("-inf")).to(ACC)
            higher = tl.maximum(most, tl.max(logits, 0))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(logits - higher), 0)
            picked += tl.sum(tl.where(column == label, logits, 0.0), 0)
            most = higher
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            place = logits_ptr + row * V + column
            logits = tl.load(place, mask=column < V, other=float("-inf")).to(ACC)
            share = tl.exp(logits - most) / total - tl.where(column == label, 1.0, 0.0)
            tl.store(place, share.to(logits_ptr.dtype.element_ty), mask=column < V)
    tl.store(losses_ptr + row, most - picked + tl.log(total))


def norm_constants(x: Tensor, eps: float, tile: int) -> dict:
    C = x.shape[-1]
    C_PAD = triton.next_power_of_2(C)
    return dict(EPS=eps, C=C, C_PAD=C_PAD, ROWS=max(1, tile // C_PAD), ACC=accumulator(x.dtype), num_warps=4)


def apply_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> x + residual (x itself without one) and its norm."""
    n, constants, add = x.numel() // x.shape[-1], norm_constants(x, eps, TILE), residual is not None
    y, total = torch.empty_like(x), torch.empty_like(x) if add else x
    with on(x.device):
        norm_kernel[(triton.cdiv(n, constants["ROWS"]),)](x, residual if add else x, weight, total, y, n, ADD=add,
                                                          **constants)
    return total, y


def norm_gradient(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> dx with dsum added, dweight."""
    n, constants, add = x.numel() // x.shape[-1], norm_constants(x, eps, BACK_TILE), dsum is not None
    programs = triton.cdiv(n, constants["ROWS"] * TILES)
    dx, dy = torch.empty_like(x), dy.contiguous()
    partial = torch.empty(programs, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    with on(x.device):
        norm_gradient_kernel[(programs,)](dy, dsum.contiguous() if add else dy, x, weight, dx, partial, n,
                                          TILES=TILES, ADD=add, **constants)
    return dx, partial.sum(0).to(weight.dtype)


def save_sum(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _, residual, weight, ctx.eps = inputs
    ctx.add = residual is not None
    ctx.save_for_backward(output[0], weight)


def sum_formula(gradient, ctx, dsum: Tensor | None, dy: Tensor | None):
    dx, dweight = (dsum, None) if dy is None else gradient(dy, dsum, *ctx.saved_tensors, ctx.eps)
    return dx, dx if ctx.add else None, dweight, None


def fake_norm_gradient(dy, dsum, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


sum_and_norm = operator(
    "add_rms_norm", apply_norm, norm_gradient, save=save_sum, formula=sum_formula,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    fake_gradient=fake_norm_gradient)


def norm_alone(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return apply_norm(x, None, weight, eps)[1]


def save_norm(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


norm = operator(
    "rms_norm", norm_alone, norm_gradient, save=save_norm,
    formula=lambda gradient, ctx, dy: (*gradient(dy, None, *ctx.saved_tensors, ctx.eps), None),
    fake=lambda x, weight, eps: x.new_empty(x.shape), fake_gradient=fake_norm_gradient)


def swiglu_constants(x: Tensor) -> dict:
    return dict(I=x.shape[-1], BLOCK=BLOCK, ACC=accumulator(x.dtype), num_warps=4)


def apply_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    with on(gate.device):
        swiglu_kernel[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, math.prod(y.shape[:-1]), **swiglu_constants(y))
    return y


def swiglu_gradient(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    with on(gate.device):
        swiglu_gradient_kernel[(triton.cdiv(dy.numel(), BLOCK),)](
            dy.contiguous(), gate, up, dgate, dup, math.prod(dy.shape[:-1]), **swiglu_constants(dy))
    return dgate, dup


gated = operator(
    "swiglu", apply_swiglu, swiglu_gradient, save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    formula=lambda gradient, ctx, dy: gradient(dy, *ctx.saved_tensors),
    fake=lambda gate, up: gate.new_empty(gate.shape),
    fake_gradient=lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


def apply_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    block = min(LOGITS, triton.next_power_of_2(V))
    if n:
        with on(logits.device):
            token_loss_kernel[(n,)](logits, labels, losses, V=V, BLOCK=block, ACC=accumulator(logits.dtype),
                                    num_warps=8 if block > 2048 else 4)
    return losses


in_place_losses = for_compile("token_losses", apply_token_losses, mutates=("logits",), fake=lambda logits, labels: (
    logits.new_empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, (..., C)."""
    return norm(x.contiguous(), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + residual (x itself without one), and rms_norm(total); all (..., C)."""
    x = x.contiguous()
    if residual is None and torch.compiler.is_compiling():
        # An operator may not return what it was given.  Then the compiler adds x's two gradients.
        return x, norm(x, weight, eps)
    return sum_and_norm(x, None if residual is None else residual.contiguous(), weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any shape; rounded once, where PyTorch's own two operations round twice."""
    return gated(gate.contiguous(), up.contiguous())


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, V), labels (n,) in [0, V) -> cross-entropy (n,) in fp32 or wider; the logits become its gradient."""
    assert logits.is_contiguous()
    return in_place_losses(logits, labels), logits
