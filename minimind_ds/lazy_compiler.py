"""torch.compile's machinery stays unloaded in a run that compiles nothing: half of what a rank's start costs.

Three things would load it all the same.  DeepSpeed imports its Muon whatever the optimizer, and Muon hands its kernels
to torch.compile there and then; torch.optim tells the compiler, at their first call, of functions that it is to leave
alone; and Adam's step asks it for a break in a graph that is not there.

    python -m pytest tests/test_lazy_compiler.py
"""

from __future__ import annotations

import functools
import sys

import torch

# Where torch notes a function as the compiler gave it back when told to leave it alone.
LEFT_ALONE = "__dynamo_disable"


def keep_unloaded() -> None:
    """Once deepspeed is imported and the model is made; does nothing where that has loaded the compiler.

    What is reached into here is torch's own affair; where another version differs, its start takes longer, no more.
    """
    if "torch._dynamo" in sys.modules:
        return
    import_muon()
    for method in vars(torch.optim.Optimizer).values():
        leave_alone(method)
    step_alone(torch.optim.Adam)


def leave_alone(method) -> None:
    """Without a compiler, a function that it is to leave alone is the function itself."""
    own = getattr(method, "__wrapped__", None)
    if own is not None and not hasattr(own, LEFT_ALONE):
        setattr(own, LEFT_ALONE, own)


def step_alone(kind: type[torch.optim.Optimizer]) -> None:
    """The optimizer's step as torch wraps it, less the break in the graph."""
    wrapped = kind.step
    if getattr(wrapped, "__code__", None) is None or wrapped.__code__.co_name != "_use_grad":
        return
    step = wrapped.__wrapped__

    @functools.wraps(step)
    def alone(self, *args, **kwargs):
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    kind.step = alone


def import_muon() -> None:
    """DeepSpeed's Muon, with kernels that are compiled when they are first called."""
    from deepspeed.runtime import compiler

    at_once, compiler.compile = compiler.compile, lambda: at_first_call
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = at_once


def at_first_call(function):
    """torch.compile, put off."""
    @functools.cache
    def compiled():
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return compiled()(*args, **kwargs)

    return call
