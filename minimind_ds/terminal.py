"""Lines for people: no wider than the terminal, or than 80 columns where there is none, and colour only where it is
wanted.

    NO_COLOR=1 COLUMNS=100 python launch/plan.py --preset minimind-3 --ranks 8 --memory 80
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

LEAST = 40


class Lasting:
    """A text stream that outlives its reader: where it cannot be written to any more, what follows goes nowhere."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.lose()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.lose()

    def lose(self) -> None:
        """What the stream still holds is then written without an error, too, and so is what libraries write."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def hold_streams(lasting: bool) -> None:
    """Closed standard streams are opened to nowhere: files opened later would get their numbers, and what libraries
    print.

    lasting: nothing that happens to an output ends the program; else to stderr only.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    sys.stdin = sys.stdin or open(0, closefd=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", encoding="utf-8", closefd=False)
        if stream.errors == "strict":
            # A file's name may hold what a terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Lasting(stream) if lasting or name == "stderr" else stream)


def width() -> int:
    """Columns of the terminal (COLUMNS, where it is set); 80 without one."""
    return max(LEAST, shutil.get_terminal_size((80, 24)).columns)


def bar_width() -> dict:
    """tqdm's options for a bar as wide as the terminal, or 80 where it says that it has no size, as containers' do."""
    with contextlib.suppress(OSError):
        if os.get_terminal_size(2).columns == 0:
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


def wrap(text: str, indent: str = "    ") -> str:
    """Text whose lines fit, what goes on indented; a word that is longer, as a path may be, stays whole."""
    return "\n".join(line if len(line) <= width() else textwrap.fill(
        line, width(), initial_indent=line[:len(line) - len(line.lstrip())], subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))


def coloured(stream) -> bool:
    """Whether a stream shows colours, and the user has not asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shorter(path: str) -> str:
    """A path as seen from the folder one works in, where it lies in that; nothing in its name moves the cursor."""
    inside = pathlib.Path(path).is_relative_to(pathlib.Path.cwd())
    text = os.path.relpath(path) if inside else str(path)
    return text if text.isprintable() else ascii(text)[1:-1]


def count(n: int, what: str, many: str = "") -> str:
    """'1 rank', '2 ranks'."""
    return f"{n:,} {what if n == 1 else many or what + 's'}"


def duration(seconds: float) -> str:
    """'0:07', '12:34', '1:02:34'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def columns(names: list[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    """A table whose rows have a name; as many columns side by side as fit, the others below them.

    names: of the columns.
    """
    rows = list(rows)
    first = max(len(name) for name, _ in rows)
    sizes = [max(len(cell) for cell in (name, *(cells[i] for _, cells in rows))) for i, name in enumerate(names)]
    lines, at = [], 0
    while at < len(names):
        upto, used = at + 1, first + 2 + sizes[at]
        while upto < len(names) and used + 2 + sizes[upto] <= width():
            used += 2 + sizes[upto]
            upto += 1
        for name, cells in [("", names), *rows]:
            lines.append("  ".join([name.ljust(first), *(cells[i].rjust(sizes[i]) for i in range(at, upto))]).rstrip())
        at = upto
    return lines


def size(value: float) -> str:
    """Bytes in the unit that fits them."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= of:
            return f"{value / of:,.1f} {unit}"
    return f"{value:,.0f} B"
