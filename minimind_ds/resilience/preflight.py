"""Facts about every node that a training will run on, and what is wrong with them, in a minute instead of in hours.

Each rank tells rank 0 its facts through a key-value store, which needs no collective: a node that does not answer is
named too.  Only then are they all timed in an all-reduce.

    deepspeed launch/preflight.py --save_dir runs/sft
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.config.program_flags import LIMITS
from minimind_ds.config.spellings import translate
from minimind_ds.distributed import rendezvous
from minimind_ds.distributed.world import World, read_world
from minimind_ds.paths import LAUNCH, PACKAGE, ROOT, cache_folder
from minimind_ds.terminal import columns, count

PACKAGES = ("torch", "deepspeed", "transformers", "triton")
# What must be the same on all nodes.
ALIKE = ("commit", "source", "python", *PACKAGES, "ranks", "GPU", "driver")


def main(argv: list[str]) -> int:
    """The whole of launch/preflight.py, on every rank.  Returns 0, or 2 when something is wrong."""
    try:
        args, _ = program_flags.preflight().parse_known_args(translate(argv)[0])
        return check(read_world(), save_dir=args.save_dir, cache_dir=args.cache_dir,
                     limits={name: getattr(args, name) for name in LIMITS})
    except UserError as error:
        print(one_line(error), file=sys.stderr, flush=True)
        return 2


def check(world: World, *, save_dir: str, cache_dir: str | None, limits: dict) -> int:
    """Returns 0, or 2 when something is wrong; collective."""
    cache_dir = cache_dir or str(cache_folder())
    store = rendezvous.connect(world, time.monotonic() + limits["wait_seconds"])
    store.set(f"facts/{world.rank}", json.dumps(facts(world, save_dir, cache_dir)))
    everyone, silent, bandwidth = [], [], None
    if world.rank == 0:
        everyone, silent = collect(store, world.size, limits["wait_seconds"])
        problems = [f"rank {rank} did not answer within {limits['wait_seconds']:g} s" for rank in silent]
        store.set("problems", json.dumps(problems + judge(everyone, limits)))
    # Rank 0 waits for the slowest before it says so.
    store.wait(["problems"], datetime.timedelta(seconds=2 * limits["wait_seconds"] + 60))
    problems = json.loads(store.get("problems"))
    if not problems:
        # Alike and alive: only now is a collective sure not to hang.
        bandwidth, clocks = measure(world, store)
        for fact, clock in zip(everyone, clocks):
            fact["clock"] = clock
        if world.rank == 0:
            store.set("connection", json.dumps(judge_connection(everyone, limits, bandwidth)))
        problems = json.loads(store.get("connection"))
        dist.destroy_process_group()
    if world.rank == 0:
        report(everyone, problems, bandwidth)
    leave(store, world, len(everyone))
    return 2 if problems else 0


def leave(store, world: World, answered: int) -> None:
    """Rank 0 hosts the store, so it leaves last."""
    store.add("left", 1)
    deadline = time.monotonic() + 10
    while world.rank == 0 and store.add("left", 0) < answered and time.monotonic() < deadline:
        time.sleep(0.05)


def collect(store, ranks: int, seconds: float) -> tuple[list[dict], list[int]]:
    """-> (the facts of the ranks that answered in time, the ranks that did not)."""
    deadline, found, silent = time.monotonic() + seconds, [], []
    for rank in range(ranks):
        try:
            store.wait([f"facts/{rank}"], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
            found.append(json.loads(store.get(f"facts/{rank}")))
        except RuntimeError:
            silent.append(rank)
    return found, silent


def facts(world: World, save_dir: str, cache_dir: str) -> dict:
    """What this rank sees of its node."""
    found = {"rank": world.rank, "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
             "commit": commit(), "source": source(),
             "python": platform.python_version(), "ranks": world.size,
             "save_dir": free_gib(save_dir), "cache_dir": free_gib(cache_dir)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        name = torch.cuda.get_device_name(world.device)
        found["uuid"] = str(getattr(torch.cuda.get_device_properties(world.device), "uuid", world.rank))
        found |= {"GPU": f"{torch.cuda.device_count()} x {name}", "GPU free": free / total, **health(found["uuid"])}
    return found


def commit() -> str:
    """The checkout's commit, with '+' when files of it were changed."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def source() -> str:
    """A hash of the program itself: a commit says nothing of files changed since."""
    state = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *LAUNCH.glob("*.py")]):
        state.update(f"{path.relative_to(PACKAGE.parent)}\0".encode() + path.read_bytes())
    return state.hexdigest()[:10]


def free_gib(folder: str) -> float | str:
    """Free space where a folder is or will be; what is wrong when it cannot be written to."""
    path = pathlib.Path(folder).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        return f"{path} cannot be written to"
    return shutil.disk_usage(path).free / 2**30


def health(uuid: str) -> dict:
    """The driver and, where the GPU tells, its uncorrected memory errors since the last reset."""
    try:
        line = subprocess.run(["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits",
                               "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total"],
                              capture_output=True, text=True, check=True, timeout=60).stdout
        driver, errors = (word.strip() for word in line.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {"driver": driver, **({"ECC errors": int(errors)} if errors.isdigit() else {})}


def measure(world: World, store) -> tuple[float, list[float]]:
    """All-reduce bandwidth over all ranks in GB/s (bus bandwidth, as NCCL's tests count it), and each rank's clock.

    The clocks are read right after a barrier; of several readings rank 0 keeps the one in which they differ least.
    """
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=world.rank,
                            world_size=world.size, timeout=datetime.timedelta(minutes=5))
    numbers, rounds = torch.ones((256 if cuda else 4) << 18, device=world.device), 10 if cuda else 3
    readings = []
    for _ in range(5):
        dist.barrier()
        mine = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        every = [torch.zeros_like(mine) for _ in range(world.size)]
        dist.all_gather(every, mine)
        readings.append([clock.item() for clock in every])
    best = float("inf")
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    moved = numbers.numel() * 4 * 2 * (world.size - 1) / world.size
    return moved / best / 1e9, min(readings, key=lambda clocks: max(clocks) - min(clocks))


def judge(everyone: list[dict], limits: dict) -> list[str]:
    """What is wrong with the nodes, one line each, by the facts of each rank."""
    problems, owners = [], {}
    for key in ALIKE:
        # A node's first rank speaks for it; the value most nodes have is taken for the right one.
        values = {}
        for fact in everyone:
            values.setdefault(fact["node"], fact.get(key))
        usual = collections.Counter(values.values()).most_common(1)[0][0]
        problems += [f"{node}: {key} is {value or 'none'}, elsewhere {usual or 'none'}"
                     for node, value in values.items() if value != usual]
    for fact in everyone:
        node, rank = fact["node"], fact["rank"]
        for key in ("save_dir", "cache_dir"):
            if isinstance(fact[key], str):
                problems.append(f"{node}: {key}: {fact[key]}")
            elif fact[key] < limits["min_free_gib"]:
                problems.append(f"{node}: {key} has {fact[key]:.1f} GiB free, less than {limits['min_free_gib']:g}")
        if fact.get("GPU free", 1) < limits["min_gpu_free"]:
            problems.append(f"{node}: {fact['GPU free']:.0%} of the memory of rank {rank}'s GPU is free; another "
                            "program is using it")
        if fact.get("ECC errors", 0):
            problems.append(f"{node}: rank {rank}'s GPU has {fact['ECC errors']} uncorrected memory errors")
        if "uuid" in fact and owners.setdefault((node, fact["uuid"]), rank) != rank:
            problems.append(f"{node}: ranks {owners[node, fact['uuid']]} and {rank} share a GPU; start one task a GPU")
    # Ranks of one node find the same.
    return list(dict.fromkeys(problems))


def judge_connection(everyone: list[dict], limits: dict, bandwidth: float) -> list[str]:
    """What is wrong between the nodes; each fact has its 'clock' by now."""
    middle = sorted(fact["clock"] for fact in everyone)[len(everyone) // 2]
    off = {fact["node"]: fact["clock"] - middle for fact in everyone}
    problems = [f"{node}: its clock is {seconds:+.1f} s off" for node, seconds in off.items()
                if abs(seconds) > limits["max_clock_skew"]]
    if len(everyone) > 1 and bandwidth < limits["min_bandwidth"]:
        problems.append(f"all-reduce over {len(everyone)} ranks: {bandwidth:.2f} GB/s, less than "
                        f"{limits['min_bandwidth']:g}")
    return problems


def report(everyone: list[dict], problems: list[str], bandwidth: float | None) -> None:
    """The table and the verdict."""
    print(table(everyone))
    if bandwidth is not None and len(everyone) > 1:
        print(f"all-reduce over {len(everyone)} ranks: {bandwidth:.2f} GB/s")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    print(f"pre-flight: {count(len(problems), 'problem')}" if problems else "pre-flight: all well", flush=True)


def table(everyone: list[dict]) -> str:
    """What is alike on all nodes, a line each, and a line for each node (of its first rank) with what is not."""
    nodes = {}
    for fact in everyone:
        nodes.setdefault(fact["node"], fact)
    own = ["GPU free", "ECC errors", "save_dir", "cache_dir", "clock"]
    keys = [key for key in ["commit", "source", "python", *PACKAGES, "GPU", *own]
            if any(key in fact for fact in nodes.values())]
    first = min((fact["clock"] for fact in nodes.values() if "clock" in fact), default=0.0)

    def cell(key: str, fact: dict) -> str:
        value = fact.get(key, "-")
        if key == "clock" and value != "-":
            return f"{value - first:+.2f} s"
        if key in ("save_dir", "cache_dir") and not isinstance(value, str):
            return f"{value:.0f} GiB free"
        return f"{value:.0%}" if key == "GPU free" and value != "-" else str(value)
    alike = [key for key in keys if key not in own and len({cell(key, fact) for fact in nodes.values()}) == 1]
    rows = [(node, [cell(key, fact) for key in keys if key not in alike]) for node, fact in nodes.items()]
    return "\n".join([*(f"{key}: {cell(key, everyone[0])}" for key in alike),
                      *columns([key for key in keys if key not in alike], rows)])
