"""A data file, tokenised once: a folder of flat files that open in no time, however large.

Tokenising is the slow part of starting a run, so its result is kept: token ids one after another, the label of a token
as its top bit (a label is always the next token's id), and where each sample begins.  Opening maps the files and reads
next to nothing.  A cache is found by everything that decides its content (the data file's path, size, time and ends;
the tokenizer; the options; the code that renders), is written aside and renamed, and is checked when it is opened: one
that is damaged is built again, never trusted.  The folder may be deleted at any time.

    python -c "from minimind_ds.data.store import open_or_build as o; from minimind_ds import load_tokenizer as t;
        print(o('examples/sft_train.jsonl', t(), kind='conversations', max_seq_len=768, cache_dir='/tmp/c').stats)"
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import DataError, read_records
from minimind_ds.data.packing import random_keys
from minimind_ds.data.sample import FATES, RENDERING, Augment, Sample, build_samples
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.io import fsync

FORMAT = 1
# Records tokenised with one call into the tokenizer library.
CHUNK = 2000
# What is read of each end of a file to tell it from another, or a whole one from a torn one.
END_BYTES = 64 << 10
FILES = {"tokens.bin": None, "offsets.bin": np.int64, "labelled.bin": np.int32, "lines.bin": np.int64}
OPTIONS = {"random_system_ratio": 0.0, "drop_empty_think_ratio": 0.0, "seed": 0, "epoch": 0}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokenised samples of one data file, or some of them (`split`).  `store[i]` is the i-th Sample.

    lengths: (N,) int32, tokens of each sample.  labelled: (N,) int32, how many of them have a label.
    lines: (N,) int64, the line of the data file each came from, from 1.
    stats: counts over the whole file: records, cut, dropped (too long), unlabelled (left out: nothing to learn),
        skipped (malformed), samples, tokens, labelled.
    content: hash of the tokens and labels, and of the split: the same data anywhere has the same.
    """

    path: Path
    lengths: np.ndarray
    labelled: np.ndarray
    lines: np.ndarray
    stats: dict[str, int]
    content: str
    folder: Path
    # (F,) uint16 or uint32 of the whole file; the top bit says that the next token is the label.
    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        input_ids, labels = self.read([index])
        return Sample(torch.from_numpy(input_ids), torch.from_numpy(labels))

    def read(self, indices: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and labels of these samples, one after another: (F,) int64 each."""
        begins = self.starts[indices].tolist()
        ends = (self.starts[indices] + self.lengths[indices]).tolist()
        none = [self.tokens[:0]]
        raw_F = np.concatenate([self.tokens[begin:end] for begin, end in zip(begins, ends)] or none)
        top_bit = raw_F.dtype.type(1 << (8 * raw_F.itemsize - 1))
        ids_F = (raw_F & ~top_bit).astype(np.int64)
        # A sample's last token has no label, so no label comes from the sample after it.
        return ids_F, np.where(raw_F >= top_bit, np.roll(ids_F, -1), IGNORE)

    def subset(self, indices: np.ndarray, name: str) -> TokenStore:
        """These samples only; `name` goes into `content`."""
        arrays = {key: getattr(self, key)[indices] for key in ("lengths", "labelled", "lines", "starts")}
        return dataclasses.replace(self, **arrays, content=f"{self.content} {name}")

    def split(self, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
        """Training and held-out samples, chosen by their lines: every epoch's store of a file is split alike.

        Raises:
            ValueError: fraction not in (0, 1), or fewer than two samples.
        """
        if not 0 < fraction < 1:
            raise UserError(f"the held-out fraction is {fraction}; it must be between 0 and 1")
        if len(self) < 2:
            raise UserError(f"{self.path} has {len(self)} sample; a held-out split needs at least 2")
        # Shuffled over all lines, used or not, so that a line's side does not hang on what became of another.
        n_lines = self.stats["lines"]
        rank_N = np.argsort(np.argsort(random_keys(n_lines, seed, 6), kind="stable"), kind="stable")[self.lines - 1]
        held_N = rank_N < fraction * n_lines
        if not held_N.any() or held_N.all():
            held_N = rank_N == (rank_N.max() if held_N.all() else rank_N.min())
        name = f"{fraction} {seed}"
        return (self.subset(np.flatnonzero(~held_N), f"without {name}"),
                self.subset(np.flatnonzero(held_N), f"held out {name}"))

    def verify(self):
        """Read everything and compare with the hash made when it was written.

        Raises:
            DataError: a byte has changed since.
        """
        if not self.content.startswith(_hash_files(self.folder)):
            raise DataError(f"the token cache {self.folder} is damaged; delete it and it is built again")


class Chunk(NamedTuple):
    """The samples of some records, packed as they are stored."""

    tokens: bytes
    lengths: np.ndarray
    labelled: np.ndarray
    # Index into FATES of every record; whole and cut ones are the samples.
    fates: np.ndarray


def open_or_build(path: str | Path, tok: Tokenizer, *, kind: str, max_seq_len: int, cache_dir: str | Path,
                  policy: str = "cut", on_bad_record: str = "stop", options: dict | None = None, workers: int = 0,
                  progress: bool = False) -> TokenStore:
    """The tokenised form of a JSONL file, from the cache if it is there.  Safe to call from many processes at once.

    Args:
        kind: "conversations" or "text".
        policy: "cut" or "drop" samples longer than max_seq_len.
        options: MiniMind's random touches: random_system_ratio, drop_empty_think_ratio, seed, epoch.
        workers: processes that tokenise; below 2 it is done here (the tokenizer library has threads of its own).
        progress: show a bar on standard error while tokenising.

    Raises:
        DataError: the file is unusable (see read_records), has no labelled token, or changed meanwhile; the cache
            folder cannot be written.
        ValueError: an unknown option, kind or policy.
    """
    path = Path(path)
    records = read_records(path, kind, on_bad_record)
    unknown = sorted(set(options or {}) - set(OPTIONS))
    if unknown:
        raise UserError(f"unknown data option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    options = {**OPTIONS, **(options or {})}
    augment = None
    if options["random_system_ratio"] or options["drop_empty_think_ratio"]:
        augment = Augment(options["seed"], options["epoch"], options["random_system_ratio"],
                          options["drop_empty_think_ratio"])
    identity = {"tokenizer": tok.fingerprint, "kind": kind, "max_seq_len": max_seq_len, "policy": policy,
                "on_bad_record": on_bad_record, "augment": augment and dataclasses.asdict(augment)}
    key = _key(path, identity)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:40]
    folder = Path(cache_dir) / f"{name}-{key[:20]}"
    encode = _Encoder(tok, max_seq_len, policy, augment)
    try:
        if not folder.exists():
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        elif (store := _open(folder, key, path)) is not None:
            return store
        with _locked(folder.with_name(f".{folder.name}.lock")) as alone:
            # Another process may have built it while this one waited.
            store = _open(folder, key, path)
            if store is None:
                if folder.exists():
                    print(f"the token cache {folder} is damaged; building it again", file=sys.stderr)
                    shutil.rmtree(folder)
                for left_over in folder.parent.glob(f".{folder.name}.*.part") if alone else ():
                    shutil.rmtree(left_over)
                _build(folder, records, encode, key, workers, progress)
                if _key(path, identity) != key:
                    shutil.rmtree(folder)
                    raise DataError(f"{path} changed while it was being read; start again")
                store = _open(folder, key, path)
    except OSError as err:
        raise DataError(f"the token cache cannot be written to {cache_dir}: {err.strerror or err}") from None
    if store is None:
        raise DataError(f"the token cache {folder} cannot be read back after writing it; is the disk sound?")
    return store


def _key(path: Path, identity: dict) -> str:
    """Hash of all that decides the content of a cache.  Raise FORMAT or RENDERING with what they stand for."""
    path = path.resolve()
    facts = path.stat()
    parts = [FORMAT, RENDERING, str(path), facts.st_size, facts.st_mtime_ns, _hash_ends(path), identity]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_ends(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, path.stat().st_size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        if name != "lines.bin":
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def _seal(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, key: str, path: Path) -> TokenStore | None:
    """The store in this folder; None if there is none or it is not exactly what was written."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        seal = meta.pop("seal")
        if seal != _seal(meta) or meta["key"] != key:
            return None
        for name, (size, ends) in meta["files"].items():
            if (folder / name).stat().st_size != size or _hash_ends(folder / name) != ends:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays = {name: _map(folder / name, dtype or np.dtype(meta["dtype"])) for name, dtype in FILES.items()}
    offsets = arrays["offsets.bin"]
    return TokenStore(path=path, lengths=np.diff(offsets).astype(np.int32), labelled=arrays["labelled.bin"],
                      lines=arrays["lines.bin"], stats=meta["stats"], content=meta["content"], folder=folder,
                      tokens=arrays["tokens.bin"], starts=offsets[:-1])


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One builder at a time; the system lets go of the lock however the builder ends.

    Yields False where the file system has no locks, as on some clusters: two builders may then do the same work, and
    the rename has one winner.
    """
    with path.open("a") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as err:
            if err.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            alone = False
        yield alone


class _Encoder:
    """Records -> Chunk; goes to worker processes as it is."""

    def __init__(self, tok: Tokenizer, max_seq_len: int, policy: str, augment: Augment | None):
        self.tok, self.max_seq_len, self.policy, self.augment = tok, max_seq_len, policy, augment
        self.dtype = np.uint16 if tok.vocab_size <= 1 << 15 else np.uint32

    def __call__(self, items: list, first_index: int) -> Chunk:
        encoded = build_samples(items, self.tok, self.max_seq_len, policy=self.policy, augment=self.augment,
                                first_index=first_index)
        kept = [sample for sample in encoded if sample.fate in ("whole", "cut")]
        lengths = np.array([len(sample.ids) for sample in kept], dtype=np.int64)
        ids_F, labels_F = _flat(sample.ids for sample in kept), _flat(sample.labels for sample in kept)
        has_label_F = labels_F != IGNORE
        assert not has_label_F[np.cumsum(lengths) - 1].any(), "a sample's last token has a label"
        assert (labels_F[:-1] == ids_F[1:])[has_label_F[:-1]].all(), "a label is not the next token"
        top_bit = 1 << (8 * np.dtype(self.dtype).itemsize - 1)
        assert ids_F.size == 0 or 0 <= ids_F.min() <= ids_F.max() < top_bit
        labelled = np.add.reduceat(has_label_F, np.cumsum(lengths) - lengths) if kept else lengths
        fates = np.array([FATES.index(sample.fate) for sample in encoded], dtype=np.int8)
        tokens_F = ids_F.astype(self.dtype)
        tokens_F[has_label_F] |= self.dtype(top_bit)
        return Chunk(tokens_F.tobytes(), lengths, labelled.astype(np.int32), fates)


def _flat(lists: Iterable[list[int]]) -> np.ndarray:
    """(F,) int32, one after another.  array.fromlist is the fastest way from Python integers to memory."""
    flat = array("i")
    for values in lists:
        flat.fromlist(values)
    return np.frombuffer(flat, dtype=np.int32)


def _chunks(records, encode: _Encoder, workers: int) -> Iterator[tuple[np.ndarray, Chunk]]:
    """(lines of its records, Chunk) in the file's order, with at most a few chunks in memory."""
    read = iter(records)
    index = itertools.count(0, CHUNK)
    batches = iter(lambda: list(itertools.islice(read, CHUNK)), [])
    runs = ((np.array([line for line, _ in batch]), [item for _, item in batch], next(index)) for batch in batches)
    if workers < 2:
        for lines, items, first_index in runs:
            yield lines, encode(items, first_index)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker,
                             initargs=(encode,)) as pool:
        waiting = []
        for lines, items, first_index in runs:
            waiting.append((lines, pool.submit(_work, items, first_index)))
            if len(waiting) > 2 * workers:
                lines, future = waiting.pop(0)
                yield lines, future.result()
        for lines, future in waiting:
            yield lines, future.result()


_worker_encode: _Encoder | None = None


def _start_worker(encode: _Encoder):
    global _worker_encode
    _worker_encode = encode


def _work(items: list, first_index: int) -> Chunk:
    return _worker_encode(items, first_index)


def _build(folder: Path, records, encode: _Encoder, key: str, workers: int, progress: bool):
    """Write a store aside, make it durable and rename it to `folder`; nothing is left behind if that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    aside.chmod(0o755)
    try:
        stats = _write_samples(aside, records, encode, workers, progress)
        if not stats["labelled"]:
            raise DataError(f"{records.path} has not one labelled token: {stats['unlabelled']} samples have no label, "
                            f"{stats['dropped']} are longer than {encode.max_seq_len} tokens and dropped")
        files = {name: [(aside / name).stat().st_size, _hash_ends(aside / name)] for name in FILES}
        meta = {"key": key, "dtype": np.dtype(encode.dtype).name, "stats": stats, "files": files,
                "content": _hash_files(aside)}
        with (aside / "meta.json").open("w") as file:
            json.dump({**meta, "seal": _seal(meta)}, file, indent=1)
        for name in (*FILES, "meta.json"):
            fsync(aside / name)
        fsync(aside)
        try:
            aside.rename(folder)
        except OSError as err:
            # Only where locks do not work: another builder was faster.
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_samples(aside: Path, records, encode: _Encoder, workers: int, progress: bool) -> dict[str, int]:
    """Write FILES and return the statistics."""
    fates = np.zeros(len(FATES), dtype=np.int64)
    samples = tokens = labelled = last_line = 0
    with contextlib.ExitStack() as stack:
        out = {name: stack.enter_context((aside / name).open("wb")) for name in FILES}
        bar = stack.enter_context(tqdm(desc=f"tokenising {records.path.name}", unit=" records", disable=not progress))
        out["offsets.bin"].write(np.zeros(1, dtype=np.int64).tobytes())
        for lines, chunk in _chunks(records, encode, workers):
            kept = np.isin(chunk.fates, (FATES.index("whole"), FATES.index("cut")))
            out["tokens.bin"].write(chunk.tokens)
            out["offsets.bin"].write((tokens + np.cumsum(chunk.lengths)).tobytes())
            out["labelled.bin"].write(chunk.labelled.tobytes())
            out["lines.bin"].write(lines[kept].astype(np.int64).tobytes())
            fates += np.bincount(chunk.fates, minlength=len(FATES))
            samples, tokens = samples + int(kept.sum()), tokens + int(chunk.lengths.sum())
            labelled, last_line = labelled + int(chunk.labelled.sum()), int(lines[-1])
            bar.update(len(lines))
    counts = dict(zip(FATES, fates.tolist()))
    del counts["whole"]
    return {"records": records.read, "lines": last_line, **counts, "skipped": records.skipped, "samples": samples,
            "tokens": tokens, "labelled": labelled}
