"""Injects the faults of a deal into a run, start after start, and looks for proof that each was met as promised."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from minimind_ds.resilience.restarts import last_step
from minimind_ds.resilience.signals import STOPPED
from minimind_ds.resilience.watchdog import HUNG as HUNG_CODE
from tests.conftest import ROOT, deepspeed_command, environment
from tests.faults import disk
from tests.faults.dealing import DAMAGES, HUNG, SLOW, Start
from tests.faults.run import Ended, Hang, Run, damage, identity

POINTED = {"latest names nothing": b"step_00009999\n", "latest empty": b"", "latest binary": bytes(range(256))}


def play(run: Run, starts: list[Start], *, draw: random.Random, failing: disk.FailingDisk,
         say: Callable[[str], None]) -> tuple[list[dict], int, list[str]]:
    """All starts of a deal, then as many more as a run needs to end, at most three.

    Args:
        failing: the disk that can return EIO.
        say: gets a line of progress.

    Returns:
        The faults that were injected, each {"kind", "step", "start", "detail", "met"}; hangs; what else went wrong.
    """
    faults, hangs, wrong, claims = [], 0, [], []
    ballast = run.folder.with_name("ballast")

    def note(kind: str, detail: str, met: bool) -> dict:
        faults.append({"kind": kind, "step": last_step(run.folder), "start": run.starts, "detail": detail, "met": met})
        say(f"start {run.starts}, step {faults[-1]['step']}: {kind}: {detail}")
        if not met:
            say(f"NOT MET, the log ends with\n{run.said()[-3000:]}")
        return faults[-1]

    for hand in [*starts, Start(), Start(), Start()]:
        failing.heal()
        ballast.unlink(missing_ok=True)
        hang = ("--hang_minutes", "0.2") if hand.end and hand.end[1] == HUNG else ()
        run.start(*hang, **(failing.environment if hand.end and hand.end[1].startswith("EIO") else {}))
        code = None
        try:
            for step, kind in hand.during:
                run.wait_for_step(step)
                note(kind, *(slow(run, draw) if kind == SLOW else second(run)))
            if hand.end:
                step, kind = hand.end
                # A run whose only whole checkpoint is damaged has none: that is not promised.
                run.wait_for_step(step, whole=2 if set(hand.between) & set(DAMAGES) else 0)
                time.sleep(draw.uniform(0, 0.1))
                detail, code, met = end(run, kind, draw, failing, ballast)
                note(kind, detail, met)
            else:
                code = run.wait_for_end()
        except Hang:
            hangs += 1
            run.kill(run.processes())
            run.account()
            say(f"start {run.starts}: HANGS")
        except Ended as early:
            code = run.wait_for_end()
            wrong.append(f"start {run.starts} {early} before its fault: {run.said()[-1500:]}")
        for claim, fault in claims:
            fault["met"] = claim in run.said()
            if not fault["met"]:
                say(f"{fault['kind']}: NOT MET, the log of the next start is\n{run.said()[-3000:]}")
        claims = []
        if code == 0:
            break
        if hand.end is None:
            wrong.append(f"start {run.starts} ended with {code}: {run.said()[-1500:]}")
        for kind in hand.between:
            detail, claim = spoil(run, kind, draw)
            claims.append((claim, note(kind, detail, True)))
    else:
        wrong.append("never came to its end")
    return faults, hangs, wrong


def slow(run: Run, draw: random.Random) -> tuple[str, bool]:
    rank, seconds, step = draw.randrange(2), draw.uniform(0.5, 2), last_step(run.folder)
    process = run.ranks()[rank]
    process.suspend()
    time.sleep(seconds)
    process.resume()
    run.wait_for(lambda: last_step(run.folder) > step)
    return f"rank {rank} stood still for {seconds:.1f} s", True


def second(run: Run) -> tuple[str, bool]:
    """The same folder once more, as one rank if the layout has it; the first waits, or it would be done too soon."""
    ranks, step = run.ranks(), last_step(run.folder)
    words = [str(ROOT / "launch" / "sft.py"), *run.flags]
    for process in ranks.values():
        process.suspend()
    job = subprocess.Popen(deepspeed_command(2, *words) if run.configuration.keys else [sys.executable, *words],
                           cwd=ROOT, text=True, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = job.communicate(timeout=run.limit_s)[0]
    except subprocess.TimeoutExpired:
        run.kill([*psutil.Process(job.pid).children(recursive=True), job])
        raise Hang from None
    finally:
        for process in ranks.values():
            process.resume()
    run.wait_for(lambda: last_step(run.folder) > step)
    met = job.returncode == 2 and f"is in use by process {ranks[0].pid} on" in said
    return f"ended with {job.returncode}", met


def end(run: Run, kind: str, draw: random.Random, failing: disk.FailingDisk, ballast) -> tuple[str, int, bool]:
    """Ends a start; -> (what was done, exit code, whether it ended as promised)."""
    ranks, everything, rank = run.ranks(), run.processes(), draw.randrange(2)
    if kind == "rank killed":
        ranks[rank].kill()
        code = run.wait_for_end()
        return f"rank {rank}", code, code not in (0, STOPPED)
    if kind == "power cut":
        run.kill(everything)
        return "all processes", run.wait_for_end(), True
    if kind == "killed while saving":
        run.wait_for(lambda: any(run.checkpoints.glob(".writing_*")))
        time.sleep(draw.uniform(0, 0.03))
        run.kill(draw.choice([everything, [ranks[rank]]]))
        code = run.wait_for_end()
        torn = [path.name for path in run.checkpoints.glob(".*")]
        return f"left {', '.join(torn) or 'nothing torn'}", code, code not in (0, STOPPED)
    if kind in ("SIGTERM", "SIGUSR1"):
        whom = draw.choice([[0], [1], [0, 1]])
        for i in whom:
            ranks[i].send_signal(getattr(signal, kind))
        code = run.wait_for_end()
        newest = max(run.checkpoints.glob("step_*"), default=None)
        met = code == STOPPED and newest and int(newest.name.removeprefix("step_")) == last_step(run.folder)
        return f"to ranks {whom}, exit code {code}", code, bool(met)
    if kind == HUNG:
        ranks[rank].suspend()
        code = run.wait_for_end()
        met = code == HUNG_CODE and f"error: rank {1 - rank} on" in run.said() and "(--hang_minutes)" in run.said()
        return f"rank {rank}, exit code {code}", code, met
    if kind == "disk full":
        disk.fill(ballast)
        sign = "No space left on device"
    else:
        failing.fail(kind.split()[-1])
        sign = "Input/output error"
    code = run.wait_for_end()
    told = any(line.startswith("error: ") and sign in line for line in run.said().splitlines())
    return f"exit code {code}", code, code == 1 and told


def spoil(run: Run, kind: str, draw: random.Random) -> tuple[str, str]:
    """Damages what lies on disk between two starts; -> (what was done, what the next start has to say of it)."""
    if kind in DAMAGES:
        newest = run.whole()[-1]
        detail = damage(newest, kind, draw)
        run.damaged.add(identity(newest))
        return detail, f"passed over a damaged checkpoint: {newest}"
    (run.checkpoints / "latest").write_bytes(POINTED[kind])
    return "overwritten", f"{run.checkpoints / 'latest'} does not name the newest whole checkpoint"
