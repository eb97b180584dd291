"""What one rank holds, counted tensor by tensor; memory_model.states says beforehand what it should be.

    python -m pytest tests/plan/test_memory.py
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

KINDS = ("parameters", "optimizer", "gradients", "buckets")


def held(ds_engine) -> dict[str, int]:
    """Bytes of this rank's training state by kind, each piece of memory counted once.

    "optimizer" is fp32 masters and moments; "buckets" are what gradients travel in.  Gradients live between backward
    and step.  Half-precision parameters that are views into one flat buffer are that buffer.
    """
    optimizer, basic = ds_engine.optimizer, ds_engine.basic_optimizer
    params = list(ds_engine.module.parameters())
    # Stage 3 hands its masters to the optimizer only while it steps.
    masters = [*(p for group in basic.param_groups for p in group["params"]),
               *getattr(optimizer, "fp32_partitioned_groups_flat", [])]
    tensors = {
        "parameters": [*(p.data for p in params), *(p.ds_tensor for p in params if hasattr(p, "ds_tensor"))],
        "optimizer": [*masters, *(t for state in basic.state.values() for t in state.values())],
        "gradients": [*(p.grad for p in params), *(p.grad for p in masters),
                      *flatten(getattr(optimizer, "averaged_gradients", {})),
                      # Stage 2's, between micro-batches.
                      *flatten(getattr(optimizer, "all_grad_tensors", {})),
                      getattr(optimizer, "grad_partitions_flat_buffer", None)],
        "buckets": [t for bucket in getattr(optimizer, "ipg_buckets", {}).values() for t in flatten(vars(bucket))],
    }
    seen, found = set(), {}
    for kind in KINDS:
        found[kind] = 0
        for tensor in tensors[kind]:
            if not torch.is_tensor(tensor) or tensor.numel() == 0:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[kind] += storage.nbytes()
    return found


def flatten(value) -> Iterable:
    """The leaves of dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)
    else:
        yield value
