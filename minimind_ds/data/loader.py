"""Which rows make up which step, who takes which of them, and the micro-batches themselves.

The plan of an epoch depends on the data, the seed, the epoch and the rows per global step, and on nothing else
(law 3 of docs/ARCHITECTURE.md): ranks, accumulation and batch size only say how a step's rows are divided.  Labelled
tokens are counted in the plan, so no rank has to ask another.  A position in the data is (epoch, step): to resume,
make the plan again and start at that step.

    python -c "from minimind_ds.data.loader import epoch_plan as p; plan = p([5, 3, 2, 4], [2, 1, 1, 2], pack_len=8,
        rows_per_step=2, seed=0, epoch=0); print(plan.rows(0), plan.facts(0))"
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minimind_ds.config.errors import UserError
from minimind_ds.data.packing import PackedBatch, Rows, check_lengths, lay_out, pack_rows, permutation, random_keys
from minimind_ds.data.store import TokenStore

# What attending to one more key costs, in units of a token's share of the matrix products: for MiniMind-3
# 12 * layers * hidden / 2 over 6 * parameters.  It only balances ranks; its exact value does not matter.
ATTENTION_COST = 1e-4


class StepFacts(NamedTuple):
    """Counts of one optimizer step, over all ranks; fill is tokens over the places in the rows that hold any."""

    n_tokens: int
    n_labelled: int
    n_rows: int
    fill: float


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The rows of one epoch in the order they are trained on, `rows_per_step` to a step; `len(plan)` counts steps.

    The last step may be short; micro_batch_rows fills it up with empty rows.
    """

    packed: Rows
    pack_len: int
    rows_per_step: int
    # (S,) int64, of every step.
    n_tokens: np.ndarray
    n_labelled: np.ndarray
    # (R,) float64, what a row costs to train on.
    cost_R: np.ndarray

    def __len__(self) -> int:
        return len(self.n_tokens)

    @property
    def n_rows(self) -> int:
        return len(self.packed)

    @property
    def fill(self) -> float:
        """Real tokens over all places in the rows."""
        return float(self.n_tokens.sum()) / max(1, self.n_rows * self.pack_len)

    def facts(self, step: int) -> StepFacts:
        n_rows = len(self._row_range(step))
        n_tokens = int(self.n_tokens[step])
        return StepFacts(n_tokens, int(self.n_labelled[step]), n_rows, n_tokens / (n_rows * self.pack_len))

    def rows(self, step: int) -> list[list[int]]:
        """The step's rows as lists of sample indices."""
        return [self.packed[row].tolist() for row in self._row_range(step)]

    def micro_batch_rows(self, step: int, rank: int, micro: int, *, ranks: int, accumulation: int,
                         batch_size: int) -> list[list[int]]:
        """The `batch_size` rows of one rank in one micro-step; empty ones are [].

        Over all ranks and micro-steps these are the step's rows, each once.  Rows of about the same cost share a
        micro-step, and within it the dearest go to the rank that has least, so that nobody waits for long.

        Raises:
            ValueError: ranks x accumulation x batch_size is not the plan's rows_per_step.
        """
        if ranks * accumulation * batch_size != self.rows_per_step:
            raise UserError(f"{ranks} ranks x {accumulation} micro-batches x {batch_size} rows are not the "
                             f"{self.rows_per_step} rows per step of the plan")
        assert 0 <= rank < ranks and 0 <= micro < accumulation
        start = self._row_range(step).start
        cost_R = self.cost_R[start : start + self.rows_per_step]
        dearest_first = np.argsort(-cost_R, kind="stable")
        share = slice(micro * ranks * batch_size, (micro + 1) * ranks * batch_size)
        mine: list[list[int]] = []
        load = [(0.0, other, 0) for other in range(ranks)]
        for row in dearest_first[share]:
            cost, taker, n_rows = heapq.heappop(load)
            if n_rows + 1 < batch_size:
                heapq.heappush(load, (cost + cost_R[row], taker, n_rows + 1))
            if taker == rank:
                mine.append(self.packed[start + row].tolist())
        return mine + [[] for _ in range(batch_size - len(mine))]

    def _row_range(self, step: int) -> range:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)} steps")
        start = step * self.rows_per_step
        return range(start, min(start + self.rows_per_step, self.n_rows))


def epoch_plan(lengths: Sequence[int] | np.ndarray, labelled: Sequence[int] | np.ndarray, *, pack_len: int,
               rows_per_step: int, seed: int, epoch: int, packing: bool = True) -> EpochPlan:
    """Pack all samples, or give each a row of its own (packing=False), in an order drawn from (seed, epoch).

    Args:
        lengths: (N,) tokens of every sample.
        labelled: (N,) labelled tokens of every sample.
        pack_len: places in a row, in tokens.
        rows_per_step: batch size x accumulation x data-parallel ranks.

    Raises:
        ValueError: a sample that is empty or longer than pack_len, or rows_per_step below 1.
    """
    if rows_per_step < 1:
        raise UserError(f"rows_per_step is {rows_per_step}; it must be at least 1")
    lengths_N, labelled_N = np.asarray(lengths, dtype=np.int64), np.asarray(labelled, dtype=np.int64)
    assert lengths_N.shape == labelled_N.shape
    if packing:
        packed = pack_rows(lengths_N, pack_len, int(random_keys(1, seed, epoch)[0]))
    else:
        check_lengths(lengths_N, pack_len)
        packed = Rows(permutation(len(lengths_N), seed, epoch, 7), np.arange(len(lengths_N) + 1))
    first_R, n_rows = packed.offsets[:-1], len(packed)

    def sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts) if len(starts) else np.zeros(0, dtype=values.dtype)

    tokens_R = sums(lengths_N[packed.order], first_R)
    first_S = np.arange(0, n_rows, rows_per_step)
    return EpochPlan(packed, pack_len, rows_per_step, n_tokens=sums(tokens_R, first_S),
                     n_labelled=sums(sums(labelled_N[packed.order], first_R), first_S),
                     cost_R=tokens_R + ATTENTION_COST * sums(lengths_N[packed.order] ** 2, first_R))


def load_micro_batch(store: TokenStore, rows: list[list[int]], pack_len: int, pad_id: int) -> PackedBatch:
    """The rows' samples as one batch: what `collate` makes of them, without making the Samples first."""
    indices = np.array([sample for row in rows for sample in row], dtype=np.int64)
    lengths = [store.lengths[row].astype(np.int64) for row in rows]
    return lay_out(*store.read(indices), lengths, pack_len, pad_id)


class Prefetcher(Iterator[PackedBatch]):
    """Makes batches in one background thread, at most `depth` ahead, in order.

    An exception while making a batch is raised by `next` in its place.  Close it, or use it as a context manager.

        with Prefetcher(load_micro_batch(store, rows, 2048, 0) for rows in all_rows) as batches:
            for batch in batches: ...

    Args:
        pin: put the batches into page-locked memory, from which a GPU copies them without waiting.
    """

    def __init__(self, batches: Iterable[PackedBatch], depth: int = 2, pin: bool = False):
        self._ready: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(batches, pin), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, batches: Iterable[PackedBatch], pin: bool):
        error = None
        try:
            for batch in batches:
                if not self._put(batch.pin_memory() if pin else batch):
                    return
        # Raised again where the batch is awaited.
        except BaseException as err:
            error = err
        self._put(_End(error))

    def _put(self, item) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> PackedBatch:
        if self._ended or self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _End):
            self._ended = True
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def close(self):
        """Stop making batches and wait until the thread has ended."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_):
        self.close()


class _End(NamedTuple):
    error: BaseException | None
