"""The elementwise parts through torch.compile: one pass over memory each, forward and backward.

Only when asked for (`--compile`, or kernels "elementwise=compiled"): the first step waits for the compiler (about
half a minute on a CPU, where it is g++).

    python -m pytest tests/test_model.py -k compile
"""

from __future__ import annotations

import shutil

import torch

from . import reference
from .needs import Needs

# Compilation happens at the first call, for the dtype and shape it comes with.
rms_norm = torch.compile(reference.rms_norm, dynamic=True)
swiglu = torch.compile(reference.swiglu, dynamic=True)
add_rms_norm = torch.compile(reference.add_rms_norm, dynamic=True)
norm_rope = torch.compile(reference.norm_rope, dynamic=True)
token_losses = reference.token_losses

LACKS = dict.fromkeys(("attention", "moe", "router"), "only the elementwise operations are compiled")


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: Needs) -> str | None:
    if op in LACKS:
        return LACKS[op]
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs a C++ compiler on the PATH (g++ or clang++)"
    return None
