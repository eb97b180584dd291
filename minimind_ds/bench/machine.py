"""Where and with what something was measured.

    python -c "from minimind_ds.bench.machine import machine; print(machine())"
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
import time

import torch

from minimind_ds.distributed.world import World
from minimind_ds.paths import ROOT


def first_line(command: list[str]) -> str | None:
    """The first line a command prints, or None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(world: World | None = None) -> dict:
    """Where and with what a result was measured."""
    cuda = torch.cuda.is_available()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("triton", "deepspeed", "transformers", "numpy", "flash-attn", "liger-kernel")
    return {"device": torch.cuda.get_device_name() if cuda else f"CPU: {cpu}", "cpu": cpu,
            "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda
            else None,
            "cuda": torch.version.cuda, "torch": torch.__version__, "python": platform.python_version(),
            "threads": torch.get_num_threads(), **{name: version(name) for name in packages},
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "commit": first_line(["git", "rev-parse", "HEAD"]),
            **({"nodes": max(1, world.size // max(1, world.local_size))} if world else {})}
