"""The evaluations of a run so far: which had the lowest loss, and how many came after it.

Every rank has the same all-reduced losses, so all decide alike; after a resume they come from metrics.jsonl, so that a
resumed run decides as the undisturbed one.

    deepspeed launch/sft.py --deepspeed zero2 --eval_fraction 0.05 --keep_best --patience 3
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable

from minimind_ds.config import untrusted

# A loss from which on the perplexity is no float any more.
MOST = 700.0


class Evaluations:
    """best: (step, loss) of the lowest loss, the earliest of equal ones, or None.  since: evaluations after it.
    last: (step, loss) of the latest."""

    def __init__(self, losses: Iterable[tuple[int, float | None]] = ()):
        self.best, self.last, self.since = None, None, 0
        for step, loss in losses:
            self.record(step, loss)

    def record(self, step: int, loss: float | None) -> bool:
        """Whether this loss (None: it is not finite) is below all before."""
        self.last = step, loss
        if loss is None or (self.best is not None and loss >= self.best[1]):
            self.since += 1
            return False
        self.best, self.since = (step, loss), 0
        return True

    def at(self, step: int) -> dict:
        """{"eval_loss": loss} where that step's weights were evaluated last."""
        return {"eval_loss": self.last[1]} if self.last and self.last[0] == step else {}

    def gave_up(self, patience: int) -> bool:
        """Whether so many evaluations in a row brought nothing; with 0 never."""
        return 0 < patience <= self.since


def perplexity(loss: float | None) -> float | None:
    """exp(loss), None where that is no number."""
    return math.exp(loss) if loss is not None and loss < MOST else None


def recorded(path: pathlib.Path, last_step: int) -> list[tuple[int, float | None]]:
    """(step, loss) of the evaluations up to last_step in a metrics.jsonl."""
    found = []
    for line in untrusted.lines(path):
        try:
            facts = json.loads(line)
            step, loss = int(facts["step"]), facts["eval_loss"]
            loss = None if loss is None else float(loss)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            # Not an evaluation's line, or torn.
            continue
        if step <= last_step:
            found.append((step, loss))
    return found
