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

from minimind_ds import kernels
from minimind_ds.model.decoder import needs
from minimind_ds.model.loss import scaled_loss
from minimind_ds.plan import counted, memory_model
from minimind_ds.training.loop import build_engine
from minimind_ds.training.prepare import DTYPES, Job
from minimind_ds.training.step import fetch


def setting(job: Job, labelled: float) -> memory_model.Setting:
    """What a prepared run is to the planner.  labelled: the share of its micro-batch's tokens that have a label."""
    run = job.run
    choice = kernels.resolve(run.kernels, job.layout.device, DTYPES[run.dtype], needs(job.model_config))
    return memory_model.Setting(config=job.model_config, ds=job.ds, dtype=run.dtype, ranks=job.layout.ranks,
                           row_len=run.row_len, rows=run.batch_size, accumulation=run.accumulation_steps,
                           labelled=labelled, activations=choice.activations.itemsize,
                           on_cpu=job.layout.device.type == "cpu", degrees=job.degrees, adapters=job.lora,
                           recompute=run.gradient_checkpointing)


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


def backward(job: Job, ds_engine, out, batch) -> None:
    facts = job.first_plan.facts(0)
    ds_engine.backward(scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                                   step_real=facts.n_tokens, dp_world=job.layout.ranks), scale_wrt_gas=False)


def measure(job: Job) -> dict:
    """One micro-batch's forward and backward, counted on this rank: states, saved tensors, and the plan's figures.

    A step goes before, so that everything an engine makes at its first is there: in fp16 the first that is not skipped
    while the loss scale is sought.
    """
    ds_engine = build_engine(job)
    ds_engine.train()
    batch = next(fetch(job, 0, job.first_plan, range(1))).to(job.layout.device)
    skipped = -1
    while skipped != ds_engine.skipped_steps:
        skipped = ds_engine.skipped_steps
        for _ in range(job.run.accumulation_steps):
            backward(job, ds_engine, ds_engine(batch), batch)
            ds_engine.step()
    with saved_for_backward(batch) as saved:
        out = ds_engine(batch)
    forward = counted.held(ds_engine)
    backward(job, ds_engine, out, batch)
    held = counted.held(ds_engine)
    ds_engine.step()
    peak = allocated_peak(job, ds_engine, batch) if job.layout.device.type == "cpu" else None
    s = setting(job, batch.n_labelled / batch.labels.numel())
    plan, states = memory_model.activations(s), memory_model.states(s)
    # Without a GPU the host is the device.
    host = sum(states["host"].values()) if s.on_cpu else 0
    ds_engine.destroy()
    gc.collect()
    return {"held": held, "forward": forward, "saved": sum(saved.values()), "peak": peak,
            "planned": {"states": states, "saved": sum(plan.values()) - plan["logits"],
                        "peak": memory_model.peak(s) + host, "activations": plan}}


def allocated_peak(job: Job, ds_engine, batch) -> int:
    """The most bytes of tensors alive at once in a micro-batch's forward and backward, by the CPU's allocator."""
    gc.collect()
    before = counted.held(ds_engine)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward(job, ds_engine, ds_engine(batch), batch)
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
