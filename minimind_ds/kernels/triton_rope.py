"""QK-norm and rotary embedding in one Triton kernel each way: queries and keys are read once and written once.

What it stands for is RMSNorm over a head (MiniMind's: the weight multiplies in fp32) and then the rotation of halves,
as in reference.py, without the rounding to bf16 between the two.  Backward reads the inputs again and recomputes
1 / rms, which costs less than storing it; the weights' gradients are partial sums per program, added in a fixed order.
Against separate operations it saves a write and a read of q and k each way.

    python -m pytest tests/test_triton_rope.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import on, rows

# Rows (a row is one head of one token) of a tile forward and backward, and tiles that a backward program goes through.
ROWS, BACK_ROWS, TILES = 32, 16, 16
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


@triton.jit
def rotate_rows(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, block, n_rows, EPS: tl.constexpr, STRIDE: tl.constexpr,
                HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
                ACC: tl.constexpr):
    token, after, offset, mask = tile_of(block, n_rows, STRIDE, HEADS, D, HALF, ROWS)
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


@triton.jit
def rotate_rows_back(dout_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partial_ptr, program, n_rows,
                     EPS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                     HALF: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, NORM: tl.constexpr,
                     ACC: tl.constexpr):
    column = tl.arange(0, HALF)
    if NORM:
        weight_a = tl.load(weight_ptr + column, mask=column < D // 2, other=0.0).to(ACC)[None, :]
        weight_b = tl.load(weight_ptr + D // 2 + column, mask=column < D // 2, other=0.0).to(ACC)[None, :]
        dweight_a = tl.zeros([ROWS, HALF], ACC)
        dweight_b = tl.zeros([ROWS, HALF], ACC)
    for turn in range(0, TILES):
        token, after, offset, mask = tile_of(program * TILES + turn, n_rows, STRIDE, HEADS, D, HALF, ROWS)
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


@triton.jit(do_not_specialize=["T", "q_programs"])
def rope_kernel(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, q_programs,
                EPS: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """The first programs take the queries' rows, the others the keys'."""
    block = tl.program_id(0)
    if block < q_programs:
        rotate_rows(q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, block, T.to(tl.int64) * H, EPS, Q_STRIDE, H, D,
                    HALF, ROWS, NORM, ACC)
    else:
        rotate_rows(k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, block - q_programs, T.to(tl.int64) * HKV, EPS,
                    K_STRIDE, HKV, D, HALF, ROWS, NORM, ACC)


@triton.jit(do_not_specialize=["T", "q_programs"])
def rope_gradient_kernel(dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr,
                         dk_ptr, q_partial_ptr, k_partial_ptr, T, q_programs, EPS: tl.constexpr,
                         Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                         D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
                         NORM: tl.constexpr, ACC: tl.constexpr):
    """Gradients of q and k, and each program's share of the weights' (programs, D)."""
    program = tl.program_id(0)
    if program < q_programs:
        rotate_rows_back(dq_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_ptr, q_partial_ptr, program,
                         T.to(tl.int64) * H, EPS, Q_STRIDE, H, D, HALF, ROWS, TILES, NORM, ACC)
    else:
        rotate_rows_back(dk_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_ptr, k_partial_ptr,
                         program - q_programs, T.to(tl.int64) * HKV, EPS, K_STRIDE, HKV, D, HALF, ROWS, TILES, NORM,
                         ACC)


def constants(q: Tensor, k: Tensor, norm: bool, eps: float, rows_of_tile: int) -> dict:
    D = q.shape[2]
    return dict(EPS=eps, Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), H=q.shape[1], HKV=k.shape[1], D=D,
                HALF=triton.next_power_of_2(D // 2), ROWS=rows_of_tile, NORM=norm,
                ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, num_warps=4, enable_fp_fusion=True)


@torch.library.custom_op("minimind_ds::qk_norm_rope", mutates_args=())
def forward(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
            eps: float) -> tuple[Tensor, Tensor]:
    """q (T, H, D), k (T, Hkv, D), weights (D,), cos and sin (T, D / 2) -> both, normalised and rotated."""
    q, k, cos, sin = rows(q), rows(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_programs, k_programs = (triton.cdiv(x.shape[0] * x.shape[1], ROWS) for x in (q, k))
    norm = q_weight is not None
    with on(q.device):
        rope_kernel[(q_programs + k_programs,)](
            q, k, q_weight if norm else q, k_weight if norm else k, cos, sin, q_out, k_out, q.shape[0], q_programs,
            **constants(q, k, norm, eps, ROWS))
    return q_out, k_out


@torch.library.custom_op("minimind_ds::qk_norm_rope_backward", mutates_args=())
def backward(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
             cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, and the weights' gradients (D,), empty without weights."""
    q, k, cos, sin, dq_out, dk_out = rows(q), rows(k), cos.contiguous(), sin.contiguous(), *(
        x.contiguous() for x in (dq_out, dk_out))
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_programs, k_programs = (triton.cdiv(x.shape[0] * x.shape[1], BACK_ROWS * TILES) for x in (q, k))
    norm, D = q_weight is not None, q.shape[2]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    partials = [torch.empty(n if norm else 0, D if norm else 0, dtype=accumulate, device=q.device)
                for n in (q_programs, k_programs)]
    with on(q.device):
        rope_gradient_kernel[(q_programs + k_programs,)](
            dq_out, dk_out, q, k, q_weight if norm else q, k_weight if norm else k, cos, sin, dq, dk,
            *(partials if norm else (dq, dk)), q.shape[0], q_programs, TILES=TILES,
            maxnreg=REGISTERS if q.dtype == torch.float32 else None, **constants(q, k, norm, eps, BACK_ROWS))
    dtypes = (q_weight.dtype, k_weight.dtype) if norm else (accumulate, accumulate)
    return dq, dk, *(partial.sum(0).to(dtype) for partial, dtype in zip(partials, dtypes))


@forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@backward.register_fake
def _(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps):
    weights = [x.new_empty(x.shape) if x is not None else q.new_empty(0) for x in (q_weight, k_weight)]
    return q.new_empty(q.shape), k.new_empty(k.shape), *weights


def save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, dq_out: Tensor, dk_out: Tensor):
    q_weight = ctx.saved_tensors[2]
    dq, dk, dq_weight, dk_weight = backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps)
    if q_weight is None:
        dq_weight = dk_weight = None
    return dq, dk, dq_weight, dk_weight, None, None, None


forward.register_autograd(gradients, setup_context=save)


def qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
                 eps: float) -> tuple[Tensor, Tensor]:
    """rotate(rms_norm(q)), rotate(rms_norm(k)); without weights (both None) only the rotation.

    Args:
        q: (T, H, D).  k: (T, Hkv, D).  q_weight, k_weight: (D,).  cos, sin: (T, D / 2).

    Raises:
        ValueError: shapes that do not fit, or one weight without the other.
    """
    (T, _, D), half = q.shape, (q.shape[0], q.shape[2] // 2)
    if D % 2 or k.shape[::2] != (T, D) or cos.shape != half or sin.shape != half:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} "
                         "do not fit each other")
    if (q_weight is None) != (k_weight is None) or any(
            weight is not None and weight.shape != (D,) for weight in (q_weight, k_weight)):
        raise ValueError(f"q and k are both normalised, with weights of {D}, or neither is")
    return forward(q, k, q_weight, k_weight, cos, sin, eps)
