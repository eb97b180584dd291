"""Waiting for what other processes do, by the event itself: a busy machine makes a test late and never wrong."""

import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable

# Hours of patience would do as well: it only ends what would never end.
HANG_S = 900


def until(true: Callable[[], bool], what: str, processes: Iterable[subprocess.Popen] = (),
          log: pathlib.Path | None = None) -> None:
    """Returns once `true()` is, looking 500 times a second: what some tests wait for passes quickly.

    Raises:
        AssertionError: one of the processes ended before, or nothing came; with the end of the log.
    """
    deadline = time.monotonic() + HANG_S
    while not true():
        ended = [p.poll() for p in processes if p.poll() is not None]
        late = time.monotonic() > deadline
        # What it was waiting for may have been the last thing that a process did.
        if (ended or late) and not true():
            said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
            raise AssertionError(f"{what}: {f'ended with {ended}' if ended else 'never came'}\n{said}")
        time.sleep(0.002)
