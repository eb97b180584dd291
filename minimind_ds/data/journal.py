"""The files of a store while it is built, and the journal of the chunks that are in them.

A chunk's line in the journal has its counts, its size in each file and its hash.  A build that was interrupted goes on
behind the last chunk whose bytes are those that were written.

    python -m pytest tests/data/test_build.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.data.conversation import IGNORED
from minimind_ds.data.sample import FATES
from minimind_ds.data.turns import MOST_NAMES, OTHERS
from minimind_ds.io import report

FILES = {"tokens.bin": None, "offsets.bin": np.int64, "labelled.bin": np.int32, "lines.bin": np.int64}
JOURNAL = "chunks.jsonl"
COUNTED = (*FATES, "records", "skipped", "samples", "tokens", "labelled", "too_long", "lost_tokens",
           "lost_labelled")


class Batch(NamedTuple):
    """Records of one chunk, before they are parsed; first_index is the first one's place among all.

    numbers, lines: of each record, as readers.RecordFile counts them.  position: bytes of the file that are read by
    then.  end: why the file could not be read on.
    """

    numbers: np.ndarray
    lines: np.ndarray
    raws: list
    first_index: int
    size: int
    position: int
    end: UserError | None = None


class Chunk(NamedTuple):
    """The samples of some records, packed as they are stored."""

    tokens: bytes
    lengths: np.ndarray
    labelled: np.ndarray
    # (records,) the places of the good ones among all given, and samples that each of them became.
    good: np.ndarray
    samples: np.ndarray
    counts: dict[str, int]
    # The first bad one's place, and what is wrong with it.
    bad: tuple[int, str] | None


def plain_counts(value: object) -> bool:
    """Whether it is what counts are as JSON: an object of whole numbers."""
    return isinstance(value, dict) and all(type(count) is int and 0 <= count < 1 << 53 for count in value.values())


class Part:
    """The files of a store while it is built, and the journal of the chunks that are in them."""

    def __init__(self, folder: Path, *, lasting: bool = False):
        self.folder, self.lasting = folder, lasting
        self.stats = dict.fromkeys((*COUNTED, "longest", "lines", "position"), 0)
        kept = self._read_back()
        for name, size in kept.items():
            with (folder / name).open("ab") as file:
                file.truncate(size)

    def _read_back(self) -> dict[str, int]:
        """Bytes of each file that belong to whole chunks, from the first on."""
        sizes, journal_size = dict.fromkeys(FILES, 0), 0
        with contextlib.ExitStack() as stack:
            try:
                journal, *parts = [stack.enter_context(untrusted.open_file(self.folder / name, sys.maxsize))
                                   for name in (JOURNAL, *FILES)]
            except UserError:
                # Not there, or no file.
                return {**sizes, JOURNAL: 0}
            files = dict(zip(FILES, parts))
            there = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
            for line in journal:
                try:
                    entry = json.loads(line)
                    if not (plain_counts(entry["sizes"]) and plain_counts(entry["stats"])):
                        break
                    parts = {name: files[name].read(min(entry["sizes"][name], there[name])) for name in FILES}
                    if entry["hash"] != _hash(parts, entry["stats"]):
                        break
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
                sizes = {name: sizes[name] + len(parts[name]) for name in FILES}
                journal_size += len(line)
                self._count(entry["stats"])
        return {**sizes, JOURNAL: journal_size}

    def _count(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if name.startswith(IGNORED) and name not in self.stats and (
                    sum(known.startswith(IGNORED) for known in self.stats) >= MOST_NAMES):
                name = IGNORED + OTHERS
            before = self.stats.get(name, 0)
            self.stats[name] = (count if name in ("lines", "position") else max(before, count) if name == "longest"
                                else before + count)

    @property
    def records(self) -> int:
        """How many it has, good or bad."""
        return self.stats["records"] + self.stats["skipped"]

    def append(self, batch: Batch, chunk: Chunk) -> None:
        numbers = batch.numbers[chunk.good]
        parts = {"tokens.bin": chunk.tokens,
                 "offsets.bin": (self.stats["tokens"] + np.cumsum(chunk.lengths)).astype(np.int64).tobytes(),
                 "labelled.bin": chunk.labelled.tobytes(), "lines.bin": np.repeat(numbers, chunk.samples).tobytes()}
        if not self.records:
            parts["offsets.bin"] = np.zeros(1, dtype=np.int64).tobytes() + parts["offsets.bin"]
        counts = {**chunk.counts, "lines": int(numbers[-1]) if len(numbers) else self.stats["lines"],
                  "position": batch.position}
        for name, content in parts.items():
            with (self.folder / name).open("ab") as file:
                file.write(content)
        entry = {"sizes": {name: len(content) for name, content in parts.items()}, "hash": _hash(parts, counts),
                 "stats": counts}
        with (self.folder / JOURNAL).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._count(counts)
        if self.lasting:
            # Once: this start has brought something.
            self.lasting = False
            report("tokenised")


def _hash(parts: dict[str, bytes], counts: dict) -> str:
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    for name in FILES:
        digest.update(parts[name])
    return digest.hexdigest()


def position_of(part_folder: Path) -> int:
    """Bytes of the data file that another process has tokenised by now; 0 where that cannot be told."""
    try:
        with untrusted.open_file(part_folder / JOURNAL, sys.maxsize) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return int(json.loads(file.read().splitlines()[-1])["stats"]["position"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return 0
