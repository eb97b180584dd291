"""What our Triton kernels share on the host: which GPU this is, on which device they start, how rows may lie."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor


def architecture() -> int:
    """90 for Hopper, 80 for Ampere, ...; the interpreter runs Hopper's configurations."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; without a GPU those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def on(device: torch.device):
    """Kernels start on the current device: make it the tensors', where it is another."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """x (T, H, D) with a token's heads side by side; tokens may lie apart (views into one projection's output)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
