"""One HTML file of a run, or of several beside each other: nothing but itself is needed to open it.

    python launch/report.py out/sft
"""

from __future__ import annotations

import os
import pathlib
import sys

from minimind_ds.config import program_flags, untrusted
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.io import write_file
from minimind_ds.report import data, page
from minimind_ds.report.folder import read
from minimind_ds.report.tables import Shown, shown
from minimind_ds.training.history import REPORT
from minimind_ds.training.prepare import PreparedRun


def main(argv: list[str]) -> int:
    """The whole of launch/report.py.  Returns the exit code."""
    options = program_flags.report().parse_args(argv)
    out = options.out or (options.runs[0] if len(options.runs) == 1 else pathlib.Path()) / REPORT
    try:
        if len(options.runs) > page.MOST_RUNS:
            raise UserError(f"{len(options.runs)} runs; a report holds at most {page.MOST_RUNS} beside each other")
        check_out(out)
        write(out, [of_folder(folder) for folder in options.runs])
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    print(f"report: {out}")
    return 0


def check_out(out: pathlib.Path) -> None:
    """Raises UserError where something else than a report would be replaced."""
    if os.path.isfile(out):
        with untrusted.open_file(out, untrusted.MOST_OF_LINES) as file:
            if not file.read(len(page.FIRST)).startswith(page.FIRST):
                raise UserError(f"{untrusted.shown_path(out)} exists and is no report: name another --out")


def of_folder(folder: pathlib.Path) -> Shown:
    """Raises UserError where there is no run."""
    found = read(folder)
    return shown(found, lambda: data.reopened(found))


def of_prepared(prepared: PreparedRun) -> pathlib.Path:
    """Writes the report of a run that has just ended into its folder; nothing of its data is opened or packed again.

    Raises:
        UserError: it cannot be written.
    """
    out = prepared.folder / REPORT
    write(out, [shown(read(prepared.folder), lambda: data.of_prepared(prepared))])
    return out


def write(out: pathlib.Path, runs: list[Shown]) -> None:
    """Raises UserError where the file cannot be written, or Bokeh is not there."""
    content = page.render(runs)
    try:
        write_file(out, content)
    except OSError as error:
        raise UserError(f"cannot write {untrusted.shown_path(out)}: {error.strerror}") from None
