"""Causal attention over packed documents on a GPU: three Triton kernels, no atomics, no (T, T) memory.

The method is FlashAttention-2 (arXiv:2307.08691), laid out for rows of many short documents:

- A work item is a tile of one document.  A document's result depends on its own tokens alone, bit for bit, wherever
  in the row it lies and whoever its neighbours are.
- A tile of queries is BLOCK tokens times HEADS heads that share a key head (64 rows, a warpgroup's width), so that
  grouped queries make tiles short in time: less of a tile lies above the diagonal, and keys are read once for all.
- The list of tiles is made on the CPU from `cu_seqlens`, longest documents first, and remembered on that tensor: the
  layers of a step share it, and nothing waits for the GPU.
- A head of 96 is two column blocks, 64 + 32, and not a padded 128.
- Backward is two kernels: one owns tiles of queries (dq, and rowsum(o * do) on the way), one owns tiles of keys and
  goes through all heads of their group (dk, dv).  Every output is written once, by one program: deterministic.

    python -m pytest tests/kernels/test_triton_attention.py tests/kernels/test_triton_aot.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import architecture, on, rows
from .operator import operator
from .schedule import schedule

# Softmax runs in base 2: exp2 is one instruction.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST..FIRST+WIDTH of the rows at `offsets`, (rows, WIDTH); what is not valid or past D is 0."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (column < D)[None, :]
    return tl.load(ptr + offsets[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offsets, valid, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (column < D)[None, :]
    tl.store(ptr + offsets[:, None] + column[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, T,
                     Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
                     H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                     HEADS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr,
                     ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out (T, H, D) and lse (H, T), the log2 of the softmax's denominator.  One program: BLOCK tokens, HEADS heads."""
    tile = tiles_ptr + tl.program_id(0) // (H // HEADS) * 4
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    head0 = tl.program_id(0) % (H // HEADS) * HEADS
    kv_head = head0 // (H // HKV)
    first64, start64 = first.to(tl.int64), start.to(tl.int64)
    row = tl.arange(0, HEADS * BLOCK)
    token = first + row % BLOCK
    head = head0 + row // BLOCK
    valid = token < end
    q_offsets = row % BLOCK * Q_STRIDE + head * D
    q0 = load_rows(q_ptr + first64 * Q_STRIDE, q_offsets, valid, 0, D0, D)
    acc0 = tl.zeros([HEADS * BLOCK, D0], ACC)
    if D1 > 0:
        q1 = load_rows(q_ptr + first64 * Q_STRIDE, q_offsets, valid, D0, D1, D)
        acc1 = tl.zeros([HEADS * BLOCK, D1], ACC)
    highest = tl.full([HEADS * BLOCK], float("-inf"), ACC)
    total = tl.zeros([HEADS * BLOCK], ACC)
    column = tl.arange(0, KEYS)
    # Every token sees its document's first key, so `highest` is finite from the first block on.
    for block in range(0, tl.cdiv(tl.minimum(first + BLOCK, end) - start, KEYS)):
        key = start + block * KEYS + column
        here = key < end
        k_block = k_ptr + (start64 + block * KEYS) * K_STRIDE
        v_block = v_ptr + (start64 + block * KEYS) * V_STRIDE
        k0 = load_rows(k_block, column * K_STRIDE + kv_head * D, here, 0, D0, D)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            k1 = load_rows(k_block, column * K_STRIDE + kv_head * D, here, D0, D1, D)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION, out_dtype=ACC)
        scores = tl.where(key[None, :] <= token[:, None], scores * (SCALE * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
        v0 = load_rows(v_block, column * V_STRIDE + kv_head * D, here, 0, D0, D)
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            v1 = load_rows(v_block, column * V_STRIDE + kv_head * D, here, D0, D1, D)
            acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    out = out_ptr + first64 * (H * D)
    out_offsets = row % BLOCK * (H * D) + head * D
    store_rows(out, out_offsets, valid, acc0 / total[:, None], 0, D0, D)
    if D1 > 0:
        store_rows(out, out_offsets, valid, acc1 / total[:, None], D0, D1, D)
    tl.store(lse_ptr + head.to(tl.int64) * T + token, highest + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=["T"])
def query_gradient_kernel(q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, T,
                          Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
                          H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                          HEADS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr,
                          ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dq (T, H, D) and delta (H, T) = rowsum(out * dout), which the other backward kernel reads."""
    tile = tiles_ptr + tl.program_id(0) // (H // HEADS) * 4
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    head0 = tl.program_id(0) % (H // HEADS) * HEADS
    kv_head = head0 // (H // HKV)
    first64, start64 = first.to(tl.int64), start.to(tl.int64)
    row = tl.arange(0, HEADS * BLOCK)
    token = first + row % BLOCK
    head = head0 + row // BLOCK
    valid = token < end
    q_offsets = row % BLOCK * Q_STRIDE + head * D
    offsets = row % BLOCK * (H * D) + head * D
    q0 = load_rows(q_ptr + first64 * Q_STRIDE, q_offsets, valid, 0, D0, D)
    dout0 = load_rows(dout_ptr + first64 * (H * D), offsets, valid, 0, D0, D)
    out0 = load_rows(out_ptr + first64 * (H * D), offsets, valid, 0, D0, D)
    delta = tl.sum(out0.to(ACC) * dout0.to(ACC), 1)
    dq0 = tl.zeros([HEADS * BLOCK, D0], ACC)
    if D1 > 0:
        q1 = load_rows(q_ptr + first64 * Q_STRIDE, q_offsets, valid, D0, D1, D)
        dout1 = load_rows(dout_ptr + first64 * (H * D), offsets, valid, D0, D1, D)
        out1 = load_rows(out_ptr + first64 * (H * D), offsets, valid, D0, D1, D)
        delta += tl.sum(out1.to(ACC) * dout1.to(ACC), 1)
        dq1 = tl.zeros([HEADS * BLOCK, D1], ACC)
    statistics = head.to(tl.int64) * T + token
    tl.store(delta_ptr + statistics, delta, mask=valid)
    lse = tl.load(lse_ptr + statistics, mask=valid, other=0.0)
    column = tl.arange(0, KEYS)
    for block in range(0, tl.cdiv(tl.minimum(first + BLOCK, end) - start, KEYS)):
        key = start + block * KEYS + column
        here = key < end
        k_block = k_ptr + (start64 + block * KEYS) * K_STRIDE
        v_block = v_ptr + (start64 + block * KEYS) * V_STRIDE
        k0 = load_rows(k_block, column * K_STRIDE + kv_head * D, here, 0, D0, D)
        v0 = load_rows(v_block, column * V_STRIDE + kv_head * D, here, 0, D0, D)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION, out_dtype=ACC)
        dweights = tl.dot(dout0, tl.trans(v0), input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            k1 = load_rows(k_block, column * K_STRIDE + kv_head * D, here, D0, D1, D)
            v1 = load_rows(v_block, column * V_STRIDE + kv_head * D, here, D0, D1, D)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION, out_dtype=ACC)
            dweights = tl.dot(dout1, tl.trans(v1), dweights, input_precision=PRECISION, out_dtype=ACC)
        weights = tl.exp2(scores * (SCALE * LOG2_E) - lse[:, None])
        weights = tl.where(key[None, :] <= token[:, None], weights, 0.0)
        dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(dscores, k0, dq0, input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            dq1 = tl.dot(dscores, k1, dq1, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dq_ptr + first64 * (H * D), offsets, valid, dq0 * SCALE, 0, D0, D)
    if D1 > 0:
        store_rows(dq_ptr + first64 * (H * D), offsets, valid, dq1 * SCALE, D0, D1, D)


@triton.jit
def turn_of_delta(delta_ptr, turn, kv_head, first, end, T, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """delta of the queries of a turn of key_gradient_kernel, 0 past the end."""
    head = kv_head * GROUP + turn % GROUP
    token = first + turn // GROUP * BLOCK + tl.arange(0, BLOCK)
    return tl.load(delta_ptr + head.to(tl.int64) * T + token, mask=token < end, other=0.0)


@triton.jit(do_not_specialize=["T"])
def key_gradient_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, T,
                        Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
                        H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                        BLOCK: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr,
                        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv (T, Hkv, D).  One program: KEYS keys of one key head, against all later queries of its group.

    Scores are kept transposed, (keys, queries), so that both products into dk and dv take them as they are.
    """
    tile = tiles_ptr + tl.program_id(0) // HKV * 4
    first, end = tl.load(tile), tl.load(tile + 2)
    if first >= end:
        return
    kv_head = tl.program_id(0) % HKV
    first64 = first.to(tl.int64)
    key_row = tl.arange(0, KEYS)
    key, here = first + key_row, first + key_row < end
    k_block = k_ptr + first64 * K_STRIDE + kv_head * D
    v_block = v_ptr + first64 * V_STRIDE + kv_head * D
    k0 = load_rows(k_block, key_row * K_STRIDE, here, 0, D0, D)
    v0 = load_rows(v_block, key_row * V_STRIDE, here, 0, D0, D)
    dk0 = tl.zeros([KEYS, D0], ACC)
    dv0 = tl.zeros([KEYS, D0], ACC)
    if D1 > 0:
        k1 = load_rows(k_block, key_row * K_STRIDE, here, D0, D1, D)
        v1 = load_rows(v_block, key_row * V_STRIDE, here, D0, D1, D)
        dk1 = tl.zeros([KEYS, D1], ACC)
        dv1 = tl.zeros([KEYS, D1], ACC)
    row = tl.arange(0, BLOCK)
    GROUP: tl.constexpr = H // HKV
    # Read a turn ahead: it is where a product starts from, which the compiler copies nothing ahead for.
    delta = turn_of_delta(delta_ptr, 0, kv_head, first, end, T, GROUP, BLOCK)
    for turn in range(0, tl.cdiv(end - first, BLOCK) * GROUP):
        head = kv_head * GROUP + turn % GROUP
        token = first + turn // GROUP * BLOCK + row
        valid = token < end
        token64 = first64 + turn // GROUP * BLOCK
        q_block, q_offsets = q_ptr + token64 * Q_STRIDE, row * Q_STRIDE + head * D
        dout_block, offsets = dout_ptr + token64 * (H * D), row * (H * D) + head * D
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + token, mask=valid, other=0.0)
        q0 = load_rows(q_block, q_offsets, valid, 0, D0, D)
        dout0 = load_rows(dout_block, offsets, valid, 0, D0, D)
        scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION, out_dtype=ACC)
        # The product with v starts from -delta instead of 0, which costs neither an instruction nor registers.
        minus_delta = tl.zeros([KEYS, BLOCK], ACC) - delta[None, :]
        delta = turn_of_delta(delta_ptr, turn + 1, kv_head, first, end, T, GROUP, BLOCK)
        dweights = tl.dot(v0, tl.trans(dout0), minus_delta, input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            q1 = load_rows(q_block, q_offsets, valid, D0, D1, D)
            dout1 = load_rows(dout_block, offsets, valid, D0, D1, D)
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION, out_dtype=ACC)
            dweights = tl.dot(v1, tl.trans(dout1), dweights, input_precision=PRECISION, out_dtype=ACC)
        # Queries past the end have q = dout = lse = delta = 0 and add nothing; keys past it are not stored.
        weights = tl.exp2(scores * (SCALE * LOG2_E) - lse[None, :])
        weights = tl.where(key[:, None] <= token[None, :], weights, 0.0)
        dv0 = tl.dot(weights.to(dout0.dtype), dout0, dv0, input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            dv1 = tl.dot(weights.to(dout0.dtype), dout1, dv1, input_precision=PRECISION, out_dtype=ACC)
        dscores = (weights * dweights).to(q0.dtype)
        dk0 = tl.dot(dscores, q0, dk0, input_precision=PRECISION, out_dtype=ACC)
        if D1 > 0:
            dk1 = tl.dot(dscores, q1, dk1, input_precision=PRECISION, out_dtype=ACC)
    out = first64 * (HKV * D) + kv_head * D
    offsets = key_row * (HKV * D)
    store_rows(dk_ptr + out, offsets, here, dk0 * SCALE, 0, D0, D)
    store_rows(dv_ptr + out, offsets, here, dv0, 0, D0, D)
    if D1 > 0:
        store_rows(dk_ptr + out, offsets, here, dk1 * SCALE, D0, D1, D)
        store_rows(dv_ptr + out, offsets, here, dv1, D0, D1, D)


class Config(NamedTuple):
    """One kernel's launch: rows (queries x heads) and keys of its tiles, warps, stages of loads in its loop.

    `registers` bounds a thread's: 168 where the compiler would take more than it needs and a third block on an SM
    would not fit, 255 where it would rather spill than give up that third block.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


class Layout(NamedTuple):
    """The kernels' constants for one shape: columns D as D0 + D1, and heads that share a tile."""

    D0: int
    D1: int
    HEADS: int
    PRECISION: str
    ACC: tl.dtype


def layout(H: int, HKV: int, D: int, dtype: torch.dtype) -> Layout:
    """Two powers of two that cover D, or one where two cost as much; up to four heads of a group in a tile."""
    whole = max(16, triton.next_power_of_2(D))
    first = max(16, whole // 2)
    second = max(16, triton.next_power_of_2(max(D - first, 1)))
    columns = (whole, 0) if D <= 16 or first + second >= whole else (first, second)
    group = H // HKV
    heads = min(group & -group, 4)
    wide = dtype in (torch.float32, torch.float64)
    return Layout(*columns, heads, "ieee" if wide else "tf32", tl.float64 if dtype == torch.float64 else tl.float32)


def config(kernel: str, D: int, dtype: torch.dtype, arch: int) -> Config:
    """Launch sizes of "forward", "query_gradient" or "key_gradient".

    Chosen from what compiled code needs (no spills with Triton 3.6 to 3.9, blocks on an SM) and, at D = 96, from an
    H200's times (docs/KERNELS.md).  A document's bits depend on these alone, so no tuner may pick them by the clock.
    """
    if dtype == torch.float64:
        return Config(16, 16, 4, 1)
    if dtype == torch.float32:
        return {"forward": Config(16, 32, 8, 2), "query_gradient": Config(32, 32, 8, 2),
                "key_gradient": Config(16, 32, 4, 2)}[kernel]
    if arch // 10 in (9, 10):
        return {
            "forward": Config(64, 32, 4, 3),
            "query_gradient": Config(64, 32, 4, 2),
            "key_gradient": Config(64 if D <= 64 else 32 if D <= 96 else 16, 64, 4, 3 if D > 64 else 2),
        }[kernel]
    if kernel == "key_gradient" and (32 < D <= 48 or 64 < D <= 96):
        return Config(16, 64, 4, 2, 255)
    return Config(64, 32, 4, 2, 255 if kernel != "query_gradient" and D > 96 else None)


class Launch(NamedTuple):
    """What one kernel is started with besides its tensors."""

    tiles: Tensor
    programs: int
    constants: dict


def launch(kernel: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Launch:
    (T, H, D), HKV = q.shape, k.shape[1]
    shape, sizes = layout(H, HKV, D, q.dtype), config(kernel, D, q.dtype, architecture())
    constants = dict(Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), H=H, HKV=HKV, D=D,
                     SCALE=D ** -0.5, KEYS=sizes.keys, num_warps=sizes.warps, num_stages=sizes.stages,
                     enable_fp_fusion=True, maxnreg=sizes.registers, **shape._asdict())
    if kernel == "key_gradient":
        del constants["HEADS"]
        tiles, across = schedule(cu_seqlens, T, sizes.keys, q.device), HKV
        constants["BLOCK"] = sizes.rows
    else:
        constants["BLOCK"] = sizes.rows // shape.HEADS
        tiles, across = schedule(cu_seqlens, T, constants["BLOCK"], q.device), H // shape.HEADS
    return Launch(tiles, len(tiles) * across, constants)


def apply(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, D), k and v (T, Hkv, D) -> out (T, H, D), and lse (H, T) in base 2."""
    q, k, v = rows(q), rows(k), rows(v)
    T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, T, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    work = launch("forward", q, k, v, cu_seqlens)
    with on(q.device):
        attention_kernel[(work.programs,)](q, k, v, out, lse, work.tiles, T, **work.constants)
    return out, lse


def gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
             cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq (T, H, D), dk and dv (T, Hkv, D)."""
    q, k, v, dout = rows(q), rows(k), rows(v), dout.contiguous()
    T = q.shape[0]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    with on(q.device):
        work = launch("query_gradient", q, k, v, cu_seqlens)
        query_gradient_kernel[(work.programs,)](q, k, v, out, dout, lse, delta, dq, work.tiles, T, **work.constants)
        work = launch("key_gradient", q, k, v, cu_seqlens)
        key_gradient_kernel[(work.programs,)](q, k, v, dout, lse, delta, dk, dv, work.tiles, T, **work.constants)
    return dq, dk, dv


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    # By itself, so that backward finds the schedule on the very tensor that forward left it on.
    ctx.cu_seqlens = inputs[3]
    ctx.set_materialize_grads(False)


def formula(gradient, ctx, dout: Tensor | None, _dlse):
    if dout is None:
        return None, None, None, None
    return *gradient(dout, *ctx.saved_tensors, ctx.cu_seqlens), None


packed_attention = operator(
    "packed_attention", apply, gradient, save=save, formula=formula,
    fake=lambda q, k, v, cu_seqlens: (q.new_empty(q.shape), q.new_empty(
        q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))),
    fake_gradient=lambda dout, q, k, v, out, lse, cu_seqlens: tuple(x.new_empty(x.shape) for x in (q, k, v)))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside each segment, causal; q (T, H, D), k and v (T, Hkv, D) -> (T, H, D).

    Raises:
        ValueError: dropout, a head dimension over 128 or odd, tensors of different dtypes, heads that do not divide.
    """
    (T, H, D), HKV = q.shape, k.shape[1]
    if dropout_p:
        raise ValueError(f"triton attention has no dropout (asked for {dropout_p}); use sdpa or reference")
    if D > 128 or D % 2:
        raise ValueError(f"triton attention takes an even head_dim up to 128, not {D}; use sdpa or reference")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape != v.shape or k.shape != (T, HKV, D) or H % HKV:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit each other")
    return packed_attention(q, k, v, cu_seqlens)[0]
