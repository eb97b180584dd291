"""How a result is judged and how a time is taken: errors against fp64, medians, the machine's own rates, floors.

    python -c "from minimind_ds.bench.machine import machine; print(machine())"
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor

# A tensor's error may be `bound` of its norm, a single row's ten times that of its own norm plus the mean row's.
# One wrong row in 32,768 moves the norm of all by half a percent: the norm alone would pass it in bf16.
ROW_SLACK = 10
# Repeats of a measurement on a GPU; the interpreter and a CPU take FEW.
REPEATS, FEW = 30, 3


def error(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors of a tensor and of its worst row; infinite where NaN, shape or size differ.

    The first is |got - exact| / |exact|; the second the largest |got_r - exact_r| / (|exact_r| + mean of |exact_r|)
    over rows r of the last dimension.
    """
    if got.shape != exact.shape:
        return math.inf, math.inf
    if not exact.numel():
        return 0.0, 0.0
    got, exact = got.detach().double(), exact.detach().double()
    rows, true = (x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1) for x in (got, exact))
    norm_r = true.norm(dim=1)
    wrong_r = (rows - true).norm(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    whole = (wrong_r.norm() / norm_r.norm().clamp(min=tiny)).item()
    worst = (wrong_r / (norm_r + norm_r.mean()).clamp(min=tiny)).max().item()
    return tuple(found if found == found else math.inf for found in (whole, worst))


def judge(got: list[Tensor], exact: list[Tensor], names: list[str], bound: float) -> dict:
    """-> {"right", "bound", "errors": by name [tensor's, worst row's]}."""
    assert len(exact) == len(names)
    if len(got) != len(exact):
        return {"right": False, "bound": bound, "errors": {"number of results": [len(got), len(exact)]}}
    errors = {name: error(a, b) for name, a, b in zip(names, got, exact)}
    right = all(whole <= bound and worst <= ROW_SLACK * bound for whole, worst in errors.values())
    return {"right": right, "bound": bound,
            "errors": {name: [float(f"{e:.3e}") for e in pair] for name, pair in errors.items()}}


def quartiles(values: list[float]) -> dict:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"ms": middle, "ms_q1": low, "ms_q3": high, "repeats": len(values)}


class Clock:
    """Times functions on one device: CUDA events on a GPU, the wall clock on a CPU.

    On a GPU each repeat begins with a cold L2 cache and a short sleep on the device, so that the host has queued the
    work before the first event passes: what is measured is the device.  `host_ms` is the wall time of a call when
    calls follow each other with nothing between them, whichever of host and device is slower.
    """

    def __init__(self, device: torch.device, repeats: int | None = None):
        self.cuda = device.type == "cuda"
        self.repeats = repeats or (REPEATS if self.cuda else FEW)
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            size = max(256 << 20, 4 * getattr(properties, "L2_cache_size", 64 << 20))
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, function, limit_s: float = 2.0) -> dict:
        """Median, quartiles (ms) and repeats: as many as asked for, fewer (five at least) if they took longer."""
        if not self.cuda:
            return self.time_on_cpu(function, limit_s)
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(3):
            function()
        issued = (time.perf_counter() - began) / 3
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began) / 3
        repeats = min(self.repeats, max(5, int(limit_s / max(whole, 1e-6))))
        # At 2 GHz; host time again is enough, 20 ms is what a function that waits for the device would ask for.
        cycles = int(min(issued * 1.5, 0.02) * 2e9)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self.flush.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        host = (time.perf_counter() - began) / repeats
        return {**quartiles([start.elapsed_time(end) for start, end in pairs]), "host_ms": host * 1e3}

    def time_on_cpu(self, function, limit_s: float) -> dict:
        function()
        taken = []
        while len(taken) < self.repeats and (len(taken) < 3 or sum(taken) < limit_s * 1e3):
            began = time.perf_counter()
            function()
            taken.append((time.perf_counter() - began) * 1e3)
        return quartiles(taken)


def rates(device: torch.device, dtype: torch.dtype, small: bool) -> dict:
    """What this device reaches at best, measured: FLOP/s of a big product in dtype, bytes/s of a big copy."""
    clock = Clock(device)
    n, n_bytes = (256, 4 << 20) if small else (8192 if dtype.itemsize == 2 else 4096, 2 << 30)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = clock.time(lambda: a @ b), clock.time(lambda: target.copy_(source))
    return {"flop_per_s": 2 * n ** 3 / product["ms"] * 1e3, "byte_per_s": 2 * n_bytes / copy["ms"] * 1e3,
            "product": f"{n} x {n} x {n}, {short(dtype)}", "copy": f"{n_bytes >> 20} MiB"}


def against_floor(timed: dict, flops: float, n_bytes: float, rate: dict) -> dict:
    """Adds the floor (the larger of bytes / bandwidth and FLOP / rate) and what was reached of it."""
    floor = max(flops / rate["flop_per_s"], n_bytes / rate["byte_per_s"]) * 1e3
    seconds = timed["ms"] / 1e3
    return {**timed, "floor_ms": floor, "of_floor": floor / timed["ms"], "gb_per_s": n_bytes / seconds / 1e9,
            "tflop_per_s": flops / seconds / 1e12}


def short(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    return names[dtype]
