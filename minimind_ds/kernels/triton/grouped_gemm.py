"""The kernels of experts.py: products of rows sorted by expert with their experts' weights, and back.

A program takes a block of rows from the table that sort.py made (all of one expert, or none) and a block of
columns.  `order` says which choice t * K + k stands where: x and dy are gathered through it, results are scattered.
Programs go through SWIZZLE row blocks for each column block, so that weights are read while they are in the cache.
Offsets that can pass 2^31 are 64-bit; what lies within a block, or within one expert's weights, is 32-bit.  `depth`,
the length of a sum, is also a run-time argument: loops of known length are unrolled until their registers spill.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/moe_facts.py
"""

from __future__ import annotations

import triton
import triton.language as tl

# Row blocks that share their expert's columns while these are in the cache.
SWIZZLE = tl.constexpr(8)


@triton.jit
def row_block(blocks_ptr, n_blocks, COLUMN_BLOCKS: tl.constexpr):
    """-> expert, first row, end row, column block of this program; the rows are empty where it has no work."""
    program = tl.program_id(0)
    group = program // (SWIZZLE * COLUMN_BLOCKS)
    height = tl.minimum(n_blocks - group * SWIZZLE, SWIZZLE)
    within = program % (SWIZZLE * COLUMN_BLOCKS)
    block = blocks_ptr + (group * SWIZZLE + within % height) * 4
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), within // height


@triton.jit
def tile(base, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The (rows, columns) of a matrix with WIDTH columns.  EVEN: all of them are inside, nothing to mask."""
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def rows_tile(pointers_M1, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns of rows given by pointers, all of them real: a block's last rows are read again instead of masked."""
    if EVEN:
        return tl.load(pointers_M1 + columns[None, :])
    return tl.load(pointers_M1 + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def swiglu(gate, up, gate_up_rows, hidden_rows, column, valid, I: tl.constexpr, SAVE: tl.constexpr):
    """Epilogue of gate_up_kernel for the columns given."""
    mask = valid[:, None] & (column < I)[None, :]
    dtype = hidden_rows.dtype.element_ty
    if SAVE:
        tl.store(gate_up_rows + column[None, :], gate.to(dtype), mask=mask)
        tl.store(gate_up_rows + I + column[None, :], up.to(dtype), mask=mask)
    hidden = gate / (1 + tl.exp(-gate)) * up
    tl.store(hidden_rows + column[None, :], hidden.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "depth"])
def gate_up_kernel(x_ptr, weight_ptr, gate_up_ptr, hidden_ptr, order_ptr, blocks_ptr, n_blocks, depth,
                   C: tl.constexpr, I: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   DEPTH: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr):
    """gate_up (M, 2 I) if SAVE, and hidden (M, I) = silu(gate) * up, for choices in sorted order."""
    expert, first, end, block = row_block(blocks_ptr, n_blocks, tl.cdiv(I, COLUMNS))
    if first >= end:
        return
    EVEN: tl.constexpr = C % DEPTH == 0 and I % COLUMNS == 0
    row = first + tl.arange(0, ROWS)
    token = tl.load(order_ptr + tl.minimum(row, end - 1)) // K
    x_rows = x_ptr + (token.to(tl.int64) * C)[:, None]
    gate_weight = weight_ptr + expert.to(tl.int64) * (2 * I * C)
    up_weight = gate_weight + I * C
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.zeros([ROWS, COLUMNS], ACC)
    up = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        x = rows_tile(x_rows, inner, C, C % DEPTH == 0)
        g = tile(gate_weight, column, inner, I, C, EVEN)
        u = tile(up_weight, column, inner, I, C, EVEN)
        gate = tl.dot(x, tl.trans(g), gate, input_precision="ieee", out_dtype=ACC)
        up = tl.dot(x, tl.trans(u), up, input_precision="ieee", out_dtype=ACC)
    valid = row < end
    within = tl.arange(0, ROWS)[:, None]
    gate_up_rows = gate_up_ptr + first.to(tl.int64) * (2 * I) + within * (2 * I)
    hidden_rows = hidden_ptr + first.to(tl.int64) * I + within * I
    left_gate, right_gate = halves(gate, ROWS, COLUMNS)
    left_up, right_up = halves(up, ROWS, COLUMNS)
    column = block * COLUMNS + tl.arange(0, COLUMNS // 2)
    swiglu(left_gate, left_up, gate_up_rows, hidden_rows, column, valid, I, SAVE)
    swiglu(right_gate, right_up, gate_up_rows, hidden_rows, column + COLUMNS // 2, valid, I, SAVE)


@triton.jit(do_not_specialize=["n_blocks", "depth"])
def linear_kernel(a_ptr, weight_ptr, scale_ptr, out_ptr, order_ptr, blocks_ptr, n_blocks, depth,
                  N: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr):
    """out (M, N) = a (M, D) @ weight[expert], times scale (M,) if SCALED.

    Rows of `a` are in sorted order, those of `scale` and `out` are choices.  A weight is (D, N), or (N, D) if
    TRANSPOSED.
    """
    expert, first, end, block = row_block(blocks_ptr, n_blocks, tl.cdiv(N, COLUMNS))
    if first >= end:
        return
    EVEN: tl.constexpr = D % DEPTH == 0 and N % COLUMNS == 0
    row = first + tl.arange(0, ROWS)
    inside = tl.minimum(row, end - 1)
    a_rows = a_ptr + first.to(tl.int64) * D + ((inside - first) * D)[:, None]
    weight = weight_ptr + expert.to(tl.int64) * (N * D)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        a = rows_tile(a_rows, inner, D, D % DEPTH == 0)
        if TRANSPOSED:
            w = tl.trans(tile(weight, column, inner, N, D, EVEN))
        else:
            w = tile(weight, inner, column, D, N, EVEN)
        out = tl.dot(a, w, out, input_precision="ieee", out_dtype=ACC)
    choice = tl.load(order_ptr + inside)
    if SCALED:
        out = out * tl.load(scale_ptr + choice).to(ACC)[:, None]
    pointers = out_ptr + (choice.to(tl.int64) * N)[:, None] + column[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < N)[None, :])


@triton.jit
def mask_of(valid, column, I: tl.constexpr, EVEN: tl.constexpr):
    """(rows, columns).  EVEN: all columns are inside."""
    if EVEN:
        return tl.broadcast_to(valid[:, None], [valid.shape[0], column.shape[0]])
    return valid[:, None] & (column < I)[None, :]


@triton.jit
def gate_and_up(gate_up_rows, column, valid, I: tl.constexpr, EVEN: tl.constexpr):
    mask = mask_of(valid, column, I, EVEN)
    pointers = gate_up_rows + column[None, :]
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + I, mask=mask, other=0.0)


@triton.jit
def swiglu_gradient(dhidden, gate, up, scale, dgate_up_rows, hidden_rows, column, valid, I: tl.constexpr,
                    EVEN: tl.constexpr, ACC: tl.constexpr):
    """Epilogue of the hidden gradient for the columns given; returns their share of dscale, (rows,)."""
    mask = mask_of(valid, column, I, EVEN)
    gate, up = gate.to(ACC), up.to(ACC)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    hidden = silu * up
    dscale = tl.sum(dhidden * hidden, 1)
    dtype = hidden_rows.dtype.element_ty
    tl.store(hidden_rows + column[None, :], (hidden * scale[:, None]).to(dtype), mask=mask)
    dhidden = dhidden * scale[:, None]
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dgate_up_rows + column[None, :], dgate.to(dtype), mask=mask)
    tl.store(dgate_up_rows + I + column[None, :], (dhidden * silu).to(dtype), mask=mask)
    return dscale


@triton.jit
def swiglu_gradient_of(dhidden, scale, gate_up_rows, dgate_up_rows, hidden_rows, column, valid, I: tl.constexpr,
                       ACC: tl.constexpr):
    """swiglu_gradient, gate and up read here."""
    gate, up = gate_and_up(gate_up_rows, column, valid, I, False)
    return swiglu_gradient(dhidden, gate, up, scale, dgate_up_rows, hidden_rows, column, valid, I, False, ACC)


@triton.jit(do_not_specialize=["n_blocks", "M", "depth"])
def hidden_gradient_kernel(dy_ptr, down_ptr, scale_ptr, gate_up_ptr, dgate_up_ptr, hidden_ptr, dscale_ptr, order_ptr,
                           blocks_ptr, n_blocks, M, depth, C: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
                           ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr):
    """From dy (T, C) to dgate_up (M, 2 I), scale * hidden (M, I) and this column block's share of dscale.

    dscale is (column blocks, M), by choice; everything else by sorted choice.  The epilogue takes a quarter of the
    columns at a time: four such tiles of inputs and outputs at once would not fit in the registers.
    """
    expert, first, end, block = row_block(blocks_ptr, n_blocks, tl.cdiv(I, COLUMNS))
    if first >= end:
        return
    EVEN: tl.constexpr = C % DEPTH == 0 and I % COLUMNS == 0
    row = first + tl.arange(0, ROWS)
    choice = tl.load(order_ptr + tl.minimum(row, end - 1))
    dy_rows = dy_ptr + ((choice // K).to(tl.int64) * C)[:, None]
    weight = down_ptr + expert.to(tl.int64) * (C * I)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    dhidden = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        dy = rows_tile(dy_rows, inner, C, C % DEPTH == 0)
        w = tile(weight, inner, column, C, I, EVEN)
        dhidden = tl.dot(dy, w, dhidden, input_precision="ieee", out_dtype=ACC)
    scale = tl.load(scale_ptr + choice).to(ACC)
    valid = row < end
    within = tl.arange(0, ROWS)[:, None]
    gate_up_rows = gate_up_ptr + first.to(tl.int64) * (2 * I) + within * (2 * I)
    dgate_up_rows = dgate_up_ptr + first.to(tl.int64) * (2 * I) + within * (2 * I)
    hidden_rows = hidden_ptr + first.to(tl.int64) * I + within * I
    left, right = halves(dhidden, ROWS, COLUMNS)
    WIDTH: tl.constexpr = COLUMNS // 4
    column = block * COLUMNS + tl.arange(0, WIDTH)
    quarter, next_quarter = halves(left, ROWS, COLUMNS // 2)
    dscale = swiglu_gradient_of(quarter, scale, gate_up_rows, dgate_up_rows, hidden_rows, column, valid, I, ACC)
    column += WIDTH
    dscale += swiglu_gradient_of(next_quarter, scale, gate_up_rows, dgate_up_rows, hidden_rows, column, valid, I, ACC)
    column += WIDTH
    quarter, next_quarter = halves(right, ROWS, COLUMNS // 2)
    dscale += swiglu_gradient_of(quarter, scale, gate_up_rows, dgate_up_rows, hidden_rows, column, valid, I, ACC)
    column += WIDTH
    dscale += swiglu_gradient_of(next_quarter, scale, gate_up_rows, dgate_up_rows, hidden_rows, column, valid, I, ACC)
    tl.store(dscale_ptr + block.to(tl.int64) * M + choice, dscale, mask=valid)


@triton.jit(do_not_specialize=["E"])
def weight_gradient_kernel(a_ptr, b_ptr, out_ptr, order_ptr, offsets_ptr, E, P: tl.constexpr, Q: tl.constexpr,
                           K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, EARLY: tl.constexpr,
                           SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                           ACC: tl.constexpr):
    """out (SPLIT, E, P, Q): of each expert's rows, a share's sum of a^T b; zero where there are none.

    a (M, P) and b (M, Q) are in sorted order, or (T, ...) by token where gathered.  EARLY: the next round's tokens are
    asked for before this round's rows, not behind them.
    """
    program = tl.program_id(0)
    p = program // tl.cdiv(Q, COLUMNS) % tl.cdiv(P, ROWS) * ROWS + tl.arange(0, ROWS)
    q = program % tl.cdiv(Q, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    expert = program // (tl.cdiv(Q, COLUMNS) * tl.cdiv(P, ROWS))
    first, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    share = tl.program_id(1)
    if SPLIT > 1:
        rows = tl.cdiv(tl.cdiv(end - first, SPLIT), DEPTH) * DEPTH
        first, end = tl.minimum(first + share * rows, end), tl.minimum(first + (share + 1) * rows, end)
    inner = tl.arange(0, DEPTH)
    out = tl.zeros([ROWS, COLUMNS], ACC)
    # Tokens are read one round ahead: their rows' loads then start as early as those of rows in order.
    token = tl.load(order_ptr + first + inner, mask=first + inner < end, other=0) // K
    for start in range(first, end, DEPTH):
        row = start + inner
        valid = row < end
        a_row = token if GATHER_A else row
        b_row = token if GATHER_B else row
        if EARLY:
            token = tl.load(order_ptr + row + DEPTH, mask=row + DEPTH < end, other=0) // K
        a_mask = valid[None, :] if P % ROWS == 0 else valid[None, :] & (p < P)[:, None]
        b_mask = valid[:, None] if Q % COLUMNS == 0 else valid[:, None] & (q < Q)[None, :]
        a = tl.load(a_ptr + (a_row.to(tl.int64) * P)[None, :] + p[:, None], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + (b_row.to(tl.int64) * Q)[:, None] + q[None, :], mask=b_mask, other=0.0)
        if not EARLY:
            token = tl.load(order_ptr + row + DEPTH, mask=row + DEPTH < end, other=0) // K
        out = tl.dot(a, b, out, input_precision="ieee", out_dtype=ACC)
    pointers = out_ptr + (share * E + expert).to(tl.int64) * (P * Q) + p[:, None] * Q + q[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])
