"""Planned times against measured ones on this machine: what docs/PLAN_AND_VERIFY.md says of the plan's error.

Every cell is a fresh launch of benchmark.py's, every prediction launch/plan.py's own output.  On a CPU with one thread
a rank, processor time is compared, so that other programs on the machine change little.

    OMP_NUM_THREADS=1 python -m minimind_ds.bench.throughput.planned --out out/planned
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys

from minimind_ds.bench.throughput import sweep
from minimind_ds.config.model import PRESETS
from minimind_ds.paths import DS_CONFIGS, LAUNCH
from minimind_ds.plan.work import KEYS
from minimind_ds.training.metrics import flops_per_token

STAGES = [f"zero{stage}" for stage in range(4)]
# Preset: rows, warm-up and timed steps.
CASES = {"debug": (["768x1x1", "256x2x2"], 2, 6), "debug-moe": (["768x1x1"], 2, 6),
         "minimind-3": (["256x1x1"], 1, 3), "minimind-3-moe": (["256x1x1"], 1, 3)}


def cells(presets: list[str], ranks: list[int]) -> list[sweep.Cell]:
    found = []
    for preset in presets:
        rows, warm_up, steps = CASES[preset]
        found += sweep.cells_of(files=[str(DS_CONFIGS / f"{stage}.json") for stage in STAGES], presets=[preset],
                                rows=rows, kernels=["auto"], ranks=ranks, warm_up=warm_up, steps=steps, flags=[])
    return found


def measured_s(record: dict) -> float:
    """A step's seconds: of the processor where a rank has one thread, else of the clock."""
    one_thread = record["machine"]["threads"] == 1 and record["machine"]["device"].startswith("CPU")
    return statistics.median(record["step_cpu_s_all" if one_thread else "step_s_all"])


def facts_of(record: dict) -> tuple[float, float]:
    """The data's share of labelled tokens, and the mean document's length that the plan is to be told."""
    config = PRESETS[record["cell"]["preset"]]
    wide = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    keys = (record["flops_per_token"] - flops_per_token(config, 0.0)) / wide
    return record["labelled_tokens_per_s"] / record["tokens_per_s"], keys / KEYS


def plan_of(record: dict) -> dict[str, dict]:
    """launch/plan.py's times of every stage for this cell's shape, and this cell's data."""
    cell = record["cell"]
    labelled, document = facts_of(record)
    command = [sys.executable, str(LAUNCH / "plan.py"), "--preset", cell["preset"], "--ranks", str(cell["ranks"]),
               "--pack_len", str(cell["row_len"]), "--batch_size", str(cell["batch_size"]),
               "--max_seq_len", str(min(768, cell["row_len"])),
               "--accumulation_steps", str(cell["accumulation"]), "--labelled", str(labelled),
               "--document", str(max(document, 1.0)), "--json"]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    plans = json.loads(done.stdout.splitlines()[-1])["plans"]
    return {name: plan["time"] for name, plan in plans.items()}


def compare(records: list[dict]) -> list[dict]:
    """One {"cell", "planned", "measured", "off"} (ms, ms, share) for each record; a shape is planned once."""
    plans, found = {}, []
    for record in records:
        cell = record["cell"]
        shape = (cell["preset"], cell["ranks"], cell["row_len"], cell["batch_size"], cell["accumulation"])
        if shape not in plans:
            plans[shape] = plan_of(record)
        planned = plans[shape][pathlib.Path(cell["deepspeed"]).stem]["step"]
        measured = measured_s(record)
        found.append({"cell": cell, "planned": 1e3 * planned, "measured": 1e3 * measured,
                      "off": planned / measured - 1})
    return found


def table(found: list[dict]) -> list[str]:
    """A line a shape, a column a stage: planned / measured, ms, and how far off."""
    by_shape = {}
    for one in found:
        cell = one["cell"]
        shape = (f"{cell['preset']}, {cell['row_len']}x{cell['batch_size']}x{cell['accumulation']}, "
                 f"{cell['ranks']} rank{'s' * (cell['ranks'] > 1)}")
        by_shape.setdefault(shape, {})[pathlib.Path(cell["deepspeed"]).stem] = one
    lines = ["| planned / measured, ms | " + " | ".join(STAGES) + " |", "|---|" + "---:|" * len(STAGES)]
    for shape, stages in by_shape.items():
        cells_of_shape = [f"{one['planned']:,.0f} / {one['measured']:,.0f}, {one['off']:+.0%}" if one else "–"
                          for one in map(stages.get, STAGES)]
        lines.append(f"| {shape} | " + " | ".join(cells_of_shape) + " |")
    off = [abs(one["off"]) for one in found]
    return [*lines, "", f"Median {statistics.median(off):.0%}, largest {max(off):.0%}, of {len(off)} cells."]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minimind_ds.bench.throughput.planned", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/planned"),
                        help="folder of the measurements; what is there is not measured again")
    parser.add_argument("--preset", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--report", action="store_true", help="the table of what is there, measuring no run")
    args = parser.parse_args(argv)
    asked = cells(args.preset, args.ranks)
    results = args.out / "results.json"
    found = []
    # A shape's prediction follows its runs at once, since a shared machine is faster at one hour than at another.
    for _, group in itertools.groupby(asked, lambda cell: (cell.preset, cell.row_len, cell.batch_size, cell.ranks)):
        shape = list(group)
        document = sweep.read(results) if args.report else sweep.sweep(shape, args.out, timeout=900, retry=True)
        records = {record["key"]: record for record in document["cells"] if record["status"] == "ok"}
        found += compare([records[cell.key] for cell in shape if cell.key in records])
    if not found:
        print(f"{results} has no results", file=sys.stderr)
        return 2
    (args.out / "planned.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join([*table(found), f"Load of the machine, mean of 15 minutes: {os.getloadavg()[2]:.1f}, on "
                     f"{len(os.sched_getaffinity(0))} cores."]))
    return 0 if len(found) == len(asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
