"""Choices of experts sorted by expert on the device: a stable counting sort in two kernels, and the row blocks' table.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/moe_facts.py -k sort
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# One-hot matrices of this many numbers are counted at a time, by as many programs as a GPU runs at once.
ONE_HOT = 2048
PROGRAMS = 128


class Plan(NamedTuple):
    """Who computes what, all of it on the device.

    order: (M,) int32, sorted position -> choice t * K + k.
    offsets: (E + 1,) int32, where each expert's positions start.
    blocks: (n, 4) int32 of expert, first position, end position, 0: at most `rows` positions of one expert.  As many
        as there can be; those left over are empty.
    """

    order: Tensor
    offsets: Tensor
    blocks: Tensor


@triton.jit
def one_hot(experts_ptr, m, end, E_PAD: tl.constexpr):
    """(BLOCK, E_PAD) int32, 1 where choice m is this expert."""
    expert = tl.load(experts_ptr + m, mask=m < end, other=-1)
    return (expert[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["M", "span"])
def count_kernel(experts_ptr, counts_ptr, M, span, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """counts (programs, E_PAD): how often each expert was chosen among a program's `span` choices."""
    program = tl.program_id(0)
    end = tl.minimum((program + 1) * span, M)
    counts = tl.zeros([E_PAD], tl.int32)
    for first in range(program * span, end, BLOCK):
        counts += tl.sum(one_hot(experts_ptr, first + tl.arange(0, BLOCK), end, E_PAD), 0)
    tl.store(counts_ptr + program * E_PAD + tl.arange(0, E_PAD), counts)


@triton.jit
def write_blocks(blocks_ptr, n_blocks, counts, starts, program, n_programs, ROWS: tl.constexpr, E_PAD: tl.constexpr,
                 BLOCK: tl.constexpr):
    """This program's part of the table of row blocks."""
    blocks = tl.cdiv(counts, ROWS)
    block_ends = tl.cumsum(blocks)
    block_starts = block_ends - blocks
    for lowest in range(program * BLOCK, n_blocks, n_programs * BLOCK):
        block = lowest + tl.arange(0, BLOCK)
        # Exactly one expert is `mine`, or none.
        mine = (block[:, None] >= block_starts[None, :]) & (block[:, None] < block_ends[None, :])
        first = tl.where(mine, starts[None, :] + (block[:, None] - block_starts[None, :]) * ROWS, 0)
        end = tl.where(mine, tl.minimum(first + ROWS, (starts + counts)[None, :]), 0)
        expert = tl.where(mine, tl.arange(0, E_PAD)[None, :], 0)
        entry, used = blocks_ptr + block * 4, block < n_blocks
        tl.store(entry, tl.sum(expert, 1), mask=used)
        tl.store(entry + 1, tl.sum(first, 1), mask=used)
        tl.store(entry + 2, tl.sum(end, 1), mask=used)


@triton.jit(do_not_specialize=["M", "span", "n_programs", "n_blocks"])
def place_kernel(experts_ptr, counts_ptr, order_ptr, offsets_ptr, blocks_ptr, M, span, n_programs, n_blocks,
                 E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Everything of Plan, from the programs' counts."""
    program = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    counts = tl.zeros([E_PAD], tl.int32)
    earlier = tl.zeros([E_PAD], tl.int32)
    for lowest in range(0, n_programs, CHUNK):
        other = lowest + tl.arange(0, CHUNK)[:, None]
        part = tl.load(counts_ptr + other * E_PAD + expert[None, :], mask=other < n_programs, other=0)
        counts += tl.sum(part, 0)
        earlier += tl.sum(tl.where(other < program, part, 0), 0)
    starts = tl.cumsum(counts) - counts
    if program == 0:
        tl.store(offsets_ptr + expert, starts, mask=expert < E)
        tl.store(offsets_ptr + E, tl.sum(counts))
    write_blocks(blocks_ptr, n_blocks, counts, starts, program, n_programs, ROWS, E_PAD, BLOCK)
    place = starts + earlier
    end = tl.minimum((program + 1) * span, M)
    for first in range(program * span, end, BLOCK):
        m = first + tl.arange(0, BLOCK)
        hits = one_hot(experts_ptr, m, end, E_PAD)
        position = tl.sum(hits * (place[None, :] + tl.cumsum(hits, 0) - hits), 1)
        tl.store(order_ptr + position, m, mask=m < end)
        place += tl.sum(hits, 0)


def blocks_at_most(M: int, E: int, rows: int) -> int:
    """Row blocks of M choices: every expert may leave one block short of rows, by all but one of them."""
    return (M + E * (rows - 1)) // rows


def plan(experts: Tensor, E: int, rows: int, *, programs: int = PROGRAMS) -> Plan:
    """Sorts choices by expert, stably (choices of one expert stay in their order), without a host-device wait.

    Args:
        experts: (T, K) integers in [0, E).
        E: how many experts there are.
        rows: how many sorted choices make a row block, at most.
        programs: how many programs share the work; the result does not depend on it.
    """
    experts = experts.contiguous()
    M, device = experts.numel(), experts.device
    E_PAD = max(2, triton.next_power_of_2(E))
    BLOCK = max(16, ONE_HOT // E_PAD)
    span = triton.cdiv(triton.cdiv(M, programs), BLOCK) * BLOCK
    used = max(1, triton.cdiv(M, max(span, 1)))
    n_blocks = blocks_at_most(M, E, rows)
    counts = torch.empty(used, E_PAD, dtype=torch.int32, device=device)
    made = Plan(torch.empty(M, dtype=torch.int32, device=device), torch.empty(E + 1, dtype=torch.int32, device=device),
                torch.empty(n_blocks, 4, dtype=torch.int32, device=device))
    count_kernel[(used,)](experts, counts, M, span, E_PAD=E_PAD, BLOCK=BLOCK)
    place_kernel[(used,)](experts, counts, *made, M, span, used, n_blocks, E=E, E_PAD=E_PAD, BLOCK=BLOCK,
                          CHUNK=max(1, min(64, ONE_HOT // E_PAD)), ROWS=rows)
    return made
