"""Host side of tma.py: sorted copies of rows, tensor descriptors, launches.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/form_facts.py
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .host import processors
from .sort import Plan
from .tma import gate_up_tma_kernel, hidden_gradient_tma_kernel, sort_rows_kernel, weight_gradient_tma_kernel

# sort_rows_kernel's tile.
ROWS, COLUMNS = 16, 256


def described(x: Tensor, *block: int) -> TensorDescriptor:
    """x, all but its last dimension in one, for copies of `block` = (rows, columns).

    A weight may be part of a flat buffer of many and begin anywhere; a descriptor's tensor begins at whole 16 bytes.
    """
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), list(block))


def fits(M: int, C: int, I: int, itemsize: int, depth: int) -> bool:
    """Whether descriptors can be made: rows of whole 16 bytes.  C: no product over it may read the next expert's."""
    return M > 0 and C % depth == 0 and C * itemsize % 16 == 0 and I * itemsize % 16 == 0


def sort_rows(x: Tensor, made: Plan, K: int, tail: int) -> Tensor:
    """x (T, C), by token -> (M + E * tail, C), sorted, and then the tails that weight_gradient needs."""
    M, E = len(made.order), len(made.offsets) - 1
    out = torch.empty(M + E * tail, x.shape[1], dtype=x.dtype, device=x.device)
    launch_sort_rows(x, out, made, K, triton.cdiv(M, ROWS), tail)
    return out


def add_tails(x: Tensor, made: Plan, tail: int):
    """Fills the last E * tail rows of x (M + E * tail, N), sorted."""
    launch_sort_rows(x, x, made, 1, 0, tail)


def launch_sort_rows(x: Tensor, out: Tensor, made: Plan, K: int, row_blocks: int, tail: int):
    E, width = len(made.offsets) - 1, x.shape[1]
    programs = row_blocks + E * tail // ROWS
    if programs:
        sort_rows_kernel[(programs, triton.cdiv(width, COLUMNS))](
            x, out, made.order, made.offsets, len(made.order), row_blocks, K=K, WIDTH=width, TAIL=max(tail, 1),
            ROWS=ROWS, COLUMNS=COLUMNS)


def gate_up(x: Tensor, weight: Tensor, gate_up: Tensor, hidden: Tensor, made: Plan, sizes, constants: dict):
    """Fills gate_up (M, 2 I), unless it is empty, and hidden (M, I) from sorted x (M, C)."""
    C, I, n, flatten = x.shape[1], hidden.shape[1], len(made.blocks), sizes.form == "persistent"
    tiles = n * triton.cdiv(I, sizes.columns)
    gate_up_tma_kernel[(min(tiles, processors(x.device)) if flatten else tiles,)](
        described(x, sizes.rows, sizes.depth), described(weight, sizes.columns, sizes.depth), gate_up, hidden,
        made.blocks, n, C, I=I, SAVE=gate_up.numel() > 0, FLATTEN=flatten, **constants)


def hidden_gradient(dy: Tensor, down: Tensor, scale: Tensor, gate_up: Tensor, dgate_up: Tensor, hidden: Tensor,
                    dscale: Tensor, made: Plan, table_rows: int, sizes, constants: dict):
    """Fills dgate_up (M, 2 I), hidden (M, I) and dscale (column blocks, M) from sorted dy (M, C).

    table_rows: how many rows made.blocks is for; sizes.rows may be a part of them.
    """
    M, C, I, n, parts = len(made.order), dy.shape[1], down.shape[2], len(made.blocks), table_rows // sizes.rows
    hidden_gradient_tma_kernel[(n * parts * triton.cdiv(I, sizes.columns),)](
        described(dy, sizes.rows, sizes.depth), described(down, sizes.depth, sizes.columns), scale, gate_up, dgate_up,
        hidden, dscale, made.order, made.blocks, n, M, C, I=I, PARTS=parts, AHEAD=sizes.ahead, **constants)


def weight_gradient(a: Tensor, b: Tensor, out: Tensor, tiles: int, made: Plan, sizes, constants: dict):
    """Fills out (shares, E, P, Q) from a (M + E * depth, P) and b (M + E * depth, Q), sorted, with their tails."""
    shares, E, P, Q = out.shape
    weight_gradient_tma_kernel[(tiles, shares)](
        described(a, sizes.depth, sizes.rows), described(b, sizes.depth, sizes.columns), out, made.offsets, E,
        len(made.order), P=P, Q=Q, SPLIT=shares, **constants)
