"""How a store's folder is written: aside, by one builder at a time, hashed, made durable, renamed.

    python -m pytest tests/data/test_build.py
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minimind_ds.config.errors import UserError
from minimind_ds.data.conversation import DataError
from minimind_ds.data.journal import FILES, JOURNAL, Part
from minimind_ds.data.readers import RecordFile
from minimind_ds.data.tokenise import Encoder, Progress, write_chunks
from minimind_ds.io import fsync, report

# Tokens are hashed in blocks of this many bytes.
BLOCK_BYTES = 1 << 20
# An interrupted build that nobody went on with for so long is not gone on with any more.
FORGOTTEN_S = 7 * 24 * 3600
# How often a process that waits for the builder looks how far it is.
LOOK_S = 0.2


def hash_files(folder: Path) -> str:
    """Hash of the arrays that training reads.  Checkpoints store it as the data's identity: independent of FORMAT."""
    digest = hashlib.sha256()
    for name in FILES:
        if name != "lines.bin":
            with (folder / name).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
    return digest.hexdigest()


def hash_blocks(path: Path) -> bytes:
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def seal_of(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path, meanwhile: Callable[[], None] | None) -> Iterator[bool]:
    """One builder at a time; the system lets go of the lock however the builder ends.

    meanwhile is called now and then while another process holds the lock.  Yields False where the file system has no
    locks, as on some clusters: two builders may then do the same work, and the rename has one winner.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "a") as file:
        alone, wanted = True, fcntl.LOCK_EX | (fcntl.LOCK_NB if meanwhile else 0)
        while True:
            try:
                fcntl.flock(file, wanted)
                break
            except OSError as err:
                if meanwhile and err.errno == errno.EWOULDBLOCK:
                    meanwhile()
                    time.sleep(LOOK_S)
                    continue
                if err.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                alone = False
                break
        yield alone


def remove_forgotten(cache_dir: Path, but: Path) -> None:
    """Deletes what interrupted builds left FORGOTTEN_S ago, but for `but`, and never what another process builds."""
    for part in cache_dir.glob(".*.part"):
        lock = part.with_suffix(".lock")
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            written = max(path.lstat().st_mtime for path in (part, *part.iterdir()))
            if part == but or part.lstat().st_uid != os.geteuid() or time.time() - written < FORGOTTEN_S:
                continue
            # Where the file system has no locks, parts have names of their own, without a lock beside them.
            if os.path.lexists(lock):
                file = os.fdopen(os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
                fcntl.flock(stack.enter_context(file), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)


def build(folder: Path, part: Path | None, write: Callable[[Path], None]) -> None:
    """Have a store written aside and rename it to `folder`.

    part: where an interrupted one is kept to go on from; None: nowhere.
    """
    if part is None:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    else:
        aside = part
        if part.exists() and part.lstat().st_uid != os.geteuid():
            raise DataError(f"{part} belongs to another user; delete it, or name another folder with --cache_dir")
        part.mkdir(exist_ok=True)
    aside.chmod(0o755)
    keep = part is not None
    try:
        write(aside)
        try:
            aside.rename(folder)
        except OSError as err:
            # Only where locks do not work: another builder was faster.
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync(folder.parent)
        report("tokenised")
    except UserError:
        # Bad data fails again: nothing is kept of it.
        keep = False
        raise
    finally:
        if not keep:
            shutil.rmtree(aside, ignore_errors=True)


def write_store(aside: Path, source: RecordFile, encode: Encoder, key: str, workers: int, bar: Progress, *,
                lasting: bool) -> None:
    """All files of a store, durable.

    lasting: an interrupted one is gone on with.

    Raises:
        DataError: the data is bad, or nothing in it is to be learnt.
    """
    stats = write_chunks(Part(aside, lasting=lasting), source, encode, workers, bar)
    if not stats["labelled"]:
        cut = stats["too_long"] - stats["dropped"]
        what = [f"{stats['unlabelled']:,} samples have no label" + f", of which {cut:,} were cut" * bool(cut),
                f"{stats['dropped']:,} are longer than {encode.max_seq_len} tokens and dropped"]
        keeps = f"; --max_seq_len {stats['longest']} keeps all of them whole" * bool(stats["too_long"])
        raise DataError(f"{source.path} has not one labelled token: {', '.join(what)}{keeps}")
    (aside / JOURNAL).unlink()
    (aside / "blocks.bin").write_bytes(hash_blocks(aside / "tokens.bin"))
    small = ("offsets.bin", "labelled.bin", "lines.bin", "blocks.bin")
    meta = {"key": key, "dtype": np.dtype(encode.dtype).name, "stats": stats, "content": hash_files(aside),
            "token_bytes": (aside / "tokens.bin").stat().st_size,
            "hashes": {name: hashlib.sha256((aside / name).read_bytes()).hexdigest() for name in small}}
    with (aside / "meta.json").open("w") as file:
        json.dump({**meta, "seal": seal_of(meta)}, file, indent=1)
    for name in (*FILES, "blocks.bin", "meta.json"):
        fsync(aside / name)
    fsync(aside)
