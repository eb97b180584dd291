"""torch.compile's machinery stays unloaded in a run that compiles nothing: half of what a rank's start costs.

DeepSpeed and torch.optim would load it all the same, to tell it of functions that it is to leave alone, to break a
graph that is not there, and to compile Muon's kernels, which are imported whatever the optimizer.  At ZeRO stage 3
what the compiler makes of those functions would be called at each module, too.

    python -m pytest tests/test_lazy_compiler.py
"""

from __future__ import annotations

import contextlib
import functools
import sys

import torch

# Where torch notes a function as the compiler gave it back when told to leave it alone.
LEFT_ALONE = "__dynamo_disable"
MARKED = []


@contextlib.contextmanager
def kept_unloaded():
    """Around deepspeed.initialize; without effect where the compiler is loaded.

    What --compile compiles later are functions of tensors (kernels/compiled.py), which call none of these.
    What is reached into here is DeepSpeed's and torch's own affair; where another version differs, its start takes
    longer, no more.
    """
    if "torch._dynamo" in sys.modules:
        while MARKED:
            delattr(MARKED.pop(), LEFT_ALONE)
        yield
        return
    from deepspeed.runtime.zero import partitioned_param_coordinator as stage_3

    import_muon()
    for owner in (torch.optim.Optimizer, stage_3, stage_3.PartitionedParameterCoordinator):
        for function in vars(owner).values():
            leave_alone(function)
    step_alone(torch.optim.Adam)
    disable, torch.compiler.disable = torch.compiler.disable, unchanged
    try:
        yield
    finally:
        torch.compiler.disable = disable


def unchanged(fn=None, recursive=True, *, reason=None):
    """torch.compiler.disable where there is no compiler."""
    return (lambda function: function) if fn is None else fn


def leave_alone(function) -> None:
    """A function that the compiler is to leave alone is itself, as long as there is none."""
    own = getattr(function, "__wrapped__", None)
    if own is not None and not hasattr(own, LEFT_ALONE):
        setattr(own, LEFT_ALONE, own)
        MARKED.append(own)


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
