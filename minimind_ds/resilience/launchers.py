"""The launchers that started this rank: DeepSpeed's two processes, or torchrun's agent.

Killed, they leave their ranks training on: nobody would restart those, and they hold the GPUs.  A shell that started a
launcher is none: runs in the background outlive it.

    python -m pytest tests/resilience/test_launchers.py
"""

from __future__ import annotations

import os

import psutil

MODULES = {"deepspeed.launcher.runner": "DeepSpeed's launcher", "minimind_ds.distributed.launcher":
           "DeepSpeed's launcher", "deepspeed.launcher.launch": "DeepSpeed's launcher of this machine",
           "torch.distributed.run": "torchrun"}
SCRIPTS = {"deepspeed": "deepspeed.launcher.runner", "deepspeed.pt": "deepspeed.launcher.runner", "ds":
           "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}


class Launcher:
    """A launcher's process, as it was found."""

    def __init__(self, process: psutil.Process, module: str):
        self.process, self.module = process, module

    def gone(self) -> bool:
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"{MODULES[self.module]} (process {self.process.pid})"


def above() -> list[Launcher]:
    """Those among the processes that this one descends from."""
    found = []
    try:
        for process in psutil.Process().parents():
            if module := runs(process.cmdline()):
                found.append(Launcher(process, module))
    except psutil.Error:
        # A process that ended meanwhile, or /proc is hidden: nobody is watched.
        pass
    return found


def runs(words: list[str]) -> str | None:
    """The module of a launcher whose command line this is; None for any other program, a shell above all."""
    # Some processes give themselves a title, which is one word.
    words = words[0].split() if len(words) == 1 else words
    if not words or not os.path.basename(words[0]).startswith("python"):
        return None
    rest = words[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        rest = rest[1:]
    if rest[:1] == ["-m"]:
        return rest[1] if rest[1:] and rest[1] in MODULES else None
    return SCRIPTS.get(os.path.basename(rest[0])) if rest else None
