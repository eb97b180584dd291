"""The plan of a run against the run itself: states held, tensors saved for backward and the peak, counted in one step.

    python launch/plan.py --preset debug --ranks 2 --pack_len 512 --measure
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minimind_ds.model import memory_model
from minimind_ds.model.loss import scaled_loss
from minimind_ds.plan import counted
from minimind_ds.training import memory
from minimind_ds.training.build import build_engine
from minimind_ds.training.prepare import PreparedRun
from minimind_ds.training.step import fetch


def setting(prepared: PreparedRun, labelled: float) -> memory_model.Setting:
    """What a prepared run is to the planner.  labelled: the share of its micro-batch's tokens that have a label."""
    return memory.setting(prepared.run, prepared.ds, prepared.world, prepared.model_config, prepared.dims,
                          prepared.lora, prepared.kernels, labelled)


@contextlib.contextmanager
def saved_for_backward(batch) -> Iterator[dict[int, int]]:
    """Storages that the forward pass saves, address -> bytes; parameters and the batch itself are none of them."""
    theirs = {t.untyped_storage().data_ptr() for t in vars(batch).values() if torch.is_tensor(t)}
    found, alive = {}, []

    def pack(t):
        storage = t.untyped_storage()
        # A product saves its weight transposed.
        whole = t if t._base is None else t._base
        if not isinstance(whole, nn.Parameter) and storage.data_ptr() not in theirs:
            found[storage.data_ptr()] = storage.nbytes()
            # As long as it lives, no other tensor gets its address.
            alive.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def backward(prepared: PreparedRun, ds_engine, out, batch) -> None:
    facts = prepared.first_plan.facts(0)
    ds_engine.backward(scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                                   step_real=facts.n_tokens, dp_world=prepared.world.size), scale_wrt_gas=False)


def measure(prepared: PreparedRun) -> dict:
    """One micro-batch's forward and backward, counted on this rank: states, saved tensors, and the plan's figures.

    A step goes before, so that everything an engine makes at its first is there: in fp16 the first that is not skipped
    while the loss scale is sought.
    """
    ds_engine = build_engine(prepared)
    ds_engine.train()
    batch = next(fetch(prepared, 0, prepared.first_plan, range(1))).to(prepared.world.device)
    skipped = -1
    while skipped != ds_engine.skipped_steps:
        skipped = ds_engine.skipped_steps
        for _ in range(prepared.run.accumulation_steps):
            backward(prepared, ds_engine, ds_engine(batch), batch)
            ds_engine.step()
    with saved_for_backward(batch) as saved:
        out = ds_engine(batch)
    forward = counted.held(ds_engine)
    backward(prepared, ds_engine, out, batch)
    held = counted.held(ds_engine)
    ds_engine.step()
    peak = allocated_peak(prepared, ds_engine, batch) if prepared.world.device.type == "cpu" else None
    s = setting(prepared, batch.n_labelled / batch.labels.numel())
    plan, states = memory_model.activations(s), memory_model.states(s)
    # Without a GPU the host is the device.
    host = sum(states["host"].values()) if s.on_cpu else 0
    ds_engine.destroy()
    gc.collect()
    return {"held": held, "forward": forward, "saved": sum(saved.values()), "peak": peak,
            "planned": {"states": states, "saved": sum(plan.values()) - plan["logits"],
                        "peak": memory_model.peak(s) + host, "activations": plan}}


def allocated_peak(prepared: PreparedRun, ds_engine, batch) -> int:
    """The most bytes of tensors alive at once in a micro-batch's forward and backward, by the CPU's allocator."""
    gc.collect()
    before = counted.held(ds_engine)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward(prepared, ds_engine, ds_engine(batch), batch)
    ds_engine.step()
    now = most = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + sum(before.values())


def compare(found: dict) -> dict[str, float]:
    """Planned over measured, less one, of each kind of state, of what is saved, and of the peak."""
    states = found["planned"]["states"]
    off = {kind: (states["device"][kind] + states["host"][kind]) / found["held"][kind] - 1 if found["held"][kind]
           else 0.0 for kind in counted.KINDS}
    off["saved"] = found["planned"]["saved"] / found["saved"] - 1
    return {**off, "peak": found["planned"]["peak"] / found["peak"] - 1} if found["peak"] else off


def write(path, found: dict) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")
