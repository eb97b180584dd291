"""The sweep: every cell a fresh launch of its own ranks, its result or the reason it has none kept in results.json.

Nothing here imports torch's GPU side: the process that starts the cells holds no device memory.

    deepspeed --num_gpus 2 launch/benchmark.py
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tqdm import tqdm

from minimind_ds import terminal
from minimind_ds.config.errors import NO_MEMORY, UserError
from minimind_ds.distributed.world import free_port
from minimind_ds.io import write_file
from minimind_ds.paths import LAUNCH

SCHEMA = 1
# What a launcher tells its ranks; a cell's ranks are told by a launcher of their own.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
            "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Cell:
    """One measurement; `flags` are the other flags of launch/sft.py, alike for the whole sweep."""

    deepspeed: str
    preset: str
    row_len: int
    batch_size: int
    accumulation: int
    kernels: str
    ranks: int
    warm_up: int
    steps: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return (f"{self.preset} {pathlib.Path(self.deepspeed).stem} {self.row_len}x{self.batch_size}x"
                f"{self.accumulation} {self.kernels} {self.ranks} rank{'s' * (self.ranks > 1)}")

    @property
    def key(self) -> str:
        """The name, and a hash of everything that decides the result: the DeepSpeed file's content too."""
        facts = json.dumps({**asdict(self), "deepspeed": pathlib.Path(self.deepspeed).read_text(encoding="utf-8")},
                           sort_keys=True)
        return f"{self.name} {hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    def train_flags(self, work: pathlib.Path) -> list[str]:
        """As launch/sft.py takes them."""
        flags = ["--deepspeed", self.deepspeed, "--preset", self.preset, "--pack_len", str(self.row_len),
                 "--batch_size", str(self.batch_size), "--accumulation_steps", str(self.accumulation),
                 "--kernels", self.kernels, "--save_dir", str(work), *self.flags]
        if "--max_seq_len" not in self.flags:
            flags += ["--max_seq_len", str(min(768, self.row_len))]
        return flags


def parse_rows(text: str) -> tuple[int, int, int]:
    """'4096x8x1': row length in tokens, rows per rank and micro-batch, micro-batches a step; the last two may be left.

    Raises:
        ValueError: anything else.
    """
    numbers = text.split("x")
    if not 1 <= len(numbers) <= 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"--rows {text!r}: write LENGTHxROWSxACCUMULATION, for example 4096x8x1")
    return tuple([*map(int, numbers), 1, 1][:3])


def cells_of(*, files: list[str], presets: list[str], rows: list[str], kernels: list[str], ranks: list[int],
             warm_up: int, steps: int, flags: list[str]) -> list[Cell]:
    """The product of everything, small cells first.  Raises ValueError for what can be seen to be wrong now."""
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"--deepspeed {file}: no such file, or not readable")
    shapes = [parse_rows(text) for text in rows]
    return [Cell(file, preset, *shape, spec, n, warm_up, steps, tuple(flags))
            for preset, shape, spec, n, file in itertools.product(presets, shapes, kernels, ranks, files)]


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """One writer at a time; jobs of a cluster may append to the same file."""
    with open(path.with_name(path.name + ".lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def read(path: pathlib.Path) -> dict:
    """results.json, or an empty one.

    Raises:
        ValueError: a file that is something else.
    """
    if not path.exists():
        return {"schema": SCHEMA, "cells": []}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or not all("key" in c and "status" in c for c in document["cells"]):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a results file of this program (schema {SCHEMA}); name another --out") \
            from None
    return document


def append(path: pathlib.Path, record: dict) -> None:
    """Add a cell's record, in place of one with the same key; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        document = read(path)
        document["cells"] = [c for c in document["cells"] if c["key"] != record["key"]] + [record]
        write_file(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def sweep(cells: list[Cell], folder: pathlib.Path, *, timeout: float, retry: bool) -> dict:
    """Run what results.json lacks, one cell after another.  -> the whole document.

    Args:
        timeout: seconds a cell may take, its start included.
        retry: also run again what is there without a result.
    """
    path = folder / "results.json"
    done = {c["key"] for c in read(path)["cells"] if c["status"] == "ok" or not retry}
    left = [cell for cell in cells if cell.key not in done]
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are in {path} already", flush=True)
    with tqdm(total=len(left), unit="cell", **terminal.bar_width(), disable=not sys.stderr.isatty()) as bar:
        for i, cell in enumerate(left):
            bar.set_postfix_str(cell.name)
            if bar.disable:
                print(f"[{i + 1}/{len(left)}] {cell.name} …", file=sys.stderr, flush=True)
            record = run_cell(cell, folder, timeout)
            append(path, record)
            bar.update()
            bar.write(f"[{i + 1}/{len(left)}] {cell.name}: {outcome(record)}", file=sys.stdout)
            sys.stdout.flush()
    return read(path)


def outcome(record: dict) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    return (f"{record['tokens_per_s']:,.0f} tokens/s ({record['tokens_per_s_min']:,.0f} to "
            f"{record['tokens_per_s_max']:,.0f})")


def run_cell(cell: Cell, folder: pathlib.Path, timeout: float) -> dict:
    """Start the cell's ranks and wait for them.  -> its record, whatever happened."""
    work, logs = folder / "work", folder / "logs"
    for made in (work, logs):
        made.mkdir(parents=True, exist_ok=True)
    result = work / "cell.json"
    result.unlink(missing_ok=True)
    log = logs / f"{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', cell.key)}.log"
    command = [*launcher(cell.ranks), str(LAUNCH / "benchmark.py"), "--cell", str(result),
               "--warm_up", str(cell.warm_up), "--steps", str(cell.steps), *cell.train_flags(work)]
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT,
                                 env=clean_environment(), start_new_session=True)
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    record = {"key": cell.key, "name": cell.name, "cell": {**asdict(cell), "flags": list(cell.flags)}}
    if code == 0 and result.exists():
        record |= {"status": "ok", "reason": None, **json.loads(result.read_text(encoding="utf-8"))}
    else:
        status, reason = diagnose(log.read_text(encoding="utf-8", errors="replace"), code, timeout)
        record |= {"status": status, "reason": reason}
    return record | {"wall_s": time.perf_counter() - began, "date": time.strftime("%Y-%m-%d %H:%M:%S")}


def clean_environment() -> dict[str, str]:
    """The environment without any launcher's variables."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    # ninja of this environment first, for what DeepSpeed compiles.
    env["PATH"] = str(pathlib.Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
    return env


def launcher(ranks: int) -> list[str]:
    """What `deepspeed --num_gpus RANKS` runs on each machine, without the seconds it takes to find that out."""
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = visible[:ranks] if len(visible) >= ranks else list(range(ranks))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0",
            "--master_addr=127.0.0.1", f"--master_port={free_port()}"]


def end(child: subprocess.Popen) -> None:
    """No process of a cell outlives it."""
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            if child.returncode is not None and sign == signal.SIGKILL:
                return


def diagnose(log: str, code: int | None, timeout: float) -> tuple[str, str]:
    """-> (status, one line why) from what a cell that gave no result has printed."""
    if code is None:
        return "timeout", f"no result after {timeout:.0f} s"
    said = [line.strip() for line in log.splitlines()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    raised = [line for line in said if re.match(r"(\w+\.)*\w*(Error|Exception|Exit)\b.*: ", line)]
    memory = next((line for line in errors + raised if NO_MEMORY.search(line)), None)
    if memory:
        return "out of memory", memory[:300].rstrip(": ")
    # The launcher's own line when the kernel ended a rank, which on a CPU is how memory runs out.
    killed = next((line for line in said if re.search(r"exits with return code = -9|return code = -9|SIGKILL", line)),
                  None)
    if killed or code in (-9, 137):
        return "out of memory", "a rank was killed (SIGKILL), which is what the kernel does when memory runs out"
    if errors:
        return ("refused" if "error: " + errors[0] in said and code == 2 else "failed"), errors[0][:300]
    reason = next((line for line in raised if "subprocess.CalledProcessError" not in line), None)
    return "failed", (reason or f"exit code {code}; last line: {next((x for x in reversed(said) if x), 'none')}")[:300]
