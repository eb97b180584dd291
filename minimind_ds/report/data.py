"""What a run trained on, to look at: lengths, the first packed rows of an epoch, samples token by token.

    python launch/report.py out/sft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minimind_ds.config.errors import UserError
from minimind_ds.config.run import RunConfig
from minimind_ds.data import IGNORE
from minimind_ds.data.loader import EpochPlan, epoch_plan
from minimind_ds.data.readers import unit_of
from minimind_ds.data.sources import Mixture
from minimind_ds.data.tokenizer import Tokenizer, load_tokenizer
from minimind_ds.report.folder import RunFolder
from minimind_ds.training.prepare import PreparedRun, open_data
from minimind_ds.verify.data import learnt, printable, some

SAMPLES, ROWS, MOST_BLOCKS, BINS = 10, 12, 4000, 40
# Of a longer sample both ends are shown.
FIRST_TOKENS, LAST_TOKENS = 280, 80


class Opened(NamedTuple):
    """An epoch's samples, the plan that packs them, and their tokenizer."""

    run: RunConfig
    store: Mixture
    plan: EpochPlan
    tokenizer: Tokenizer


class Row(NamedTuple):
    """A packed row: its samples as (where, first, end), its learnt stretches as (first, end), in tokens."""

    samples: list[tuple[str, int, int]]
    learnt: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        return self.samples[-1][2]

    @property
    def learnt_tokens(self) -> int:
        return sum(end - first for first, end in self.learnt)


class Shown(NamedTuple):
    """A sample: tokens as (text, id, whether it is learnt); left_out: how many stand between the two parts."""

    where: str
    length: int
    n_learnt: int
    first: list[tuple[str, int, bool]]
    left_out: int
    last: list[tuple[str, int, bool]]


@dataclass(frozen=True)
class Data:
    """counts, edges: of the samples' lengths.  padded_fill: real tokens over places if each sample were padded to
    max_seq_len."""

    run: RunConfig
    counts: list[int]
    edges: list[float]
    n_samples: int
    n_tokens: int
    n_learnt: int
    median: float
    longest: int
    n_rows: int
    fill: float
    padded_fill: float
    rows: list[Row]
    samples: list[Shown]


def of_prepared(prepared: PreparedRun) -> Opened:
    return Opened(prepared.run, prepared.stores[0], prepared.first_plan, prepared.tokenizer)


def reopened(found: RunFolder) -> Opened:
    """The first epoch's data of a run that has ended, out of the token cache.

    Raises:
        UserError: the data, the cache or the tokenizer is not what it was, or not there.
    """
    run = found.config
    if run is None:
        raise UserError("without run.yaml nobody knows what the run read")
    kind = found.last_start.get("kind") or ("text" if run.too_long == "split" else "conversations")
    if kind not in ("text", "conversations"):
        raise UserError("starts.json does not say what the data holds")
    tokenizer = load_tokenizer(found.folder / "tokenizer")
    # What is held out by another file does not matter here.
    run = run.replace(epochs=min(run.epochs, 1), eval_path=None, eval_fraction=0 if run.eval_path else
                      run.eval_fraction, keep_best=False, patience=0)
    stores, _ = open_data(kind, run, tokenizer, build_it=False)
    plan = epoch_plan(stores[0].lengths, stores[0].labelled, pack_len=run.row_len, rows_per_step=1, seed=run.seed,
                      epoch=0, packing=run.packing)
    return Opened(run, stores[0], plan, tokenizer)


def look(opened: Opened) -> Data:
    """Raises UserError (DataError) where the token cache has changed since it was written."""
    run, store, plan, _ = opened
    lengths = np.asarray(store.lengths, dtype=np.int64)
    counts, edges = np.histogram(lengths, bins=min(BINS, max(1, int(lengths.max() - lengths.min()))))
    return Data(run, counts.tolist(), edges.tolist(), len(store), int(lengths.sum()), int(store.labelled.sum()),
                float(np.median(lengths)), int(lengths.max()), plan.n_rows, plan.fill,
                float(lengths.mean()) / run.max_seq_len, packed_rows(opened), shown_samples(opened))


def packed_rows(opened: Opened) -> list[Row]:
    """The first rows of the epoch, as many as can be drawn."""
    found, blocks = [], 0
    for number in range(min(ROWS, opened.plan.n_rows)):
        row = row_of(opened, opened.plan.packed[number])
        blocks += len(row.samples) + len(row.learnt)
        if found and blocks > MOST_BLOCKS:
            break
        found.append(row)
    return found


def row_of(opened: Opened, indices: np.ndarray) -> Row:
    samples, stretches, at = [], [], 0
    for index in indices.tolist():
        _, labels = opened.store.read([index])
        samples.append((where(opened.store, index), at, at + len(labels)))
        edges = np.flatnonzero(np.diff(learnt(labels).astype(np.int8), prepend=0, append=0))
        stretches += [(at + first, at + end) for first, end in edges.reshape(-1, 2).tolist()]
        at += len(labels)
    return Row(samples, stretches)


def where(store: Mixture, index: int) -> str:
    source = store.sources[int(store.source_of([index])[0])]
    return f"{unit_of(source.path)} {store.lines[index]} of {source.path.name}"


def shown_samples(opened: Opened) -> list[Shown]:
    """The same samples as verify.py's."""
    found = []
    for index in some(opened.store, SAMPLES, opened.run.seed).tolist():
        ids, labels = opened.store.read([index])
        tokens = list(zip(ids.tolist(), learnt(labels).tolist()))
        left_out = max(0, len(tokens) - FIRST_TOKENS - LAST_TOKENS)
        ends = (tokens[:FIRST_TOKENS], tokens[-LAST_TOKENS:]) if left_out else (tokens, [])
        first, last = ([(text_of(opened.tokenizer, i), i, told) for i, told in part] for part in ends)
        found.append(Shown(where(opened.store, index), len(ids), int((labels != IGNORE).sum()), first, left_out, last))
    return found


def text_of(tokenizer: Tokenizer, i: int) -> str:
    """A token for people: part of a character by what the vocabulary calls it, a line's end with a sign."""
    text = tokenizer.decode([i])
    if "\ufffd" in text or not text:
        text = tokenizer.piece(i) or f"<{i}>"
    return printable(text).replace("\n", "↵\n")
