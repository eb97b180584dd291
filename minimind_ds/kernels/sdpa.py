"""Fast on a CPU, and on any GPU that has no kernels of ours: PyTorch's own operations, arranged for packed rows.

Attention runs segment by segment (a block-diagonal mask would pay for the products it then throws away); experts run
as one product per expert over tokens sorted by expert; the elementwise parts carry hand-written gradients.

Isolation: attention and the elementwise parts give a sample the same bits whatever the others hold.  So does `moe`
while the number of tokens each expert gets stays the same; when another sample's routing changes that number, the
shapes of the products change, and with them, possibly, the last bits of their sums (the `reference` backend pays for
not having even that).

    python -m pytest tests/kernels/test_kernels.py
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .elementwise import JoinedSwiGLU, add_rms_norm, norm_rope, rms_norm, swiglu
from .needs import KernelRequirements
from .reference import route, token_losses

__all__ = ["add_rms_norm", "attention", "moe", "norm_rope", "rms_norm", "route", "swiglu", "token_losses", "why_not"]


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str | None:
    """None: PyTorch has these operations for every device and floating dtype."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float) -> Tensor:
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and dropout_p == 0:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen)
    lengths = cu_seqlens.diff().tolist()
    dtype = q.dtype
    if q.device.type == "cpu":
        # Half-precision SDPA takes twice as long as fp32's on a CPU, backward above all; casting costs little.
        dtype = torch.promote_types(dtype, torch.float32)
    q_LHD, k_LHD, v_LHD = (x.to(dtype).split(lengths) for x in (q, k, v))
    outputs = [segment_attention(*segment, dropout_p) for segment in zip(q_LHD, k_LHD, v_LHD)]
    return torch.cat(outputs).to(q.dtype)


def segment_attention(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, dropout_p: float) -> Tensor:
    q_1HLD, k_1HLD, v_1HLD = (x.transpose(0, 1)[None] for x in (q_LHD, k_LHD, v_LHD))
    out_1HLD = F.scaled_dot_product_attention(q_1HLD, k_1HLD, v_1HLD, dropout_p=dropout_p, is_causal=True,
                                              enable_gqa=True)
    return out_1HLD[0].transpose(0, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """All segments in one launch of PyTorch's FlashAttention.  The copy of cu_seqlens does not wait for the GPU."""
    from torch.nn.attention.varlen import varlen_attn

    # Causality has been spelt is_causal and, later, window_size.
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    group = q.shape[1] // k.shape[1]
    cu_seqlens = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
    return varlen_attn(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), cu_seqlens, cu_seqlens,
                       max_seqlen, max_seqlen, **causal)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    T, K = experts.shape
    E = gate_up.shape[0]
    # Choice m = t * K + k; `order` lists choices by expert, `place` is where each choice went.
    order_M = experts.flatten().argsort(stable=True)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(T * K, device=x.device))
    # Not bincount, which waits for the GPU to learn the largest number.
    counts_E = (experts.flatten() == torch.arange(E, device=x.device)[:, None]).sum(dim=1)
    x_MC = Permute.apply(x[:, None].expand(T, K, -1).reshape(T * K, -1), order_M, place_M)
    hidden_MI = JoinedSwiGLU.apply(grouped_linear(x_MC, gate_up, counts_E))
    y_MC = grouped_linear(hidden_MI, down, counts_E)
    y_TKC = Permute.apply(y_MC, place_M, order_M).view(T, K, -1)
    return (y_TKC * weights.to(x.dtype)[..., None]).sum(dim=1)


def grouped_linear(x_MC: Tensor, weight_ENC: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert, counts_E of them for each, times their expert's matrix -> (M, N)."""
    if x_MC.device.type == "cuda" and x_MC.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        # Offsets stay on the GPU: nothing waits for it.
        return F.grouped_mm(x_MC, weight_ENC.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
    return GroupedLinear.apply(x_MC, weight_ENC, counts_E.tolist())


class Permute(Function):
    """x[index] for a permutation: the gradient is gathered too, where indexing's own would scatter."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


class GroupedLinear(Function):
    """One product per expert, written straight into place; an expert without rows gets a gradient of zeros."""

    @staticmethod
    def forward(ctx, x_MC, weight_ENC, counts):
        ctx.save_for_backward(x_MC, weight_ENC)
        ctx.counts = counts
        y_MN = x_MC.new_empty(x_MC.shape[0], weight_ENC.shape[1])
        for x, weight, y in zip(x_MC.split(counts), weight_ENC, y_MN.split(counts)):
            torch.mm(x, weight.T, out=y)
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MN):
        x_MC, weight_ENC = ctx.saved_tensors
        dx_MC, dweight_ENC = torch.empty_like(x_MC), torch.empty_like(weight_ENC)
        rows = zip(dy_MN.split(ctx.counts), x_MC.split(ctx.counts), dx_MC.split(ctx.counts))
        for (dy, x, dx), weight, dweight in zip(rows, weight_ENC, dweight_ENC):
            torch.mm(dy, weight, out=dx)
            torch.mm(dy.T, x, out=dweight)
        return dx_MC, dweight_ENC, None
