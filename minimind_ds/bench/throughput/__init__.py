"""Throughput of the real training step: sweeps, ratios and profiles; launch/benchmark.py's main.

    python launch/benchmark.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import traceback

from minimind_ds import terminal
from minimind_ds.bench.throughput import report, sweep
from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import find_shipped
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World, read_world
from minimind_ds.paths import DS_CONFIGS
from minimind_ds.training.loop import user_error

ZERO = [str(DS_CONFIGS / f"zero{stage}.json") for stage in range(4)]


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a user's mistake."""
    if "SLURM_STEP_ID" not in os.environ:
        # A batch script is told it is task 0 of all; only what srun starts is one.
        os.environ.pop("SLURM_PROCID", None)
    world = read_world()
    args, flags = parse(argv)
    # Every started process is a rank of the one measurement; otherwise one process starts the others.
    together = args.compare or args.profile or args.cell or args.append or in_srun_step()
    if not together and world.rank > 0:
        return 0
    try:
        if args.cell or args.append or (in_srun_step() and not (args.compare or args.profile)):
            return run_here(args, flags, world)
        if args.report:
            return show(sweep.read(args.out / "results.json"), args.out)
        if args.compare:
            return compare(args, flags, world)
        if args.profile:
            return profile(args, flags, world)
        fill_in(args, world.size)
        cells = sweep.cells_of(files=args.deepspeed, presets=args.preset, rows=args.rows, kernels=args.kernels,
                               ranks=[int(n) for n in args.ranks], warm_up=args.warm_up, steps=args.steps,
                               flags=flags)
        return show(sweep.sweep(cells, args.out, timeout=args.timeout, retry=args.retry), args.out)
    except UserError as error:
        return user_error(error, world)
    except KeyboardInterrupt:
        return 130


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> (our flags, launch/sft.py's)."""
    args, flags = program_flags.benchmark().parse_known_args(argv)
    for name in ("deepspeed", "preset", "rows", "ranks"):
        if getattr(args, name):
            setattr(args, name, [word for words in getattr(args, name) for word in words])
    if args.deepspeed:
        args.deepspeed = [find_shipped(name, pathlib.Path()) for name in args.deepspeed]
    if not args.compare and not args.profile:
        args.out = args.out or pathlib.Path("out/benchmark")
    args.warm_up = args.warm_up if args.warm_up is not None else 1 if args.compare else 2
    args.steps = args.steps if args.steps is not None else 3 if args.compare else 2 if args.profile else 5
    return args, flags


def in_srun_step() -> bool:
    """One of several tasks of an srun; a batch script has SLURM_PROCID too, but no step."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def fill_in(args: argparse.Namespace, launched: int) -> None:
    """The sweep's defaults for this machine.  Raises ValueError for a value that cannot be."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    args.deepspeed = args.deepspeed or ZERO
    args.preset = args.preset or (["minimind-3", "minimind-3-moe"] if gpus else ["debug", "minimind-3"])
    args.rows = args.rows or (["4096x8x1"] if gpus else ["768x1x1"])
    args.kernels = args.kernels or ["auto"]
    most = launched if launched > 1 else gpus or min(2, len(os.sched_getaffinity(0)))
    args.ranks = args.ranks or sorted({"1", str(most)})
    for preset in args.preset:
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    for n in args.ranks:
        if not n.isdecimal() or int(n) < 1:
            raise UserError(f"--ranks {n}: a whole number of at least 1")
    for name in ("warm_up", "steps"):
        if getattr(args, name) < (name == "steps"):
            raise UserError(f"--{name} {getattr(args, name)} is too few")


def single(args: argparse.Namespace, name: str, default: str) -> str:
    """The one value of a flag that a sweep may give many of."""
    values = getattr(args, name) or [default]
    if len(values) > 1:
        raise UserError(f"--{name} has {len(values)} values; one measurement takes one")
    return values[0]


def train_flags(args: argparse.Namespace, flags: list[str], *, deepspeed: bool = True) -> list[str]:
    """launch/sft.py's flags of a single measurement: those given, in its own words."""
    found = list(flags)
    if deepspeed:
        found += ["--deepspeed", single(args, "deepspeed", ZERO[0])]
    for name in ("preset", "kernels"):
        if getattr(args, name):
            found += [f"--{name}", single(args, name, "")]
    if args.rows:
        length, rows, accumulation = sweep.parse_rows(single(args, "rows", ""))
        found += ["--pack_len", str(length), "--batch_size", str(rows), "--accumulation_steps", str(accumulation)]
        if "--max_seq_len" not in flags:
            found += ["--max_seq_len", str(min(768, length))]
    return found


def run_here(args: argparse.Namespace, flags: list[str], world: World) -> int:
    """This process is a rank of one cell; rank 0 writes its record."""
    from minimind_ds.bench.throughput import cell

    path, record = args.cell, None
    if not args.cell:
        path = args.append or args.out / "results.json"
        fill_in(args, world.size)
        args.ranks = [str(world.size)]
        the = sweep.Cell(*(single(args, name, "") for name in ("deepspeed", "preset")),
                         *sweep.parse_rows(single(args, "rows", "")), single(args, "kernels", ""), world.size,
                         args.warm_up, args.steps, tuple(flags))
        if the.key in {c["key"] for c in sweep.read(path)["cells"]}:
            print(f"{the.name} is in {path} already", flush=True)
            return 0
        flags = the.train_flags(path.parent / "work")
        record = {"key": the.key, "name": the.name, "cell": {**vars(the), "flags": list(the.flags)}}
    else:
        flags = train_flags(args, flags)
    prepared = None
    try:
        prepared = cell.prepare_cell(flags, world)
        engine.start(world)
        found = cell.run(prepared, warm_up=args.warm_up, steps=args.steps)
    except Exception as error:
        refused = prepared is None and isinstance(error, ValueError)
        if record and (world.rank == 0 or not refused):
            text = " ".join(str(error if refused else f"{type(error).__name__}: {error}").split())
            status, reason = sweep.diagnose(f"error: {text}", 2 if refused else 1, args.timeout)
            sweep.append(path, {**record, "status": status, "reason": reason})
        if refused:
            raise
        # One line for the record; the traceback for whoever reads the log.
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())[:280]}", file=sys.stderr, flush=True)
        os._exit(1)
    if world.rank == 0 and record is None:
        path.write_text(json.dumps(found), encoding="utf-8")
    elif world.rank == 0:
        record |= {"status": "ok", "reason": None, **found}
        sweep.append(path, record)
        print(f"{the.name}: {sweep.outcome(record)}", flush=True)
    engine.stop()
    return 0


def show(document: dict, folder: pathlib.Path) -> int:
    for line in report.write(document, folder):
        print(terminal.wrap(line), flush=True)
    return 0


def compare(args: argparse.Namespace, flags: list[str], world: World) -> int:
    from minimind_ds.bench.throughput import ratios, trl_ratio

    def say(text: str) -> None:
        if world.rank == 0:
            print(terminal.wrap(text), flush=True)

    timing = dict(warm_up=args.warm_up, steps=args.steps, say=say)
    if args.compare == "padded":
        result = ratios.compare_padded(train_flags(args, flags), dtypes=args.dtypes.split(","),
                                          padded_rows=args.padded_rows, **timing)
    elif args.compare == "moe":
        result = ratios.compare_moe(train_flags(args, flags, deepspeed=False),
                                       preset=single(args, "preset", "debug"),
                                       file=single(args, "deepspeed", ZERO[0]), **timing)
    elif args.compare == "trl":
        result = trl_ratio.compare(train_flags(args, flags, deepspeed=False), files=args.deepspeed or ZERO[:1],
                                   **timing)
    else:
        result = ratios.compare_engines(train_flags(args, flags, deepspeed=False), files=args.deepspeed or ZERO,
                                           ddp=args.compare == "ddp", **timing)
    if world.rank == 0:
        print("\n" + ratios.table(result) + "\n")
        text = json.dumps(result, indent=1, ensure_ascii=False)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
    engine.stop()
    return 0


def profile(args: argparse.Namespace, flags: list[str], world: World) -> int:
    from minimind_ds.bench.throughput import trace

    lines = trace.run(train_flags(args, flags), world, args.profile, warm_up=args.warm_up, steps=args.steps)
    if world.rank == 0:
        print("\n".join(lines), flush=True)
    engine.stop()
    return 0
