"""Our own Triton kernels for every operation of the door, on NVIDIA GPUs from Ampere on.

On a machine without a GPU they run in Triton's interpreter, for tests, when the process starts with it:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_attention.py
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from ..needs import KernelRequirements

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str | None:
    """None where this operation runs, else why it does not.  Triton itself is only imported by what runs."""
    if op == "attention" and needs.dropout:
        return f"the attention kernel has no dropout (asked for {needs.dropout})"
    if op in ("attention", "rope") and needs.head_dim is not None and (needs.head_dim > 128 or needs.head_dim % 2):
        return f"the kernels take an even head_dim up to 128, not {needs.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with torch's CUDA builds)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # fp64 is for gradcheck: no GPU configuration of ours has it.
        return None if dtype in (*DTYPES, torch.float64) else f"the kernels take {_names(DTYPES)}, not {dtype}"
    if device.type != "cuda":
        return f"Triton compiles for GPUs, and this is {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are built for NVIDIA GPUs from Ampere (compute capability 8.0) on"
    return None if dtype in DTYPES else f"the kernels take {_names(DTYPES)}, not {dtype}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def load() -> ModuleType:
    """The operations; imports Triton, which a CPU build of torch lacks."""
    from . import operations

    return operations
