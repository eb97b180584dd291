"""Do the committed ratios still hold?  Ratios only: times belong to a machine, ratios mostly to the code.

    python launch/benchmark.py --guard             # exit code 1 if a ratio fell below its floor
    python launch/benchmark.py --guard --update    # measure, and make the result the new baseline
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

from minimind_ds.bench.throughput import sweep
from minimind_ds.config.errors import UserError
from minimind_ds.paths import ROOT

# Share of a committed ratio that may be lost before the guard fails: the run-to-run spread of a busy machine.
TOLERANCE = 0.15
STEPS = ("--warm_up", "2", "--steps", "9")
SIZE = ("--preset", "debug", "--rows", "768x1x1", "--dtype", "fp32")
RUNS = {
    "plain": ("--compare", "plain", *SIZE, *STEPS),
    "moe": ("--compare", "moe", *SIZE, *STEPS),
    "padded": ("--compare", "padded", "--preset", "debug", "--dtypes", "fp32", "--max_seq_len", "128",
               "--pack_len", "768", "--padded_rows", "6", *STEPS),
}


def measure() -> dict[str, float]:
    """Every guarded ratio, measured now; each comparison is a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            out = pathlib.Path(folder) / f"{name}.json"
            command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), *words, "--out", str(out),
                       "--save_dir", str(pathlib.Path(folder) / "run")]
            done = subprocess.run(command, capture_output=True, text=True, env=sweep.clean_environment())
            if done.returncode:
                raise RuntimeError(f"--compare {name} ended with {done.returncode}: {done.stderr[-2000:]}")
            document = json.loads(out.read_text(encoding="utf-8"))
            if "pairs" in document:
                found |= {pair: facts["ratio"] for pair, facts in document["pairs"].items()}
            else:
                ratios = document["packed_to_padded_same_dtype"]
                found |= {f"packed / padded {dtype}": ratio for dtype, ratio in ratios.items()}
    return found


def judge(baseline: dict, now: dict[str, float]) -> list[tuple[str, float, float, bool]]:
    """-> (name, committed, measured, holds) of every committed ratio; one that was not measured does not hold."""
    floor = 1 - baseline["tolerance"]
    return [(name, was, now.get(name, float("nan")), now.get(name, 0.0) >= was * floor)
            for name, was in baseline["ratios"].items()]


def run(path: pathlib.Path, *, update: bool) -> int:
    """Print each ratio beside its baseline.  -> exit code.

    Raises:
        ValueError: there is no baseline.
    """
    if not update and not path.exists():
        raise UserError(f"{path} is missing; --guard --update measures one")
    baseline = None if update else json.loads(path.read_text(encoding="utf-8"))
    now = measure()
    if update:
        document = {"what": "ratios of real tokens/s, in turns in one process (launch/benchmark.py --guard)",
                    "tolerance": TOLERANCE, "ratios": {name: round(ratio, 4) for name, ratio in now.items()}}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    judged = judge(baseline, now)
    for name, was, is_now, holds in judged:
        print(f"{'holds ' if holds else 'FELL  '} {name}: {is_now:.3f} (committed {was:.3f}, at least "
              f"{was * (1 - baseline['tolerance']):.3f})")
    return 0 if all(holds for *_, holds in judged) else 1
