"""Is this run right, on this machine, with this DeepSpeed, this JSON, this data?  In about a minute, before it starts.

Shows samples with what is learnt, counts, warns of what spoils fine-tuning, then measures each law of
docs/PLAN_AND_VERIFY.md and compares with its bound; the table is kept as verify.json in the run folder.

    deepspeed --num_gpus 2 launch/verify.py --deepspeed ds_configs/zero2.json --data_path my.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch.distributed as dist

from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import parse_run_config
from minimind_ds.data.conversation import file_kind
from minimind_ds.data.files import expand
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World, read_world
from minimind_ds.io import write_file
from minimind_ds.terminal import coloured, wrap
from minimind_ds.training.loop import user_error
from minimind_ds.training.prepare import PROGRAMS, PreparedRun, prepare

from . import data, sensitivity
from .checks import Check, worst_over_ranks
from .laws import LAWS
from .reduced_run import ReducedRun, make_reduced_run
from .template import template_law


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    options, rest = program_flags.verify().parse_known_args(argv)
    for name in ("samples", "tokens"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 0")
    return options, rest


def prepare_run(argv: list[str], world: World) -> tuple[PreparedRun, str]:
    """The run as launch/sft.py (or pretrain.py, for texts) would start it, and the data's kind.

    Bad records are counted here, where training would stop, unless the run says otherwise.
    """
    run = parse_run_config(argv, "sft", PROGRAMS["sft"])
    kind = file_kind(expand(run.data_path)[0].path)
    skip = [] if "on_bad_record" in run.given else ["--on_bad_record", "skip"]
    return prepare("pretrain" if kind == "text" else "sft", [*argv, *skip], world), kind


def main(argv: list[str]) -> int:
    """The whole of launch/verify.py.  Returns 0, 1 when a law fails, 2 for a user's mistake."""
    world = read_world()
    try:
        options, rest = parse(argv)
        prepared, kind = prepare_run(rest, world)
        say = print_on(world)
        engine.start(world)
        cut = make_reduced_run(prepared, options.tokens)
    except UserError as error:
        return user_error(error, world)
    except KeyboardInterrupt:
        return 130
    try:
        if options.sensitivity:
            measure_sensitivity(prepared, kind, cut, say)
            return 0
        return 0 if verify(prepared, kind, cut, options, say)["ok"] else 1
    finally:
        engine.stop()


def print_on(world: World) -> Callable[[str], None]:
    return (lambda line: print(wrap(line), flush=True)) if world.rank == 0 else (lambda line: None)


def verify(prepared: PreparedRun, kind: str, b: ReducedRun, options: argparse.Namespace, say: Callable[[str],
                                                                                                       None]) -> dict:
    """Everything after the preparations, collective; the report, the same on every rank."""
    began, report = time.perf_counter(), [None]
    found, stats, warned = [], {}, []
    if prepared.world.rank == 0:
        for line in data.show(prepared, options.samples, color=options.color or coloured(sys.stdout)):
            say(line)
        stats = data.statistics(prepared, kind)
        warned = data.warnings(prepared, stats, kind)
        for line in [*data.describe(stats), *(f"warning: {line}" for line in warned)]:
            say(line)
        # Pretraining has no template.
        found = data.labels_law(prepared, kind) + (template_law(prepared) if kind == "conversations" else [])
    for line in prepared.notes:
        say(line)
    say(f"kernels: {prepared.kernels.reason}")
    if b.cut:
        say(f"the model is too large for a minute here; the laws are measured on {b.cut}")
    found += measure(b, say)
    if prepared.world.rank == 0:
        ok = all(finding.ok for finding in found)
        for line in table(found):
            say(line)
        report = [{"ok": ok, "failed": failed(found), "laws": [finding.to_dict() for finding in found],
                   "warnings": warned, "notes": list(prepared.notes), "data": stats,
                   "model": b.config.to_dict(), "cut_down": b.cut,
                   "deepspeed": prepared.ds, "dtype": prepared.run.dtype, "ranks": prepared.world.size,
                   "device": prepared.world.device.type, "kernels": prepared.kernels.reason,
                   "versions": {name: version(name) for name in ("torch", "deepspeed")},
                   "seconds": time.perf_counter() - began}]
        path = prepared.folder / "verify.json"
        write_file(path, json.dumps(report[0], indent=1, ensure_ascii=False))
        verdict = "every law holds" if ok else f"broken: {', '.join(failed(found))}"
        say(f"{verdict}; {report[0]['seconds']:.0f} s; wrote {path}")
    dist.broadcast_object_list(report)
    return report[0]


def measure(b: ReducedRun, say: Callable[[str], None]) -> list[Check]:
    """All the laws that need the model.  One that ends in an error is broken, and on several ranks the last."""
    found, scratch = [], b.prepared.folder / ".verify"
    # Engines are collected one by one; what is there by now stays, and need not be looked through each time.
    gc.freeze()
    try:
        for law, function in LAWS.items():
            began = time.perf_counter()
            try:
                # Where several ranks compute the same alone, the worst of them counts.
                found += worst_over_ranks(function(b), b.prepared.world.device)
            except Exception as error:
                found.append(Check(law, f"ended with {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                                     math.inf, 0))
                if b.prepared.world.size > 1:
                    break
            say(f"measured {law}, {time.perf_counter() - began:.1f} s")
    finally:
        gc.unfreeze()
        if b.prepared.world.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return found


def measure_sensitivity(prepared: PreparedRun, kind: str, b: ReducedRun, say: Callable[[str], None]) -> None:
    """Prints the table of sensitivity.py, and keeps it beside the run as sensitivity.json."""
    for line in [*prepared.notes, f"kernels: {prepared.kernels.reason}", *sensitivity.header()]:
        say(line)
    lines = sensitivity.measure(b, kind, say)
    if prepared.world.rank == 0:
        shutil.rmtree(prepared.folder / ".verify", ignore_errors=True)
        write_file(prepared.folder / "sensitivity.json", json.dumps(lines, indent=1))


def failed(found: list[Check]) -> list[str]:
    return list(dict.fromkeys(finding.law for finding in found if not finding.ok))


def table(found: list[Check]) -> list[str]:
    lines = [f"{'law':<10} {'measured':>9}  {'bound':>7}      what"]
    for f in found:
        ok = "ok" if f.ok else "NO"
        # What goes on stands below its column.
        lines.append(wrap(f"{f.law:<10} {number(f.measured):>9}  {number(f.bound):>7}  {ok}  {f.what}", " " * 35))
    return lines


def number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.1e}"
