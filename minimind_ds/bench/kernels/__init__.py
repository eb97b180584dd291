"""The kernels on the machine at hand: right, how fast beside others', and do they train the same model.

Every group of checks runs in a process of its own, so that a kernel that breaks the device, or never comes back,
costs its own result and no other's: the process is started again and goes on with the next.  On a machine without a
GPU the same checks run at tiny sizes in Triton's interpreter.

    python launch/check_kernels.py OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
from collections.abc import Sequence

from minimind_ds.bench import gpu_tests
from minimind_ds.bench.machine import machine
from minimind_ds.bench.supervise import BAD, Group, all_right, records_of, supervise, write
from minimind_ds.config import program_flags
from minimind_ds.config.program_flags import PARTS
from minimind_ds.paths import LAUNCH, ROOT

from .runner import run_group

# Seconds of wall time: correctness and curve run side by side (nothing there is timed), timings by themselves.
# The interpreter takes INTERPRETED times as long.
INTERPRETED = 5
BUDGETS = {"correctness": 190, "curve": 190, "timings": 170}
WHAT = {
    "correctness": "outputs and gradients against the reference in fp64, and leak probes: changing one document moves "
                   "no bit of another; the groups named others are what ours is timed against",
    "curve": "training losses with our kernels and with PyTorch's own operations, same data, same start",
    "timings": "ms (median, quartiles) of forward and of forward + backward, checked against the reference first; the "
               "floor is max(bytes / bandwidth, FLOP / rate) at rates measured in the same process",
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = program_flags.check_kernels()
    args = parser.parse_args(argv)
    if (args.out is None) == (args.cpu_ratios is None):
        parser.error("give OUT_DIR, or --cpu_ratios OUT.json")
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    return args


def main(argv: list[str]) -> int:
    """-> 0, or 1 if a result of ours is wrong or missing."""
    args = parse(argv)
    if args.cpu_ratios:
        from .cpu_ratios import compare

        return compare(args.cpu_ratios, [int(n) for n in args.lengths.split(",")], args.pairs)
    if args.child:
        part, name = args.child.split(".")
        return run_group(part, name, args.out, small=args.small, without=words(args.without))
    # Children start in the checkout's root.
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # A timeout's signal: no child may outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return check(args)


def words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def check(args: argparse.Namespace) -> int:
    import torch

    cuda = torch.cuda.is_available()
    args.small = args.small or not cuda
    print(f"checking kernels on {machine()['device']}", flush=True)
    if not cuda:
        print("PyTorch sees no GPU here: tiny sizes in Triton's interpreter, whose times mean nothing", flush=True)
    # Compiling kernels is most of the work that is not timed: processes side by side.
    side_by_side = min(8, max(2, (os.cpu_count() or 2) // 2)) if cuda else 1
    parts = args.parts.split(",")
    groups = plan(args, parts, cuda)
    untimed = [group for group in groups if group.part != "timings"]
    stretch = 1 if cuda else INTERPRETED
    supervise(untimed, side_by_side, stretch * max((BUDGETS[g.part] for g in untimed), default=0), cuda)
    supervise([group for group in groups if group.part == "timings"], 1, stretch * BUDGETS["timings"], cuda)
    for part in parts:
        write(args.out / f"{part}.json", collect(part, [g for g in groups if g.part == part], args.small))
    return summarise(args.out, parts)


def plan(args: argparse.Namespace, parts: list[str], cuda: bool) -> list[Group]:
    """The processes to start.  The slowest first: they decide how long it takes."""
    from .items import GROUPS

    folder = args.out / "groups"
    folder.mkdir(exist_ok=True)
    program = str(LAUNCH / "check_kernels.py")
    flags = ["--small"] * args.small + (["--without", args.without] if args.without else [])
    groups = []
    for part in sorted(parts, reverse=True):
        for name in GROUPS[part]:
            if args.groups and not name.startswith(words(args.groups)):
                continue
            file = folder / f"{part}.{name}.json"
            command = (sys.executable, program, str(file), "--child", f"{part}.{name}", *flags)
            groups.append(Group(part, name, file, command))
    # A wheel has no tests.
    if "correctness" in parts and not args.no_pytest and not args.groups and (ROOT / "tests").is_dir():
        groups.insert(0, gpu_tests.group("correctness", "tests", folder / "correctness.tests.json", cuda))
    for group in groups:
        if group.command:
            group.file.unlink(missing_ok=True)
    return groups


def collect(part: str, groups: list[Group], small: bool) -> dict:
    """One part's document from its groups' files."""
    records, rates, seconds = [], {}, {}
    for group in groups:
        found = records_of(group)
        records += [{"group": group.name, **record} for record in found["records"]]
        rates.update({group.name: found["rates"]} if "rates" in found else {})
        seconds[group.name] = found.get("seconds")
    return {"what": WHAT[part], "mode": "interpreter, tiny sizes" if small else "device", "ok": all_right(records),
            "counts": counts(records), "seconds": seconds, **({"rates": rates} if rates else {}),
            "results": records, "machine": machine()}


def counts(records: list[dict]) -> dict:
    statuses = [record["status"] for record in records]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def summarise(out: pathlib.Path, names: Sequence[str]) -> int:
    """Prints what went wrong and, last, one JSON document; writes it to summary.json.  -> exit status."""
    parts = {name: sum_up(out / f"{name}.json") for name in names}
    document = {"what": "kernel checks", "ok": all(part["ok"] for part in parts.values()), "parts": parts,
                "machine": machine()}
    write(out / "summary.json", document)
    print(json.dumps(document, indent=1, ensure_ascii=False), flush=True)
    return 0 if document["ok"] else 1


def sum_up(path: pathlib.Path) -> dict:
    """A file's line of the summary."""
    if not path.exists():
        return {"ok": False, "reason": "not measured: no such file"}
    found = json.loads(path.read_text(encoding="utf-8"))
    for r in found["results"]:
        if r["status"] in BAD:
            name = r.get("item") or " ".join(str(r.get(key, "")) for key in ("op", "dtype", "contender"))
            why = next((r[key] for key in ("reason", "errors", "moved", "failed") if r.get(key)), "")
            print(f"{path.stem}: {r['status']}{'' if r['ours'] else ' (not ours)'}: {name}: {why}", flush=True)
    return {"ok": found["ok"], **found["counts"], "mode": found["mode"]}
