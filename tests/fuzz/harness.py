"""Runs a target on inputs and tells what came of each: accepted, refused in one line, or a finding.

A chunk of inputs runs in a process of its own, forked from this one, so that one that dies or hangs for good is told
with its input, and none leaves anything behind for the next.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minimind_ds.config.errors import UserError, one_line

# CPU seconds of one input after which it hangs, and seconds altogether (a pipe that nobody writes to).
CPU_S, IDLE_S = 5.0, 60.0
# Memory beyond what the process had: the largest that a reader may ask for because of an input of a few kB.
MEMORY = 1 << 30
# Characters of a message: a path, a key and a value, each cut to its limit.
MOST_SAID = 1500


@dataclass(frozen=True)
class Target:
    """One reader.

    draw: makes an input, plain data that pickles.  read: gives it to the reader, in an empty folder; raises what that
    raises.  share: inputs of this target for each of the others', about the reverse of its cost.  warm: what is made
    once, before processes fork.
    """

    name: str
    draw: Callable[[random.Random], Any]
    read: Callable[[Any, pathlib.Path], None]
    share: float = 1.0
    warm: tuple[Callable[[], Any], ...] = ()


@dataclass
class Outcome:
    """Counts of a target's inputs, and its findings: signature -> [how often, the first one's number, its message]."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    cpu_s: float = 0.0
    findings: dict[str, list] = field(default_factory=dict)

    def find(self, signature: str, number: int, said: str, times: int = 1) -> None:
        self.findings.setdefault(signature, [0, number, said])[0] += times

    def add(self, other: Outcome) -> None:
        self.inputs, self.accepted = self.inputs + other.inputs, self.accepted + other.accepted
        self.refused, self.cpu_s = self.refused + other.refused, round(self.cpu_s + other.cpu_s, 2)
        for signature, (times, number, said) in other.findings.items():
            self.find(signature, number, said, times)


class Hang(BaseException):
    """No library's `except Exception` keeps it."""


def signature(error: BaseException) -> str:
    """The exception's type and the innermost frame of the package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "ring"]
    ours = [frame for frame in frames if f"{os.sep}minimind_ds{os.sep}" in frame.filename] or frames
    where = f" in {pathlib.PurePath(*pathlib.PurePath(ours[-1].filename).parts[-2:])}:{ours[-1].name}" if ours else ""
    return type(error).__name__ + where


def input_of(target: Target, seed: int, number: int) -> Any:
    """Input `number` of a seed; the same in every process."""
    return target.draw(random.Random(f"{target.name} {seed} {number}"))


@contextlib.contextmanager
def limits():
    """Raises Hang in the main thread after CPU_S seconds of work, or IDLE_S altogether; again and again, should it be
    swallowed.  What is yielded says whether it was."""
    rung = []

    def ring(*_):
        rung.append(True)
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_S, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, IDLE_S, IDLE_S)
    try:
        yield rung
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def tried(target: Target, case: Any, folder: pathlib.Path) -> tuple[str, str]:
    """-> ("accepted", ""), ("refused", the message), or (a signature, the message) of a finding."""
    said, kind, rung = io.StringIO(), "accepted", []
    message = ""
    try:
        with limits() as rung, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            target.read(case, folder)
    except UserError as error:
        kind, message = "refused", one_line(error)
        if len(str(error)) > MOST_SAID:
            kind = f"a message of {len(str(error)) // 1000} k characters, {signature(error)}"
        elif not message.isprintable():
            kind = f"a message that does not print, {signature(error)}"
    except SystemExit as error:
        lines = said.getvalue().count("\n")
        kind, message = "refused", said.getvalue()[:300]
        if error.code != 2 or lines != 1 or len(said.getvalue()) > MOST_SAID:
            kind = f"exit code {error.code} after {min(lines, 9)} lines, {len(said.getvalue()) // 1000} k characters"
    except BaseException as error:
        kind, message = signature(error), str(error)[:300]
    if rung and not kind.startswith("Hang"):
        kind = f"Hang, which was then {kind}"
    return kind, message


def run_chunk(target: Target, seed: int, numbers: range, at, results) -> None:
    """In a process of its own: tries the inputs and sends the Outcome; `at` holds the number of the present one."""
    outcome = Outcome()
    home = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="fuzz_"))
    used = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What libraries write to the terminal themselves.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        for number in numbers:
            at.value = number
            folder = home / "case"
            folder.mkdir()
            kind, said = tried(target, input_of(target, seed, number), folder)
            outcome.inputs += 1
            if kind in ("accepted", "refused"):
                setattr(outcome, kind, getattr(outcome, kind) + 1)
            else:
                outcome.find(kind, number, said)
            shutil.rmtree(folder, ignore_errors=True)
        outcome.cpu_s = sum(os.times()[:4])
        results.send(outcome)
    except BaseException as error:
        # The harness's own.
        outcome.find(f"{signature(error)}, drawing", at.value, str(error)[:300])
        results.send(outcome)
    finally:
        shutil.rmtree(home, ignore_errors=True)
        # No library's threads are to be waited for.
        os._exit(0)


@dataclass
class Chunk:
    """Inputs of a target that a process is trying."""

    target: Target
    numbers: range
    process: Any
    at: Any
    results: Any
    seen: tuple[int, float] = (-1, 0.0)


def start(target: Target, seed: int, numbers: range) -> Chunk:
    fork = multiprocessing.get_context("fork")
    at, (here, there) = fork.RawValue("q", numbers.start), fork.Pipe(duplex=False)
    process = fork.Process(target=run_chunk, args=(target, seed, numbers, at, there))
    process.start()
    there.close()
    return Chunk(target, numbers, process, at, here)


def finish(chunk: Chunk) -> tuple[Outcome | None, list[range]]:
    """-> (what came of a chunk whose process has ended, or None, the inputs that are still to be tried)."""
    try:
        return chunk.results.recv(), []
    except EOFError:
        pass
    chunk.process.join()
    number, outcome = chunk.at.value, Outcome(inputs=1)
    code = chunk.process.exitcode
    why = signal.Signals(-code).name if code < 0 else f"code {code}"
    outcome.find(f"the process died of {why}", number, "")
    return outcome, [left for left in (range(chunk.numbers.start, number), range(number + 1, chunk.numbers.stop))
                     if left]


def is_stuck(chunk: Chunk) -> bool:
    """Whether its process has been at one input far beyond all limits: in a library that no signal reaches."""
    if chunk.at.value != chunk.seen[0]:
        chunk.seen = chunk.at.value, time.monotonic()
    return time.monotonic() - chunk.seen[1] > 3 * IDLE_S


def drive(work: list[tuple[Target, range]], seed: int, *, processes: int, until: float | None = None,
          heard: Callable[[dict[str, Outcome]], None] = lambda _: None) -> dict[str, Outcome]:
    """Tries all inputs in `work`, in its order, in so many processes at a time.

    Args:
        until: time.monotonic() from which on no chunk is begun.
        heard: called with the outcomes so far after each chunk.
    """
    todo, running = list(work), []
    outcomes = {target.name: Outcome() for target, _ in work}
    try:
        while running or (todo and (until is None or time.monotonic() < until)):
            while todo and len(running) < processes and (until is None or time.monotonic() < until):
                target, numbers = todo.pop(0)
                running.append(start(target, seed, numbers))
            ready = multiprocessing.connection.wait([chunk.results for chunk in running], timeout=1.0)
            for chunk in [chunk for chunk in running if chunk.results in ready]:
                outcome, left = finish(chunk)
                outcomes[chunk.target.name].add(outcome)
                todo[:0] = [(chunk.target, numbers) for numbers in left]
                running.remove(chunk)
                chunk.process.join()
                heard(outcomes)
            for chunk in running:
                if is_stuck(chunk):
                    chunk.process.kill()
    finally:
        for chunk in running:
            chunk.process.kill()
    return outcomes
