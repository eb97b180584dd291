"""Where a training step's time and traffic go, seen from outside: the step itself is not changed.

Collectives counts what torch.distributed moves, whoever calls it; PartTimer deals the seconds of a step to its parts.

    python -m pytest tests/bench/test_benchmark.py -k traffic
"""

from __future__ import annotations

import abc
import contextlib
import functools
import time
from collections.abc import Iterator

import torch
from torch._C._distributed_c10d import ProcessGroup

PARTS = ("data", "forward", "backward", "reduce", "optimizer", "other")
# Method of a process group (torch 2.13 has new names for some): its kind, which argument holds what this rank hands
# in, and how many bytes a rank of n sends for each of them in a ring.
RING = {
    "allreduce": ("all-reduce", 0, lambda n: 2 * (n - 1) / n),
    "allreduce_coalesced": ("all-reduce", 0, lambda n: 2 * (n - 1) / n),
    "reduce": ("reduce", 0, lambda n: (n - 1) / n),
    "broadcast": ("broadcast", 0, lambda n: (n - 1) / n),
    "allgather": ("all-gather", 1, lambda n: n - 1),
    "_allgather_base": ("all-gather", 1, lambda n: n - 1),
    "allgather_coalesced": ("all-gather", 1, lambda n: n - 1),
    "all_gather_single": ("all-gather", 1, lambda n: n - 1),
    "all_gather_single_coalesced": ("all-gather", 1, lambda n: n - 1),
    "allgather_into_tensor_coalesced": ("all-gather", 1, lambda n: n - 1),
    "reduce_scatter": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "_reduce_scatter_base": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "reduce_scatter_single": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1, lambda n: (n - 1) / n),
    "alltoall": ("all-to-all", 1, lambda n: (n - 1) / n),
    "all_to_all_single": ("all-to-all", 1, lambda n: (n - 1) / n),
    "alltoall_base": ("all-to-all", 1, lambda n: (n - 1) / n),
}


def sizes(value) -> int:
    """Bytes of the tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(sizes, value))


class Parts(abc.ABC):
    """Something that is told when a part of a step begins and ends."""

    @abc.abstractmethod
    def enter(self, part: str) -> None: ...

    @abc.abstractmethod
    def leave(self) -> None: ...

    def around(self, part: str, call):
        @functools.wraps(call)
        def watched(*args, **kwargs):
            self.enter(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()
        return watched

    def data(self, batches: Iterator) -> Iterator:
        while True:
            self.enter("data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.leave()
            yield batch


class PartTimer(Parts):
    """Seconds by part; time belongs to the innermost part that is open."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, dict.fromkeys(PARTS, 0.0), ["other"]
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn(self) -> None:
        now = self.now()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        self.turn()
        self.open.append(part)

    def leave(self) -> None:
        self.turn()
        self.open.pop()


class Collectives:
    """While it is open, what this rank's Python hands to collectives, by kind: calls, bytes handed in, bytes sent.

    Bytes sent are those of a ring: 2 (n - 1) / n of an all-reduced tensor, and so on.  With a stopwatch every
    collective is waited for at once, so that its seconds can be told from those of the computation around it; nothing
    overlaps then.
    """

    def __init__(self, stopwatch: PartTimer | None = None):
        self.stopwatch, self.kinds = stopwatch, {}

    def __enter__(self) -> Collectives:
        # From the class's own table: what getattr gives would no longer bind once it is put back.
        self.originals = {name: vars(ProcessGroup)[name] for name in RING if name in vars(ProcessGroup)}
        for name in self.originals:
            setattr(ProcessGroup, name, self.watched(name, getattr(ProcessGroup, name)))
        return self

    def __exit__(self, *_) -> None:
        for name, original in self.originals.items():
            setattr(ProcessGroup, name, original)

    def watched(self, name: str, original):
        kind, position, factor = RING[name]

        def call(group, *args, **kwargs):
            # torch names no argument of these but the options.
            handed = sizes(args[position])
            count = self.kinds.setdefault(kind, {"calls": 0, "bytes": 0, "sent": 0.0})
            count["calls"] += 1
            count["bytes"] += handed
            count["sent"] += handed * factor(group.size())
            if self.stopwatch is None:
                return original(group, *args, **kwargs)
            self.stopwatch.enter("reduce")
            try:
                work = original(group, *args, **kwargs)
                # Inside a coalescing block there is nothing to wait for yet.
                if work is not None:
                    work.wait()
                return work
            finally:
                self.stopwatch.leave()
        return call


@contextlib.contextmanager
def parted(ds_engine, parts: Parts) -> Iterator[None]:
    """While it is open, the engine's forward, backward and step are told apart."""
    hooks = [ds_engine.register_forward_pre_hook(lambda *_: parts.enter("forward")),
             ds_engine.register_forward_hook(lambda *_: parts.leave())]
    ds_engine.backward = parts.around("backward", ds_engine.backward)
    ds_engine.step = parts.around("optimizer", ds_engine.step)
    try:
        yield
    finally:
        del ds_engine.backward, ds_engine.step
        for hook in hooks:
            hook.remove()
