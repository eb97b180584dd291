"""Real faults at seeded random moments of real two-rank runs, each run compared bit for bit with an undisturbed one.

Kills, signals, full and failing disks, damaged checkpoints, slow and hung ranks and second jobs are dealt to runs of
the debug preset under the `deepspeed` launcher: at ZeRO stages 0 to 3, dense and with experts, of all weights or of
adapters, with experts or rows shared by both ranks.  After each end a run is started again by the same command.  Exit
code 0: every fault was injected and met as docs/RELIABILITY.md promises, and all final weights and curves are equal.

    python -m tests.faults
    python -m tests.faults --faults 24 --seed 3 --only zero2-dense --out faults.json    # some of a deal; goes on later
    python -m tests.faults --kill_every 60                                              # goodput with a kill a minute
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile

from minimind_ds.bench.machine import machine
from minimind_ds.io import write_file
from tests import starts
from tests.conftest import environment
from tests.faults import disk
from tests.faults.dealing import ALL, Configuration, Start, deal, steps_for
from tests.faults.goodput import killed_regularly
from tests.faults.inject import play
from tests.faults.run import CUT, WHOLE, Run, curve, weights


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    names = [configuration.name for configuration in ALL]
    parser.add_argument("--faults", type=int, default=100, help="how many in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the deal (default: 0)")
    parser.add_argument("--over", nargs="+", choices=names, default=names, help="runs to deal to (default: all)")
    parser.add_argument("--only", nargs="+", choices=names, help="of these, play only some now")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; runs of the same deal in it are not played again")
    parser.add_argument("--whole", action="store_true", help="the debug preset as it is, not cut to 48 x 2 layers")
    parser.add_argument("--kill_every", type=float, help="seconds: instead of a deal, one long run and power cuts")
    parser.add_argument("--steps", type=int, default=4000, help="of the long run (default: 4000)")
    parser.add_argument("--every", type=int, default=50, help="its steps between checkpoints (default: 50)")
    args = parser.parse_args(argv)
    model = WHOLE if args.whole else CUT
    starts.BASE.update(environment())
    subprocess.Popen = starts.Popen
    # Ends what it started, and its folders, when it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="faults_") as home:
        if args.kill_every:
            result = killed_regularly(pathlib.Path(home), args.kill_every, model=model, steps=args.steps,
                                      every=args.every, say=say)
        else:
            result = sweep(pathlib.Path(home), args, model)
    write(args.out, result)
    return 0 if result["ok"] else 1


def sweep(home: pathlib.Path, args, model: dict) -> dict:
    """Play the hands of a deal; -> the result with all that were played, in this call or before."""
    chosen = [configuration for configuration in ALL if configuration.name in args.over]
    why, why_not = {"disk full": disk.own_mounts()}, disk.FailingDisk(home, home).why_not
    why |= {"EIO on write": why_not, "EIO on fsync": why_not}
    missing = {kind: reason for kind, reason in why.items() if reason}
    for kind, reason in missing.items():
        say(f"no {kind}: {reason}")
    hands = deal(args.faults, args.seed, chosen, set(missing))
    result = {"what": "faults injected into 2-rank runs under the deepspeed launcher, against undisturbed runs",
              "model": model, "faults": args.faults, "seed": args.seed, "over": args.over, "missing": missing,
              "machine": machine(), "runs": {}}
    if args.out and args.out.exists():
        past = json.loads(args.out.read_text(encoding="utf-8"))
        if all(past.get(name) == result[name] for name in ("model", "faults", "seed", "over", "missing")):
            result["runs"] = past["runs"]
    for configuration in chosen:
        if configuration.name not in result["runs"] and (not args.only or configuration.name in args.only):
            result["runs"][configuration.name] = one(home / configuration.name, configuration, model,
                                                     hands[configuration.name], args.seed)
            # It may be stopped before all are played.
            write(args.out, result)
    runs = result["runs"].values()
    totals = {name: sum(run[name] for run in runs) for name in
              ("dealt", "injected", "recovered", "silently_corrupted", "hangs", "manual_steps", "starts",
               "steps_repeated", "wall_s")}
    totals["wall_s"] = round(totals["wall_s"], 1)
    result["totals"] = {**totals, "played": len(result["runs"]), "equal": all(run["equal"] for run in runs)}
    result["ok"] = (totals["dealt"] == totals["injected"] == totals["recovered"] and result["totals"]["equal"]
                    and totals["hangs"] + totals["silently_corrupted"] + totals["manual_steps"] == 0)
    show(result)
    return result


def one(home: pathlib.Path, configuration: Configuration, model: dict, starts: list[Start], seed: int) -> dict:
    """An undisturbed run, then the same with a hand of faults."""
    kinds = {start.end[1] for start in starts if start.end}
    dealt = sum(len(start.during) + bool(start.end) + len(start.between) for start in starts)
    home.mkdir()
    place = home / "disk"
    if "disk full" in kinds:
        disk.small(place, 48 if model == CUT else 640)
    else:
        place.mkdir()
    with Run(configuration, home / "undisturbed", home, model=model, steps=steps_for(dealt)) as whole:
        whole.start()
        code = whole.wait_for_end()
        assert code == 0, whole.said()[-3000:]
    say(f"{configuration.name}: undisturbed run of {len(whole.rows())} steps in {whole.wall_s:.0f} s; "
        f"{dealt} faults follow")
    with Run(configuration, place / "run", home, model=model, steps=steps_for(dealt)) as hurt:
        faults, hangs, wrong = play(hurt, starts, draw=random.Random(f"{seed} {configuration.name}"),
                                    failing=disk.FailingDisk(home, hurt.checkpoints),
                                    say=lambda text: say(f"  {text}"))
    finished = any(hurt.folder.glob("sft_*.safetensors"))
    equal = finished and weights(hurt) == weights(whole) and curve(hurt) == curve(whole)
    goodput = round(hurt.goodput(), 4) if finished else None
    if "disk full" in kinds:
        disk.unmount(place)
    for text in wrong:
        say(f"  WRONG: {text}")
    return {"dtype": configuration.dtype, "dealt": dealt, "injected": len(faults),
            "recovered": sum(fault["met"] for fault in faults) if finished else 0, "equal": equal,
            # It ended, says nothing, and is not what it should be.
            "silently_corrupted": int(finished and not equal), "hangs": hangs, "manual_steps": len(wrong),
            "starts": hurt.starts, "steps": len(whole.rows()), "steps_repeated": hurt.repeated,
            "wall_s": round(hurt.wall_s, 1), "goodput": goodput,
            "undisturbed": {"wall_s": round(whole.wall_s, 1), "goodput": round(whole.goodput(), 4)},
            "list": faults}


def write(out: pathlib.Path | None, result: dict) -> None:
    if out:
        write_file(out, json.dumps(result, indent=1) + "\n")


def show(result: dict) -> None:
    columns = ("dealt", "injected", "recovered", "silently_corrupted", "hangs", "manual_steps", "starts",
               "steps_repeated", "wall_s", "goodput", "equal")
    say("| run | " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    say("|---" * (len(columns) + 1) + "|")
    for name, run in [*result["runs"].items(), ("all", result["totals"])]:
        say(f"| {name} | " + " | ".join(str(run.get(column, "")) for column in columns) + " |")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
