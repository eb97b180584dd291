"""Ask a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP or SIGUSR1 means a checkpoint after this step, then exit 75.

A signal may reach one rank only, or the ranks at different steps.  Each step's loss all-reduce therefore carries one
more number, whether any rank was asked; all ranks read the same sum and stop after the same step.  A second SIGTERM or
Ctrl-C ends the process at once.

    kill -TERM <pid of any rank>
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

# sysexits.h's EX_TEMPFAIL: nothing is wrong, the same command goes on from the checkpoint.
STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A launcher passes Ctrl-C on to ranks that the terminal has already sent it to: within this it is one request.
SAME_REQUEST_SECONDS = 2.0
# Through the pipe, where signals come as their numbers: the end of the thread.
END = b"\0"


class Stopped(Exception):
    """The run was asked to stop and did, after writing the checkpoint of `step` unless there are none.

    code: the exit code.  planned: the stop was part of the command (--stop_after): nothing is to be started again by
    itself, and what comes next in a script may.
    """

    def __init__(self, step: int, *, kept: bool = True, planned: int = 0):
        if planned:
            said = f"stopped after {planned} steps (--stop_after)"
        else:
            said = "stopped as asked"
        super().__init__(f"{said}; the checkpoint of step {step} is written, the same command goes on"
                         if kept else f"stopped as asked after step {step}; with optimizer states on NVMe there is no "
                         "checkpoint, the same command starts over")
        self.step, self.planned, self.code = step, bool(planned), 0 if planned else STOPPED


class StopRequest:
    """Whether this process was asked to stop (`asked`: the signal's name) and whether all ranks know (`agreed`).

    As a context manager it takes the signals over.  A thread reads them from a pipe that Python's C handler writes
    to, so that a second one counts even while the main thread waits inside a collective.
    """

    def __init__(self):
        self.asked: str | None = None
        self.agreed = False
        self.first = None

    def __enter__(self) -> StopRequest:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.watcher = threading.Thread(target=self.watch, args=(self.reader,), name="signals", daemon=True)
        self.watcher.start()
        self.old_fd = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        # Under nohup a terminal that is closed says so to nobody.
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self.old = {number: signal.signal(number, lambda *_: None) for number in taken}
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

    def watch(self, reader: int) -> None:
        while (byte := os.read(reader, 1)) != END:
            if byte[0] in SIGNALS:
                self.receive(signal.Signals(byte[0]))

    def receive(self, number: signal.Signals) -> None:
        """Note a signal; does not return from the one that ends the process."""
        now = time.monotonic()
        # SIGUSR1 is a batch system's warning, followed by SIGTERM: it does not count as the first of two.
        if number != signal.SIGUSR1:
            if self.first is not None and now - self.first > SAME_REQUEST_SECONDS:
                print(f"{number.name} again: ending at once", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.first = self.first or now
        if self.asked is None:
            self.asked = number.name
            print(f"{number.name}: a checkpoint after this step, then the end; Ctrl-C or SIGTERM once more ends at "
                  "once", file=sys.stderr, flush=True)
