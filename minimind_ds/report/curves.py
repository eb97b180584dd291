"""The numbers behind a report's charts, few enough to draw; charts.js draws them.

    python launch/report.py out/sft out/lora --out compare.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from minimind_ds.report.folder import RunFolder

# Points of a line; steps of a longer run are taken together.
MOST_POINTS = 1000
# A long run's loss is smoothed over this share of its steps.
WINDOW, SHORT = 0.01, 300
PARTS = ("data", "forward", "backward", "update")


@dataclass
class Chart:
    """lines: {"run": index, "kind": "raw" | "smooth" | "points" | one of PARTS, "x": [...], "y": [...]}; a raw line
    whose points stand for several steps has their "low" and "high"."""

    name: str
    title: str
    unit: str
    about: str
    lines: list[dict] = field(default_factory=list)
    stacked: bool = False
    from_zero: bool = False


def charts(runs: list[RunFolder]) -> list[Chart]:
    """Those for which at least one run has numbers."""
    loss = Chart("loss", "Loss", "nats per labelled token", "Training as a line, evaluation as points.")
    rate = Chart("lr", "Learning rate", "learning rate", "As the update used it.", from_zero=True)
    norm = Chart("grad_norm", "Gradient norm", "global 2-norm", "Before clipping.", from_zero=True)
    speed = Chart("tokens_per_s", "Throughput", "real tokens / s", "All ranks; padding does not count.",
                  from_zero=True)
    for number, run in enumerate(runs):
        if not run.steps or not len(run.steps["step"]):
            continue
        add_loss(loss, number, run.steps, alone=len(runs) == 1)
        points = [(step, value) for step, value in run.evaluations if math.isfinite(value)][-MOST_POINTS:]
        if points:
            loss.lines.append({"run": number, "kind": "points", "x": [step for step, _ in points],
                               "y": [value for _, value in points]})
        for chart, name in ((rate, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s")):
            add(chart, number, "raw", run.steps, name)
    times = step_times(runs)
    return [chart for chart in (loss, rate, norm, speed, *times) if chart.lines]


def add_loss(chart: Chart, run: int, steps: dict[str, np.ndarray], *, alone: bool) -> None:
    """A long run's loss is smoothed, and drawn as it was besides where the run is alone."""
    if len(steps["step"]) < SHORT or alone:
        add(chart, run, "raw", steps, "loss")
    if len(steps["step"]) >= SHORT:
        add(chart, run, "smooth", {**steps, "loss": smoothed(steps["loss"])}, "loss")
        chart.about = "Training, smoothed, as a line, evaluation as points."


def step_times(runs: list[RunFolder]) -> list[Chart]:
    """A chart of one run's step by part; of several only their whole steps."""
    chart = Chart("step_s", "Step time", "seconds", "", from_zero=True)
    parts = [parts_of(run) for run in runs]
    if len(runs) == 1 and parts[0]:
        chart.stacked, chart.about = True, "Rank 0; data is waiting for it, update is the rest of the step."
        for name in PARTS:
            add(chart, 0, name, parts[0], name)
        return [chart]
    chart.about = "Whole steps." if len(runs) > 1 else "Whole steps; this run recorded no parts."
    for number, run in enumerate(runs):
        if run.steps:
            add(chart, number, "raw", run.steps, "step_s")
    return [chart]


def parts_of(run: RunFolder) -> dict[str, np.ndarray] | None:
    """Seconds of each part of the steps that tell them; None where none does."""
    if not run.steps:
        return None
    columns = [run.steps[name] for name in ("data_s", "forward_s", "backward_s", "step_s")]
    told = np.isfinite(np.stack(columns)).all(0)
    if not told.any():
        return None
    data, forward, backward, whole = (column[told] for column in columns)
    return {"step": run.steps["step"][told], "data": data, "forward": forward, "backward": backward,
            "update": np.maximum(0, whole - data - forward - backward)}


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over WINDOW of the run around each step, of what is finite; NaN where nothing is."""
    half = int(WINDOW * len(values)) // 2
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(part)]) for part in (np.where(known, values, 0), known))
    at = np.arange(len(values))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    n = counts[end] - counts[first]
    return np.where(n, (sums[end] - sums[first]) / np.maximum(n, 1), np.nan)


def add(chart: Chart, run: int, kind: str, steps: dict[str, np.ndarray], name: str) -> None:
    """A line of a column over the steps; nothing where it has no number."""
    known = np.isfinite(steps[name])
    x, y = steps["step"][known], steps[name][known]
    if not len(x):
        return
    line = {"run": run, "kind": kind}
    if len(x) > MOST_POINTS:
        starts = np.linspace(0, len(x), MOST_POINTS, endpoint=False).astype(int)
        sizes = np.diff([*starts, len(x)])
        if kind == "raw":
            line |= {"low": rounded(np.minimum.reduceat(y, starts)), "high": rounded(np.maximum.reduceat(y, starts))}
        x, y = x[starts], np.add.reduceat(y, starts) / sizes
    chart.lines.append({**line, "x": [int(step) for step in x], "y": rounded(y)})


def rounded(values: np.ndarray) -> list[float]:
    """Six digits: more than a screen has."""
    return [float(f"{value:.6g}") for value in values.tolist()]
