"""The elementwise parts through torch.compile: one pass over memory each, forward and backward.

Only when asked for (`--compile`, or kernels "elementwise=compiled"): the first step waits for the compiler (about
half a minute on a CPU, where it is g++).

    python -m pytest tests/model/test_model.py -k compile
"""

from __future__ import annotations

import functools
import shutil

import torch

from . import reference
from .needs import KernelRequirements


@functools.cache
def compiled(name: str):
    """The reference's function; compilation happens at its first call, for the dtype and shape it comes with.

    Not at import: torch.compile itself loads the compiler, two seconds of every program's start.
    """
    return torch.compile(getattr(reference, name), dynamic=True)


def rms_norm(*args):
    return compiled("rms_norm")(*args)


def swiglu(*args):
    return compiled("swiglu")(*args)


def add_rms_norm(*args):
    return compiled("add_rms_norm")(*args)


def norm_rope(*args):
    return compiled("norm_rope")(*args)


token_losses = reference.token_losses

LACKS = dict.fromkeys(("attention", "moe", "router"), "only the elementwise operations are compiled")


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str | None:
    if op in LACKS:
        return LACKS[op]
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs a C++ compiler on the PATH (g++ or clang++)"
    return None
