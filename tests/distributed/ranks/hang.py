"""launch/sft.py whose ranks 1 and 2 hang where all gather the final weights: one sleeps, one lets no Python run.

    deepspeed --num_gpus 3 tests/distributed/ranks/hang.py --deepspeed ds_configs/zero2.json --max_steps 3 \
        --hang_minutes 0.2
"""

import ctypes
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.training import loop  # noqa: E402


def sleep():
    time.sleep(600)


def keep_the_interpreter():
    ctypes.PyDLL(None).sleep(600)


def hang_first(*args):
    if os.environ["RANK"] == "0":
        patience = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
        print(f"collectives wait {patience.total_seconds() / 60:g} minutes", file=sys.stderr)
        # As long as collectives: a checkpoint's verdict comes through it.
        store = dist.distributed_c10d._get_default_store()
        print(f"the store waits {store.timeout.total_seconds() / 60:g} minutes", file=sys.stderr)
    else:
        (sleep if os.environ["RANK"] == "1" else keep_the_interpreter)()
    return gather(*args)


if __name__ == "__main__":
    gather, engine.full_weights = engine.full_weights, hang_first
    sys.exit(loop.main("sft", sys.argv[1:]))
