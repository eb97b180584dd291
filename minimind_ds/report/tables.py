"""A run's facts as a page shows them: texts and numbers with their units, still unescaped.

    python -c "import pathlib; from minimind_ds.report import of_folder; print(of_folder(pathlib.Path('out')).facts)"
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minimind_ds.config import run_flags, untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import DEFAULTS, FLAGS, RunConfig
from minimind_ds.data.sources import what_is_lost
from minimind_ds.report import data, memory
from minimind_ds.report.folder import RunFolder, number_of
from minimind_ds.training.evaluations import perplexity


class Fact(NamedTuple):
    """A number to be seen first, and a line about it."""

    name: str
    value: str
    about: str


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it."""

    run: RunFolder
    facts: list[Fact]
    sources: list[list[str]]
    lost: list[str]
    by_source: list[list[str]]
    data: data.Data | None
    memory: memory.Memory | None
    starts: list[list[str]]
    failures: list[str]
    kept: list[str]
    software: str
    settings: list[tuple[str, str, bool]]
    numbers: list[list[str]]
    missing: list[str]


def shown(run: RunFolder, opened: Callable[[], data.Opened]) -> Shown:
    """opened: opens the run's data; raises UserError."""
    missing = list(run.missing)

    def attempt(function: Callable):
        try:
            return function()
        except (UserError, OSError) as error:
            missing.append(str(error))

    looked = attempt(lambda: data.look(opened()))
    labelled = total(run, "labelled_tokens") / max(total(run, "tokens"), 1)
    planned = attempt(lambda: memory.of(run, labelled or 0.5))
    return Shown(run, facts(run), *of_sources(run), losses_by_source(run), looked, planned, starts(run),
                 failures(run), kept(run), software(run), settings(run.config), numbers(run), missing)


def total(run: RunFolder, name: str) -> float:
    """Of all steps; of a long run, from those that were read."""
    return float(np.nansum(run.steps[name])) * run.stride if run.steps else 0.0


def facts(run: RunFolder) -> list[Fact]:
    steps, tokens, spent = run.steps, total(run, "tokens"), total(run, "step_s")
    found, loss, last = [], math.nan, 0
    if steps and len(steps["step"]):
        loss, last = steps["loss"][-1], int(steps["step"][-1])
    of = run.last_start.get("total_steps")
    of = f" of {of:,}" if isinstance(of, int) and of >= last else ""
    found.append(Fact("Final loss", number(loss, ".4f"), f"step {last:,}{of}" if last else "no step"))
    judged = [(value, step) for step, value in run.evaluations if math.isfinite(value)]
    if judged:
        value, step = min(judged)
        ppl = perplexity(value)
        found.append(Fact("Best evaluation", number(value, ".4f"),
                          f"step {step:,}" + (f", perplexity {ppl:.4g}" if ppl is not None else "")))
    else:
        found.append(Fact("Best evaluation", "–", "nothing was held out" if last else "none"))
    found.append(Fact("Tokens / s", number(tokens / spent if spent else math.nan, ",.0f"),
                      f"{amount(tokens)} tokens, {ranks_of(run)}"))
    wall = sum(number_of(start.get("ended")) - number_of(start.get("began")) for start in run.starts
               if number_of(start.get("ended")) >= number_of(start.get("began")))
    about = f"{duration(spent)} of it in steps" if wall else "in steps"
    found.append(Fact("Time", duration(wall or spent), about))
    found.append(exit_of(run))
    return found


def ranks_of(run: RunFolder) -> str:
    ranks, name = run.last_start.get("ranks"), run.last_start.get("name")
    if not isinstance(ranks, int):
        return "ranks not recorded"
    return f"{ranks} rank{'s' * (ranks != 1)}" + (f" on {str(name)[:60]}" if name else "")


def exit_of(run: RunFolder) -> Fact:
    start = run.last_start
    end, again = start.get("end"), len(run.starts)
    starts = f"{again} start{'s' * (again != 1)}" if again else "starts not recorded"
    if run.finished is not None:
        return Fact("Exit", "finished", ("early, by --patience; " if run.finished.get("early") else "") + starts)
    if end == "stopped":
        return Fact("Exit", "stopped", ("as planned (--stop_after); " if start.get("planned") else "as asked; ")
                    + starts)
    if end == "failed":
        return Fact("Exit", "failed", str(start.get("error"))[:200])
    return Fact("Exit", "no end", f"it still runs, or was killed; {starts}")


def number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def amount(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    if not seconds >= 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


SOURCE_HEAD = ["source", "share", "samples an epoch", "tokens", "of all tokens", "learnt", "records", "cut", "dropped",
               "split", "malformed", "without a label", "tokens lost"]
# Of store.TokenStore's stats, the last columns.
FILE_COUNTS = ("records", "cut", "dropped", "split", "skipped", "unlabelled", "lost_tokens")


def of_sources(run: RunFolder) -> tuple[list[list[str]], list[str]]:
    """A row of SOURCE_HEAD for each source, and a line about what each lost."""
    rows, lost = [], []
    for source in run.sources:
        file = source.get("file") if isinstance(source.get("file"), dict) else {}

        def count(name: str, of: dict) -> str:
            return number(number_of(of.get(name)), ",.0f")

        tokens, learnt = number_of(source.get("tokens")), number_of(source.get("labelled_tokens"))
        rows.append([str(source.get("name")), number(number_of(source.get("share")), "g"), count("samples", source),
                     count("tokens", source), share(number_of(source.get("share_of_tokens")), 1),
                     share(learnt, tokens), *(count(name, file) for name in FILE_COUNTS)])
        if run.config is not None:
            try:
                kind = run.last_start.get("kind", "conversations")
                said = what_is_lost(file, run.config.max_seq_len, kind)
            except (KeyError, TypeError, ValueError):
                continue
            lost += [f"{source.get('name')}: {said}"] if said else []
    return rows, lost


def losses_by_source(run: RunFolder) -> list[list[str]]:
    """name, last and lowest evaluation loss, and the step of that."""
    rows = []
    for name, values in run.by_source.items():
        known = [(value, step) for step, value in values if math.isfinite(value)]
        best, step = min(known, default=(math.nan, 0))
        rows.append([name, number(values[-1][1], ".4f"), number(best, ".4f"), f"{step:,}"])
    return rows


START_HEAD = ["began (UTC)", "end", "lasted", "on", "ranks", "after step", "steps done again"]


def starts(run: RunFolder) -> list[list[str]]:
    rows = []
    for start in run.starts:
        began, ended = number_of(start.get("began")), number_of(start.get("ended"))
        end = str(start.get("end", "no end: it still runs, or was killed"))
        if end == "failed":
            end = f"failed: {start.get('error')}"
        elif end == "stopped":
            end = f"stopped after step {start.get('end_step')}" + (", as planned" if start.get("planned") else "")
        rows.append([moment(began), end, duration(ended - began), f"{start.get('name')}, {start.get('host')}",
                     *(number(number_of(start.get(name)), ",.0f") for name in ("ranks", "step", "steps_again"))])
    return rows


def failures(run: RunFolder) -> list[str]:
    """Those since the run was last started by hand."""
    return [f"failed at step {failure.get('at')}, from the checkpoint of step {failure.get('from')}: "
            f"{failure.get('error') or 'the process was killed, or its node lost'}" for failure in run.attempts]


def kept(run: RunFolder) -> list[str]:
    return [f"The {name} weights: {note.get('file')}, of step {note.get('step')}." for name, note in run.kept.items()]


def software(run: RunFolder) -> str:
    start = run.last_start
    if not start:
        return ""
    return (f"minimind_ds {start.get('minimind_ds')}, torch {start.get('torch')}, DeepSpeed {start.get('deepspeed')}. "
            f"Kernels: {start.get('kernels')}.")


def moment(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "–"


def settings(config: RunConfig | None) -> list[tuple[str, str, bool]]:
    """(flag, value, whether it is the default), in the order of --help."""
    if config is None:
        return []
    order = [name for names in run_flags.GROUPS.values() for name in names]
    names = sorted((f.name for f in FLAGS), key=lambda name: order.index(name) if name in order else len(order))
    rows = [(name, value_of(getattr(config, name)), getattr(config, name) == DEFAULTS[name]) for name in names]
    return [*rows, *((f"model.{name}", value_of(value), False) for name, value in config.model.items())]


def value_of(value: object) -> str:
    if isinstance(value, list):
        # Sources of data, those with a share as {path, share}.
        return ", ".join(f"{entry.get('path')} (share {entry.get('share', 1)})" if isinstance(entry, dict)
                         else str(entry) for entry in value)[:2000]
    if isinstance(value, dict):
        return str(value)[:2000]
    return "–" if value is None else str(value)


NUMBER_HEAD = ["step", "loss", "evaluation", "learning rate", "gradient norm", "tokens / s", "step, s", "data, s",
               "forward, s", "backward, s"]


def numbers(run: RunFolder) -> list[list[str]]:
    """Some of the steps as text, the first, the last and all that were evaluated among them: at most about 60."""
    if not run.steps or not len(run.steps["step"]):
        return []
    judged = dict(run.evaluations[-30:])
    step_N = run.steps["step"]
    chosen = np.unique(np.linspace(0, len(step_N) - 1, min(30, len(step_N))).astype(int))
    chosen = np.union1d(chosen, np.flatnonzero(np.isin(step_N, list(judged))))
    forms = {"loss": ".4f", "lr": ".3g", "grad_norm": ".4g", "tokens_per_s": ",.0f", "step_s": ".4g", "data_s": ".3g",
             "forward_s": ".4g", "backward_s": ".4g"}
    rows = []
    for at in chosen.tolist():
        loss, *rest = (number(run.steps[name][at], form) for name, form in forms.items())
        rows.append([f"{int(step_N[at]):,}", loss, number(judged.get(int(step_N[at]), math.nan), ".4f"), *rest])
    return rows


def differing(runs: list[Shown]) -> list[list[str]]:
    """A row for each setting in which the runs differ: its name, and each run's value."""
    tables = [{name: value for name, value, _ in run.settings} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [[name, *(table.get(name, "–") for table in tables)] for name in names
            if len({table.get(name) for table in tables}) > 1]


def clean(text: object) -> str:
    """Text that any UTF-8 file can hold and that commands nothing: control characters and surrogates spelled out."""
    text = str(text)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def path_of(run: RunFolder) -> str:
    return untrusted.shown_path(run.folder)
