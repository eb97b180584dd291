"""Groups of checks, each in a process of its own that may die, hang or break the device: it costs its own result only.

A group's process writes each result to the group's file before it begins the next; one that dies is started again and
leaves out what it died of.  Nothing here loads torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

from minimind_ds.io import write_file
from minimind_ds.paths import ROOT

# The exit status of a process after a fault of the device: a new process has to go on.
DEVICE_BROKE = 3
# Statuses of a result that has to be right and is not.
BAD = ("wrong", "failed", "stopped")


class Group(NamedTuple):
    """A process to run: `file` receives its records; `command` is what starts it (nothing to start if empty).

    report: makes the one record of a process that writes none, from its exit status.
    environment: beside the usual one.
    """

    part: str
    name: str
    file: pathlib.Path
    command: tuple[str, ...]
    report: Callable[[int | None], dict] | None = None
    environment: tuple[tuple[str, str], ...] = ()


def environment(cuda: bool) -> dict[str, str]:
    """A child's: kernels are interpreted where there is no GPU, and only there."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept if cuda else {**kept, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}


def supervise(groups: list[Group], side_by_side: int, budget_s: float, cuda: bool) -> None:
    """Runs every group's process, `side_by_side` at once, until each has ended or the time is up."""
    deadline = time.monotonic() + budget_s
    waiting, running = [group for group in groups if group.command], {}
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                group = waiting.pop(0)
                print(f"-- {group.part}: {group.name}", flush=True)
                running[group] = subprocess.Popen(group.command, cwd=ROOT, start_new_session=True,
                                                  env={**environment(cuda), **dict(group.environment)})
            time.sleep(0.2)
            late = time.monotonic() > deadline
            for group, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    end(process)
                del running[group]
                if settle(group, process.returncode, late):
                    waiting.insert(0, group)
            if late:
                for group in waiting:
                    note(group, "stopped", f"not started: the {budget_s:.0f} s of its part were over")
                waiting = []
    finally:
        for process in running.values():
            end(process)


def end(process: subprocess.Popen) -> None:
    """The process and those it started (pytest's workers, DeepSpeed's ranks)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def settle(group: Group, returncode: int, late: bool) -> bool:
    """Notes how a group's process ended; True if it should be started again for what is left."""
    if group.report:
        write(group.file, {"records": [group.report(returncode)]})
        return False
    if late:
        note(group, "stopped", "the time of its part was over")
        return False
    if returncode in (0, DEVICE_BROKE):
        return returncode == DEVICE_BROKE
    how = (f"killed by signal {-returncode}" + (" (the clock of a single check)" if returncode == -signal.SIGALRM
                                                else "")) if returncode < 0 else f"ended with {returncode}"
    return note(group, "failed", f"its process {how}; what it printed says more")


def note(group: Group, status: str, reason: str) -> bool:
    """Adds a record for the check that was under way; False if none was, so that starting again would not help."""
    found = records_of(group)
    name = found.pop("running", None)
    print(f"   {status}: {group.part} {group.name} {name or ''}: {reason}", flush=True)
    ours = not group.name.startswith("others")
    found["records"].append({"item": name, "op": group.name, "ours": ours, "status": status, "reason": reason})
    write(group.file, found)
    return name is not None


def records_of(group: Group) -> dict:
    """What the group's file holds so far."""
    return json.loads(group.file.read_text(encoding="utf-8")) if group.file.exists() else {"records": []}


def all_right(records: list[dict]) -> bool:
    """No result of ours is wrong or missing, and there is one at all.  Others' faults are theirs."""
    return bool(records) and not any(r["ours"] and r["status"] in BAD for r in records)


def write(path: pathlib.Path, document: dict) -> None:
    """Whole or not at all: a process may be killed at any moment."""
    write_file(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
