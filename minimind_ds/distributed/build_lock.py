"""How DeepSpeed's operations are compiled: by one process at a time, and one that is killed holds up nobody.

torch keeps others from a build's folder by a file that the builder deletes in the end; after a power cut or SIGKILL it
stays, and every later start waits for it without end and without a word.  Here the file is locked, too, which the
operating system undoes when the process ends.  torch 2.14 and later do that themselves.

    python -m pytest tests/distributed/test_op_build.py
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
import time

# A file that says nothing is torch's own, of a process that may be anywhere; a build takes two minutes.
FOREIGN_S = 600.0
# How long to wait in silence.
TELL_S = 5.0
MARK = b"locked by minimind_ds"
ARGUMENTS: dict = {}


class BuildLock:
    """In the place of torch.utils.file_baton.FileBaton, of which it has what cpp_extension uses.

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
        """Of torch's interface; try_acquire has waited."""

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.held)
        self.held = None


def install() -> None:
    """For all that this process compiles; deepspeed is imported."""
    import deepspeed

    with contextlib.suppress(ImportError):
        from torch.utils import file_baton

        file_baton.FileBaton = BuildLock
    loaded = sys.modules.get("torch.utils.cpp_extension")
    # Without it, torch locks the file itself.
    if hasattr(loaded, "FileBaton"):
        loaded.FileBaton = BuildLock
    adam = deepspeed.get_accelerator().get_op_builder("CPUAdamBuilder")
    if adam is not None and adam.cxx_args is not without_symbols:
        ARGUMENTS[adam], adam.cxx_args = adam.cxx_args, without_symbols


def without_symbols(builder) -> list[str]:
    """The compiler's arguments as DeepSpeed has them, less symbols for debuggers: two thirds of the time."""
    return [*ARGUMENTS[type(builder)](builder), "-g0"]
