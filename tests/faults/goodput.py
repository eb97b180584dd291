"""How much of the time is training, in a long run whose power is cut at regular times.

    python -m tests.faults --kill_every 60
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
from collections.abc import Callable

from minimind_ds.bench.machine import machine
from minimind_ds.resilience.restarts import last_step
from tests.faults.dealing import Configuration
from tests.faults.run import Run, curve, weights


def killed_regularly(home: pathlib.Path, seconds: float, *, model: dict, steps: int, every: int,
                     say: Callable[[str], None]) -> dict:
    """A run of so many steps, undisturbed, and once more with all its processes killed every so many seconds."""
    runs = (Run(Configuration(2, False), home / name, home, model=model, steps=steps, every=every, limit_s=1800)
            for name in ("undisturbed", "killed"))
    with next(runs) as whole:
        whole.start()
        code = whole.wait_for_end()
        assert code == 0, whole.said()[-3000:]
    say(f"undisturbed: {steps} steps in {whole.wall_s:.0f} s, goodput {whole.goodput():.1%}")
    kills, code = 0, -1
    with next(runs) as hurt:
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
              "model": model, "machine": machine(), "kills": kills, "steps": steps, "save_interval": every,
              "steps_repeated": hurt.repeated, "wall_s": round(hurt.wall_s, 1), "goodput": round(hurt.goodput(), 4),
              "step_ms": round(1000 * statistics.median(row["step_s"] for row in hurt.rows()), 1),
              "undisturbed": {"wall_s": round(whole.wall_s, 1), "goodput": round(whole.goodput(), 4)}, "equal": equal}
    say(json.dumps(result, indent=1))
    return result
