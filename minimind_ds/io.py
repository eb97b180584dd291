"""Files that are whole or not there, even through a power cut; and the word that a batch script waits for.

    python -m pytest tests/checkpoint/test_power_cut.py
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def fsync(path: str | Path) -> None:
    """A file's content, or a folder's list of names, is on disk when this returns.  Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write or replace a file in one step that survives a power cut; text as UTF-8.

    Raises:
        OSError: as of the file system, and for a folder or device of that name, which is left as it is.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.is_symlink() and (path.is_char_device() or path.is_block_device()):
        raise FileExistsError(errno.EEXIST, "it is a device", str(path))
    aside = path.with_name(f"{path.name}.aside")
    try:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        fsync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync(path.parent)


def report(outcome: str) -> None:
    """Tell launch/slurm/common.sh how far this start came: unmet, tokenised, training, stopped or done."""
    if path := os.environ.get("MINIMIND_DS_OUTCOME"):
        write_file(path, outcome + "\n")
