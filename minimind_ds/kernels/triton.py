"""Our own Triton kernels: attention over packed documents and dropless experts, on NVIDIA GPUs from Ampere on.

On a machine without a GPU they run in Triton's interpreter, for tests, when the process starts with it:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_attention.py
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BUILT = {"attention": "triton_attention", "moe": "triton_moe"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this operation runs, else why it does not.  Triton itself is only imported by what runs."""
    if op not in BUILT or importlib.util.find_spec(f"{__package__}.{BUILT[op]}") is None:
        return f"there is no Triton kernel for {op}"
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


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float) -> Tensor:
    from . import triton_attention

    return triton_attention.attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    from . import triton_moe

    return triton_moe.moe(x, gate_up, down, weights, experts)
