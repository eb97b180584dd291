"""launch/sft.py as a loaded machine may end it: rank 0 stands still when the run is over, the other rank is late.

Rank 0 answers again while the other's interpreter is ending: a thread still waiting for it inside C++ aborts then.

    deepspeed --num_gpus 2 tests/distributed/ranks/late_end.py --deepspeed ds_configs/zero2.json --max_steps 3
"""

import os
import pathlib
import signal
import sys
import threading
import time

import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from minimind_ds.training import loop  # noqa: E402

# Longer than the notes are looked at apart.
LATE_S = 7.0


class Wake:
    """Lets process `pid` go on once this interpreter deletes its modules, and takes a moment more to end."""

    def __init__(self, pid: int):
        self.pid, self.kill, self.sleep, self.number = pid, os.kill, time.sleep, int(signal.SIGCONT)

    def __del__(self):
        self.kill(self.pid, self.number)
        self.sleep(1.0)


def end_late(prepared, *args) -> None:
    global wake
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    write(prepared, *args)
    if prepared.world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    wake = Wake(pids[0])
    notes = [thread for thread in threading.enumerate() if thread.name == "watchdog notes"]
    for thread in notes:
        thread.join(LATE_S)
    print(f"notes are {'still ' if any(thread.is_alive() for thread in notes) else 'no longer '}taken", flush=True)


if __name__ == "__main__":
    write, loop.write_weights = loop.write_weights, end_late
    sys.exit(loop.main("sft", sys.argv[1:]))
