"""The elementwise parts through torch.compile: one pass over memory each, forward and backward.

Only when asked for (`--compile`, or kernels "elementwise=compiled"): the first step waits for the compiler (about
half a minute on a CPU, where it is g++).

    python -m pytest tests/test_model.py -k compile
"""

from __future__ import annotations

import shutil

import torch

from . import reference

# Compilation happens at the first call, for the dtype and shape it comes with.
rms_norm = torch.compile(reference.rms_norm, dynamic=True)
swiglu = torch.compile(reference.swiglu, dynamic=True)
rotate = torch.compile(reference.rotate, dynamic=True)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if op != "elementwise":
        return "only the elementwise operations are compiled"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs a C++ compiler on the PATH (g++ or clang++)"
    return None
