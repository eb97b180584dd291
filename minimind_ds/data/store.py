"""A data file, tokenised once: a folder of flat files that open in no time, however large.

Tokenising is the slow part of starting a run, so its result is kept: token ids one after another, the label of a token
as its top bit (a label is always the next token's id), and where each sample begins.  Opening reads next to nothing,
and maps all but the tokens.  A cache is found by everything that decides its content (the data file's path, size, time
and ends; the tokenizer; the options; the code that renders), is written aside and renamed, and is never trusted: what
opening reads is compared with its hash then, each block of tokens when a sample is first read from it.  A damaged one
is built again.  The folder may be deleted at any time.

    python -c "from minimind_ds.data.store import open_or_build as o; from minimind_ds import load_tokenizer as t;
        print(o('examples/sft_train.jsonl', t(), kind='conversations', max_seq_len=768, cache_dir='/tmp/c').stats)"
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import weakref
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.build import BLOCK_BYTES, build, hash_files, locked, remove_forgotten, seal_of, write_store
from minimind_ds.data.conversation import DataError, Parser, read_records
from minimind_ds.data.journal import FILES, plain_counts, position_of
from minimind_ds.data.packing import random_keys
from minimind_ds.data.sample import POLICIES, RENDERING, Augment, Sample
from minimind_ds.data.tokenise import Encoder, Progress, worker_count
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.paths import cache_folder

FORMAT = 3
# 32 bytes for each block of tokens.
MOST_OF_HASHES = 1 << 30
# What is read of each end of a data file to tell it from another.
END_BYTES = 64 << 10
OPTIONS = {"random_system_ratio": 0.0, "drop_empty_think_ratio": 0.0, "seed": 0, "epoch": 0,
           "learn": "all", "text_markers": "literal"}


class TokenFile:
    """A tokens.bin, read where it is asked for; each block is compared with the hash of when it was written before.

    Not mapped: where a disk fails, or the file is cut, a mapping ends the process without a word.
    """

    def __init__(self, folder: Path, dtype: np.dtype, hashes: bytes):
        self.folder, self.dtype, self.hashes = folder, dtype, hashes
        with untrusted.open_file(folder / "tokens.bin", sys.maxsize) as file:
            self.fd, self.size = os.dup(file.fileno()), os.fstat(file.fileno()).st_size
        weakref.finalize(self, os.close, self.fd)
        self.checked = np.zeros(len(hashes) // 32, dtype=bool)

    def read(self, begins_N: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
        """The tokens begins_N[i]:ends_N[i], one after another, with their top bits.

        Raises:
            DataError: they are not those that were written, or cannot be read.
        """
        begins_N, ends_N = begins_N * self.dtype.itemsize, ends_N * self.dtype.itemsize
        if not self.checked.all():
            self.check(begins_N, ends_N)
        out, at = memoryview(bytearray(int((ends_N - begins_N).sum()))), 0
        for begin, end in zip(begins_N.tolist(), ends_N.tolist()):
            self.fill(out[at:at + end - begin], begin)
            at += end - begin
        return np.frombuffer(out, self.dtype)

    def fill(self, out: memoryview, begin: int) -> None:
        """Reads as many bytes as `out` has room for, from the byte `begin`."""
        try:
            while out:
                count = os.preadv(self.fd, [out], begin)
                if not count:
                    self.refuse(f"tokens.bin ends at byte {begin:,}")
                out, begin = out[count:], begin + count
        except OSError as err:
            raise DataError(f"the token cache {self.folder} cannot be read ({err.strerror}): is its disk "
                            "sound?") from None

    def check(self, begins: np.ndarray, ends: np.ndarray) -> None:
        """Raises DataError unless the bytes begins[i]:ends[i] are those that were written."""
        for begin, end in zip((begins // BLOCK_BYTES).tolist(), ((ends - 1) // BLOCK_BYTES).tolist()):
            for block in range(begin, end + 1):
                if not self.checked[block] and not self.sound(block):
                    self.refuse(f"block {block} of tokens.bin changed after it was written")

    def refuse(self, what: str) -> None:
        then = "it is built again at the next start"
        try:
            (self.folder / "meta.json").unlink()
        except OSError as err:
            then = f"and cannot be built again there ({err.strerror}): name another --cache_dir"
        raise DataError(f"the token cache {self.folder} is damaged: {what}; {then}")

    def sound(self, block: int) -> bool:
        part = memoryview(bytearray(min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)))
        self.fill(part, block * BLOCK_BYTES)
        self.checked[block] = hashlib.sha256(part).digest() == self.hashes[block * 32:(block + 1) * 32]
        return bool(self.checked[block])


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokenised samples of one data file, or some of them (`split`).  `store[i]` is the i-th Sample.

    lengths: (N,) int32, tokens of each sample.  labelled: (N,) int32, how many of them have a label.
    lines: (N,) int64, the line of the data file each came from, from 1.
    stats: counts over the whole file: records, cut, dropped, split (too long), unlabelled (left out: nothing to
        learn), skipped (malformed), samples, tokens, labelled; lost_tokens and lost_labelled of what was cut or
        dropped; longest (tokens of the longest record).
    content: hash of the tokens and labels, and of the split: the same data anywhere has the same.
    """

    path: Path
    lengths: np.ndarray
    labelled: np.ndarray
    lines: np.ndarray
    stats: dict[str, int]
    content: str
    folder: Path
    # uint16 or uint32 of the whole file; the top bit says that the next token is the label.
    tokens: TokenFile
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        input_ids, labels = self.read([index])
        return Sample(torch.from_numpy(input_ids), torch.from_numpy(labels))

    def read(self, indices: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and labels of these samples, one after another: (F,) int64 each.

        Raises:
            DataError: the cache has changed since it was written.
        """
        begins_N = self.starts[indices]
        raw_F = self.tokens.read(begins_N, begins_N + self.lengths[indices])
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
        # Shuffled over all lines, used or not, so that a line's side does not depend on other lines.
        n_lines = self.stats["lines"]
        rank_N = np.argsort(np.argsort(random_keys(n_lines, seed, 6), kind="stable"), kind="stable")[self.lines - 1]
        held_N = rank_N < fraction * n_lines
        if not held_N.any() or held_N.all():
            held_N = rank_N == (rank_N.max() if held_N.all() else rank_N.min())
        name = f"{fraction} {seed}"
        return (self.subset(np.flatnonzero(~held_N), f"without {name}"),
                self.subset(np.flatnonzero(held_N), f"held out {name}"))

    def verify(self):
        """Read everything and compare with the hashes made when it was written.

        Raises:
            DataError: a byte has changed since.
        """
        intact = all(map(self.tokens.sound, range(len(self.tokens.checked))))
        if not (intact and self.content.startswith(hash_files(self.folder))):
            raise DataError(f"the token cache {self.folder} is damaged; delete it and it is built again")


def open_or_build(path: str | Path, tok: Tokenizer, *, kind: str, max_seq_len: int, cache_dir: str | Path,
                  policy: str = "cut", on_bad_record: str = "stop", options: dict | None = None,
                  workers: int | None = 0, progress: bool = False, build_it: bool = True) -> TokenStore:
    """The tokenised form of a data file, from the cache if it is there.  Safe to call from many processes at once.

    Args:
        kind: "conversations" or "text".
        policy: "cut" or "drop" samples longer than max_seq_len; "split" texts into several.
        options: MiniMind's random touches: random_system_ratio, drop_empty_think_ratio, seed, epoch; learn and
            text_markers as Augment has them.
        workers: processes that tokenise; below 2 it is done here (the tokenizer library has threads of its own); None:
            as many as the file is worth, on the cores this process may use.
        progress: say on standard error how far tokenising is, whichever process does it.
        build_it: False: only what is in the cache is opened.

    Raises:
        DataError: the file is unusable (see read_records), has no labelled token, or changed meanwhile; the cache
            folder cannot be written, or what it holds belongs to another user.
        ValueError: an unknown option, kind or policy.
    """
    path = Path(path)
    records = read_records(path, kind, on_bad_record, tok.specials)
    unknown = sorted(set(options or {}) - set(OPTIONS))
    if unknown:
        raise UserError(f"unknown data option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    options = {**OPTIONS, **(options or {})}
    if policy not in POLICIES[kind]:
        raise UserError(f"samples that are too long cannot be {policy!r} where there are {kind}: choose from "
                        f"{', '.join(POLICIES[kind])}")
    augment = None
    if options != {**OPTIONS, "seed": options["seed"], "epoch": options["epoch"]}:
        augment = Augment(options["seed"], options["epoch"], options["random_system_ratio"],
                          options["drop_empty_think_ratio"], options["learn"], options["text_markers"])
    identity = {"tokenizer": tok.fingerprint, "kind": kind, "max_seq_len": max_seq_len, "policy": policy,
                "on_bad_record": on_bad_record, "augment": augment and dataclasses.asdict(augment)}
    key = _key(path, identity)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:40]
    folder = Path(cache_dir) / f"{name}-{key[:20]}"
    part = folder.with_name(f".{folder.name}.part")
    size = sum(file.stat().st_size for file in _files_of(path))
    try:
        if folder.exists() and (store := _open(folder, key, path)) is not None:
            return store
        if not build_it:
            raise DataError(f"{path}, as it is now, is not in the token cache {cache_dir}")
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        shown = contextlib.closing(Progress(path.name, size, progress))
        with shown as bar, locked(folder.with_name(f".{folder.name}.lock"),
                                   (lambda: bar.at(position_of(part))) if progress else None) as alone:
            # Another process may have built it while this one waited.
            store = _open(folder, key, path)
            if store is None:
                if folder.exists():
                    print(f"the token cache {folder} is damaged; building it again", file=sys.stderr)
                    shutil.rmtree(folder)
                remove_forgotten(Path(cache_dir), but=part)
                encode = Encoder(tok, max_seq_len, policy, augment, Parser(kind, tok.specials), records.skip)
                workers = worker_count(size, workers)
                build(folder, part if alone else None,
                      lambda aside: write_store(aside, records.source, encode, key, workers, bar, lasting=alone))
                if not _is(path, identity, key):
                    shutil.rmtree(folder)
                    raise DataError(f"{path} changed while it was being read; start again")
                store = _open(folder, key, path)
    except BrokenExecutor:
        raise DataError(f"{path}: a process that tokenised was killed (out of memory?); what was done before is kept: "
                        "start again, with a smaller --num_workers perhaps") from None
    except OSError as err:
        raise DataError(f"the token cache cannot be written to {cache_dir}: {err.strerror or err}; name another "
                        "folder with --cache_dir") from None
    if store is None:
        raise DataError(f"the token cache {folder} cannot be read back after writing it; is the disk sound?")
    return store


def _files_of(path: Path) -> list[Path]:
    """The file, or those of a folder that is one data set."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _key(path: Path, identity: dict) -> str:
    """Hash of all that decides the content of a cache.  Raise FORMAT or RENDERING with what they stand for."""
    parts = [FORMAT, RENDERING, identity]
    for file in _files_of(path.resolve()):
        facts = file.stat()
        parts += [str(file), facts.st_size, facts.st_mtime_ns, _hash_ends(file)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is(path: Path, identity: dict, key: str) -> bool:
    """Whether the data file is still there and the one that the key was made of."""
    try:
        return _key(path, identity) == key
    except OSError:
        return False


def _hash_ends(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, path.stat().st_size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _open(folder: Path, key: str, path: Path) -> TokenStore | None:
    """The store in this folder; None if there is none or it is not exactly what was written.

    Raises:
        DataError: in the user's own cache folder, one that another user made.
    """
    try:
        meta = untrusted.read_json(folder / "meta.json")
        seal = meta.pop("seal")
        if seal != seal_of(meta) or meta["key"] != key or not plain_counts(meta["stats"]) or not isinstance(
                meta["content"], str) or meta["dtype"] not in ("uint16", "uint32"):
            return None
        arrays = {name: _map(folder / name, dtype) for name, dtype in FILES.items() if name != "tokens.bin"}
        hashes = untrusted.read_bytes(folder / "blocks.bin", MOST_OF_HASHES)
        tokens = TokenFile(folder, np.dtype(meta["dtype"]), hashes)
        small = {**arrays, "blocks.bin": hashes}
        if any(hashlib.sha256(content).hexdigest() != meta["hashes"][name] for name, content in small.items()):
            return None
        # The ends, which a torn write spoils, now; what lies between when it is read.
        if tokens.size != meta["token_bytes"] or not (tokens.sound(0) and tokens.sound(len(tokens.checked) - 1)):
            return None
    # A UserError is a ValueError: not there, no regular file, no JSON.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError):
        return None
    _refuse_foreign(folder)
    offsets = arrays["offsets.bin"]
    return TokenStore(path=path, lengths=np.diff(offsets).astype(np.int32), labelled=arrays["labelled.bin"],
                      lines=arrays["lines.bin"], stats=meta["stats"], content=meta["content"], folder=folder,
                      tokens=tokens, starts=offsets[:-1])


def _refuse_foreign(folder: Path) -> None:
    """Hashes tell accidents, not intent: in the default folder only what this user wrote is used."""
    if folder.resolve().parent != cache_folder().resolve():
        return
    owners = {path.lstat().st_uid for path in (folder, *folder.iterdir())} - {os.geteuid()}
    if owners:
        raise DataError(f"the token cache {folder} belongs to another user (uid {min(owners)}): delete it, or name a "
                        "folder that you trust with --cache_dir")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    with untrusted.open_file(path, sys.maxsize) as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
