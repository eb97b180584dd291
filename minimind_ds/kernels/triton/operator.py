"""A kernel with its gradient, once for eager code and once for torch.compile.

As an operator of torch.library, torch.compile takes it whole, without a graph break.  Called eagerly such an operator
costs several times what an autograd.Function does (443 us against the kernel's own 98 on the machine of an H200), so
eager code gets a Function of the same parts.

    python -m pytest tests/kernels/test_operators.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def operator(name: str, apply: Callable, gradient: Callable, *, fake: Callable, fake_gradient: Callable,
             save: Callable, formula: Callable) -> Callable:
    """-> a function of apply's arguments, differentiable once.

    Args:
        name: the operators' in torch.library: minimind_ds::NAME and minimind_ds::NAME_backward.
        apply, gradient: what starts the kernels; their annotations are the operators' schemas.
        fake, fake_gradient: their results' shapes and dtypes, without data.
        save: (ctx, inputs, output), as register_autograd's setup_context.
        formula: (gradient, ctx, *douts) -> a gradient for each of apply's arguments.
    """
    forward_op = torch.library.custom_op(f"minimind_ds::{name}", apply, mutates_args=())
    backward_op = torch.library.custom_op(f"minimind_ds::{name}_backward", gradient, mutates_args=())
    forward_op.register_fake(fake)
    backward_op.register_fake(fake_gradient)
    forward_op.register_autograd(lambda ctx, *douts: formula(backward_op, ctx, *douts), setup_context=save)

    def forward(ctx, *inputs):
        output = apply(*inputs)
        save(ctx, inputs, output)
        return output

    @once_differentiable
    def backward(ctx, *douts):
        return formula(gradient, ctx, *douts)

    # Made with its name, which profiles show.
    eager = type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})

    def call(*inputs):
        return forward_op(*inputs) if torch.compiler.is_compiling() else eager.apply(*inputs)

    return call


def for_compile(name: str, apply: Callable, *, fake: Callable, mutates: tuple[str, ...]) -> Callable:
    """-> `apply`, which has no gradient and changes its arguments named in `mutates`; torch.compile takes it whole."""
    whole = torch.library.custom_op(f"minimind_ds::{name}", apply, mutates_args=mutates)
    whole.register_fake(fake)

    def call(*inputs):
        return whole(*inputs) if torch.compiler.is_compiling() else apply(*inputs)

    return call
