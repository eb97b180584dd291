"""run.log in the run folder: what rank 0 prints, with the time, over all starts of a run.

    tail -f out/run.log
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from minimind_ds import terminal

NAME = "run.log"
# Libraries whose handlers hold the stream that there was when they were imported.
LOGGERS = ("DeepSpeed", "torch", "transformers")
COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Copied:
    """A text stream whose lines are also handed to `keep`; `shape` is what the stream shows of one."""

    def __init__(self, stream: TextIO, keep: Callable[[str], None], shape: Callable[[str], str] | None = None):
        self.stream, self.keep, self.shape = stream, keep, shape
        self.rest, self.lock = "", threading.RLock()

    def write(self, text: str) -> int:
        with self.lock:
            if self.shape is None:
                self.stream.write(text)
            *lines, self.rest = (self.rest + text).split("\n")
            for line in lines:
                if self.shape is not None:
                    self.stream.write(self.shape(line) + "\n")
                self.keep(line)
        return len(text)

    def close(self) -> None:
        """Shows and keeps what had no end of line; the stream stays open."""
        if self.rest:
            self.write("\n")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Records(logging.Handler):
    """Hands a library's log records to `keep`."""

    def __init__(self, keep: Callable[[str], None]):
        super().__init__()
        self.keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self.keep(f"{record.name}: {record.levelname.lower()}: {line}")


def one_line(text: str) -> str:
    """A line without control characters: of what was written over itself, the last."""
    text = COLOUR.sub("", text.rstrip("\r").rpartition("\r")[2])
    return "".join(character if character.isprintable() else " " for character in text).rstrip()


@contextlib.contextmanager
def kept(folder: pathlib.Path, rank: int, first: str) -> Iterator[Callable[[str], None]]:
    """While it lasts, what this process prints by Python goes to the run folder's log too; on rank 0 only.

    first: a line that says what begins here.

    Yields:
        keep(line), for what is to stand in the log and not on the screen.
    """
    if rank != 0:
        yield lambda line: None
        return
    try:
        file = (folder / NAME).open("a", buffering=1, encoding="utf-8", errors="replace")
    except OSError as error:
        print(f"warning: no {NAME}: {error}", file=sys.stderr, flush=True)
        yield lambda line: None
        return

    def keep(text: str) -> None:
        if line := one_line(text):
            # A log is no reason to end a run; where a disk is full, metrics.jsonl says so.
            with contextlib.suppress(OSError, ValueError):
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {line}\n")

    keep(first)
    out, err = Copied(sys.stdout, keep, terminal.wrap), Copied(sys.stderr, keep)
    handler = Records(keep)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                yield keep
            finally:
                out.close()
                err.close()
    except BaseException:
        # The interpreter prints it when the log is closed.
        for line in traceback.format_exc().splitlines():
            keep(line)
        raise
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        with contextlib.suppress(OSError):
            file.close()
