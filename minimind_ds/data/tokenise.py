"""Records -> the flat files of a TokenStore: in chunks, by several processes, going on where it was interrupted.

A chunk is some records of about CHUNK_BYTES of text, whose bounds depend on the records alone.  Finished chunks are
appended to the files of a folder aside, each with its hash in a journal; whoever builds the same store next keeps the
chunks whose hashes are right and tokenises the rest, to the same bytes.

    python -c "import minimind_ds.data.tokenise as t; print(t.usable_cores())"
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import Conversation
from minimind_ds.data.sample import FATES, Augment, build_samples, pieces_of
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.data.words import WordCache
from minimind_ds.io import report

# Text of a chunk, and of all chunks that wait for a worker or for the disk, in characters; records of a chunk.
CHUNK_BYTES, WAITING_BYTES, CHUNK_RECORDS = 1 << 20, 32 << 20, 2000
# A worker process takes seconds to start: one for each of this many bytes of the file.
BYTES_PER_WORKER = 16 << 20
SAY_EVERY_S = 30
# The garbage collector's own thresholds let it look through a chunk's objects again and again, a third of the time;
# with these it looks when so many new ones are left, which are several chunks'.
COLLECTION = (200_000, 1000, 1000)
FILES = {"tokens.bin": None, "offsets.bin": np.int64, "labelled.bin": np.int32, "lines.bin": np.int64}
JOURNAL = "chunks.jsonl"
COUNTED = (*FATES, "records", "samples", "tokens", "labelled", "too_long", "lost_tokens", "lost_labelled")


class Chunk(NamedTuple):
    """The samples of some records, packed as they are stored."""

    tokens: bytes
    lengths: np.ndarray
    labelled: np.ndarray
    # (records,) samples that each record became.
    samples: np.ndarray
    counts: dict[str, int]


def usable_cores() -> int:
    """Cores this process may use: by its affinity, its cgroup's quota and SLURM's share of a task."""
    cores = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores.append(math.ceil(int(quota) / int(period)))
    with contextlib.suppress(KeyError, ValueError):
        cores.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(cores))


def worker_count(n_bytes: int) -> int:
    """Processes worth starting for a file of this size."""
    return min(usable_cores(), n_bytes // BYTES_PER_WORKER)


class Encoder:
    """Records -> Chunk; goes to worker processes as it is."""

    def __init__(self, tok: Tokenizer, max_seq_len: int, policy: str, augment: Augment | None):
        self.tok, self.max_seq_len, self.policy, self.augment = tok, max_seq_len, policy, augment
        self.words = WordCache(tok)
        self.dtype = np.uint16 if tok.vocab_size <= 1 << 15 else np.uint32

    def __call__(self, items: list, first_index: int) -> Chunk:
        encoded = build_samples(items, self.tok, self.max_seq_len, policy=self.policy, augment=self.augment,
                                first_index=first_index, encode_batch=self.words.encode_batch)
        of_records = [pieces_of(sample, self.max_seq_len) if sample.fate in ("whole", "cut", "split") else []
                      for sample in encoded]
        kept = [sample for samples in of_records for sample in samples]
        lengths = np.array([len(sample.ids) for sample in kept], dtype=np.int64)
        ids_F, labels_F = _flat(sample.ids for sample in kept), _flat(sample.labels for sample in kept)
        has_label_F = labels_F != IGNORE
        assert not has_label_F[np.cumsum(lengths) - 1].any(), "a sample's last token has a label"
        assert (labels_F[:-1] == ids_F[1:])[has_label_F[:-1]].all(), "a label is not the next token"
        top_bit = 1 << (8 * np.dtype(self.dtype).itemsize - 1)
        assert ids_F.size == 0 or 0 <= ids_F.min() <= ids_F.max() < top_bit
        labelled = np.add.reduceat(has_label_F, np.cumsum(lengths) - lengths) if kept else lengths
        tokens_F = ids_F.astype(self.dtype)
        tokens_F[has_label_F] |= self.dtype(top_bit)
        counts = Counter(sample.fate for sample in encoded)
        counts.update(records=len(encoded), samples=len(kept), tokens=int(lengths.sum()),
                      labelled=int(labelled.sum()), too_long=sum(s.lost > 0 or s.fate == "split" for s in encoded),
                      lost_tokens=sum(s.lost for s in encoded), lost_labelled=sum(s.lost_labelled for s in encoded))
        counts["longest"] = max((len(s.ids) + s.lost for s in encoded), default=0)
        return Chunk(tokens_F.tobytes(), lengths, labelled.astype(np.int32), np.array(list(map(len, of_records))),
                     dict(counts))


def _flat(lists: Iterable[list[int]]) -> np.ndarray:
    """(F,) int32, one after another.  array.fromlist is the fastest way from Python integers to memory."""
    flat = array("i")
    for values in lists:
        flat.fromlist(values)
    return np.frombuffer(flat, dtype=np.int32)


class Batch(NamedTuple):
    """Records of one chunk, before they are tokenised; first_index is the first one's place among all."""

    lines: np.ndarray
    items: list
    first_index: int
    size: int


def batches(records: Iterable[tuple[int, object]]) -> Iterator[Batch]:
    """The records in groups of about CHUNK_BYTES characters, at least one record each."""
    lines, items, size, first_index = [], [], 0, 0
    for line, item in records:
        lines.append(line)
        items.append(item)
        size += characters(item)
        if size >= CHUNK_BYTES or len(items) == CHUNK_RECORDS:
            yield Batch(np.array(lines, dtype=np.int64), items, first_index, size)
            lines, items, size, first_index = [], [], 0, first_index + len(items)
    if items:
        yield Batch(np.array(lines, dtype=np.int64), items, first_index, size)


def characters(item: Conversation | str) -> int:
    if isinstance(item, str):
        return len(item)
    return sum(map(len, item.tools)) + sum(
        len(m.content) + len(m.reasoning or "") + sum(len(call.arguments) for call in m.tool_calls)
        for m in item.messages)


def encoded_chunks(todo: Iterable[Batch], encode: Encoder, workers: int) -> Iterator[tuple[Batch, Chunk]]:
    """Every batch with its Chunk, in order, with at most about WAITING_BYTES of text in memory."""
    if workers < 2:
        for batch in todo:
            yield batch, encode(batch.items, batch.first_index)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker,
                             initargs=(encode,)) as pool:
        waiting: deque[tuple[Batch, Future]] = deque()
        try:
            for batch in todo:
                future = pool.submit(_work, batch.items, batch.first_index)
                waiting.append((batch._replace(items=[]), future))
                while len(waiting) > 2 * workers or sum(b.size for b, _ in waiting) > WAITING_BYTES:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            while waiting:
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# A cache: what this worker process was started with.
_worker_encode: Encoder | None = None


def _start_worker(encode: Encoder):
    global _worker_encode
    _worker_encode = encode
    gc.set_threshold(*COLLECTION)
    # Killed, a parent leaves its workers waiting for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One core each: the tokenizer library's threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent():
    parent_process().join()
    os._exit(1)


def _work(items: list, first_index: int) -> Chunk:
    return _worker_encode(items, first_index)


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """Objects are looked through as COLLECTION has it."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def plain_counts(value: object) -> bool:
    """Whether it is what counts are as JSON: an object of whole numbers."""
    return isinstance(value, dict) and all(type(count) is int and 0 <= count < 1 << 53 for count in value.values())


class Part:
    """The files of a store while it is built, and the journal of the chunks that are in them."""

    def __init__(self, folder: Path, *, lasting: bool = False):
        self.folder, self.lasting = folder, lasting
        self.stats = dict.fromkeys((*COUNTED, "longest", "lines"), 0)
        self.position = 0
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
        for name in COUNTED:
            self.stats[name] += counts.get(name, 0)
        self.stats["longest"] = max(self.stats["longest"], counts.get("longest", 0))
        self.stats["lines"], self.position = counts.get("lines", 0), counts.get("position", 0)

    def append(self, lines: np.ndarray, chunk: Chunk, position: int) -> None:
        """position: bytes of the data file that are read by then."""
        parts = {"tokens.bin": chunk.tokens,
                 "offsets.bin": (self.stats["tokens"] + np.cumsum(chunk.lengths)).astype(np.int64).tobytes(),
                 "labelled.bin": chunk.labelled.tobytes(), "lines.bin": np.repeat(lines, chunk.samples).tobytes()}
        if not self.stats["records"]:
            parts["offsets.bin"] = np.zeros(1, dtype=np.int64).tobytes() + parts["offsets.bin"]
        counts = {**chunk.counts, "lines": int(lines[-1]), "position": position}
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


class Progress:
    """How far tokenising is: a bar where there is a terminal, else a line every SAY_EVERY_S seconds."""

    def __init__(self, name: str, n_bytes: int, shown: bool):
        self.name, self.n_bytes, self.shown = name, n_bytes, shown
        self.began = self.said = time.monotonic()
        self.first: int | None = None
        self.bar = tqdm(desc=f"tokenising {name}", total=n_bytes, unit="B", unit_scale=True, file=sys.stderr,
                        dynamic_ncols=True, disable=not (shown and sys.stderr.isatty()))

    def at(self, position: int) -> None:
        """Reports how many bytes of the file are done."""
        if self.first is None:
            self.first = self.bar.initial = position
        self.bar.update(position - self.bar.n)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.said >= SAY_EVERY_S:
            self.said, rate = now, (position - self.first) / (now - self.began)
            left = f", {(self.n_bytes - position) / rate:.0f} s left" if rate else ""
            print(f"tokenising {self.name}: {position / max(self.n_bytes, 1):.0%} of {self.n_bytes / 1e6:.0f} MB, "
                  f"{rate / 1e6:.1f} MB/s{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def write_chunks(part: Part, records, encode: Encoder, workers: int, progress: Progress) -> dict[str, int]:
    """Tokenise what `part` does not hold yet; returns the statistics of the whole."""
    done, read = part.stats["records"], iter(records)
    progress.at(part.position)
    # Read again for what only a whole reading tells: bad records and where they stand.
    if done:
        print(f"going on after {done:,} records of {records.path} that were tokenised before", file=sys.stderr)
    for _ in itertools.islice(read, done):
        pass

    def todo() -> Iterator[Batch]:
        for batch in batches(read):
            positions.append(getattr(records, "position", 0))
            yield batch._replace(first_index=done + batch.first_index)

    positions: deque[int] = deque()
    with rare_collection():
        for batch, chunk in encoded_chunks(todo(), encode, workers):
            part.append(batch.lines, chunk, positions.popleft())
            progress.at(part.position)
    stats = dict(part.stats)
    del stats["whole"]
    return {**stats, "skipped": records.skipped, **records.counts()}
