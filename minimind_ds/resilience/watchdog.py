"""A run that hangs ends, and says where: which rank is behind, and what every rank was doing.

Each rank notes in the process group's store what it does (`beat`).  A thread looks at this rank's own last note: when
it is older than the limit, this rank is stuck, alone or because it waits for another.  It then asks all ranks to write
their stacks to the log, writes its own, says what the other ranks noted last, and ends the process; the launcher ends
the others.  The store lives in a thread of rank 0's C++ side, so it answers while Python waits inside a collective.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json --hang_minutes 10
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from minimind_ds.distributed.torch_compat import default_store

# How long the notes of the other ranks are waited for, and at the end the writing of this one's.
ASK_S, TELL_S = 20.0, 2.0
# In the store when a rank wants to see the stacks of all.
STACKS = "watchdog/stacks"
STDERR = 2
# Of its own, so that a batch script can tell a hang from a crash.
HUNG = 76


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone: what gloo and NCCL raise then."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL"))


class Watchdog:
    """As a context manager around the training; `beat` says what this rank does now."""

    def __init__(self, rank: int, ranks: int, limit_s: float, look_s: float = 5.0):
        self.rank, self.ranks, self.limit_s, self.look_s = rank, ranks, limit_s, min(look_s, limit_s / 4)
        self.host, self.over, self.noted = socket.gethostname(), threading.Event(), threading.Event()
        self.store = default_store() if ranks > 1 else None
        self.doing, self.since = "starting", time.monotonic()

    def __enter__(self) -> Watchdog:
        self.watcher = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.watcher.start()
        if self.store is not None:
            # Not the same thread: where rank 0 hangs as a whole, its store may not answer either.
            self.teller = threading.Thread(target=self.tell, name="watchdog notes", daemon=True)
            self.teller.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.noted.set()
        self.watcher.join()
        if self.store is not None:
            # Without `finish` this rank ends by an error of its own: not with 0 in any case.
            self.teller.join(TELL_S)

    def finish(self) -> None:
        """Stop taking notes, on all ranks; collective, and the last use of rank 0's store.

        An interpreter that ends while a thread is inside the store aborts ("terminate called", exit code -6), so this
        rank waits until its thread has left, and for the other ranks before rank 0 may end.  A rank that never comes
        ends the run as everywhere: the limit still holds.
        """
        if self.store is not None:
            self.beat("the end")
            self.noted.set()
            self.teller.join()
            dist.barrier()

    def beat(self, doing: str) -> None:
        """`doing`: 'step 12: update', for example.  Cheap: the thread tells the others."""
        self.doing, self.since = doing, time.monotonic()

    def watch(self) -> None:
        while not self.over.is_set():
            # Library code that hangs and lets no Python run, this thread neither: its stack comes from a C thread.
            with contextlib.suppress(RuntimeError):
                # Where no more threads can be started, this one still looks.
                faulthandler.dump_traceback_later(self.limit_s, file=STDERR)
            self.over.wait(self.look_s)
            doing, age = self.doing, time.monotonic() - self.since
            if age > self.limit_s and not self.over.is_set():
                self.end(doing, age)
        faulthandler.cancel_dump_traceback_later()

    def tell(self) -> None:
        told, shown = None, False
        try:
            while not self.noted.is_set():
                if (doing := self.doing) != told:
                    self.store.set(f"watchdog/{self.rank}", f"{self.host}\t{time.time():.1f}\t{doing}")
                    told = doing
                if not shown and self.store.check([STACKS]):
                    shown = True
                    self.show_stacks(f"rank {self.rank} on {self.host} is in '{doing}'; its stacks follow, since one "
                                     "of the ranks hangs")
                self.noted.wait(self.look_s)
        except Exception:  # noqa: BLE001  (rank 0 is gone: the collectives will say so)
            return

    @staticmethod
    def show_stacks(why: str) -> None:
        print(why, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)

    def end(self, doing: str, age: float) -> None:
        """Does not return."""
        self.show_stacks(f"error: rank {self.rank} on {self.host} has been in '{doing}' for {age:.0f} s "
                         f"(--hang_minutes): {self.others()}; the stacks of this rank follow")
        # The launcher ends the others as soon as this one has left, and they have theirs to write.
        time.sleep(2 * self.look_s)
        # Not exit(): that would wait for the very thread that hangs.
        os._exit(HUNG)

    def others(self) -> str:
        """What the other ranks said last, the one behind first."""
        if self.store is None:
            return "it is the only rank"
        notes = []
        asking = threading.Thread(target=self.ask, args=(notes,), name="watchdog asks", daemon=True)
        asking.start()
        asking.join(ASK_S)
        if asking.is_alive() and self.rank != 0:
            notes.append((0.0, "rank 0, which keeps the ranks' notes, does not answer"))
        shown = [text for _, text in sorted(notes)[:8]]
        return "; ".join(shown) + (f"; and {len(notes) - 8} more" if len(notes) > 8 else "")

    def ask(self, notes: list[tuple[float, str]]) -> None:
        """Has all ranks write their stacks, and appends (when, what) for each other; may wait for ever, as a store's
        timeout needs its answer too."""
        with contextlib.suppress(Exception):
            self.store.set(STACKS, str(self.rank))
        for rank in range(self.ranks):
            key = f"watchdog/{rank}"
            try:
                self.store.wait([key], datetime.timedelta(seconds=2))
                host, at, doing = self.store.get(key).decode().split("\t")
            except Exception:  # noqa: BLE001
                host, at, doing = "unknown host", "0", "nothing since the start, or its store is gone"
            if rank != self.rank:
                notes.append((float(at), f"rank {rank} on {host}: '{doing}'"
                              + (f" since {time.time() - float(at):.0f} s" if float(at) else "")))
