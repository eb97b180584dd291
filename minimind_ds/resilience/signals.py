"""Ask a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP or SIGUSR1 means a checkpoint after this step, then exit 75.

A signal may reach one rank only, or the ranks at different steps.  Each step's loss all-reduce therefore carries one
more number, whether any rank was asked; all ranks read the same sum and stop after the same step.  A second SIGTERM or
Ctrl-C ends the process at once.  Before the training there is no step to wait for.  That the launcher has gone counts
as a signal, too.

    kill -TERM <pid of any rank>
"""

from __future__ import annotations

import abc
import functools
import os
import select
import signal
import sys
import threading
import time

from minimind_ds.config.spellings import say_once
from minimind_ds.resilience import launchers

# sysexits.h's EX_TEMPFAIL: nothing is wrong, the same command goes on from the checkpoint.
STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A launcher passes Ctrl-C on to ranks that the terminal has already sent it to: within this it is one request.
SAME_REQUEST_SECONDS = 2.0
# Through the pipe, where signals come as their numbers: the end of the thread.
END = b"\0"
# How often the launcher is looked for.
LOOK_S = 1.0


class Stopped(Exception):
    """The run was asked to stop and did, after writing the checkpoint of `step` unless there are none.

    code: the exit code.  planned: the stop was part of the command (--stop_after): nothing is to be started again by
    itself, and what comes next in a script may.  again: it was stopped before, and only started again by torchrun, to
    which 75 is a failure.
    """

    def __init__(self, step: int, *, kept: bool = True, planned: int = 0, again: bool = False):
        if again:
            said = "torchrun started a run again that was asked to stop; it stays stopped"
        elif planned:
            said = f"stopped after {planned} steps (--stop_after)"
        else:
            said = "stopped as asked"
        super().__init__(f"{said}; the checkpoint of step {step} is written, the same command goes on"
                         if kept else f"stopped as asked after step {step}; with optimizer states on NVMe there is no "
                         "checkpoint, the same command starts over")
        self.step, self.planned, self.code = step, bool(planned), 0 if planned else STOPPED
        self.how = {"kept": kept, "planned": planned, "again": again}

    def __reduce__(self):
        """Rank 0 sends it to the others."""
        return functools.partial(Stopped, **self.how), (self.step,)


class Signals(abc.ABC):
    """As a context manager it takes signals over, and looks whether the launcher of this rank has gone.

    A thread reads them from a pipe that Python's C handler writes to: it hears them while the main thread waits inside
    a collective, loads a library or tokenises.
    """

    signals = SIGNALS

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.watcher = threading.Thread(target=self.watch, args=(self.reader, launchers.above()), name="signals",
                                        daemon=True)
        self.watcher.start()
        self.old_fd = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        # Under nohup a terminal that is closed says so to nobody.
        taken = [n for n in self.signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self.old = {number: signal.signal(number, self.heard) for number in taken}
        for number in taken:
            # Libraries need not expect their system calls to be interrupted.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_fd)
        # Not by closing it: a process forked meanwhile may hold the pipe open.
        os.write(self.writer, END)
        self.watcher.join()
        os.close(self.writer)
        os.close(self.reader)

    def watch(self, reader: int, above: list[launchers.Launcher]) -> None:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while True:
            if poll.poll(1000 * LOOK_S if above else None):
                byte = os.read(reader, 1)
                if byte == END:
                    return
                if byte[0] in self.signals:
                    self.receive(signal.Signals(byte[0]))
            elif signal.getsignal(signal.SIGTERM) != self.heard:
                # One inside this one has taken over.
                above = []
            elif gone := next((launcher for launcher in above if launcher.gone()), None):
                above = []
                self.lose(str(gone))

    def heard(self, *_) -> None:  # noqa: B027
        """Python's handler, which has nothing to do: the C one has written to the pipe already."""

    @abc.abstractmethod
    def receive(self, number: signal.Signals) -> None:
        """Called with each signal, by the thread."""

    @abc.abstractmethod
    def lose(self, launcher: str) -> None:
        """Called once, by the thread, when a launcher has gone."""


class Preparing(Signals):
    """Before the training, and in programs that train nothing: the process ends at once.

    What is tokenised by then is kept, chunk by chunk (data/tokenise.py).  Ctrl-C is left to Python.
    """

    signals = tuple(number for number in SIGNALS if number != signal.SIGINT)

    def receive(self, number: signal.Signals) -> None:
        self.end(number.name)

    def lose(self, launcher: str) -> None:
        self.end(f"{launcher} is gone")

    @staticmethod
    def end(why: str) -> None:
        """Does not return.  One rank of a machine speaks: where another has ended by a mistake, which it has told, the
        launcher's SIGTERM to the rest is no news."""
        say_once(f"{why}: ends at once, before any step; what is tokenised is kept, the same command goes on")
        os._exit(STOPPED)


class StopRequest(Signals):
    """While a run trains: whether this process was asked to stop (`asked`: by what) and whether all ranks know
    (`agreed`)."""

    def __init__(self):
        self.asked: str | None = None
        self.agreed = False
        self.first = None

    def receive(self, number: signal.Signals) -> None:
        """Note a signal; does not return from the one that ends the process."""
        now = time.monotonic()
        # SIGUSR1 is a batch system's warning, followed by SIGTERM: it does not count as the first of two.  Nor SIGHUP
        # as the second: a terminal closes when all that it ran, DeepSpeed's launcher, has ended by Ctrl-C.
        if number != signal.SIGUSR1:
            again = number != signal.SIGHUP and self.first is not None
            if again and now - self.first > SAME_REQUEST_SECONDS:
                print(f"{number.name} again: ending at once", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.first = self.first or now
        self.ask(number.name, "; Ctrl-C or SIGTERM once more ends at once")

    def lose(self, launcher: str) -> None:
        self.ask(f"{launcher} is gone")

    def ask(self, why: str, more: str = "") -> None:
        if self.asked is None:
            self.asked = why
            print(f"{why}: a checkpoint after this step, then the end{more}", file=sys.stderr, flush=True)
