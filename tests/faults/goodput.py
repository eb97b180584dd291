"""What faults and checkpoints cost: a long run whose power is cut at regular times; a save's share of the step loop.

    python -m tests.faults --kill_every 60
    deepspeed --num_gpus 2 tests/faults/goodput.py --deepspeed ds_configs/zero2.json --preset debug --pack_len 768
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from minimind_ds import checkpoint, train
from minimind_ds.benchmark.cell import machine
from minimind_ds.restarts import last_step

SAVES, WINDOW = 8, 6


def killed_regularly(home: pathlib.Path, seconds: float, *, steps: int, every: int,
                     say: Callable[[str], None]) -> dict:
    """A run of so many steps, undisturbed, and once more with all its processes killed every so many seconds."""
    from tests.faults.dealing import Configuration
    from tests.faults.run import Run, curve, weights

    with Run(Configuration(2, False), home / "undisturbed", home, steps=steps, every=every) as whole:
        whole.start()
        code = whole.wait_for_end()
        assert code == 0, whole.said()[-3000:]
    say(f"undisturbed: {steps} steps in {whole.wall_s:.0f} s, goodput {whole.goodput():.1%}")
    kills, code = 0, -1
    with Run(Configuration(2, False), home / "killed", home, steps=steps, every=every) as hurt:
        while code < 0:
            hurt.start()
            try:
                hurt.launcher.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                hurt.kill(hurt.processes())
                kills += 1
            code = hurt.wait_for_end()
            say(f"start {hurt.starts} ended with {code} after step {last_step(hurt.folder)} of {steps}")
    equal = code == 0 and weights(hurt) == weights(whole) and curve(hurt) == curve(whole)
    result = {"what": f"all processes of a 2-rank run of the debug preset killed every {seconds:g} s", "ok": equal,
              "machine": machine(), "kills": kills, "steps": steps, "save_interval": every,
              "steps_repeated": hurt.repeated, "wall_s": round(hurt.wall_s, 1), "goodput": round(hurt.goodput(), 4),
              "step_ms": round(1000 * statistics.median(row["step_s"] for row in hurt.rows()), 1),
              "undisturbed": {"wall_s": round(whole.wall_s, 1), "goodput": round(whole.goodput(), 4)}, "equal": equal}
    say(json.dumps(result, indent=1))
    return result


def save_cost(argv: list[str]) -> dict:
    """Train, save every 2 * WINDOW steps, and compare the WINDOW steps with a save to the WINDOW steps after them.

    Args:
        argv: flags of launch/sft.py.

    Returns:
        Medians, in ms: a step, what saving keeps the loop waiting, and what it costs the loop in all, with the
        processor time and the memory traffic that the writing thread takes from the steps.
    """
    begun, saved, writing = [], [], []
    step, save = train.train_step, checkpoint.save

    def timed_step(*args):
        begun.append(time.perf_counter())
        return step(*args)

    def timed_save(*args, **named):
        began = time.perf_counter()
        saving = save(*args, **named)
        saved.append((len(begun), time.perf_counter() - began))
        writing.append(saving)
        return saving

    train.train_step, checkpoint.save = timed_step, timed_save
    with tempfile.TemporaryDirectory(prefix="save_cost_") as home:
        code = train.main("sft", [*argv, "--save_dir", home, "--max_steps", str(2 * WINDOW * (SAVES + 1)), "--epochs",
                                  "1000", "--save_interval", str(2 * WINDOW), "--keep", "1"])
    assert code == 0
    # The save after step n (counted from 1) is in the time from its beginning to that of the next one.
    pairs = [(begun[n - 1 + WINDOW] - begun[n - 1], begun[n - 1 + 2 * WINDOW] - begun[n - 1 + WINDOW])
             for n, _ in saved[:SAVES]]
    ms = {"step": [1000 * without / WINDOW for _, without in pairs], "waits": [1000 * s for _, s in saved[:SAVES]],
          "costs": [1000 * (a - b) for a, b in pairs]}
    result = {name: [round(x, 2) for x in statistics.quantiles(values, n=4)] for name, values in ms.items()}
    middle = {name: statistics.median(values) for name, values in ms.items()}
    return {"quartiles_ms": result, "saves": SAVES, "of_one_step": round(middle["costs"] / middle["step"], 3),
            **{f"share_at_interval_{n}": round(middle["costs"] / (n * middle["step"]), 4) for n in (10, 20, 100)}}


if __name__ == "__main__":
    import os

    cost = save_cost([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"flags": sys.argv[1:], "machine": machine(), **cost}, indent=1))
