"""What a run folder says, as numbers and texts; what is missing or torn is named there, and never an error.

    python -c "import pathlib; from minimind_ds.report.folder import read; print(read(pathlib.Path('out')).missing)"
"""

from __future__ import annotations

import math
import pathlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind_ds import checkpoint
from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import RunConfig, parse_run_config
from minimind_ds.resilience import restarts
from minimind_ds.training import history, kept_weights

# Of a step's line; NaN where a line has no number.
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "labelled_tokens", "packing_fill", "tokens_per_s", "step_s",
           "data_s", "forward_s", "backward_s")
# Steps that are read one by one; of a longer run every second one, every third ...
MOST_STEPS = 100_000
MOST_LINE, MOST_EVENTS = 1 << 20, 200


@dataclass
class RunFolder:
    """steps: COLUMNS, one value for each step that was read, `stride` apart.  evaluations: (step, loss) in order, loss
    NaN where it was not finite; by_source: the same by name.  events: (step, what was told), `more_events` besides.
    starts: history.read's.  missing: what the report cannot show, and why.
    """

    folder: pathlib.Path
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    stride: int = 1
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    by_source: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    sources: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    more_events: int = 0
    starts: list[dict] = field(default_factory=list)
    attempts: list[dict] = field(default_factory=list)
    finished: dict | None = None
    kept: dict[str, dict] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    config: RunConfig | None = None
    ds: dict | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_start(self) -> dict:
        return self.starts[-1] if self.starts else {}


def read(folder: pathlib.Path) -> RunFolder:
    """Raises UserError for a folder in which no run has left anything."""
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "run.yaml")):
        raise UserError(f"{untrusted.shown_path(folder)} holds no run: neither metrics.jsonl nor run.yaml; name the "
                        "--save_dir of a training")
    found = RunFolder(folder)

    def attempt(function, *given, otherwise=None) -> Any:
        try:
            return function(*given)
        except (UserError, OSError, SystemExit) as error:
            found.missing.append(str(error))
            return otherwise

    attempt(read_metrics, found)
    found.starts = attempt(history.read, folder, otherwise=[])
    found.config = attempt(read_config, folder)
    found.ds = attempt(untrusted.read_json, folder / "ds_config.json")
    for name in (kept_weights.LAST, kept_weights.BEST):
        if (folder / f"{name}.json").exists():
            found.kept[name] = attempt(untrusted.read_json, folder / f"{name}.json", otherwise={})
    if (folder / "DONE").exists():
        found.finished = attempt(untrusted.read_json, folder / "DONE", otherwise={})
    found.attempts = [failure for failure in restarts.read(folder)["failures"] if isinstance(failure, dict)]
    found.checkpoints = [path.name for path in checkpoint.listed(checkpoint.folder_of(folder))][::-1]
    return found


def read_config(folder: pathlib.Path) -> RunConfig:
    return parse_run_config(["--config", str(folder / "run.yaml")], "sft", {})


def read_metrics(found: RunFolder) -> None:
    """Raises UserError where there is no metrics.jsonl; lines of it that are torn are counted."""
    path = found.folder / "metrics.jsonl"
    found.stride = -(-sum(1 for _ in lines_of(path)) // MOST_STEPS) or 1
    rows, torn, number = [], 0, 0
    for line in lines_of(path):
        if b'"lr"' in line:
            number += 1
            if number % found.stride and b'"note"' not in line and b'"slowest_rank"' not in line:
                continue
        try:
            facts = untrusted.json_object(line.decode("utf-8"), "metrics.jsonl")
        except (UserError, UnicodeDecodeError):
            torn += 1
            continue
        if "lr" in facts:
            rows.append([number_of(facts.get(name)) for name in COLUMNS])
        take(found, facts)
    if torn:
        found.missing.append(f"{torn} lines of metrics.jsonl cannot be read" if torn > 1 else
                             "a line of metrics.jsonl cannot be read (a process that is killed may leave it torn)")
    table = np.array([row for row in rows if math.isfinite(row[0])], dtype=np.float64).reshape(-1, len(COLUMNS))
    table = table[np.argsort(table[:, 0], kind="stable")]
    found.steps = dict(zip(COLUMNS, table.T))


def lines_of(path: pathlib.Path) -> Iterator[bytes]:
    """Raises UserError for what is no file; a line of any length is no more than MOST_LINE bytes at once."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{untrusted.shown_path(path)} is no regular file")
        with path.open("rb") as file:
            while line := file.readline(MOST_LINE):
                if line.strip():
                    yield line
    except OSError as error:
        raise UserError(f"cannot read {untrusted.shown_path(path)}: {error.strerror}") from None


def take(found: RunFolder, facts: dict) -> None:
    """What a line of metrics.jsonl says besides its numbers."""
    step = number_of(facts.get("step"))
    step = int(step) if math.isfinite(step) else 0
    if "eval_loss" in facts:
        found.evaluations.append((step, number_of(facts["eval_loss"])))
        for name, value in facts.items():
            if name.startswith("eval_loss/"):
                found.by_source.setdefault(name.removeprefix("eval_loss/"), []).append((step, number_of(value)))
    if isinstance(facts.get("data"), list):
        found.sources = [row for row in facts["data"] if isinstance(row, dict)]
        notes = facts.get("notes")
        found.notes = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    told = []
    if facts.get("note") or facts.get("skipped"):
        told.append(("skipped: " if facts.get("skipped") else "") + str(facts.get("note") or "the update"))
    if isinstance(facts.get("changed"), dict):
        told.append("; ".join(f"{name} was {before_and_after(value)}" for name, value in facts["changed"].items()))
    if "slowest_rank" in facts:
        slow, usual = number_of(facts.get("slowest_forward_s")), number_of(facts.get("median_forward_s"))
        told.append(f"rank {facts['slowest_rank']} on {facts.get('slowest_host', '?')} was slow: a forward pass of "
                    f"{slow:.3f} s, of the others {usual:.3f} s")
    for text in told:
        if len(found.events) < MOST_EVENTS:
            found.events.append((step, text))
        else:
            found.more_events += 1


def before_and_after(value: object) -> str:
    pair = value if isinstance(value, list) and len(value) == 2 else ["?", value]
    return f"{untrusted.shown(pair[0])}, is {untrusted.shown(pair[1])} from here on"


def number_of(value: object) -> float:
    """A number of a file as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return math.nan
    return float(value)
