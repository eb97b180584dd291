"""Which rank is slow: each rank times its own forward passes, and the loss's all-reduce carries the times to all.

At ZeRO stages 0 to 2 and without rows or experts over ranks a forward pass waits for nobody, so its time is the rank's
own; otherwise the times are alike, and say nothing.  A step's times travel with the step after it, when a GPU knows
them without being waited for.
"""

from __future__ import annotations

import statistics
import time

import torch

# A rank is reported when it takes this much longer than the median, and more than a trifle.
FACTOR, TRIFLE_S = 1.5, 0.02


class DeviceTimer:
    """Sums up the time of `with` blocks on a device, without waiting for it."""

    def __init__(self, device: torch.device):
        self.cuda, self.pairs, self.spent = device.type == "cuda", [], 0.0

    def __enter__(self):
        if self.cuda:
            self.pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            self.pairs[-1][0].record()
        self.began = time.perf_counter()

    def __exit__(self, *_):
        if self.cuda:
            self.pairs[-1][1].record()
        self.spent += time.perf_counter() - self.began

    def take(self) -> float:
        """Seconds since the last take; on a GPU only after the blocks' work is done."""
        seconds = sum(a.elapsed_time(b) for a, b in self.pairs) / 1000 if self.cuda else self.spent
        self.pairs, self.spent = [], 0.0
        return seconds


def slowest(times: list[float], hosts: list[str]) -> dict:
    """Facts for a step's line of metrics: which rank is slow, if one is."""
    if len(times) < 2:
        return {}
    median, worst = statistics.median(times), max(range(len(times)), key=times.__getitem__)
    if times[worst] < FACTOR * median + TRIFLE_S:
        return {}
    host = {"slowest_host": hosts[worst]} if hosts else {}
    return {"slowest_rank": worst, **host, "slowest_forward_s": times[worst], "median_forward_s": median}
