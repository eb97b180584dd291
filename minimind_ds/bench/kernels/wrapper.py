"""What an operator costs the CPU beside its kernels: Python calls of one forward and backward, launches left out.

Three ways to the same kernels' host code: as the model calls it (eager), a bare autograd.Function written by hand, and
torch.library's operator, which torch.compile takes.  Tests hold the calls, which any machine finds the same; times
are the least of many, on this machine's CPU.  Prints one JSON document.

    python -m minimind_ds.bench.kernels.wrapper
"""

from __future__ import annotations

import json
import os
import sys
import timeit
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minimind_ds.kernels.triton import attention, elementwise, experts, rope, router
from minimind_ds.kernels.triton.operator import operator

# Whose files have this in their path belongs to torch.library.
LIBRARY = os.path.join("torch", "_library")


class Case(NamedTuple):
    """eager: what the model calls, with `inputs` and `more`; the others take `inputs` alone."""

    eager: Callable
    bare: Callable
    library: Callable
    inputs: tuple
    more: tuple = ()


class Calls(NamedTuple):
    """Of Python's and C's functions; `library`: of those, torch.library's."""

    all: int
    library: int


def leave_out_launches() -> None:
    """From now on the kernels' host code runs on CPU tensors, as for an H200, and starts nothing."""
    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    JITFunction.run = lambda kernel, *args, **kwargs: None


def by_hand(apply: Callable, save: Callable, backward: Callable) -> Callable:
    class Bare(Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = apply(*inputs)
            save(ctx, inputs, output)
            return output

    Bare.backward = staticmethod(once_differentiable(backward))
    return Bare.apply


def from_module(module: ModuleType | SimpleNamespace) -> Callable:
    return by_hand(module.apply, module.save, lambda ctx, *douts: module.formula(module.gradient, ctx, *douts))


def draw(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def probe() -> Case:
    """An operator whose host code is next to nothing, so that only the way to it is counted."""
    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.empty_like(x)

    def gradient(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def formula(gradient, ctx, dy):
        return gradient(dy, *ctx.saved_tensors)

    made = SimpleNamespace(apply=apply, gradient=gradient, save=save, formula=formula)
    eager = operator("probe", fake=apply, fake_gradient=gradient, **vars(made))
    return Case(eager, from_module(made), torch.ops.minimind_ds.probe, (draw(16, 32), draw(32)))


def cases() -> dict[str, Case]:
    def norm_backward(ctx, dsum, dy):
        return elementwise.sum_formula(elementwise.norm_gradient, ctx, dsum, dy)

    ops, angle = torch.ops.minimind_ds, torch.zeros(16, 8)
    bounds = torch.tensor([0, 10, 16], dtype=torch.int32)
    bare_attention, bare_moe = from_module(attention), from_module(experts)
    norm = by_hand(elementwise.apply_norm, elementwise.save_sum, norm_backward)
    return {
        "probe": probe(),
        "attention": Case(lambda *args: attention.attention(*args, dropout_p=0.0),
                          lambda *args: bare_attention(*args)[0], lambda *args: ops.packed_attention(*args)[0],
                          (draw(16, 4, 16), draw(16, 2, 16), draw(16, 2, 16), bounds), (10,)),
        "norm_rope": Case(rope.norm_rope, from_module(rope), ops.norm_rope,
                          (draw(16, 4, 16), draw(16), angle, angle, 1e-6)),
        "add_rms_norm": Case(elementwise.add_rms_norm, norm, ops.add_rms_norm,
                             (draw(16, 32), draw(16, 32), draw(32), 1e-6)),
        "moe": Case(lambda *args: experts.moe(*args[:5]), lambda *args: bare_moe(*args)[0],
                    lambda *args: ops.moe(*args)[0],
                    (draw(16, 32), draw(4, 16, 32), draw(4, 32, 8), draw(16, 2),
                     torch.zeros(16, 2, dtype=torch.int64), "", True)),
        "route": Case(router.route, from_module(router), ops.route,
                      (draw(16, 4), 2, True, torch.zeros(16, dtype=torch.int64), 1)),
    }


def both_ways(function: Callable, *inputs) -> Callable[[], None]:
    """-> what runs forward and backward; it has run twice, so that all that is remembered is there."""
    def run():
        out = function(*inputs)
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])

    run()
    run()
    return run


def calls(run: Callable[[], None]) -> Calls:
    files = []

    def note(frame, event, argument):
        if event in ("call", "c_call"):
            files.append(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return Calls(len(files), sum(LIBRARY in file for file in files))


def seconds(run: Callable[[], None]) -> float:
    return min(timeit.repeat(run, number=20, repeat=25)) / 20


def measure(timed: bool = False) -> dict[str, dict[str, float]]:
    """By operation: calls of a bare Function, and of the others as ratios to it; times likewise if asked for."""
    found = {}
    for name, case in cases().items():
        eager, bare, library = (both_ways(case.eager, *case.inputs, *case.more), both_ways(case.bare, *case.inputs),
                                both_ways(case.library, *case.inputs))
        found[name] = {"bare_calls": calls(bare).all, "eager_calls_of_library": calls(eager).library,
                       "library_calls_of_library": calls(library).library,
                       "eager_ratio": calls(eager).all / calls(bare).all,
                       "library_ratio": calls(library).all / calls(bare).all}
        if timed:
            own = seconds(bare)
            found[name].update(eager_time_ratio=seconds(eager) / own, library_time_ratio=seconds(library) / own)
    return found


if __name__ == "__main__":
    leave_out_launches()
    print(json.dumps({"what": "forward and backward, launches left out: Python calls, and least times, beside a bare "
                              "autograd.Function's", **measure(timed=True)}, indent=1))
