"""What a step's loss must look like, and what happens to a step whose loss does not.

A spike is a loss more than SIGMAS standard deviations above the mean of the last WINDOW steps' (as OLMo-core).  Every
rank judges the same all-reduced loss, so all decide alike; after a resume the window comes from metrics.jsonl, so that
a resumed run decides as the undisturbed one.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json --on_spike skip
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import statistics
from collections.abc import Iterable

from minimind_ds.config import untrusted

SIGMAS, WINDOW, LEAST = 6.0, 128, 32
# Skipped steps in a row after which something else than one bad batch is wrong.
MOST_SKIPPED = 10


class SpikeDetector:
    """The losses of the last steps, and how many in a row were skipped."""

    def __init__(self, losses: Iterable[float] = ()):
        self.losses = collections.deque(losses, maxlen=WINDOW)
        self.skipped = 0

    def check(self, loss: float) -> str | None:
        """None for a loss like the others, else what is wrong with it."""
        if not math.isfinite(loss):
            return "is not finite"
        if len(self.losses) < LEAST:
            return None
        mean, spread = statistics.fmean(self.losses), statistics.pstdev(self.losses)
        if loss > mean + SIGMAS * spread:
            return (f"is {loss:.4f}, {(loss - mean) / max(spread, 1e-12):.1f} standard deviations above the "
                    f"{len(self.losses)} before")
        return None

    def record(self, loss: float) -> None:
        """Records the loss of a step that was applied."""
        self.losses.append(loss)
        self.skipped = 0

    def skip(self) -> bool:
        """Count a skipped step; False if there were too many in a row."""
        self.skipped += 1
        return self.skipped <= MOST_SKIPPED


def taken_losses(path: pathlib.Path, last_step: int) -> list[float]:
    """The losses of the steps up to last_step in a metrics.jsonl that were not skipped, the last WINDOW of them."""
    found = collections.deque(maxlen=WINDOW)
    for line in untrusted.lines(path):
        try:
            facts = json.loads(line)
            taken = facts["step"] <= last_step and not facts.get("skipped")
            loss = float(facts["loss"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            # Not a step's line, or torn.
            continue
        if taken and math.isfinite(loss):
            found.append(loss)
    return list(found)
