"""The kernels' specification: packed attention, dropless experts and the elementwise parts in plain PyTorch.

Every other backend is tested against this one.  It is written to be read, runs on any device and in any floating
dtype (fp64 included, for gradcheck), and holds the strictest form of sample isolation: each segment is computed as if
it were alone, and every expert sees all T tokens in one fixed-shape product, so what one sample holds cannot move a
bit of another sample's result, whatever the router decides.  That costs E/K times the expert FLOPs of a fast backend.

    python -m pytest tests/kernels/test_kernels.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .needs import KernelRequirements


def why_not(op: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str | None:
    """None: this backend runs every operation anywhere, in any floating dtype."""
    return None


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, dropout_p: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside each segment, causal; q (T, H, D), k and v (T, Hkv, D) -> (T, H, D)."""
    group = q.shape[1] // k.shape[1]
    q_HTD = at_least_fp32(q).transpose(0, 1)
    k_HTD = at_least_fp32(k).transpose(0, 1).repeat_interleave(group, dim=0)
    v_HTD = at_least_fp32(v).transpose(0, 1).repeat_interleave(group, dim=0)
    bounds = cu_seqlens.tolist()
    outputs = []
    for start, end in zip(bounds, bounds[1:]):
        length = end - start
        future_LL = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores_HLL = q_HTD[:, start:end] @ k_HTD[:, start:end].transpose(1, 2) * q.shape[2] ** -0.5
        weights_HLL = scores_HLL.masked_fill(future_LL, float("-inf")).softmax(dim=-1)
        outputs.append(F.dropout(weights_HLL, dropout_p) @ v_HTD[:, start:end])
    return torch.cat(outputs, dim=1).transpose(0, 1).to(q.dtype)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """y_t = sum_k weights[t, k] * down_e @ (silu(gate_e @ x_t) * (up_e @ x_t)) with e = experts[t, k]."""
    x_TC = at_least_fp32(x)
    y_TC = torch.zeros_like(x_TC)
    for expert in range(gate_up.shape[0]):
        gate_TI, up_TI = (x_TC @ at_least_fp32(gate_up[expert]).T).chunk(2, dim=-1)
        expert_TC = (F.silu(gate_TI) * up_TI) @ at_least_fp32(down[expert]).T
        chosen_TK = experts == expert
        share_T1 = torch.where(chosen_TK, at_least_fp32(weights), 0).sum(dim=-1, keepdim=True)
        # `where`, not a product with zero: what another token's expert overflows on stays that token's.
        y_TC = y_TC + torch.where(chosen_TK.any(dim=-1, keepdim=True), share_T1 * expert_TC, 0)
    return y_TC.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension; the weight multiplies in fp32, before the cast (as MiniMind)."""
    wide = at_least_fp32(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + residual (x itself without one), and rms_norm(total)."""
    total = x if residual is None else x + residual
    return total, rms_norm(total, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention, in at least fp32; x (T, H, D), cos and sin (T, D / 2)."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rotate(rms_norm(x)) with a weight (D,), rotate(x) without."""
    return rotate(x if weight is None else rms_norm(x, weight, eps), cos, sin)


def route(logits: Tensor, k: int, norm: bool, group: Tensor | None, n_groups: int) -> tuple[Tensor, ...]:
    """logits (T, E) -> weights and experts (T, k); counts and score sums (n_groups, E) by group (-1: in none)."""
    scores_TE = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights_TK, experts_TK = scores_TE.topk(k, dim=-1, sorted=False)
    if norm:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if group is None:
        return weights_TK, experts_TK, *scores_TE.new_zeros(2, 0, logits.shape[1])
    member_GT = (group == torch.arange(n_groups, device=group.device)[:, None]).to(scores_TE.dtype)
    choices_TE = F.one_hot(experts_TK, logits.shape[1]).sum(dim=1).to(scores_TE.dtype)
    return weights_TK, experts_TK, member_GT @ choices_TE, member_GT @ scores_TE


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, V), labels (n,) -> cross-entropy (n,) and its gradient in the logits' dtype; logits may be reused."""
    wide = at_least_fp32(logits)
    scale_n1, label_n1 = wide.logsumexp(dim=1, keepdim=True), labels[:, None]
    losses_n = (scale_n1 - wide.gather(1, label_n1))[:, 0]
    dlogits = wide.sub_(scale_n1).exp_()
    dlogits.scatter_add_(1, label_n1, dlogits.new_full((1, 1), -1).expand_as(label_n1))
    return losses_n, dlogits.to(logits.dtype)
