"""How long a run is, and the learning rate of each step where the DeepSpeed JSON brings no scheduler of its own.

    python -m pytest tests/training/test_schedule.py
"""

from __future__ import annotations

import math


def steps_of(run, epoch: int, plan_steps: int) -> int:
    """How many steps of an epoch's plan the run takes: all, or of the last one the share that is left."""
    share = run.epochs - epoch
    return plan_steps if share >= 1 else max(1, round(share * plan_steps))


def total_steps(run, plan_steps: int) -> int:
    """Optimizer steps of the run, if the plan of every epoch has as many as this one's."""
    last = run.epochs_begun - 1
    steps = last * plan_steps + steps_of(run, last, plan_steps)
    return min(run.max_steps, steps) if run.max_steps else steps


def warmup_share(run, steps: int) -> float:
    """The share of a run of so many steps in which its rate rises; more than 1 where it never ends."""
    return run.warmup_steps / steps if run.warmup_steps else run.warmup_ratio


def notes(run, steps: int) -> list[str]:
    """What the start of a run of so many steps says of its warm-up."""
    if steps > run.warmup_steps:
        return []
    return [f"{run.place('warmup_steps')} is {run.warmup_steps} and the run has {steps} steps: the rate never "
            "comes to its peak"]


def progress(run, step: int, epoch: int, epoch_step: int, epoch_steps: int) -> float:
    """How much of the run is done after this step, in (0, 1], by epochs or by max_steps, whichever ends it first.

    epoch_steps: of this epoch, as steps_of says.
    """
    by_epochs = (epoch + min(1, run.epochs - epoch) * ((epoch_step + 1) / epoch_steps)) / run.epochs
    return max(by_epochs, step / run.max_steps) if run.max_steps else by_epochs


def learning_rate(done: float, run, warmup: float | None = None) -> float:
    """Linear warm-up, then what --lr_schedule says, down to min_lr_ratio of the peak.

    Args:
        done: the share of the run, up to 1.
        warmup: warmup_share's; None is warmup_ratio.
    """
    warmup = run.warmup_ratio if warmup is None else warmup
    if done < warmup:
        return run.learning_rate * done / warmup
    fallen = (done - warmup) / max(1 - warmup, 1e-9)
    if run.lr_schedule == "constant":
        height = 1.0
    elif run.lr_schedule == "linear":
        height = 1 - min(fallen, 1.0)
    elif run.lr_schedule == "wsd":
        height = min((1 - done) / run.decay_ratio, 1.0) if run.decay_ratio else 1.0
    else:
        height = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    return run.learning_rate * (run.min_lr_ratio + (1 - run.min_lr_ratio) * height)
