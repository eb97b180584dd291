"""Ends two tiny ranks many times on a busy machine and counts their exit codes; 1 unless all are as they should be.

The ranks are forked from one process that has imported everything, which makes an end cheap: a run of three steps with
a checkpoint, and then the whole of the interpreter's own end.

    python -m tests.ends 200 --busy 6
    python -m tests.ends 200 --busy 6 --stop      (asked to stop by a signal to one rank)
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from tests.conftest import ROOT, free_port

MODEL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96}


def flags_for(folder: pathlib.Path, steps: int = 3) -> list[str]:
    """A tiny run in `folder`, its tokenised data beside it."""
    folder.mkdir(exist_ok=True)
    config = folder / "run.yaml"
    config.write_text("preset: debug\nmodel: " + json.dumps(MODEL))
    return ["--config", str(config), "--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--dtype", "fp32",
            "--save_dir", str(folder / "run"), "--cache_dir", str(folder.parent / "cache"), "--max_seq_len", "96",
            "--pack_len", "96", "--max_steps", str(steps), "--save_interval", "2"]


def fork_rank(rank: int, port: int, folder: pathlib.Path, flags: list[str]) -> int:
    """The child's pid, or 0 in the child, which is now a rank and has its own log."""
    if pid := os.fork():
        return pid
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["launch/sft.py", *flags]
    return 0


def fork_busy() -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    while os.getppid() == parent:
        pass
    os._exit(0)


def wait_for_a_step(folder: pathlib.Path, pids: list[int]) -> None:
    path = folder / "run" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n")):
        for pid in pids:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ends", type=int)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep the cores busy meanwhile")
    parser.add_argument("--stop", action="store_true", help="end the runs by SIGTERM to one rank: exit code 75")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Forked ranks have loaded what they need.
    for name in ("deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)
    from minimind_ds.resilience.signals import STOPPED
    from minimind_ds.training import loop

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    # Not TemporaryDirectory: a forked rank would delete it.
    root, codes, right = pathlib.Path(tempfile.mkdtemp(prefix="ends_")), collections.Counter(), STOPPED * args.stop
    busy = [fork_busy() for _ in range(args.busy)]
    for number in range(args.ends):
        folder, port, pids = root / str(number), free_port(), []
        # Before the fork, so that no rank reads what the other is writing.
        flags = flags_for(folder, 100_000 if args.stop else 3)
        for rank in range(2):
            pids.append(fork_rank(rank, port, folder, flags))
            if pids[-1] == 0:
                return loop.main("sft", sys.argv[1:])
        if args.stop:
            wait_for_a_step(folder, pids)
            os.kill(pids[number % 2], signal.SIGTERM)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        codes.update(ended)
        if ended != [right, right]:
            print(f"end {number}: {ended}", *(folder.joinpath(f"{rank}.log").read_text()[-2000:] for rank in (0, 1)),
                  sep="\n", flush=True)
        shutil.rmtree(folder)
    for pid in busy:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shutil.rmtree(root)
    print(f"{args.ends} ends of 2 ranks beside {args.busy} busy processes; exit codes: "
          + ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())))
    return int(set(codes) != {right})


if __name__ == "__main__":
    sys.exit(main())
