"""A profile of the training step: a trace for a viewer (chrome://tracing, Perfetto) and a summary of one screen.

    python launch/benchmark.py --profile out/profile --deepspeed ds_configs/zero2.json --preset debug

A gap is time of a step in which nothing computes: on a GPU no kernel runs, on a CPU the main thread is in no operator
of PyTorch's, but in Python, autograd's bookkeeping or DeepSpeed's hooks.  The profiler makes gaps longer than they are
without it, most where operators are short.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minimind_ds.bench.throughput.cell import full_steps, prepare_cell
from minimind_ds.bench.throughput.watch import PARTS, Parts, parted
from minimind_ds.data.loader import Prefetcher
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World
from minimind_ds.training.build import build_engine
from minimind_ds.training.live import LiveRun
from minimind_ds.training.step import Position, fetch, train_step

STEP = "benchmark: step"
TOP = 12


class Marks(Parts):
    """The parts of a step as ranges in the trace."""

    def __init__(self):
        self.open = []

    def enter(self, part: str) -> None:
        self.open.append(record_function(f"benchmark: {part}"))
        self.open[-1].__enter__()

    def leave(self) -> None:
        self.open.pop().__exit__(None, None, None)


def run(flags: list[str], world: World, folder: pathlib.Path, *, warm_up: int, steps: int,
        top: int = TOP) -> list[str]:
    """Collective; rank 0 is profiled.  Writes trace.json and summary.json.  -> the summary's lines.

    Args:
        top: operators or kernels that the summary names.

    Raises:
        ValueError: a user's mistake in the flags.
    """
    prepared = prepare_cell(flags, world)
    folder.mkdir(parents=True, exist_ok=True)
    engine.start(world)
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    engine.set_lr(live.engine, prepared.run.learning_rate)
    order = [i % full_steps(prepared) for i in range(warm_up + steps)]
    marks, cuda = Marks(), world.device.type == "cuda"

    def step(i: int) -> None:
        with record_function(STEP):
            train_step(prepared, live, plan, Position(i + 1, 0, order[i]), batches)
            if cuda:
                torch.cuda.synchronize()

    with parted(live.engine, marks), Prefetcher(fetch(prepared, 0, plan, order), pin=cuda) as ready:
        batches = marks.data(ready)
        for i in range(warm_up):
            step(i)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        if world.rank > 0:
            for i in range(warm_up, warm_up + steps):
                step(i)
            return []
        with profile(activities=activities) as found:
            for i in range(warm_up, warm_up + steps):
                step(i)
    found.export_chrome_trace(str(folder / "trace.json"))
    facts = summarise(found.events(), cuda=cuda, top=top)
    facts |= {"deepspeed": prepared.run.deepspeed, "preset": prepared.run.preset, "ranks": world.size, "steps": steps}
    (folder / "summary.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return screen(facts, folder)


def summarise(events, *, cuda: bool, top: int = TOP) -> dict:
    """Top operators or kernels, and how much of each part of the steps is gaps; times in ms a step."""
    def on_device(e) -> bool:
        return e.device_type == torch.autograd.DeviceType.CUDA

    def span(e) -> tuple[float, float]:
        return (e.time_range.start, e.time_range.end)

    ranges = [e for e in events if not on_device(e) and e.name.startswith("benchmark: ")]
    steps = [e for e in ranges if e.name == STEP]
    if cuda:
        work = [e for e in events if on_device(e) and not e.name.startswith("benchmark: ")]
        own = {id(e): e.time_range.end - e.time_range.start for e in work}
    else:
        work = [e for e in events if e.name.startswith(("aten::", "c10d::")) and e.thread == steps[0].thread]
        own = {id(e): e.self_cpu_time_total for e in work}
    busy = union(map(span, work))
    totals = {}
    for e in work:
        entry = totals.setdefault(e.name, [0.0, 0])
        entry[0] += own[id(e)]
        entry[1] += 1
    n, wall = len(steps), sum(e.time_range.end - e.time_range.start for e in steps)
    parts = {}
    for part in PARTS:
        mine = union(span(e) for e in ranges if e.name == f"benchmark: {part}")
        took = sum(b - a for a, b in mine)
        parts[part] = {"ms": took / 1e3 / n, "gaps_ms": (took - overlap(mine, busy)) / 1e3 / n}
    step_spans = union(map(span, steps))
    gaps = wall - overlap(step_spans, busy)
    inside = {name: sum(p[name] for p in parts.values()) for name in ("ms", "gaps_ms")}
    parts["other"] = {"ms": wall / 1e3 / n - inside["ms"], "gaps_ms": gaps / 1e3 / n - inside["gaps_ms"]}
    largest = sorted(totals.items(), key=lambda item: -item[1][0])[:top]
    return {"device": "cuda" if cuda else "cpu", "step_ms": wall / 1e3 / n, "host_bound_share": gaps / wall,
            "operations_per_step": len(work) / n, "gap_us_mean": gaps / max(1, len(busy)), "parts": parts,
            "top": [{"name": name, "ms": us / 1e3 / n, "calls": calls / n} for name, (us, calls) in largest]}


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted spans without overlap that cover the same time."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Length of what both unions cover."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def screen(facts: dict, folder: pathlib.Path) -> list[str]:
    what = "kernels" if facts["device"] == "cuda" else "operators"
    lines = [f"{facts['preset']}, {pathlib.Path(facts['deepspeed']).name}, {facts['ranks']} rank(s), rank 0: a step "
             f"of {facts['step_ms']:.1f} ms under the profiler, {facts['operations_per_step']:,.0f} {what}",
             f"host-bound (no {what[:-1]} running): {facts['host_bound_share']:.1%}; mean gap "
             f"{facts['gap_us_mean']:.1f} us", "", f"{'part':<12}{'ms':>10}{'of it gaps':>12}"]
    lines += [f"{part:<12}{p['ms']:>10.2f}{p['gaps_ms']:>12.2f}" for part, p in facts["parts"].items()
              if p["ms"] > 0.005]
    lines += ["", f"{'ms a step':>10}{'calls':>8}  top {what}, by their own time"]
    lines += [f"{t['ms']:>10.2f}{t['calls']:>8.0f}  {t['name'][:90]}" for t in facts["top"][:TOP]]
    return [*lines, "", f"trace: {folder / 'trace.json'}"]
