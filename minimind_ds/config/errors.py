"""A user's mistake is one line and exit code 2; anything else is a bug of ours, and its traceback asks for a report.

    report_bugs()
"""

from __future__ import annotations

import os
import sys
import traceback

REPORT = ("This is a bug in minimind_ds, not your mistake: please report it with the lines above, the command "
          "and the versions of torch and deepspeed.")
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
        print(one_line(error), file=sys.stderr, flush=True)
        sys.stdout.flush()
        # The interpreter itself would end with 1.
        os._exit(2)
    if issubclass(kind, KeyboardInterrupt):
        # The interpreter then ends as by the signal: 130 to a shell.
        print("interrupted (Ctrl-C)", file=sys.stderr, flush=True)
        return
    traceback.print_exception(kind, error, trace)
    print(REPORT, file=sys.stderr, flush=True)
