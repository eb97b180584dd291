"""Several files as one set of samples: how often each is seen, and where a sample came from.

A file of share 2 is seen twice an epoch, one of share 0.5 by halves: samples are taken cyclically in a seeded
order, so that after any number of epochs each was seen as often as its share says, give or take one.

    python -m pytest tests/data/test_sources.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from minimind_ds.config.errors import UserError
from minimind_ds.data.files import Source
from minimind_ds.data.packing import permutation
from minimind_ds.data.readers import unit_of
from minimind_ds.data.sample import Sample
from minimind_ds.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class Mixture:
    """The samples of an epoch, from one or more stores; used as a TokenStore is.

    picks: of each source the indices of its samples, in order, as often as they are seen.  Sample i of the mixture is
    the i-th of all picks one after another.
    """

    sources: tuple[Source, ...]
    stores: tuple[TokenStore, ...]
    picks: tuple[np.ndarray, ...]
    label: str = ""

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """(sources + 1,) where each source's samples begin and end."""
        return np.cumsum([0, *map(len, self.picks)])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return self._gather("lengths")

    @functools.cached_property
    def labelled(self) -> np.ndarray:
        return self._gather("labelled")

    @functools.cached_property
    def lines(self) -> np.ndarray:
        return self._gather("lines")

    def _gather(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(store, name)[pick] for store, pick in zip(self.stores, self.picks)])

    @functools.cached_property
    def stats(self) -> dict[str, int]:
        """The stores' counts, added up over whole files."""
        total = Counter()
        for store in self.stores:
            total.update(store.stats)
        return {**total, "longest": max(store.stats["longest"] for store in self.stores)}

    @property
    def content(self) -> str | list:
        """What a resumed run must find again: of one file the hash of its tokens, of several [name, hash, share]."""
        if len(self.sources) == 1 and self.sources[0].share == 1:
            return self.stores[0].content + self.label
        return [[source.path.name, store.content + self.label, source.share]
                for source, store in zip(self.sources, self.stores)]

    def source_of(self, indices: Iterable[int] | np.ndarray) -> np.ndarray:
        """Which source each of these samples is from."""
        return np.searchsorted(self.bounds, np.asarray(indices, dtype=np.int64), side="right") - 1

    def place_of(self, index: int) -> tuple[int, int]:
        """A sample's source and its number there, the same each time that it is seen."""
        [source] = self.source_of([index])
        return int(source), int(self.picks[source][index - self.bounds[source]])

    def __getitem__(self, index: int) -> Sample:
        input_ids, labels = self.read([index])
        return Sample(torch.from_numpy(input_ids), torch.from_numpy(labels))

    def read(self, indices: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and labels of these samples, one after another: (F,) int64 each.

        Raises:
            DataError: a cache has changed since it was written.
        """
        indices = np.asarray(indices, dtype=np.int64)
        of = self.source_of(indices)
        token_of_F = np.repeat(of, self.lengths[indices])
        ids_F, labels_F = np.empty((2, len(token_of_F)), dtype=np.int64)
        for source in np.unique(of):
            mine_F = token_of_F == source
            ids_F[mine_F], labels_F[mine_F] = self.stores[source].read(
                self.picks[source][indices[of == source] - self.bounds[source]])
        return ids_F, labels_F

    def subset(self, indices: np.ndarray, name: str) -> Mixture:
        """These samples only, in order; `name` goes into `content`."""
        of = self.source_of(indices)
        picks = tuple(pick[indices[of == source] - self.bounds[source]] for source, pick in enumerate(self.picks))
        return dataclasses.replace(self, picks=picks, label=f"{self.label} {name}")

    def parts(self) -> list[tuple[str, Mixture]]:
        """Each source that has samples by itself, with its name."""
        return [(source.name, Mixture((source,), (store,), (pick,)))
                for source, store, pick in zip(self.sources, self.stores, self.picks) if len(pick)]

    def where(self, indices: Iterable[int]) -> str:
        """'lines 3, 17 of a.jsonl and record 5 of b.json'."""
        indices = np.unique(np.fromiter(indices, dtype=np.int64))
        of, said = self.source_of(indices), []
        for source in np.unique(of):
            lines = np.unique(self.lines[indices[of == source]]).tolist()
            more = f" and {len(lines) - 20} more" if len(lines) > 20 else ""
            path = self.sources[source].path
            said.append(f"{unit_of(path)}{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:20]))}{more} of {path}")
        return " and ".join(said)

    def table(self) -> list[dict]:
        """What each source gives to the epoch, and what became of its records: a line of JSON each."""
        rows = []
        for source, store, start, end in zip(self.sources, self.stores, self.bounds, self.bounds[1:]):
            rows.append({"name": source.name, "path": str(source.path), "share": source.share,
                         "samples": int(end - start), "tokens": int(self.lengths[start:end].sum()),
                         "labelled_tokens": int(self.labelled[start:end].sum()), "file": store.stats})
        tokens, labelled = (max(1, sum(row[key] for row in rows)) for key in ("tokens", "labelled_tokens"))
        return [{**row, "share_of_tokens": row["tokens"] / tokens,
                 "share_of_labels": row["labelled_tokens"] / labelled} for row in rows]


def mix(sources: list[Source], stores: list[TokenStore], seed: int, epoch: int) -> Mixture:
    """The samples of an epoch.

    Raises:
        DataError: shares so small that there is none.
    """
    picks = tuple(deal(len(store), source.share, epoch, seed, number)
                  for number, (source, store) in enumerate(zip(sources, stores)))
    if not sum(map(len, picks)):
        raise UserError(f"epoch {epoch + 1} has no sample: the shares are too small for files of so few")
    return Mixture(tuple(sources), tuple(stores), picks)


def deal(n: int, share: float, epoch: int, seed: int, number: int) -> np.ndarray:
    """The indices of a source's n samples that an epoch sees, sorted; with share 1 each of them once."""
    first, end = (int(share * n * passes + 0.5) for passes in (epoch, epoch + 1))
    if end - first == n:
        return np.arange(n)
    return np.sort(permutation(n, seed, 10, number)[np.arange(first, end) % n])


def notes(epochs: list[Mixture], held_out: Mixture | None) -> list[str]:
    """What a run says of its sources: samples that it never sees, and files that hold the same."""
    lines, seen = [], {}
    for number, (source, store) in enumerate(zip(epochs[0].sources, epochs[0].stores)):
        if not any(len(mixture.picks[number]) for mixture in epochs):
            lines.append(f"{source.path} is never seen: a share of {source.share:g} of its {len(store):,} samples is "
                         f"none in {len(epochs)} epochs")
    for mixture in [epochs[0], *([held_out] if held_out else [])]:
        for source, store in zip(mixture.sources, mixture.stores):
            if (other := seen.setdefault(store.content, source.path)) is not source.path:
                what = ("held-out data that is trained on says nothing of unseen data" if mixture is held_out else
                        "they are seen twice as often")
                lines.append(f"{source.path} holds the same samples as {other}: {what}")
    return lines


def whole_passes(sources: list[Source]) -> bool:
    """Whether every epoch sees the same."""
    return all(source.share == int(source.share) for source in sources)


def what_is_lost(stats: dict, max_seq_len: int, kind: str) -> str:
    """'cut 151 of 595 conversations: 9.3 % of labelled tokens lost; --max_seq_len 1536 keeps all', or ''."""
    too_long, what = stats["too_long"], "texts" if kind == "text" else "conversations"
    if not too_long:
        return ""
    of = f"{too_long:,} of {stats['records']:,} {what}"
    if not stats["lost_tokens"]:
        return f"split {of} into samples of at most {max_seq_len} tokens; nothing is lost"
    every, learnt = stats["tokens"] + stats["lost_tokens"], max(1, stats["labelled"] + stats["lost_labelled"])
    return (f"{'dropped' if stats['dropped'] else 'cut'} {of}: {percent(stats['lost_labelled'] / learnt)} of labelled "
            f"tokens lost ({stats['lost_labelled']:,}; {percent(stats['lost_tokens'] / every)} of all tokens, "
            f"{stats['lost_tokens']:,}); --max_seq_len {-(-stats['longest'] // 64) * 64} keeps all")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def content_change(then: object, now: object) -> str:
    """What differs between two contents of Mixture, for a message."""
    if not (isinstance(then, list) and isinstance(now, list)):
        return "its data is not this run's"
    old, new = by_name(then), by_name(now)
    for name in (*old, *new):
        if name not in new:
            return f"it read {name}, which this run does not"
        if name not in old:
            return f"it did not read {name}"
        if old[name][1] != new[name][1]:
            return f"it read {name} with share {old[name][1]:g}, this run with {new[name][1]:g}"
        if old[name][0] != new[name][0]:
            return f"{name} has changed since"
    return f"it read {', '.join(old)} in that order"


def by_name(content: list) -> dict[str, list]:
    """name -> [content, share]; a name that comes again is told apart by its number."""
    found: dict[str, list] = {}
    for name, *facts in content:
        again = sum(known.split(" (")[0] == name for known in found)
        found[f"{name} ({again + 1})" if again else name] = facts
    return found
