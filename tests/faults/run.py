"""One run of launch/sft.py that is started again and again, from outside, by one and the same command."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import torch
from safetensors.torch import load_file

from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import RunConfig
from minimind_ds.convert import minimind, weight_files
from minimind_ds.resilience.restarts import last_step
from tests.conftest import ROOT, deepspeed_command, environment
from tests.faults.dealing import EVERY, Configuration
from tests.waiting import HANG_S

# The debug preset with dropout, and cut so that a start is nearly all of the time.
WHOLE = {"dropout": 0.1}
CUT = {**WHOLE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
       "intermediate_size": 96}
# A start that takes longer is one that hangs.
LIMIT_S = HANG_S
# How long what is left of a start may take to go.
END_S = 60
# What differs from run to run, in a line of metrics.
TIMES = ("tokens_per_s", "step_s", "data_s", "forward_s", "backward_s", "slowest_rank", "slowest_host",
         "slowest_forward_s", "median_forward_s")


class Hang(Exception):
    """What was to happen did not, within a run's limit_s."""


class Ended(Exception):
    """The start ended before what was to happen."""


class Run:
    """A run folder, and the processes of its present start.

    Args:
        folder: for the run.
        home: for its log, its configuration and tokenised data.
        model: what differs from the debug preset.
        every: steps between checkpoints.
    """

    def __init__(self, configuration: Configuration, folder: pathlib.Path, home: pathlib.Path, *, model: dict,
                 steps: int, every: int = EVERY, limit_s: float = LIMIT_S):
        self.configuration = configuration
        self.folder, self.checkpoints, self.log = folder, folder / "checkpoints", home / f"{folder.name}.log"
        self.starts, self.offset, self.repeated, self.wall_s = 0, 0, 0, 0.0
        self.launcher, self.damaged, self.limit_s = None, set(), limit_s
        fields = {**model, "use_moe": configuration.moe}
        config, ds = home / f"{configuration.name}.yaml", home / f"{configuration.name}.json"
        config.write_text("preset: debug\nmodel: " + json.dumps(fields))
        zero = json.loads((ROOT / "ds_configs" / f"zero{configuration.stage}.json").read_text())
        ds.write_text(json.dumps({**zero, **configuration.keys}))
        adapters = ("--lora_rank", 4, "--from_weight", base(home, fields)) if configuration.lora else ()
        self.flags = [str(word) for word in (
            "--config", config, "--deepspeed", ds, *adapters, "--save_dir", folder, "--cache_dir", home, "--dtype",
            configuration.dtype, "--max_steps", steps, "--epochs", 1000, "--save_interval", every,
            "--accumulation_steps", 2, "--max_seq_len", 96, "--pack_len", 96, "--from_resume", "auto")]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        """Nothing outlives the harness."""
        if self.launcher is not None:
            self.kill(self.processes())
            self.launcher.wait()

    def start(self, *flags: str, **extra: str) -> None:
        """The same command each time, as a batch system would; extra: environment."""
        self.before, self.began = last_step(self.folder), time.monotonic()
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                deepspeed_command(2, str(ROOT / "launch" / "sft.py"), *self.flags, *flags), cwd=ROOT, stdout=log,
                stderr=log, start_new_session=True,
                env=environment(**{"TORCHELASTIC_RESTART_COUNT": str(self.starts), **extra}))
        self.starts += 1

    def said(self) -> str:
        """What the present start has printed so far."""
        with self.log.open(errors="replace") as log:
            log.seek(self.offset)
            return log.read()

    def processes(self) -> list[psutil.Process]:
        """The launcher's and all below it."""
        try:
            launcher = psutil.Process(self.launcher.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self.processes():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if any(word.endswith("sft.py") for word in words):
                found |= {int(word[-1]): process for word in words if word.startswith("--local_rank=")}
        return found

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.limit_s
        while not what():
            if self.launcher.poll() is not None:
                raise Ended(f"ended with {self.launcher.returncode}")
            if time.monotonic() > deadline:
                raise Hang
            time.sleep(0.002)

    def wait_for_step(self, step: int, *, whole: int = 0) -> None:
        """Until this start has taken the step, and so many whole checkpoints are there."""
        # Before it trains, metrics.jsonl is still that of the start before.
        self.wait_for(lambda: "engine: " in self.said())
        self.wait_for(lambda: last_step(self.folder) >= step and len(self.whole()) >= whole)

    def whole(self) -> list[pathlib.Path]:
        """The checkpoints that are there and were not damaged, oldest first."""
        return [path for path in sorted(self.checkpoints.glob("step_*")) if identity(path) not in self.damaged]

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            try:
                process.kill()
            except psutil.Error:
                pass

    def wait_for_end(self) -> int:
        """The exit code of the start; what is left of it after limit_s is killed.

        Raises:
            Hang: it was.
        """
        below, hangs = self.processes(), False
        try:
            self.launcher.wait(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            hangs = True
        # A process that was killed takes a while to go, on a busy machine more than one.
        deadline = time.monotonic() + (0 if hangs else END_S)
        while (left := [process for process in below if runs(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.launcher.returncode != -signal.SIGKILL:
            hangs |= bool(left)
        self.kill(left)
        self.launcher.wait()
        psutil.wait_procs(left, timeout=END_S)
        self.account()
        if hangs:
            raise Hang
        return self.launcher.returncode

    def account(self) -> None:
        """Adds up the time and the repeated steps of a start that has ended."""
        self.wall_s += time.monotonic() - self.began
        if "engine: " in self.said():
            found = re.search(r"resuming from .* after step (\d+)", self.said())
            self.repeated += max(0, self.before - int(found.group(1) if found else 0))

    def rows(self) -> list[dict]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "data" not in line]

    def goodput(self) -> float:
        """Time of the steps that count, as a share of all the time."""
        return sum(row.get("step_s", 0) for row in self.rows()) / self.wall_s


def base(home: pathlib.Path, fields: dict) -> pathlib.Path:
    """Weights for adapters to train beside; the same file for all runs of a home."""
    path = home / "base.safetensors"
    if not path.exists():
        config = RunConfig(preset="debug", model=fields).model_config(PRESETS["debug"].vocab_size)
        torch.manual_seed(1)
        weight_files.save_safetensors(path, dict(minimind.fresh(config)), config)
    return path


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def identity(path: pathlib.Path) -> tuple:
    found = path.stat()
    return path.name, found.st_ino, found.st_ctime_ns


def curve(run: Run) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in run.rows()]


def weights(run: Run) -> dict[str, bytes]:
    """The final weights, bit for bit."""
    return {name: value.numpy().tobytes() for name, value in
            load_file(next(run.folder.glob("sft_*.safetensors"))).items()}


def damage(path: pathlib.Path, kind: str, draw: random.Random) -> str:
    """Cut, alter or delete a file of a checkpoint; -> what was done."""
    file = draw.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))
    size = file.stat().st_size
    at = draw.randrange(size)
    if kind == "file deleted":
        file.unlink()
    elif kind == "file cut":
        os.truncate(file, at)
    else:
        with file.open("r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return f"{path.name}/{file.relative_to(path)}, byte {at} of {size}"
