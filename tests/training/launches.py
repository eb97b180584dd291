"""What one optimizer step asks of a GPU, for tests/training/test_launches.py: kernels launched, and waits of the host.

    python -m tests.training.launches OUT_DIR dense 1

Everything is the trainer's own, on the CPU's DeepSpeed engine: every operation that torch dispatches is seen, and the
Triton kernels' host code runs with the launch itself left out (so every number is zero).  Counted are operations that
would be a kernel or a copy on a GPU, and waits of the host: reads of a tensor's value, and numbers that torch.tensor
brings to the GPU.  Not seen are other copies to the GPU (a batch's five), and what one operation starts inside: NCCL,
cuBLAS's reductions, sorts.  A foreach operation counts as many launches as its number of tensors needs; with
MiniMind-3's widths it is up to five.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import pathlib
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from minimind_ds.distributed import engine
from minimind_ds.distributed.world import read_world
from minimind_ds.training.build import build_engine
from minimind_ds.training.live import LiveRun
from minimind_ds.training.step import Position, fetch, train_step
from tests.distributed.ranks.layouts import make_run

# MiniMind-3's layers; narrow, because only their number counts.
FIELDS = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
# Besides views: what allocates, and what only the host does.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh",
        "_unsafe_view", "promote_types", "_record_function_enter_new", "_record_function_exit"}
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}
# So many tensors a kernel of torch's takes, by the number of lists (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class Counter(TorchDispatchMode):
    """Counts by phase and name.  `host`: tensors that would be on the CPU on a machine with a GPU, too."""

    def __init__(self):
        super().__init__()
        self.phase, self.launches, self.waits = "between", collections.Counter(), collections.Counter()
        self.host = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, inputs = func._schema.name.split("::")[1], tensors((args, kwargs))
        if name == "lift_fresh" or inputs and all(x in self.host for x in inputs):
            # Made from Python's numbers, or from such tensors alone.
            self.host.update({x: True for x in tensors(out)})
        elif name in READS:
            self.waits[self.phase, name] += 1
        elif name not in FREE and not is_view(func) and func.namespace != "minimind_ds":
            self.launches[self.phase, name] += launches_of(name, args)
        return out

    def counted_read(self, name: str):
        """torch.Tensor's method of that name, which on a CPU dispatches nothing."""
        read = getattr(torch.Tensor, name)

        def run(x, *args, **kwargs):
            if x not in self.host:
                self.waits[self.phase, name] += 1
            return read(x, *args, **kwargs)

        return run

    def counted_tensor(self, make):
        """torch.tensor, which waits until numbers are on a GPU."""
        def run(*args, **kwargs):
            self.waits[self.phase, "tensor"] += kwargs.get("device") is not None
            return make(*args, **kwargs)

        return run

    def in_phase(self, name: str, function):
        def run(*args, **kwargs):
            before, self.phase = self.phase, name
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return run


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def is_view(func) -> bool:
    """Whether its result shares an argument's memory and nothing is written."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def launches_of(name: str, args: tuple) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and tensors(x)]
    return math.ceil(len(lists[0]) / TENSORS_A_LAUNCH[len(lists)])


def zeroed(allocate):
    """The same allocation, filled with zeros unseen: a kernel would have written there."""
    def run(*args, **kwargs):
        x = allocate(*args, **kwargs)
        with _disable_current_modes():
            x.detach().zero_()
        return x

    return run


def leave_out_launches(counter: Counter) -> None:
    """From now on `triton` runs on CPU tensors, and its kernels are counted and not started."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from minimind_ds.kernels import triton
    from tests.kernels.triton.aot import NoDriver

    def run(kernel, *args, **kwargs):
        counter.launches[counter.phase, getattr(kernel, "__name__", None) or kernel.fn.__name__] += 1

    torch.empty, torch.empty_like = zeroed(torch.empty), zeroed(torch.empty_like)
    torch.Tensor.new_empty = zeroed(torch.Tensor.new_empty)
    driver.set_active(NoDriver(90))
    JITFunction.run = Autotuner.run = run
    triton.why_not = lambda *facts: None


def count(out: pathlib.Path, model: str, stage: int, keys: dict) -> dict:
    """A second step's {"launches": {phase: {name: times}}, "waits": likewise}; `keys` are added to its JSON."""
    world, counter = read_world(), Counter()
    leave_out_launches(counter)
    engine.start(world)
    from deepspeed.accelerator import get_accelerator

    kernels = ["--kernels", "triton,activations=native"]
    prepared = make_run(world, out, model, stage, 1, kernels, "bf16", keys=keys, fields=FIELDS)
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    first, second = fetch(prepared, 0, plan, range(2))
    train_step(prepared, live, plan, Position(1, 0, 0), iter([first]))
    for name, phase in (("forward", "forward"), ("backward", "backward"), ("step", "update")):
        setattr(live.engine, name, counter.in_phase(phase, getattr(live.engine, name)))
    for name in ("tolist", "cpu", "numpy"):
        setattr(torch.Tensor, name, counter.counted_read(name))
    torch.tensor = counter.counted_tensor(torch.tensor)
    # As DeepSpeed makes them on a GPU.
    for name, dtype in (("FloatTensor", torch.float), ("ByteTensor", torch.uint8)):
        made = functools.partial(torch.tensor, dtype=dtype, device="cpu")
        setattr(type(get_accelerator()), name, made)
    counter.launches.clear()
    counter.host[second.cu_seqlens] = True
    with counter:
        stats = train_step(prepared, live, plan, Position(2, 0, 1), iter([second]))
    assert not stats.skipped
    found = {"launches": {}, "waits": {}}
    for kind, phases in found.items():
        for (phase, name), times in sorted(getattr(counter, kind).items()):
            if times:
                phases.setdefault(phase, {})[name] = times
    return found


if __name__ == "__main__":
    folder, model, stage, *keys = sys.argv[1:]
    print(json.dumps(count(pathlib.Path(folder), model, int(stage), json.loads(keys[0]) if keys else {})))
