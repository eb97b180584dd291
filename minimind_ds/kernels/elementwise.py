"""RMSNorm, SwiGLU and rotary embeddings with hand-written gradients: fewer passes over memory than autograd's.

Forward function, backward function, thin autograd class; the specification is in reference.py.  They save their
inputs only and recompute the rest.

    python -m pytest tests/kernels/test_kernels.py -k elementwise
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_forward(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y in x's dtype, and 1 / rms (..., 1) in at least fp32."""
    wide = at_least_fp32(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(at_least_fp32(weight_C)).to(x.dtype), scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight_C: Tensor, scale: Tensor,
                      dtotal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> dx with dtotal added, dweight."""
    wide_dy, wide_weight_C = at_least_fp32(dy), at_least_fp32(weight_C)
    unit = at_least_fp32(x) * scale
    product = wide_dy * unit
    dweight_C = product.flatten(0, -2).sum(dim=0)
    share = (product @ wide_weight_C).div_(x.shape[-1])[..., None]
    dx = torch.mul(wide_dy, wide_weight_C, out=product).sub_(unit.mul_(share))
    dx = dx.mul_(scale) if dtotal is None else torch.addcmul(dtotal, dx, scale, out=dx)
    return dx.to(x.dtype), dweight_C.to(weight_C.dtype)


class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight_C, eps):
        y, scale = rms_norm_forward(x, weight_C, eps)
        ctx.save_for_backward(x, weight_C, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *rms_norm_backward(dy, *ctx.saved_tensors), None


class AddRMSNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight_C, eps):
        ctx.set_materialize_grads(False)
        total = x.view_as(x) if residual is None else x + residual
        y, scale = rms_norm_forward(total, weight_C, eps)
        ctx.save_for_backward(total, weight_C, scale)
        ctx.add = residual is not None
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        dx, dweight_C = (dtotal, None) if dy is None else rms_norm_backward(dy, *ctx.saved_tensors, dtotal)
        return dx, dx if ctx.add else None, dweight_C, None


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, *, dgate: Tensor, dup: Tensor):
    """Fills dgate and dup."""
    torch.ops.aten.silu.out(gate, out=dup).mul_(dy)
    torch.mul(dy, up, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)


class SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        swiglu_backward(dy, gate, up, dgate=dgate, dup=dup)
        return dgate, dup


class JoinedSwiGLU(Function):
    """SwiGLU of (..., 2 I), gate then up: the gradient is born joined, where chunk's own would copy it together."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        dgate_up = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, dim=-1), dgate_up.chunk(2, dim=-1)
        swiglu_backward(dy, gate, up, dgate=dgate, dup=dup)
        return dgate_up


def rotate_halves(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) on the two halves of the last dimension, in at least fp32."""
    first, second = at_least_fp32(x_THD).chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    out_THD = torch.empty(x_THD.shape, dtype=first.dtype, device=x_THD.device)
    out_first, out_second = out_THD.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out_THD.to(x_THD.dtype)


class Rotate(Function):
    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD):
        ctx.save_for_backward(cos_TD, sin_TD)
        return rotate_halves(x_THD, cos_TD, sin_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_THD):
        cos_TD, sin_TD = ctx.saved_tensors
        # A rotation's transpose turns back.
        return rotate_halves(dy_THD, cos_TD, -sin_TD), None, None


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return RMSNorm.apply(x, weight_C, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return AddRMSNorm.apply(x, residual, weight_C, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return SwiGLU.apply(gate, up)


def norm_rope(x_THD: Tensor, weight_D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, eps: float) -> Tensor:
    return Rotate.apply(x_THD if weight_D is None else rms_norm(x_THD, weight_D, eps), cos_TD, sin_TD)
