"""Every reach into private parts of torch: the lock of a build, and the store of the process group.

    python -m pytest tests/distributed/test_op_build.py tests/distributed/test_compat.py
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
import time
from typing import NamedTuple

import torch.distributed as dist


class Workaround(NamedTuple):
    """wrong: what is wrong, or missing, upstream.  seen: releases tried.  remove: the condition under which it goes.
    mended_in: the first release without the fault, once there is one."""

    wrong: str
    seen: str
    remove: str
    mended_in: str | None = None


WORKAROUNDS = {
    "lock_builds": Workaround("a build's lock is a file that stays when its process is killed, and every later start "
                              "waits for it without a word", "2.10 to 2.13", "2.14 is the oldest torch supported",
                              mended_in="2.14"),
    "default_store": Workaround("a thread of its own needs a client of its own of the group's store, which has no "
                                "accessor", "2.10 to 2.15", "a public accessor"),
}
# An unmarked lock file is torch's own: stale after this long.  A build takes two minutes.
FOREIGN_S = 600.0
# How long to wait in silence.
TELL_S = 5.0
MARK = b"locked by minimind_ds"


class BuildLock:
    """In the place of torch.utils.file_baton.FileBaton, of which it has what cpp_extension uses.

    torch keeps others from a build's folder by a file that the builder deletes in the end.  Here the file is locked,
    too, and the operating system takes the lock back when the process ends, however it ends.
    Whoever waited has the lock in the end and builds as well: nothing is left to do, unless the other was killed.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None):
        self.path, self.look_s, self.held = pathlib.Path(lock_file_path), wait_seconds, None

    def try_acquire(self) -> bool:
        """Waits for the lock; True."""
        began, told = time.monotonic(), False
        while not self.take():
            if not told and time.monotonic() - began > TELL_S:
                print(f"waiting for another process that compiles: {self.path}; if none does, delete that file",
                      file=sys.stderr, flush=True)
                told = True
            time.sleep(self.look_s)
        return True

    def take(self) -> bool:
        try:
            file, new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                file, new = os.open(self.path, os.O_RDWR), False
            except FileNotFoundError:
                return False
        try:
            if self.free(file, new):
                os.pwrite(file, MARK + f", process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                self.held, file = file, None
                return True
            return False
        finally:
            if file is not None:
                os.close(file)

    def free(self, file: int, new: bool) -> bool:
        """Whether the open file is this process's now."""
        old = time.time() - os.fstat(file).st_mtime > FOREIGN_S
        try:
            # Nobody holds on to a new file: those who find it unmarked let go at once.
            fcntl.flock(file, fcntl.LOCK_EX if new else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            # A file system without locks.
            return new or old
        try:
            still_there = os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False
        return still_there and (new or old or os.pread(file, len(MARK), 0) == MARK)

    def wait(self) -> None:
        """Part of FileBaton's interface; try_acquire has waited already."""

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.held)
        self.held = None


def lock_builds() -> None:
    """All that this process compiles is locked by BuildLock, where torch does not lock it itself."""
    with contextlib.suppress(ImportError):
        from torch.utils import file_baton

        file_baton.FileBaton = BuildLock
    loaded = sys.modules.get("torch.utils.cpp_extension")
    # Without it, torch locks the file itself.
    if hasattr(loaded, "FileBaton"):
        loaded.FileBaton = BuildLock


def default_store() -> dist.Store:
    """A new client of the process group's store: one client serves one call at a time, and collectives use another."""
    return dist.distributed_c10d._get_default_store().clone()
