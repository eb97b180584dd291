"""Everything that only a GPU can tell, most valuable first, within a time limit: launch/gpu_check.sh's main.

Parts run one after another, each in processes of its own with its own limit; after each, results.json and summary.md
in the output folder are whole.  A part that hangs or breaks the device costs itself.  Without a GPU the same runs at
tiny sizes, kernels in Triton's interpreter.  Nothing in this file loads torch.

    python -m minimind_ds.bench.gpu OUT_DIR
"""

from __future__ import annotations

import argparse
import gzip
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from minimind_ds.bench import gpu_tests, supervise
from minimind_ds.bench.supervise import Group
from minimind_ds.paths import LAUNCH

from . import children, summary

SECONDS, INTERPRETED = 540, 6
PROGRAM = (sys.executable, "-m", "minimind_ds.bench.gpu")
CHECK_KERNELS = (sys.executable, str(LAUNCH / "check_kernels.py"))
# Others' kernels that take a compiler minutes.
WITHOUT = "compiled,flex"


class Part(NamedTuple):
    """A part: seconds that it may take on a GPU, least seconds that are worth starting it with, groups by name.

    side_by_side: how many processes run at once; one where the clock is read.
    """

    name: str
    seconds: int
    least: int
    side_by_side: int
    groups: tuple[str, ...]


PARTS = (
    Part("imports", 40, 1, 1, ("imports",)),
    Part("agreement", 90, 20, 8, ("operations", "dense", "mixture", "attention_variants", "experts_variants",
                                  "elementwise_variants")),
    Part("throughput", 130, 30, 1, ("dense", "mixture", "padded")),
    Part("products", 30, 15, 1, ("products",)),
    Part("variants", 70, 25, 1, ("attention_variants", "experts_variants", "elementwise_variants")),
    Part("stages", 80, 30, 1, ("stages",)),
    Part("correctness", 120, 40, 8, ("correctness.attention", "correctness.moe", "correctness.elementwise",
                                     "correctness.router", "correctness.leaks", "curve.dense", "curve.mixture",
                                     "tests")),
    Part("timings", 100, 30, 1, ("timings.attention", "timings.moe", "timings.elementwise")),
)


def main(argv: list[str]) -> int:
    """-> 0, 1 if a result of ours is wrong or missing, 2 if nothing could be run."""
    args = parse(argv)
    if args.child:
        return children.run(args.child, args.out, small=args.small, folder=args.work)
    began, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A timeout's signal: no child may outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        return Check(out, pathlib.Path(name), began, args).run()


def parse(argv: list[str]) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    p = argparse.ArgumentParser("gpu_check.sh", allow_abbrev=False, description=(
        "Everything that only a GPU can tell, in one command: results.json, summary.md, log.txt and trace.json.gz in "
        "OUT_DIR, refreshed after each part."))
    p.add_argument("out", type=pathlib.Path, metavar="OUT_DIR")
    p.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (default: %(default)s)")
    p.add_argument("--parts", default=",".join(names),
                   help="which, or PART/GROUP for one of its processes (default: %(default)s)")
    p.add_argument("--wheels", metavar="DIR", help="packages that this machine lacks, as made by --make_wheels")
    p.add_argument("--make_wheels", metavar="DIR", help="instead, on a machine with a network: fetch them")
    p.add_argument("--limits", default="", help="other limits of parts: NAME=SECONDS, comma-separated")
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    p.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.parts = args.parts.split(",")
    try:
        args.limits = {name: float(number) for name, number in (
            pair.split("=") for pair in args.limits.split(",") if pair)}
    except ValueError:
        p.error(f"--limits {args.limits}: write NAME=SECONDS, comma-separated")
    known = {*names, *(f"{part.name}/{group}" for part in PARTS for group in part.groups)}
    unknown = (set(args.parts) - known) | (set(args.limits) - set(names))
    if unknown:
        p.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    return args


class Check:
    """One run: its folders, its clock, what has been found so far."""

    def __init__(self, out: pathlib.Path, work: pathlib.Path, began: float, args: argparse.Namespace):
        self.out, self.work, self.began, self.args = out, work, began, args
        self.cuda, self.groups, self.notes, self.missing = False, [], [], False

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.began)

    def run(self) -> int:
        for part in PARTS:
            chosen = tuple(group for group in part.groups if part.name == "imports" or part.name in self.args.parts
                           or f"{part.name}/{group}" in self.args.parts)
            if not chosen:
                continue
            part = part._replace(groups=chosen)
            stretch = 1 if self.cuda or part.name == "imports" else INTERPRETED
            # Some seconds are kept for the last summary.
            seconds = min(self.args.limits.get(part.name, part.seconds * stretch), self.left() - 5)
            if seconds < min(part.least, self.args.limits.get(part.name, part.least)):
                self.notes.append(f"{part.name}: not started, {max(0, self.left()):.0f} s were left")
                self.missing = True
                continue
            print(f"\n== {part.name} ({time.monotonic() - self.began:.0f} s since the start, {seconds:.0f} s at most)",
                  flush=True)
            began, groups = time.monotonic(), self.plan(part)
            self.groups += groups
            supervise.supervise(groups, part.side_by_side if self.cuda else 1, seconds, self.cuda)
            self.notes.append(f"{part.name}: {time.monotonic() - began:.0f} s")
            self.write()
            if part.name == "imports" and not self.imported():
                return 2
        document = self.write()
        print("\n" + summary.text(document), flush=True)
        return 0 if document["ok"] else 1

    def plan(self, part: Part) -> list[Group]:
        made = []
        for name in part.groups:
            file = self.work / f"{part.name}.{name}.json"
            small = () if self.cuda else ("--small",)
            if name == "tests":
                made.append(gpu_tests.group(part.name, name, file, self.cuda))
                continue
            if "." in name:
                command = (*CHECK_KERNELS, str(file), "--child", name, *small, "--without", WITHOUT)
            else:
                command = (*PROGRAM, str(file), "--child", f"{part.name}.{name}", "--work", str(self.work), *small)
            # Training takes the kernels that suit the device, on a CPU PyTorch's.
            interpreted = part.name not in ("throughput", "stages", "products", "imports")
            made.append(Group(part.name, name, file, command, None,
                              () if interpreted or self.cuda else (("TRITON_INTERPRET", "0"),)))
        return made

    def imported(self) -> bool:
        """Whether all packages are there; takes note of the device."""
        records = supervise.records_of(self.groups[0])["records"]
        for record in records:
            if record["status"] != "right":
                print(f"error: {record['reason']}", file=sys.stderr, flush=True)
        self.cuda = any(record.get("cuda") for record in records)
        return supervise.all_right(records)

    def write(self) -> dict:
        """results.json and summary.md, whole; -> the document."""
        parts = {}
        for group in self.groups:
            found = supervise.records_of(group)
            part = parts.setdefault(group.part, {"rates": {}, "results": []})
            part["results"] += [{"group": group.name, **record} for record in found["records"]]
            part["rates"].update({group.name: found["rates"]} if "rates" in found else {})
        records = [record for part in parts.values() for record in part["results"]]
        machine = next((r["machine"] for r in records if "machine" in r), {})
        document = {"what": "everything that only a GPU can tell", "mode": "device" if self.cuda else
                    "no GPU: tiny sizes, kernels in the interpreter; no time here means anything",
                    "ok": supervise.all_right(records) and not self.missing,
                    "seconds": round(time.monotonic() - self.began, 1), "notes": self.notes,
                    "machine": machine, "parts": parts}
        supervise.write(self.out / "results.json", document)
        (self.out / "summary.md").write_text(summary.text(document), encoding="utf-8")
        for trace in self.work.glob("profile*/trace.json"):
            with open(trace, "rb") as source, gzip.open(self.out / f"{trace.parent.name}.json.gz", "wb") as target:
                shutil.copyfileobj(source, target)
            os.unlink(trace)
        return document
