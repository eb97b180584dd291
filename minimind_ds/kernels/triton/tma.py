"""Hopper's forms of the experts' kernels: operands come through tensor descriptors (TMA) from rows in sorted order.

A copy is then one instruction of one thread: no addresses, masks or tokens in the loops over a sum.  That asks for
sorted copies of x and dy, made by sort_rows_kernel.  A descriptor does not know where an expert's rows end:

- Kernels over rows read on into the next expert's rows and do not store what they made of them.
- weight_gradient_tma_kernel sums rounds of `TAIL` rows.  Behind its operands' M sorted rows lie TAIL rows for each
  expert: what is left of its rows after whole rounds, then zeros.

Warp specialisation is not used: where Triton 3.6 splits a tile between two groups of warps, the halves are copied
through a descriptor of the whole (3.7 refuses to compile that).

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/form_facts.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import SWIZZLE, gate_and_up, halves, swiglu, swiglu_gradient


@triton.jit(do_not_specialize=["M", "row_blocks"])
def sort_rows_kernel(x_ptr, out_ptr, order_ptr, offsets_ptr, M, row_blocks, K: tl.constexpr, WIDTH: tl.constexpr,
                     TAIL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Programs below row_blocks copy x's rows (by token) to out (sorted); the others fill out's tails from x.

    row_blocks is 0 where x is out, sorted already.  out is (M + E * TAIL, WIDTH).
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = tl.arange(0, ROWS)
    if program < row_blocks:
        to = program * ROWS + within
        source = tl.load(order_ptr + to, mask=to < M, other=0) // K
        there, stored = to < M, to < M
    else:
        tail = (program - row_blocks) * ROWS
        to = M + tail + within
        first, end = tl.load(offsets_ptr + tail // TAIL), tl.load(offsets_ptr + tail // TAIL + 1)
        place = first + (end - first) // TAIL * TAIL + tail % TAIL + within
        there, stored = place < end, within >= 0
        if row_blocks > 0:
            source = tl.load(order_ptr + place, mask=there, other=0) // K
        else:
            source = place
    inside = (column < WIDTH)[None, :]
    rows = tl.load(x_ptr + source.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=there[:, None] & inside,
                   other=0.0)
    tl.store(out_ptr + to.to(tl.int64)[:, None] * WIDTH + column[None, :], rows, mask=stored[:, None] & inside)


@triton.jit
def row_block_of(program, blocks_ptr, n_blocks, COLUMN_BLOCKS: tl.constexpr):
    """grouped_gemm.row_block for any program of many: expert, first row, end row, column block."""
    group = program // (SWIZZLE * COLUMN_BLOCKS)
    height = tl.minimum(n_blocks - group * SWIZZLE, SWIZZLE)
    within = program - group * (SWIZZLE * COLUMN_BLOCKS)
    block = blocks_ptr + (group * SWIZZLE + within % height) * 4
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), within // height


@triton.jit(do_not_specialize=["n_blocks", "depth"])
def gate_up_tma_kernel(x_desc, weight_desc, gate_up_ptr, hidden_ptr, blocks_ptr, n_blocks, depth, I: tl.constexpr,
                       ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SAVE: tl.constexpr,
                       FLATTEN: tl.constexpr, ACC: tl.constexpr):
    """grouped_gemm.gate_up_kernel from sorted x (M, C), weights (E * 2 I, C).

    A program may do several tiles; with FLATTEN their sums are one loop, and the next tile is copied during an
    epilogue.
    """
    tiles = n_blocks * tl.cdiv(I, COLUMNS)
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, block = row_block_of(program, blocks_ptr, n_blocks, tl.cdiv(I, COLUMNS))
        weight_row = expert * (2 * I) + block * COLUMNS
        gate = tl.zeros([ROWS, COLUMNS], ACC)
        up = tl.zeros([ROWS, COLUMNS], ACC)
        for start in range(0, depth, DEPTH):
            x = x_desc.load([first, start])
            g = weight_desc.load([weight_row, start])
            u = weight_desc.load([weight_row + I, start])
            gate = tl.dot(x, tl.trans(g), gate, input_precision="ieee", out_dtype=ACC)
            up = tl.dot(x, tl.trans(u), up, input_precision="ieee", out_dtype=ACC)
        within = tl.arange(0, ROWS)
        valid = first + within < end
        gate_up_rows = gate_up_ptr + first.to(tl.int64) * (2 * I) + within[:, None] * (2 * I)
        hidden_rows = hidden_ptr + first.to(tl.int64) * I + within[:, None] * I
        left_gate, right_gate = halves(gate, ROWS, COLUMNS)
        left_up, right_up = halves(up, ROWS, COLUMNS)
        column = block * COLUMNS + tl.arange(0, COLUMNS // 2)
        swiglu(left_gate, left_up, gate_up_rows, hidden_rows, column, valid, I, SAVE)
        swiglu(right_gate, right_up, gate_up_rows, hidden_rows, column + COLUMNS // 2, valid, I, SAVE)


@triton.jit(do_not_specialize=["n_blocks", "M", "depth"])
def hidden_gradient_tma_kernel(dy_desc, down_desc, scale_ptr, gate_up_ptr, dgate_up_ptr, hidden_ptr, dscale_ptr,
                               order_ptr, blocks_ptr, n_blocks, M, depth, I: tl.constexpr, PARTS: tl.constexpr,
                               AHEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                               ACC: tl.constexpr):
    """grouped_gemm.hidden_gradient_kernel from sorted dy (M, C), C a multiple of DEPTH; weights (E * C, I).

    The epilogue reads a quarter of gate and up while it works on the one before; AHEAD quarters (0, 1 or 4) are read
    before the product, as scale is.  A row block of the table makes PARTS tiles of ROWS rows, next to each other.
    """
    program = tl.program_id(0)
    expert, first, end, block = row_block_of(program // PARTS, blocks_ptr, n_blocks, tl.cdiv(I, COLUMNS))
    first += program % PARTS * ROWS
    if first >= end:
        return
    within = tl.arange(0, ROWS)
    valid = first + within < end
    gate_up_rows = gate_up_ptr + first.to(tl.int64) * (2 * I) + within[:, None] * (2 * I)
    dgate_up_rows = dgate_up_ptr + first.to(tl.int64) * (2 * I) + within[:, None] * (2 * I)
    hidden_rows = hidden_ptr + first.to(tl.int64) * I + within[:, None] * I
    EVEN: tl.constexpr = I % COLUMNS == 0
    WIDTH: tl.constexpr = COLUMNS // 4
    column = block * COLUMNS + tl.arange(0, WIDTH)
    choice = tl.load(order_ptr + tl.minimum(first + within, end - 1))
    scale = tl.load(scale_ptr + choice).to(ACC)
    if AHEAD > 0:
        gate_0, up_0 = gate_and_up(gate_up_rows, column, valid, I, EVEN)
    if AHEAD > 1:
        gate_1, up_1 = gate_and_up(gate_up_rows, column + WIDTH, valid, I, EVEN)
        gate_2, up_2 = gate_and_up(gate_up_rows, column + 2 * WIDTH, valid, I, EVEN)
        gate_3, up_3 = gate_and_up(gate_up_rows, column + 3 * WIDTH, valid, I, EVEN)
    dhidden = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, depth, DEPTH):
        dy = dy_desc.load([first, start])
        w = down_desc.load([expert * depth + start, block * COLUMNS])
        dhidden = tl.dot(dy, w, dhidden, input_precision="ieee", out_dtype=ACC)
    if AHEAD == 0:
        gate_0, up_0 = gate_and_up(gate_up_rows, column, valid, I, EVEN)
    left, right = halves(dhidden, ROWS, COLUMNS)
    quarter_0, quarter_1 = halves(left, ROWS, COLUMNS // 2)
    quarter_2, quarter_3 = halves(right, ROWS, COLUMNS // 2)
    if AHEAD < 2:
        gate_1, up_1 = gate_and_up(gate_up_rows, column + WIDTH, valid, I, EVEN)
    dscale = swiglu_gradient(quarter_0, gate_0, up_0, scale, dgate_up_rows, hidden_rows, column, valid, I, EVEN, ACC)
    if AHEAD < 2:
        gate_2, up_2 = gate_and_up(gate_up_rows, column + 2 * WIDTH, valid, I, EVEN)
    dscale += swiglu_gradient(quarter_1, gate_1, up_1, scale, dgate_up_rows, hidden_rows, column + WIDTH, valid, I,
                              EVEN, ACC)
    if AHEAD < 2:
        gate_3, up_3 = gate_and_up(gate_up_rows, column + 3 * WIDTH, valid, I, EVEN)
    dscale += swiglu_gradient(quarter_2, gate_2, up_2, scale, dgate_up_rows, hidden_rows, column + 2 * WIDTH, valid, I,
                              EVEN, ACC)
    dscale += swiglu_gradient(quarter_3, gate_3, up_3, scale, dgate_up_rows, hidden_rows, column + 3 * WIDTH, valid, I,
                              EVEN, ACC)
    tl.store(dscale_ptr + block.to(tl.int64) * M + choice, dscale, mask=valid)


@triton.jit(do_not_specialize=["E", "M"])
def weight_gradient_tma_kernel(a_desc, b_desc, out_ptr, offsets_ptr, E, M, P: tl.constexpr, Q: tl.constexpr,
                               SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                               ACC: tl.constexpr):
    """grouped_gemm.weight_gradient_kernel from sorted a (M + E * DEPTH, P) and b (M + E * DEPTH, Q) with tails."""
    program = tl.program_id(0)
    p = program // tl.cdiv(Q, COLUMNS) % tl.cdiv(P, ROWS) * ROWS
    q = program % tl.cdiv(Q, COLUMNS) * COLUMNS
    expert = program // (tl.cdiv(Q, COLUMNS) * tl.cdiv(P, ROWS))
    first, last = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    end = last
    share = tl.program_id(1)
    if SPLIT > 1:
        rows = tl.cdiv(tl.cdiv(last - first, SPLIT), DEPTH) * DEPTH
        first, end = tl.minimum(first + share * rows, last), tl.minimum(first + (share + 1) * rows, last)
    out = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(first, end, DEPTH):
        row = tl.where(start + DEPTH <= last, start, M + expert * DEPTH)
        a = a_desc.load([row, p])
        b = b_desc.load([row, q])
        out = tl.dot(tl.trans(a), b, out, input_precision="ieee", out_dtype=ACC)
    p_rows, q_columns = p + tl.arange(0, ROWS), q + tl.arange(0, COLUMNS)
    pointers = out_ptr + (share * E + expert).to(tl.int64) * (P * Q) + p_rows[:, None] * Q + q_columns[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(p_rows < P)[:, None] & (q_columns < Q)[None, :])
