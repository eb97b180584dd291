"""Records -> the flat files of a TokenStore: in chunks, by several processes, going on where it was interrupted.

A chunk is some records of about CHUNK_BYTES, whose bounds depend on the records alone; who tokenises them parses them
too.  Finished chunks go to a folder aside (journal.py); whoever builds the same store next keeps them and tokenises
the rest, to the same bytes.

    python -c "import minimind_ds.data.tokenise as t; print(t.usable_cores())"
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import signal
import sys
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from multiprocessing import connection, get_context, resource_tracker
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minimind_ds import terminal
from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import DataError, Parser, no_record
from minimind_ds.data.journal import Batch, Chunk, Part
from minimind_ds.data.json_text import letters
from minimind_ds.data.readers import RecordFile
from minimind_ds.data.sample import Augment, Encoded, build_samples, pieces_of
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.data.words import WordCache

# Bytes of a chunk's records, and of all chunks that wait for a worker or for the disk; records of a chunk.
CHUNK_BYTES, WAITING_BYTES, CHUNK_RECORDS = 1 << 20, 32 << 20, 2000
# A worker process takes seconds to start: one for each of this many bytes of the file.
BYTES_PER_WORKER = 16 << 20
# More would have no chunk to work on.
MOST_WORKERS = WAITING_BYTES // CHUNK_BYTES
SAY_EVERY_S = 30
# The garbage collector's own thresholds let it look through a chunk's objects again and again, a third of the time;
# with these it looks when so many new ones are left, which are several chunks'.
COLLECTION = (200_000, 1000, 1000)


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


def worker_count(n_bytes: int, asked: int | None = None) -> int:
    """Processes that tokenise a file of this size: as many as asked for, or as are worth starting.

    Two for each usable core at most: others would take memory and no work.
    """
    return min(usable_cores(), n_bytes // BYTES_PER_WORKER, MOST_WORKERS) if asked is None else min(
        asked, 2 * usable_cores(), MOST_WORKERS)


class Encoder:
    """Raw records -> Chunk; goes to worker processes as it is.

    skip: bad records are passed over; else it stops at the first.
    """

    def __init__(self, tok: Tokenizer, max_seq_len: int, policy: str, augment: Augment | None, parser: Parser,
                 skip: bool = False):
        self.tok, self.max_seq_len, self.policy, self.augment = tok, max_seq_len, policy, augment
        self.parser, self.skip = parser, skip
        self.words = WordCache(tok)
        self.dtype = np.uint16 if tok.vocab_size <= 1 << 15 else np.uint32

    def __call__(self, raws: list, first_index: int) -> Chunk:
        """first_index: the first one's place among all records."""
        bad, items, good = None, [], []
        self.parser.forget()
        for place, raw in enumerate(raws):
            try:
                items.append(self.parser.parse(raw))
                good.append(place)
            except UserError as err:
                bad = bad or (place, str(err))
                if not self.skip:
                    break
        encoded = build_samples(items, self.tok, self.max_seq_len, policy=self.policy, augment=self.augment,
                                indices=[first_index + place for place in good],
                                encode_batch=self.words.encode_batch)
        of_records = [pieces_of(sample, self.max_seq_len) if sample.fate in ("whole", "cut", "split") else []
                      for sample in encoded]
        kept = [sample for samples in of_records for sample in samples]
        lengths = np.array([len(sample.ids) for sample in kept], dtype=np.int64)
        tokens_F, has_label_F = self._packed(kept, lengths)
        labelled = np.add.reduceat(has_label_F, np.cumsum(lengths) - lengths) if kept else lengths
        counts = Counter(sample.fate for sample in encoded)
        counts.update(records=len(encoded), skipped=len(raws) - len(encoded), samples=len(kept),
                      tokens=int(lengths.sum()), labelled=int(labelled.sum()),
                      too_long=sum(s.lost > 0 or s.fate == "split" for s in encoded),
                      lost_tokens=sum(s.lost for s in encoded), lost_labelled=sum(s.lost_labelled for s in encoded))
        counts["longest"] = max((len(s.ids) + s.lost for s in encoded), default=0)
        return Chunk(tokens_F.tobytes(), lengths, labelled.astype(np.int32), np.array(good, dtype=np.int64),
                     np.array(list(map(len, of_records)), dtype=np.int64), {**counts, **self.parser.counts()}, bad)

    def _packed(self, samples: list[Encoded], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(F,) tokens, one sample after another, with the top bit where there is a label; and where that is."""
        ids_F, labels_F = _flat(sample.ids for sample in samples), _flat(sample.labels for sample in samples)
        has_label_F = labels_F != IGNORE
        assert not has_label_F[np.cumsum(lengths) - 1].any(), "a sample's last token has a label"
        assert (labels_F[:-1] == ids_F[1:])[has_label_F[:-1]].all(), "a label is not the next token"
        top_bit = 1 << (8 * np.dtype(self.dtype).itemsize - 1)
        assert ids_F.size == 0 or 0 <= ids_F.min() <= ids_F.max() < top_bit
        tokens_F = ids_F.astype(self.dtype)
        tokens_F[has_label_F] |= self.dtype(top_bit)
        return tokens_F, has_label_F


def _flat(lists: Iterable[list[int]]) -> np.ndarray:
    """(F,) int32, one after another.  array.fromlist is the fastest way from Python integers to memory."""
    flat = array("i")
    for values in lists:
        flat.fromlist(values)
    return np.frombuffer(flat, dtype=np.int32)


def batches(source: RecordFile, after: int = 0) -> Iterator[Batch]:
    """The records but for the first `after`, in groups of about CHUNK_BYTES, at least one record each."""
    numbers, lines, raws, size, end = [], [], [], 0, None

    def batch() -> Batch:
        return Batch(*(np.array(counted, dtype=np.int64) for counted in (numbers, lines)), raws, after, size,
                     source.position, end)
    try:
        for number, line, raw in itertools.islice(source, after, None):
            size += size_of(raw, source.place(number, line))
            numbers.append(number)
            lines.append(line)
            raws.append(raw)
            if size >= CHUNK_BYTES or len(raws) == CHUNK_RECORDS:
                yield batch()
                after += len(raws)
                numbers, lines, raws, size = [], [], [], 0
    except UserError as err:
        end = err
    if raws or end:
        yield batch()


def size_of(raw: object, place: str) -> int:
    """Bytes of a line, or letters of a record."""
    try:
        return len(raw) if isinstance(raw, bytes) else letters(raw)
    except RecursionError:
        raise DataError(f"{place}: it is nested too deeply") from None


def encoded_chunks(todo: Iterable[Batch], encode: Encoder, workers: int) -> Iterator[tuple[Batch, Chunk]]:
    """Every batch with its Chunk, in order, with at most about WAITING_BYTES of records in memory."""
    if workers < 2:
        for batch in todo:
            yield batch, encode(batch.raws, batch.first_index)
        return
    with worker_pipes(workers) as pipes:
        for pipe in pipes:
            with _living():
                pipe.send(encode)
        idle, busy, done, given = pipes, {}, {}, 0
        for number, batch in itertools.chain(enumerate(todo), [(-1, None)]):
            while busy and (batch is None or not idle or len(busy) + len(done) > 2 * workers or sum(
                    b.size for b, _ in (*busy.values(), *done.values())) > WAITING_BYTES):
                for pipe in connection.wait(list(busy)):
                    with _living():
                        chunk = pipe.recv()
                    if isinstance(chunk, Exception):
                        raise chunk
                    of, place = busy.pop(pipe)
                    done[place] = of, chunk
                    idle.append(pipe)
                while given in done:
                    yield done.pop(given)
                    given += 1
            if batch is not None:
                pipe = idle.pop()
                with _living():
                    pipe.send((batch.raws, batch.first_index))
                busy[pipe] = batch._replace(raws=[]), number


@contextlib.contextmanager
def worker_pipes(workers: int) -> Iterator[list[connection.Connection]]:
    """Pipes to so many processes that tokenise, each of which takes an Encoder first.

    A pipe breaks where its worker is killed, at any moment; Python's pool of processes may wait for ever then.
    """
    context, pipes, processes = get_context("spawn"), [], []
    # It lets SIGINT through again when it is started.
    resource_tracker.ensure_running()
    # Ctrl-C is for this process, which ends the others.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with _living():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                with theirs:
                    process = context.Process(target=_serve, args=(theirs,), daemon=True)
                    process.start()
                processes.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield list(pipes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


@contextlib.contextmanager
def _living() -> Iterator[None]:
    """Around what cannot be done where a worker was killed, or none can be started."""
    try:
        yield
    except (EOFError, OSError) as err:
        raise BrokenExecutor(str(err)) from None


def _serve(pipe: connection.Connection):
    gc.set_threshold(*COLLECTION)
    # One core each: the tokenizer library's threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The pipe ends with the process that began it, however that ends.
    with contextlib.suppress(EOFError, OSError):
        encode = pipe.recv()
        while True:
            raws, first_index = pipe.recv()
            try:
                answer = encode(raws, first_index)
            except UserError as err:
                answer = err
            except Exception as err:
                answer = RuntimeError(f"{type(err).__name__}: {err}\n{traceback.format_exc()}")
            pipe.send(answer)


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """Objects are looked through as COLLECTION has it."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Progress:
    """How far tokenising is: a bar where there is a terminal, else a line every SAY_EVERY_S seconds."""

    def __init__(self, name: str, n_bytes: int, shown: bool):
        self.name, self.n_bytes, self.shown = name, n_bytes, shown
        self.began = self.said = time.monotonic()
        self.first: int | None = None
        self.bar = tqdm(desc=f"tokenising {name}", total=n_bytes, unit="B", unit_scale=True, file=sys.stderr,
                        **terminal.bar_width(), disable=not (shown and sys.stderr.isatty()))

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


def write_chunks(part: Part, source: RecordFile, encode: Encoder, workers: int, progress: Progress) -> dict[str, int]:
    """Tokenise what `part` does not hold yet; returns the statistics of the whole.

    Raises:
        DataError: the file cannot be read on, a record is bad (and bad ones are not skipped), or none is good.
    """
    first_bad = ""
    progress.at(part.stats["position"])
    if part.records:
        print(f"going on after {part.records:,} records of {source.path} that were tokenised before", file=sys.stderr)
    with rare_collection():
        for batch, chunk in encoded_chunks(batches(source, part.records), encode, workers):
            if chunk.bad:
                place, why = chunk.bad
                first_bad = first_bad or f"{source.place(int(batch.numbers[place]), int(batch.lines[place]))}: {why}"
                if not encode.skip:
                    raise DataError(first_bad)
            part.append(batch, chunk)
            progress.at(batch.position)
            if batch.end:
                raise batch.end
    if not part.stats["records"]:
        raise no_record(source.path, part.stats["skipped"], first_bad)
    return {name: count for name, count in part.stats.items() if name not in ("whole", "position")}
