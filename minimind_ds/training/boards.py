"""The curves elsewhere, at Weights & Biases and in TensorBoard's files: a run outlives what goes wrong there.

    python launch/sft.py … --use_wandb --use_tensorboard
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import sys
from collections.abc import Callable, Iterator

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import reason

WANDB, TENSORBOARD = "Weights & Biases", "TensorBoard"
ADVICE = {WANDB: "run wandb login, set WANDB_API_KEY or WANDB_MODE=offline, or leave --use_wandb out",
          TENSORBOARD: "look at the folder tensorboard of the run, or leave --use_tensorboard out"}


class Boards:
    """Writes what flags ask for.

    Args:
        folder: the run folder.
        step: the step a resumed run continues after (0: a new run).
        resolved: the run's configuration, shown by wandb.
        say: takes the line about a board that is given up.

    Raises:
        UserError: one cannot be begun, in a new run; a resumed one goes on without it.
    """

    def __init__(self, folder: pathlib.Path, run, *, step: int, resolved: dict, say: Callable[[str], None]):
        self.say, self.new, self.on = say, step == 0, {}
        if run.use_wandb:
            with self.outlived(WANDB):
                self.on[WANDB] = begin_wandb(folder, run, resolved)
        if run.use_tensorboard:
            with self.outlived(TENSORBOARD):
                from torch.utils.tensorboard import SummaryWriter

                self.on[TENSORBOARD] = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.new = False

    @contextlib.contextmanager
    def outlived(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Whatever these libraries raise, wandb's own, its checks' and its sockets' among it.
        except Exception as error:
            self.on.pop(name, None)
            if name == WANDB:
                # Else its own end would be printed as a traceback when this process ends.
                with contextlib.suppress(Exception):
                    import wandb

                    wandb.teardown()
            if self.new:
                raise UserError(f"{name} cannot be begun: {reason(error)}; {ADVICE[name]}") from None
            self.say(f"{name} is given up for this start: {reason(error)}; the run goes on without it")

    def write(self, numbers: dict, step: int) -> None:
        if WANDB in self.on:
            with self.outlived(WANDB):
                self.on[WANDB].log(numbers, step=step)
        if TENSORBOARD in self.on:
            with self.outlived(TENSORBOARD):
                for name, value in numbers.items():
                    self.on[TENSORBOARD].add_scalar(name, value, step)

    def close(self) -> None:
        if WANDB in self.on:
            with self.outlived(WANDB):
                self.on[WANDB].finish()
        if TENSORBOARD in self.on:
            with self.outlived(TENSORBOARD):
                self.on[TENSORBOARD].close()


def begin_wandb(folder: pathlib.Path, run, resolved: dict):
    """The run at Weights & Biases; it is never asked for a key, which a job would wait for."""
    import wandb

    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            return wandb.init(project=run.wandb_project, dir=str(folder), config=resolved, resume="allow",
                              id=wandb_id(folder), name=folder.resolve().name)
        finally:
            sys.stdin = stdin


def wandb_id(folder: pathlib.Path) -> str:
    """The run's id at Weights & Biases, kept in the run folder so that a resumed run continues its curves."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    found = untrusted.read_text(path).strip()
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise UserError(f"{path} holds {untrusted.shown(found)}, which is no run's id at Weights & Biases: delete it")
    return found
