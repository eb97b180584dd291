"""Fuzzes every reader of what others write.

    python -m tests.fuzz --minutes 30 [--target NAME] [--seed N] [--processes N] [--out FILE.json]
    python -m tests.fuzz --target "run YAML" --seed 3 --number 4711      # one input again, with its traceback

Ends with exit code 1 if anything but acceptance or one line was found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import pprint
import sys
import tempfile
import time

os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import torch  # noqa: E402

from tests.fuzz import (  # noqa: E402
    config_targets,
    data_targets,
    run_folder_targets,
    shell_targets,
    tokenizer_targets,
    weight_targets,
)
from tests.fuzz.harness import Outcome, Target, drive, input_of  # noqa: E402

TARGETS = [target for module in (data_targets, config_targets, weight_targets, tokenizer_targets, run_folder_targets,
                                 shell_targets)
           for target in module.TARGETS]
CHUNK = 100


def deal(targets: list[Target], inputs: int) -> list[tuple[Target, range]]:
    """Chunks of every target in turn, the numbers of inputs in each by its share."""
    total = sum(target.share for target in targets)
    chunks = []
    for target in targets:
        count, each = max(1, round(inputs * target.share / total)), max(1, round(CHUNK * target.share))
        chunks.append([(target, range(at, min(at + each, count))) for at in range(0, count, each)])
    return [chunk for turn in itertools.zip_longest(*chunks) for chunk in turn if chunk]


def again(target: Target, seed: int, number: int) -> None:
    """One input in this process, shown, and what it raises."""
    case = input_of(target, seed, number)
    pprint.pprint(case, width=150, compact=True)
    with tempfile.TemporaryDirectory() as folder:
        target.read(case, pathlib.Path(folder))


def report(outcomes: dict[str, Outcome], seed: int) -> dict:
    return {"seed": seed, "inputs": sum(outcome.inputs for outcome in outcomes.values()),
            "signatures": sum(len(outcome.findings) for outcome in outcomes.values()),
            "targets": {name: vars(outcome) for name, outcome in outcomes.items()}}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, help="how long; default: as many inputs as --inputs")
    p.add_argument("--inputs", type=int, default=20_000,
                   help="of all targets (default: 20000); with --minutes not looked at")
    p.add_argument("--target", choices=[target.name for target in TARGETS], help="this one alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--number", type=int, help="this input alone")
    p.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", type=pathlib.Path, help="also write the result there")
    args = p.parse_args()
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if args.target in (None, target.name)]
    for make in dict.fromkeys(make for target in targets for make in target.warm):
        make()
    if args.number is not None:
        again(targets[0], args.seed, args.number)
        return 0
    inputs, until = args.inputs, None
    if args.minutes:
        # More than there is time for.
        inputs, until = round(args.minutes * 60 * 20_000), time.monotonic() + 60 * args.minutes

    def heard(outcomes: dict[str, Outcome]) -> None:
        if args.out:
            args.out.write_text(json.dumps(report(outcomes, args.seed), indent=1) + "\n")

    outcomes = drive(deal(targets, inputs), args.seed, processes=args.processes, until=until, heard=heard)
    heard(outcomes)
    for name, outcome in outcomes.items():
        print(f"{name:32} {outcome.inputs:9,} inputs {outcome.accepted:9,} accepted {outcome.refused:9,} refused"
              f"{1000 * outcome.cpu_s / max(1, outcome.inputs):9.2f} ms")
        for signature, (times, number, said) in sorted(outcome.findings.items(), key=lambda item: -item[1][0]):
            print(f"    {times:6} x {signature}\n             --number {number}: {said[:200]!r}")
    result = report(outcomes, args.seed)
    print(f"{result['inputs']:,} inputs, {result['signatures']} signatures")
    return 1 if result["signatures"] else 0


if __name__ == "__main__":
    sys.exit(main())
