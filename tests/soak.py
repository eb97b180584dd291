"""Long runs: does an undisturbed one stay as it is, and does one that is disturbed every minute come to the same end?

    python -m tests.soak flat        2 ranks, 2,000 steps with saves and evaluations: memory, files, threads of each
    python -m tests.soak faults      2 nodes of a SLURM, 500 steps, a fault every minute of training (needs root)

Prints a table and one JSON document last; 1 where something grew, or an end is another one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil

from minimind_ds.bench.machine import machine
from minimind_ds.resilience.restarts import last_step
from tests.checkpoint.test_resume import curve, weights
from tests.conftest import ROOT, environment, ranks_command
from tests.ends import flags_for
from tests.waiting import until

# Before this step libraries still load and caches fill.
WARM = 200
EVERY = 25
# Of each rank's own memory, in 200 steps.
MOST_MIB = 1.0
FAULTS = ("a rank killed", "SIGTERM to a rank", "a warning (USR1)", "a node lost")


def flat(steps: int) -> dict:
    """An undisturbed run under DeepSpeed's launcher, looked at every EVERY steps."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="soak_"))
    folder, log = home / "soak" / "run", home / "log"
    flags = flags_for(home / "soak", steps)
    more = ["--epochs", "1000", "--save_interval", "40", "--eval_fraction", "0.05", "--eval_interval", "50"]
    launcher = subprocess.Popen([*ranks_command(2, "launch/sft.py"), *flags, *more], cwd=ROOT, env=environment(),
                                stdout=log.open("w"), stderr=subprocess.STDOUT)
    seen = {0: [], 1: []}
    for step in range(EVERY, steps, EVERY):
        until(lambda step=step: last_step(folder) >= step or launcher.poll() is not None, f"step {step}", log=log)
        for rank, process in enumerate(sorted(psutil.Process(launcher.pid).children(), key=lambda p: p.pid)):
            with process.oneshot():
                seen[rank].append((last_step(folder), process.memory_full_info().uss / 2**20, process.num_fds(),
                                   process.num_threads()))
    code = launcher.wait()
    ranks = [growth([row for row in rows if row[0] > min(WARM, steps // 2)]) for rows in seen.values()]
    shutil.rmtree(home)
    ok = code == 0 and all(rank["MiB in 200 steps"] < MOST_MIB and rank["files"][0] >= rank["files"][1]
                           and rank["threads"][0] >= rank["threads"][1] for rank in ranks)
    print("| rank | MiB of its own, first and last quarter | MiB more in 200 steps | open files | threads |\n"
          "|---|---|---|---|---|")
    for number, rank in enumerate(ranks):
        print(f"| {number} | {rank['MiB'][0]:.1f}, {rank['MiB'][1]:.1f} | {rank['MiB in 200 steps']:+.3f} | "
              f"{rank['files'][0]:g}, {rank['files'][1]:g} | {rank['threads'][0]:g}, {rank['threads'][1]:g} |")
    return {"what": f"{steps} undisturbed steps of 2 ranks", "ok": ok, "exit code": code, "ranks": ranks}


def growth(rows: list[tuple]) -> dict:
    """The slope of memory; each number's median in the first and in the last quarter of the rows."""
    columns, quarter = list(zip(*rows)), max(1, len(rows) // 4)
    ends = [[statistics.median(column[:quarter]), statistics.median(column[-quarter:])] for column in columns]
    return {"MiB in 200 steps": 200 * float(np.polyfit(columns[0], columns[1], 1)[0]), "MiB": ends[1],
            "files": ends[2], "threads": ends[3], "step and MiB": [[row[0], round(row[1], 1)] for row in rows[::8]]}


def faults(steps: int, mean_s: float, seed: int) -> dict:
    """A run on two nodes, and the same with a fault about mean_s seconds after the first step of each start."""
    from tests.slurm.cluster import Cluster, forbidden, missing
    from tests.slurm.test_slurm import TWO_NODES, Batch

    if why := missing() or forbidden():
        sys.exit(f"error: {why}")
    home, draw = pathlib.Path(tempfile.mkdtemp(prefix="mmds", dir="/tmp")), random.Random(seed)
    home.chmod(0o755)
    (home / "run.yaml").write_text("preset: debug\nmodel: {dropout: 0.1}\n")
    flags = ("--max_steps", str(steps), "--epochs", "1000", "--accumulation_steps", "4")
    try:
        with Cluster(home) as cluster:
            job, done, began = Batch(cluster, "disturbed", *TWO_NODES, flags=flags), [], time.monotonic()
            # A busy machine's SLURM may add a restart of its own.
            while comes_to_a_step(job, restarts := int(job.show()["Restarts"])):
                time.sleep(draw.expovariate(1 / mean_s))
                if job.show()["JobState"] != "RUNNING" or int(job.show()["Restarts"]) != restarts:
                    continue
                done.append(disturb(cluster, job, draw.choice(FAULTS)))
                print(f"{time.monotonic() - began:.0f} s, step {last_step(job.folder)}: {done[-1]}", flush=True)
                job.wait_for(lambda n=restarts: int(job.show()["Restarts"]) > n, f"restart {restarts + 1}")
            state = job.wait("COMPLETED")
            wall_s, control = time.monotonic() - began, Batch(cluster, "control", *TWO_NODES, flags=flags)
            # However long a busy machine takes, as long as it gets on.
            for step in range(EVERY, steps, EVERY):
                control.wait_for(lambda step=step: last_step(control.folder) >= step, f"step {step}")
            control.wait("COMPLETED")
            once = [row[0] for row in curve(job.folder)] == list(range(1, steps + 1))
            equal = curve(job.folder) == curve(control.folder) and weights(job.folder) == weights(control.folder)
    finally:
        shutil.rmtree(home)
    kinds = {kind: done.count(kind) for kind in FAULTS}
    print("| steps | wall s | faults | restarts | each step once | curve, weights equal |\n|---|---|---|---|---|---|\n"
          f"| {steps} | {wall_s:.0f} | {len(done)}: {kinds} | {state['Restarts']} | {once} | {equal} |")
    return {"what": f"{steps} steps on 2 nodes, a fault {mean_s:g} s after each start's first step on average",
            "ok": once and equal, "wall_s": round(wall_s), "faults": kinds, "restarts": int(state["Restarts"])}


def comes_to_a_step(job, restarts: int) -> bool:
    """Until a start has made a step; False where the job has come to its end."""
    outcome = job.cluster.home / f"{job.name}.logs" / "outcome"

    def over() -> bool:
        return job.show()["JobState"] == "COMPLETED" or int(job.show()["Restarts"]) > restarts

    job.wait_for(lambda: f"restart {restarts}: " in job.said() or over(), f"start {restarts}")
    job.wait_for(lambda: outcome.exists() and outcome.read_text() in ("training\n", "done\n") or over(), "training")
    step = last_step(job.folder)
    job.wait_for(lambda: last_step(job.folder) != step or over(), "a step")
    return job.show()["JobState"] != "COMPLETED"


def disturb(cluster, job, kind: str) -> str:
    if kind == "a rank killed":
        job.signal("KILL")
    elif kind == "SIGTERM to a rank":
        job.signal("TERM")
    elif kind == "a warning (USR1)":
        cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    else:
        cluster.switch_off("node2")
        cluster.give_up_after(6)
        job.wait("PENDING")
        cluster.give_up_after(60)
        cluster.switch_on("node2")
        cluster.run("slurmd", on="node2")
    return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flat", "faults"))
    parser.add_argument("--steps", type=int, help="default: 2000, 500")
    parser.add_argument("--mean_s", type=float, default=60, help="seconds to a fault, on average (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON document there, too")
    args = parser.parse_args()
    result = (flat(args.steps or 2000) if args.what == "flat" else faults(args.steps or 500, args.mean_s, args.seed))
    text = json.dumps({**result, "machine": machine()}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
