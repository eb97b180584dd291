"""A user's mistake is one line and exit code 2, a full disk one and 1; anything else is a bug of ours, and its
traceback asks for a report.

    report_bugs()
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback

REPORT = ("This is a bug in minimind_ds, not your mistake: please report it with the lines above, the command "
          "and the versions of torch and deepspeed.")
# What is wrong with a path that a user named, and with a disk.
OF_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
            errno.EBUSY)
# What a disk says that is full, failing or gone.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
NO_THREADS = re.compile(r"(can't|unable to) start .*thread|resource temporarily unavailable", re.IGNORECASE)
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|unable to allocate|memoryerror|bad_alloc", re.IGNORECASE)
# Characters of an error's line.
MOST_SAID = 2000


class UserError(ValueError):
    """Something the user can put right: the message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """What a library's exception says first, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def one_line(error: BaseException | str) -> str:
    """The line that a user reads: whatever names and values of others hold, it fits a screen and moves no cursor."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MOST_SAID else f"{text[:MOST_SAID - 200]} ... {text[-195:]}"
    return "error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def report_bugs() -> None:
    """From now on an exception that nobody catches ends with the request for a report; a UserError with its line."""
    sys.excepthook = show_bug


def show_bug(kind, error, trace) -> None:
    if issubclass(kind, UserError):
        # The interpreter itself would end with 1.
        end(one_line(error), 2)
    if issubclass(kind, BrokenPipeError):
        # Whoever read the output has enough, as head; a shell calls that 128 + SIGPIPE.
        os._exit(141)
    if issubclass(kind, OSError) and (error.errno in DISK or error.errno in OF_PATHS and error.filename):
        # Whoever named the path, or cares for the disk, can put it right.
        name = str(error.filename or "writing")[-300:]
        end(one_line(f"{name}: {error.strerror}"), 1 if error.errno in DISK else 2)
    if issubclass(kind, (RuntimeError, BlockingIOError)) and NO_THREADS.search(str(error)):
        end(one_line(f"no more processes, threads or memory for them here ({first_line(error)}): raise ulimit -u and "
                     "-v, or the container's limits"), 1)
    if issubclass(kind, MemoryError) or issubclass(kind, RuntimeError) and NO_MEMORY.search(str(error)):
        end(one_line(f"out of memory: {first_line(error)}; lower --batch_size or --pack_len (launch/plan.py)"), 1)
    if issubclass(kind, Warning):
        end(one_line(f"PYTHONWARNINGS or -W makes an error of a library's {kind.__name__}: {first_line(error)}"), 2)
    if issubclass(kind, ModuleNotFoundError) and error.name and not error.name.startswith("minimind_ds"):
        end(one_line(f"{sys.executable} has no {error.name}: activate the environment that has (source "
                     ".venv/bin/activate; bash launch/setup_env.sh makes it)"), 2)
    if issubclass(kind, KeyboardInterrupt):
        # The interpreter then ends as by the signal: 130 to a shell.
        print("interrupted (Ctrl-C)", file=sys.stderr, flush=True)
        return
    traceback.print_exception(kind, error, trace)
    print(REPORT, file=sys.stderr, flush=True)


def end(line: str, code: int) -> None:
    """Does not return.  Once ranks have met, torch keeps what is printed to sys.stderr here for a later that there is
    not."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))
    os._exit(code)
