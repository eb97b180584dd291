"""A head's RMSNorm and rotary embedding in one Triton kernel each way: queries (or keys) are read and written once.

What it stands for is RMSNorm over a head (MiniMind's: the weight multiplies in fp32) and then the rotation of halves,
as in reference.py, without the rounding to bf16 between the two.  Backward reads the inputs again and recomputes
1 / rms, which costs less than storing it; the weights' gradients are partial sums per program, added in a fixed order.
Against separate operations it saves a write and a read each way.  Queries and keys are two launches: each norm's
weight belongs to a module of its own, which is how ZeRO-3 finds it.

    python -m pytest tests/kernels/test_triton_rope.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on, rows
from .operator import operator

# Rows (a row is one head of one token) of a tile forward and backward, and tiles that a backward program goes through.
ROWS, BACK_ROWS, TILES = 16, 16, 16
# A bound for the backward kernel in fp32, without which the compiler spills to fit a fifth block on an SM.
REGISTERS = 128


@triton.jit
def tile_of(block, n_rows, STRIDE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
            ROWS: tl.constexpr):
    """Rows block * ROWS.. -> first token (int64), each row's token after it, offsets (ROWS, HALF), mask."""
    first = block.to(tl.int64) * ROWS
    token = first // HEADS
    row = (first - token * HEADS).to(tl.int32) + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    mask = (first + tl.arange(0, ROWS) < n_rows)[:, None] & (column < D // 2)[None, :]
    return token, row // HEADS, row // HEADS * STRIDE + row % HEADS * D, mask


@triton.jit(do_not_specialize=["T"])
def rope_kernel(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, T, EPS: tl.constexpr, STRIDE: tl.constexpr,
                HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
                ACC: tl.constexpr):
    """out (T, HEADS, D), one program a tile of ROWS heads of tokens."""
    token, after, offset, mask = tile_of(tl.program_id(0), T.to(tl.int64) * HEADS, STRIDE, HEADS, D, HALF, ROWS)
    column = tl.arange(0, HALF)
    x = x_ptr + token * STRIDE + offset[:, None] + column[None, :]
    a, b = tl.load(x, mask=mask, other=0.0).to(ACC), tl.load(x + D // 2, mask=mask, other=0.0).to(ACC)
    angle = token * (D // 2) + after[:, None] * (D // 2) + column[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + EPS)[:, None]
        weight_a = tl.load(weight_ptr + column, mask=column < D // 2, other=0.0).to(ACC)
        weight_b = tl.load(weight_ptr + D // 2 + column, mask=column < D // 2, other=0.0).to(ACC)
        a, b = weight_a[None, :] * (a * scale), weight_b[None, :] * (b * scale)
    out = out_ptr + token * (HEADS * D) + (after * (HEADS * D) + offset - after * STRIDE)[:, None] + column[None, :]
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + D // 2, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rope_gradient_kernel(dout_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partial_ptr, T, EPS: tl.constexpr,
                         STRIDE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                         ROWS: tl.constexpr, TILES: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """dx (T, HEADS, D), and each program's share of the weight's gradient (programs, D)."""
    program = tl.program_id(0)
    column = tl.arange(0, HALF)
    if NORM:
        weight_a = tl.load(weight_ptr + column, mask=column < D // 2, other=0.0).to(ACC)[None, :]
        weight_b = tl.load(weight_ptr + D // 2 + column, mask=column < D // 2, other=0.0).to(ACC)[None, :]
        dweight_a = tl.zeros([ROWS, HALF], ACC)
        dweight_b = tl.zeros([ROWS, HALF], ACC)
    for turn in range(0, TILES):
        token, after, offset, mask = tile_of(program * TILES + turn, T.to(tl.int64) * HEADS, STRIDE, HEADS, D,
                                            HALF, ROWS)
        packed = token * (HEADS * D) + (after * (HEADS * D) + offset - after * STRIDE)[:, None] + column[None, :]
        da = tl.load(dout_ptr + packed, mask=mask, other=0.0).to(ACC)
        db = tl.load(dout_ptr + packed + D // 2, mask=mask, other=0.0).to(ACC)
        angle = token * (D // 2) + after[:, None] * (D // 2) + column[None, :]
        cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
        da, db = da * cos + db * sin, db * cos - da * sin
        if NORM:
            x = x_ptr + token * STRIDE + offset[:, None] + column[None, :]
            a, b = tl.load(x, mask=mask, other=0.0).to(ACC), tl.load(x + D // 2, mask=mask, other=0.0).to(ACC)
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + EPS)[:, None]
            a, b = a * scale, b * scale
            dweight_a += da * a
            dweight_b += db * b
            da, db = da * weight_a, db * weight_b
            share = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / D)[:, None]
            da, db = (da - a * share) * scale, (db - b * share) * scale
        tl.store(dx_ptr + packed, da.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + packed + D // 2, db.to(dx_ptr.dtype.element_ty), mask=mask)
    if NORM:
        partial = partial_ptr + program.to(tl.int64) * D + column
        tl.store(partial, tl.sum(dweight_a, 0), mask=column < D // 2)
        tl.store(partial + D // 2, tl.sum(dweight_b, 0), mask=column < D // 2)


def constants(x: Tensor, norm: bool, eps: float, rows_of_tile: int) -> dict:
    D = x.shape[2]
    return dict(EPS=eps, STRIDE=x.stride(0), HEADS=x.shape[1], D=D, HALF=triton.next_power_of_2(D // 2),
                ROWS=rows_of_tile, NORM=norm, ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=4,
                enable_fp_fusion=True)


def apply(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (T, H, D), weight (D,), cos and sin (T, D / 2) -> x normalised and rotated."""
    x, cos, sin = rows(x), cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = weight is not None
    with on(x.device):
        rope_kernel[(triton.cdiv(x.shape[0] * x.shape[1], ROWS),)](
            x, weight if norm else x, cos, sin, out, x.shape[0], **constants(x, norm, eps, ROWS))
    return out


def gradient(dout: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor,
             eps: float) -> tuple[Tensor, Tensor]:
    """-> dx, and the weight's gradient (D,), empty without a weight."""
    x, cos, sin, dout = rows(x), cos.contiguous(), sin.contiguous(), dout.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(x.shape[0] * x.shape[1], BACK_ROWS * TILES)
    norm, D = weight is not None, x.shape[2]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(programs if norm else 0, D if norm else 0, dtype=accumulate, device=x.device)
    with on(x.device):
        rope_gradient_kernel[(programs,)](
            dout, x, weight if norm else x, cos, sin, dx, partial if norm else dx, x.shape[0], TILES=TILES,
            maxnreg=REGISTERS if x.dtype == torch.float32 else None, **constants(x, norm, eps, BACK_ROWS))
    return dx, partial.sum(0).to(weight.dtype if norm else accumulate)


def save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def formula(gradient, ctx, dout: Tensor):
    dx, dweight = gradient(dout, *ctx.saved_tensors, ctx.eps)
    return dx, dweight if ctx.saved_tensors[1] is not None else None, None, None, None


norm_and_rotate = operator(
    "norm_rope", apply, gradient, save=save, formula=formula,
    fake=lambda x, weight, cos, sin, eps: x.new_empty(x.shape),
    fake_gradient=lambda dout, x, weight, cos, sin, eps: (
        x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)))


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rotate(rms_norm(x)); without a weight only the rotation.

    Args:
        x: (T, H, D).  weight: (D,) or None.  cos, sin: (T, D / 2).

    Raises:
        ValueError: shapes that do not fit.
    """
    D, half = x.shape[2], (x.shape[0], x.shape[2] // 2)
    if D % 2 or cos.shape != half or sin.shape != half or (weight is not None and weight.shape != (D,)):
        shapes = ", ".join(str(None if t is None else tuple(t.shape)) for t in (x, weight, cos, sin))
        raise ValueError(f"x, weight, cos and sin do not fit each other: {shapes}")
    return norm_and_rotate(x, weight, cos, sin, eps)
