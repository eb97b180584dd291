"""Products that share an input, chained so that its gradient is summed inside their own matrix products.

Where several Linears read one x, autograd makes a gradient of x for each of them and adds them, a pass over memory
each.  Here each product but the last hands x on to the next, and backward, which runs the other way, hands on the
gradient: every product adds its share to it as it is made.  Each weight is still used in its own module's forward,
which is where ZeRO-3 gathers it and where LoRA stands beside it.

    python -m pytest tests/model/test_product.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class ChainedProduct(Function):
    """(x (T, C), weight (N, C)) -> x weight^T, and x for the next of the chain.

    Backward adds to the gradient of the x that was handed on, in place.  That is safe as long as nobody else holds
    this gradient, which is so where what reads the handed-on x makes a gradient of its own: a product (chained or
    not), an index, a dropout, the experts.  An addition does not: it would pass one gradient to two inputs.  So a
    handed-on x is for such readers only, and never leaves the forward that asked for it.
    """

    @staticmethod
    def forward(ctx, x_TC, weight_NC):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TC if ctx.needs_input_grad[1] else None, weight_NC)
        return F.linear(x_TC, weight_NC), x_TC.view_as(x_TC)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN, dx_TC):
        x_TC, weight_NC = ctx.saved_tensors
        if dy_TN is None:
            return dx_TC, None
        dx_TC = dy_TN @ weight_NC if dx_TC is None else dx_TC.addmm_(dy_TN, weight_NC)
        return dx_TC, dy_TN.T @ x_TC if ctx.needs_input_grad[1] else None


def chained_product(x_TC: Tensor, weight_NC: Tensor) -> tuple[Tensor, Tensor]:
    """-> x weight^T (T, N), and x for the next of the chain: see ChainedProduct for who may read it.

    torch.compile gets plain products: it does not trace a Function that returns its input, and sums gradients itself.
    """
    if x_TC.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return ChainedProduct.apply(x_TC, weight_NC)
    return F.linear(x_TC, weight_NC), x_TC
