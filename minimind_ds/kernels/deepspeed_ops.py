"""The experts through DeepSpeed's own Triton ops: its grouped GEMM, SwiGLU and weighted restore of tokens.

A second implementation of the same door, made of what the pinned DeepSpeed ships (deepspeed/ops/triton_ops).  Only
`moe` is: LACKS says what else it has no op for, or none that computes MiniMind's numbers.  So it is asked for as

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json --preset minimind-3-moe --kernels moe=deepspeed

and every other operation runs on whatever backend `auto` finds.  Differences from the `triton` backend: tokens are
permuted in memory before and after, gate and up and their product are separate launches, and each product's tiles are
chosen by timing at its first call, so two runs may differ in last bits.

    python -m pytest tests/kernels/test_deepspeed_ops.py
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from minimind_ds.config.errors import UserError

from .needs import KernelRequirements
from .sdpa import Permute

LACKS = {
    "attention": "DeepSpeed has no causal attention over packed segments that can be trained",
    "router": "DeepSpeed's router is a module of its own that keeps no balance statistics of packed samples",
    "rope": "DeepSpeed's rotary embedding takes cos and sin in half precision, MiniMind in fp32",
    "elementwise": "DeepSpeed's RMSNorm rounds before the weight multiplies, MiniMind after",
}


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str | None:
    """None for `moe` in bf16 and fp16 on an NVIDIA GPU from Ampere on, where DeepSpeed has its Triton ops."""
    if op in LACKS:
        return LACKS[op]
    if importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("triton") is None:
        return "it needs deepspeed and triton, and one of them is not installed"
    nvidia = device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip
    if not nvidia or torch.cuda.get_device_capability(device) < (8, 0):
        return "DeepSpeed's Triton ops are for NVIDIA GPUs from Ampere (compute capability 8.0) on, and there is none"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"DeepSpeed's grouped GEMM computes in bf16 and fp16 (it rounds fp32 to tf32), not {dtype}"
    from deepspeed.ops.triton_ops import is_triton_available

    return None if is_triton_available() else "DeepSpeed found no Triton driver when it was imported"


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """x (T, C), gate_up (E, 2 I, C), down (E, C, I), weights and experts (T, K) -> (T, C).

    Raises:
        ValueError: more elements than DeepSpeed's grouped GEMM can count.
    """
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore
    from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

    (T, C), (E, inner), K = x.shape, gate_up.shape[:2], experts.shape[1]
    if T * K * max(inner, C) >= 2 ** 31:
        raise UserError(f"DeepSpeed's grouped GEMM counts in 32 bits: {T} tokens x {K} experts x {max(inner, C)} "
                         "columns are too many; use smaller micro-batches or --kernels moe=triton")
    # Choice m = t * K + k; `order` lists choices by expert, `place` is where each went.  Nothing waits for the GPU.
    chosen_M, order_M = experts.flatten().sort(stable=True)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(T * K, device=x.device))
    ends_E = torch.searchsorted(chosen_M, torch.arange(E, device=x.device), right=True, out_int32=True)
    x_MC = Permute.apply(x[:, None].expand(T, K, C).reshape(T * K, C), order_M, place_M)
    gate_up_MI = group_gemm_triton(x_MC, gate_up.contiguous(), ends_E, trans_b=True)
    y_MC = group_gemm_triton(swiglu(gate_up_MI), down.contiguous(), ends_E, trans_b=True)
    return fused_weighted_restore(y_MC, weights, order_M, K, (1, T, C))[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up from both side by side, (M, 2 I) -> (M, I)."""
    from deepspeed.ops.triton_ops import swiglu_triton

    # 0.19.8 reads both halves in place; 0.19.7 wants each in memory of its own.
    packed = getattr(swiglu_triton, "swiglu_packed", None)
    return packed(gate_up) if packed else swiglu_triton.swiglu(*gate_up.chunk(2, dim=-1))
