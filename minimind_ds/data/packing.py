"""Lengths -> rows filled to the brim -> PackedBatch, every sample still alone in its row.

Padding MiniMind's conversations to one length wastes two thirds of the arithmetic.  Here a row of `pack_len` tokens is
opened with the longest sample left and completed with the subset of the next samples (in a seeded random order) whose
lengths best fit what remains: best-fit decreasing whose "best" is over subsets, not single items, so that rows come
out full to the last token while there are samples to choose from.  Isolation is data: `position_ids` restart at every
sample, `cu_seqlens` names every sample's tokens, no label crosses a boundary.

    python -c "from minimind_ds.data.packing import pack; print(pack([5, 3, 2, 4], pack_len=8, seed=0))"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.row_search import fill_rows, repack

if TYPE_CHECKING:
    from minimind_ds.data.sample import Sample

# Larger sets are packed in blocks of samples of equal length, so that the search runs about this often at most.
MAX_ITEMS = 32768
# Sets of few rows get a second look: in them one row more or less shows.
REPACK_ROWS = 4096


class Rows(NamedTuple):
    """Rows in array form: row r holds the samples `order[offsets[r]:offsets[r + 1]]`."""

    order: np.ndarray  # (N,) int64
    offsets: np.ndarray  # (R+1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.offsets[row] : self.offsets[row + 1]]


def random_keys(n: int, *seeds: int) -> np.ndarray:
    """(n,) uint64 that depend on `seeds` and the index only: SplitMix64, the same on any machine and NumPy.

    Sorting by them is the shuffle used for everything that a resumed run has to draw again.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for seed in seeds:
            state = _mix((state ^ np.uint64(seed % 2**64)) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(state + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *seeds: int) -> np.ndarray:
    """(n,) int64, a shuffle of range(n) that depends on `seeds` only."""
    return np.argsort(random_keys(n, *seeds), kind="stable")


def pack(lengths: Sequence[int], pack_len: int, seed: int) -> list[list[int]]:
    """Rows of sample indices; every sample is in exactly one row and no row is longer than `pack_len` tokens.

    The same arguments give the same rows on any machine; another seed gives other companions and another order.

    Raises:
        ValueError: a length below 1 or above `pack_len`, with its index.
    """
    rows = pack_rows(lengths, pack_len, seed)
    order, offsets = rows.order.tolist(), rows.offsets.tolist()
    return [order[start:end] for start, end in zip(offsets, offsets[1:])]


def pack_rows(lengths: Sequence[int] | np.ndarray, pack_len: int, seed: int) -> Rows:
    """`pack` in array form, for the loader.  A million samples take under two seconds."""
    lengths_N = np.asarray(lengths, dtype=np.int64).reshape(-1)
    check_lengths(lengths_N, pack_len)
    n = len(lengths_N)
    if not n:
        return Rows(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    # Longest first, equal lengths in a seeded order: the position in this order is what "item" means below.
    order_N = permutation(n, seed, 1)
    order_N = order_N[np.argsort(-lengths_N[order_N], kind="stable")]
    row_N = _assign(lengths_N[order_N], pack_len, seed)
    n_rows = int(row_N.max()) + 1
    row_of_sample_N = np.empty(n, dtype=np.int64)
    row_of_sample_N[order_N] = permutation(n_rows, seed, 2)[row_N]
    shuffled_N = permutation(n, seed, 3)
    by_row_N = shuffled_N[np.argsort(row_of_sample_N[shuffled_N], kind="stable")]
    offsets = np.zeros(n_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of_sample_N, minlength=n_rows), out=offsets[1:])
    return Rows(by_row_N, offsets)


def check_lengths(lengths_N: np.ndarray, pack_len: int):
    if pack_len < 1:
        raise UserError(f"pack_len is {pack_len}; it must be at least 1")
    for wrong_N, what in ((lengths_N > pack_len, f"more than pack_len {pack_len}"), (lengths_N < 1, "no token")):
        if wrong_N.any():
            index = int(wrong_N.argmax())
            raise UserError(f"sample {index} has length {lengths_N[index]}: {what}")


def _assign(lengths_N: np.ndarray, pack_len: int, seed: int) -> np.ndarray:
    """(N,) row of every item; `lengths_N` falls."""
    n = len(lengths_N)
    row_N = np.full(n, -1, dtype=np.int64)
    n_rows = 0
    block = max(1, n // MAX_ITEMS)
    left_N = np.arange(n)
    if block > 1:
        # Blocks of `block` neighbours of one length, each packed as if it were one sample: `block` rows at once.
        starts_B = _blocks(lengths_N, block)
        rows = fill_rows(lengths_N[starts_B].tolist(), pack_len, permutation(len(starts_B), seed, 4).tolist(), 4096)
        item_K = starts_B[[item for items in rows for item in items]]
        first_row_K = block * np.repeat(np.arange(len(rows)), [len(items) for items in rows])
        nth_b = np.arange(block)
        row_N[item_K[:, None] + nth_b] = first_row_K[:, None] + nth_b
        n_rows = block * len(rows)
        left_N = np.flatnonzero(row_N < 0)
    lengths = lengths_N[left_N].tolist()
    rows = fill_rows(lengths, pack_len, permutation(len(left_N), seed, 5).tolist(), 0)
    if n_rows + len(rows) <= REPACK_ROWS:
        rows = repack(rows, lengths, pack_len, seed)
    item_K = left_N[[item for items in rows for item in items]]
    row_N[item_K] = n_rows + np.repeat(np.arange(len(rows)), [len(items) for items in rows])
    return row_N


def _blocks(lengths_N: np.ndarray, block: int) -> np.ndarray:
    """First items of the runs of `block` items of equal length, as many as each length has whole ones."""
    first_L = np.flatnonzero(np.diff(lengths_N, prepend=-1))
    count_L = np.diff(first_L, append=len(lengths_N))
    n_blocks_L = count_L // block
    nth_B = np.arange(n_blocks_L.sum()) - np.repeat(np.cumsum(n_blocks_L) - n_blocks_L, n_blocks_L)
    return np.repeat(first_L, n_blocks_L) + nth_B * block


@dataclass
class PackedBatch:
    """B rows of T tokens.  Segments (samples, and the padding tail of each row) are runs of the flattened B*T tokens.

    `labels[b, t]` is the target of `input_ids[b, t]`, -100 = none; the last token of a sample never has one.
    `position_ids` count from 0 in every segment.  `cu_seqlens` are the segments' bounds, from 0 to B*T; no segment
    crosses a row.  Padding has input `pad_id`, no label, and False in `real_mask_BT` (None: no padding at all).
    `labelled_index` are the flat positions that have a label, in order, so that no device has to be asked for them.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64
    cu_seqlens: torch.Tensor  # (N+1,) int32
    max_seqlen: int
    real_mask: torch.Tensor | None = None  # (B, T) bool
    labelled_index: torch.Tensor | None = None  # (n_labelled,) int64
    n_tokens: int | None = None
    n_labelled: int | None = None
    first_token: int = 0
    n_rows: int | None = None  # None: B

    def share(self, index: int, of: int) -> PackedBatch:
        """One of `of` equal runs of the flattened tokens, as one row, for ranks that share rows.

        `cu_seqlens` stay the whole batch's; `first_token` says where in it the run begins, `n_rows` how many rows the
        whole batch has; positions, labels, mask and counts are the run's own.

        Raises:
            ValueError: a number of shares that does not divide the tokens.
        """
        total = self.input_ids.numel()
        if total % of:
            raise UserError(f"{total} tokens cannot be cut into {of} equal shares")
        run = slice(index * (total // of), (index + 1) * (total // of))
        cut = {name: getattr(self, name).flatten()[run][None] for name in ("input_ids", "labels", "position_ids")}
        real = None if self.real_mask is None else self.real_mask.flatten()[run][None]
        labelled_index = (cut["labels"].flatten() != IGNORE).nonzero().flatten()
        return PackedBatch(**cut, cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, real_mask=real,
                           labelled_index=labelled_index, n_labelled=len(labelled_index),
                           n_tokens=total // of if real is None else int(real.sum()), first_token=run.start,
                           n_rows=self.input_ids.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on a device.  `cu_seqlens` stays on the CPU, where kernels plan their work without waiting."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        moved.cu_seqlens = self.cu_seqlens
        return moved

    def pin_memory(self) -> PackedBatch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PackedBatch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def collate(rows: list[list[Sample]], pack_len: int, pad_id: int = 0) -> PackedBatch:
    """Lay samples out as rows of `pack_len` tokens.  An empty row is all padding.

    Raises:
        ValueError: a row longer than `pack_len`, or no row at all.
    """
    input_ids, labels, lengths = [], [], []
    for row in rows:
        lengths.append(np.array([len(sample.input_ids) for sample in row], dtype=np.int64))
        for sample in row:
            assert len(sample.input_ids) == len(sample.labels)
            input_ids.append(sample.input_ids.numpy())
            labels.append(sample.labels.numpy())
    none = [np.zeros(0, dtype=np.int64)]
    return lay_out(np.concatenate(input_ids or none), np.concatenate(labels or none), lengths, pack_len, pad_id)


def lay_out(input_ids_N: np.ndarray, labels_N: np.ndarray, lengths: list[np.ndarray], pack_len: int,
            pad_id: int) -> PackedBatch:
    """`collate` for tokens that lie one after another; `lengths` holds the samples' lengths, an array for each row."""
    n_rows = len(lengths)
    if not n_rows:
        raise UserError("a batch needs at least one row")
    filled_B = np.array([row.sum() for row in lengths], dtype=np.int64)
    if filled_B.max() > pack_len:
        raise UserError(f"row {int(filled_B.argmax())} has {filled_B.max()} tokens, more than pack_len {pack_len}")
    # A row's padding tail is one more segment; a full row has none.
    segments = [n for row, filled in zip(lengths, filled_B) for n in (*row, pack_len - filled) if n]
    bounds = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum(segments, out=bounds[1:])
    assert bounds[-1] == n_rows * pack_len
    position_ids_F = np.arange(n_rows * pack_len) - np.repeat(bounds[:-1], segments)
    real_BT = np.arange(pack_len)[None, :] < filled_B[:, None]
    input_ids_BT = np.full((n_rows, pack_len), pad_id, dtype=np.int64)
    input_ids_BT[real_BT] = input_ids_N
    labels_BT = np.full((n_rows, pack_len), IGNORE, dtype=np.int64)
    labels_BT[real_BT] = labels_N
    assert (labels_BT.reshape(-1)[bounds[1:] - 1] == IGNORE).all(), "a sample's last token has a label"
    labelled_index = np.flatnonzero(labels_BT != IGNORE)
    n_tokens = int(filled_B.sum())
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids_BT),
        labels=torch.from_numpy(labels_BT),
        position_ids=torch.from_numpy(position_ids_F.reshape(n_rows, pack_len)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(max(segments)),
        real_mask=None if n_tokens == n_rows * pack_len else torch.from_numpy(real_BT),
        labelled_index=torch.from_numpy(labelled_index),
        n_tokens=n_tokens,
        n_labelled=len(labelled_index),
    )
