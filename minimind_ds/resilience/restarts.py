"""What one start of a run tells the next one, and the batch script that decides whether there is a next one.

`attempts.json` in the run folder lists the failures since the run was last started by hand.  A run that a batch system
restarts by itself gives up when the same step failed three times, so that a crash does not burn a week of GPU hours.
The file named by MINIMIND_DS_OUTCOME (set by launch/slurm/common.sh) gets one word: io.report.

    cat out/attempts.json
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

from minimind_ds.checkpoint.folder import folder_of, listed
from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.distributed.world import whole
from minimind_ds.io import report, write_file
from minimind_ds.resilience.signals import Stopped

SAME_STEP = 3
SAME_CHECKPOINT = 10


def automatic_restarts() -> int:
    """How often SLURM or torchrun has started this job again by itself.  Raises ValueError for what is no number."""
    return count_of("SLURM_RESTART_COUNT") + torchrun_attempt()


def torchrun_attempt() -> int:
    """How often torchrun's agent has started the ranks again."""
    return count_of("TORCHELASTIC_RESTART_COUNT")


def count_of(name: str) -> int:
    """A variable's number; 0 where it is not set or empty."""
    return whole({name: os.environ.get(name) or "0"}, name, 0)


def job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def job_facts() -> dict:
    """Whose checkpoint one is, for its manifest."""
    return {"id": job_id(), "attempt": automatic_restarts()}


def goes_on(past: dict) -> bool:
    """Whether this is a later start, begun by a batch system, of the job that last trained where `past` was read."""
    return bool(automatic_restarts()) and past["job"] == job_id()


def has_own_checkpoint(folder: pathlib.Path) -> bool:
    """Whether this job, restarted by itself, has written a checkpoint here: it goes on from that whatever it was told
    to start from, or `--from_resume none` would throw the work away at each pre-emption."""
    if not automatic_restarts() or job_id() is None:
        return False
    # Not by their times: clocks differ.
    return any(whose(path).get("id") == job_id() for path in listed(folder_of(folder)))


def whose(path: pathlib.Path) -> dict:
    """job_facts of the start that wrote a checkpoint; {}: its manifest does not say."""
    try:
        facts = untrusted.read_json(path / "manifest.json")["job"]
    except (ValueError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def refuse_after_stop(folder: pathlib.Path) -> None:
    """Raises Stopped where torchrun's agent starts ranks again that were asked to stop: to it, 75 is a failure."""
    stopped = read(folder).get("stopped") or {}
    if stopped.get("run") == os.environ.get("TORCHELASTIC_RUN_ID", "") and torchrun_attempt() > stopped["attempt"]:
        raise Stopped(stopped["step"], again=True)


def begin(folder: pathlib.Path, step: int) -> list[str]:
    """Note that training begins after `step`; rank 0 only, before the metrics of lost steps are dropped.

    Returns:
        Lines for the user.

    Raises:
        ValueError: automatic restarts fail over and over at one step, or from one checkpoint.
    """
    past = read(folder)
    if not goes_on(past):
        past = {"job": job_id(), "running": False, "failures": []}
    failures = past["failures"]
    if past["running"]:
        failures.append({"from": past["from"], "at": last_step(folder) + 1, "error": past.get("error")})
    past = {name: value for name, value in past.items() if name not in ("error", "stopped")}
    write(folder, {**past, "running": False})
    for key, most, what in (("at", SAME_STEP, "at step"), ("from", SAME_CHECKPOINT, "after the checkpoint of step")):
        latest = failures[-most:]
        if len(latest) == most and len({failure[key] for failure in latest}) == 1:
            why = latest[-1]["error"] or "the process was killed (out of memory?) or its node lost"
            raise UserError(f"{folder}: training failed {most} times {what} {latest[-1][key]}, the last time with: "
                             f"{why}; not tried again; started by hand it goes on from the last checkpoint")
    write(folder, {**past, "running": True, "from": step})
    report("training")
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return [f"SLURM job {(job_id() or '')[:40]}, restarted {automatic_restarts()} times"
            + (f", failed {len(failures)} times" if failures else "")]


class Attempt:
    """Around the training: notes how it ended.  Active on rank 0 only."""

    def __init__(self, folder: pathlib.Path, rank: int):
        self.folder, self.rank = folder, rank

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if self.rank != 0:
            return
        if error is None:
            (self.folder / "attempts.json").unlink(missing_ok=True)
            report("done")
        elif isinstance(error, Stopped):
            stopped = {"run": os.environ.get("TORCHELASTIC_RUN_ID"), "attempt": torchrun_attempt(), "step": error.step}
            write(self.folder, {**read(self.folder), "running": False, "stopped": stopped})
            # A batch script requeues what was stopped, and not what has done all it was told to.
            report("done" if error.planned else "stopped")
        else:
            # A full disk fails here too; what it failed first is to be seen.
            with contextlib.suppress(OSError):
                write(self.folder, {**read(self.folder), "error": f"{kind.__name__}: {error}"[:500]})


def read(folder: pathlib.Path) -> dict:
    try:
        found = untrusted.read_json(folder / "attempts.json")
        failures = [{"from": int(one["from"]), "at": int(one["at"]), "error": one["error"]}
                    for one in found["failures"]]
        if stopped := found.get("stopped"):
            found["stopped"] = {"run": stopped["run"], **{key: int(stopped[key]) for key in ("attempt", "step")}}
        return {**found, "job": found["job"], "running": bool(found["running"]), "failures": failures,
                **({"from": int(found["from"])} if found["running"] else {})}
    # Torn, or another program's: the failures before are not known.
    except (ValueError, KeyError, TypeError, OverflowError):
        return {"job": None, "running": False, "failures": []}


def write(folder: pathlib.Path, record: dict) -> None:
    write_file(folder / "attempts.json", json.dumps(record, indent=1) + "\n")


def last_step(folder: pathlib.Path) -> int:
    """The last step in metrics.jsonl, 0 when there is none; a torn last line does not count."""
    try:
        with untrusted.open_file(folder / "metrics.jsonl", untrusted.MOST_OF_LINES) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().splitlines()
    except (OSError, UserError):
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return 0
