"""The learning rate after each step, where the DeepSpeed JSON brings no scheduler of its own."""

from __future__ import annotations

import math


def progress(run, step: int, epoch: int, epoch_step: int, epoch_steps: int) -> float:
    """How much of the run is done after this step, in (0, 1], by epochs or by max_steps, whichever ends it first."""
    by_epochs = (epoch + (epoch_step + 1) / epoch_steps) / run.epochs
    return max(by_epochs, step / run.max_steps) if run.max_steps else by_epochs


def learning_rate(done: float, run) -> float:
    """Linear warm-up, then a cosine down to min_lr_ratio of the peak.  `done`: the share of the run, up to 1."""
    if done < run.warmup_ratio:
        return run.learning_rate * done / run.warmup_ratio
    fallen = (done - run.warmup_ratio) / max(1 - run.warmup_ratio, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    return run.learning_rate * (run.min_lr_ratio + (1 - run.min_lr_ratio) * cosine)
