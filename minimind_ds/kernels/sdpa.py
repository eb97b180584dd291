"""Fast on a CPU, and on any GPU that has no kernels of ours: PyTorch's own operations, arranged for packed rows.

Attention runs segment by segment (a block-diagonal mask would pay for the products it then throws away); experts run
as one grouped matrix product over tokens sorted by expert.

    python -m pytest tests/test_kernels.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for q_LHD, k_LHD, v_LHD in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        out = F.scaled_dot_product_attention(
            q_LHD.transpose(0, 1)[None], k_LHD.transpose(0, 1)[None], v_LHD.transpose(0, 1)[None],
            is_causal=True, enable_gqa=True, dropout_p=dropout_p)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    token = order // experts.shape[1]
    lengths = experts.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    outputs = []
    for expert, x_MC in enumerate(x[token].split(lengths)):
        gate_MI, up_MI = (x_MC @ gate_up[expert].T).chunk(2, dim=-1)
        outputs.append((F.silu(gate_MI) * up_MI) @ down[expert].T)
    y_MC = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, y_MC)
