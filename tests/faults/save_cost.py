"""What a checkpoint in the background costs the step loop, with and without saving in turns, in one run.

    deepspeed --num_gpus 2 tests/faults/save_cost.py --deepspeed ds_configs/zero2.json --preset debug --pack_len 768
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from minimind_ds import checkpoint  # noqa: E402
from minimind_ds.bench.machine import machine  # noqa: E402
from minimind_ds.training import loop  # noqa: E402

SAVES, WINDOW = int(os.environ.get("SAVES", 8)), int(os.environ.get("WINDOW", 6))


def save_cost(argv: list[str], folder: pathlib.Path) -> dict:
    """Save every 2 * WINDOW steps, and compare the WINDOW steps from a save on with the WINDOW steps after those.

    Args:
        argv: flags of launch/sft.py.
        folder: the run's; the same on every rank.

    Returns:
        Quartiles in ms: a step, what the loop waits for a save (the copy), and what a save costs the loop in all, with
        what its thread takes from the steps beside it.
    """
    begun, saves, late = [], [], 0
    step, save = loop.train_step, checkpoint.save

    def timed_step(*args):
        nonlocal late
        begun.append(time.perf_counter())
        if saves and len(begun) == saves[-1][0] + WINDOW:
            late += saves[-1][2].thread.is_alive()
        return step(*args)

    def timed_save(*args, **named):
        began = time.perf_counter()
        saving = save(*args, **named)
        saves.append((len(begun), time.perf_counter() - began, saving))
        return saving

    loop.train_step, checkpoint.save = timed_step, timed_save
    code = loop.main("sft", [*argv, "--save_dir", str(folder), "--max_steps", str(2 * WINDOW * (SAVES + 1)),
                              "--epochs", "1000", "--save_interval", str(2 * WINDOW), "--keep", "1"])
    assert code == 0, code
    del saves[SAVES:]
    # The save after the n-th step lies between the beginnings of that step and of the next.
    pairs = [(begun[n - 1 + WINDOW] - begun[n - 1], begun[n - 1 + 2 * WINDOW] - begun[n - 1 + WINDOW])
             for n, *_ in saves]
    times = {"step": [without / WINDOW for _, without in pairs], "waits": [seconds for _, seconds, _ in saves],
             "costs": [a - b for a, b in pairs]}
    quartiles = {name: [round(1000 * x, 1) for x in statistics.quantiles(values, n=4)]
                 for name, values in times.items()}
    step_ms, waits_ms, costs_ms = (quartiles[name][1] for name in ("step", "waits", "costs"))
    return {"saves": SAVES, "still_writing_after_the_window": late, "quartiles_ms": quartiles,
            "wait_in_steps": round(waits_ms / step_ms, 3), "cost_in_steps": round(costs_ms / step_ms, 3),
            "cost_at_save_interval_100": round(costs_ms / (100 * step_ms), 5)}


if __name__ == "__main__":
    own = pathlib.Path(tempfile.gettempdir()) / f"save_cost_{os.environ.get('MASTER_PORT', os.getpid())}"
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cost = save_cost(words, own)
    if os.environ.get("RANK", "0") == "0":
        size = sum(p.stat().st_size for p in next((own / "checkpoints").glob("step_*")).rglob("*") if p.is_file())
        print(json.dumps({"flags": words, "machine": machine(), "checkpoint_MiB": round(size / 2**20, 1), **cost},
                         indent=1))
        shutil.rmtree(own)
