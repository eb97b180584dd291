"""One optimizer step and one evaluation, on every rank: what the trainer, the benchmark and verify.py all run.

    from minimind_ds.step import Position, fetch, train_step
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from minimind_ds.data import loader
from minimind_ds.data.packing import PackedBatch
from minimind_ds.distributed import engine
from minimind_ds.distributed.engine import NonFinite
from minimind_ds.model.loss import scaled_loss
from minimind_ds.resilience.stragglers import Stopwatch, slowest
from minimind_ds.training.prepare import Job
from minimind_ds.training.spikes import MOST_SKIPPED


class Position(NamedTuple):
    """A place in the data: optimizer step `step` of the run, counted from 1, is step `epoch_step` of `epoch`."""

    step: int
    epoch: int
    epoch_step: int


def fetch(job: Job, epoch: int, plan: loader.EpochPlan, steps: range) -> Iterator[PackedBatch]:
    """This rank's micro-batches of those steps of an epoch, in order."""
    run = job.run
    for epoch_step in steps:
        for micro in range(run.accumulation_steps):
            rows = my_rows(job, plan, epoch_step, micro)
            yield my_share(job, loader.load_micro_batch(job.stores[epoch], rows, run.row_len, job.tokenizer.pad_id))


def my_share(job: Job, batch: PackedBatch) -> PackedBatch:
    """What this rank holds of a micro-batch that it may share with its neighbours."""
    n = job.degrees.sequence
    return batch if n == 1 else batch.share(job.layout.rank % n, n)


def my_rows(job: Job, plan: loader.EpochPlan, epoch_step: int, micro: int) -> list[list[int]]:
    """The samples of one of this rank's micro-batches; ranks that share rows have the same."""
    return plan.micro_batch_rows(epoch_step, job.layout.rank // job.degrees.sequence, micro, ranks=job.rows_ranks,
                                 accumulation=job.run.accumulation_steps, batch_size=job.run.batch_size)


def train_step(job: Job, ds_engine, plan: loader.EpochPlan, at: Position, batches: Iterator[PackedBatch]) -> dict:
    """One optimizer step: forward and backward of each micro-batch, then the update.

    Returns:
        The step's line of metrics, the same on every rank.

    Raises:
        NonFinite: before the update, naming the step and the samples.
    """
    run, layout = job.run, job.layout
    began = time.perf_counter()
    facts = plan.facts(at.epoch_step)
    # Loss, balance loss, whether any rank was asked to stop, each rank's forward time of the step before.
    sums, suspects = torch.zeros(3 + layout.ranks, dtype=torch.float64, device=layout.device), []
    stopwatch, optimizer = Stopwatch(layout.device), ds_engine.basic_optimizer
    job.beat(f"step {at.step}: forward and backward")
    scale = engine.norm_scale(ds_engine, job.stage)
    ds_engine.train()
    for micro in range(run.accumulation_steps):
        batch = next(batches).to(layout.device, non_blocking=True)
        with stopwatch:
            out = ds_engine(batch)
        ds_engine.backward(scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                                       step_real=facts.n_tokens, dp_world=layout.ranks), scale_wrt_gas=False)
        sums[:2] += torch.stack([out.loss_sum.detach().double(), out.aux_loss.detach().double() * batch.n_tokens])
        suspects.append(out.loss_sum.detach())
        if micro + 1 == run.accumulation_steps:
            # Once per step, before the update, and the same on every rank.
            sums[2], sums[3 + layout.rank] = float(job.stop.asked is not None), job.forward_s
            if layout.ranks > 1:
                dist.all_reduce(sums)
            total, aux_total, asked, *times = sums.tolist()
            loss, aux = total / max(facts.n_labelled, 1), aux_total / max(facts.n_tokens, 1)
            job.stop.agreed, job.forward_s = asked > 0, stopwatch.take()
            optimizer.skip_update, note = judge(job, plan, at, loss if math.isfinite(aux) else aux, suspects)
            norm = engine.clip_gradients(ds_engine, run.grad_clip)
            job.beat(f"step {at.step}: update")
        update(job, ds_engine, plan, at)
    if norm is None:
        norm = engine.grad_norm(ds_engine, scale)
    skipped = {"skipped": True} if optimizer.skip_update or not ds_engine.was_step_applied() else {}
    optimizer.skip_update = False
    if not skipped:
        job.guard.took(loss)
    seconds = time.perf_counter() - began
    return {"loss": finite(loss), "aux_loss": finite(aux), "lr": float(ds_engine.optimizer.param_groups[0]["lr"]),
            "grad_norm": finite(norm), "tokens": facts.n_tokens, "labelled_tokens": facts.n_labelled,
            "packing_fill": facts.fill, "tokens_per_s": facts.n_tokens / seconds, "step_s": seconds, **skipped,
            **({"note": note} if note else {}), **slowest(times, job.hosts)}


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def judge(job: Job, plan: loader.EpochPlan, at: Position, loss: float,
          suspects: list[torch.Tensor]) -> tuple[bool, str | None]:
    """Whether this step's update is to be skipped, and what is wrong with its loss; the same on every rank.

    Raises:
        NonFinite: the run is to stop for it, or too many steps in a row were skipped.
    """
    wrong, run = job.guard.judge(loss), job.run
    if wrong is None:
        return False, None
    if math.isfinite(loss):
        policy, note = run.on_spike, f"the loss of step {at.step} {wrong}; {samples_of(job, plan, at)}"
    else:
        policy, note = run.on_non_finite, blame(job, plan, at, suspects)
    if policy == "stop":
        raise NonFinite(note)
    if policy == "skip" and not job.guard.skip():
        raise NonFinite(f"{MOST_SKIPPED} steps in a row were skipped; {note}")
    return policy == "skip", note


def update(job: Job, ds_engine, plan: loader.EpochPlan, at: Position) -> None:
    """engine.step(): between accumulation boundaries it only counts.  A gradient that is not finite ends the run."""
    try:
        ds_engine.step()
    except NonFinite as error:
        raise NonFinite(f"{error}; {where(job, plan, at)}") from None
    boundary = ds_engine.micro_steps % job.run.accumulation_steps == 0
    # DeepSpeed skips such updates itself in half precision.  With fp16 the loss scale was too high: it is lowered.
    skipping = job.run.dtype == "fp16" or ds_engine.basic_optimizer.skip_update
    if boundary and not ds_engine.was_step_applied() and not skipping:
        raise NonFinite(f"a gradient is not finite; {where(job, plan, at)}")


def where(job: Job, plan: loader.EpochPlan, at: Position) -> str:
    return f"the update of step {at.step} was not applied; {samples_of(job, plan, at)}"


def samples_of(job: Job, plan: loader.EpochPlan, at: Position) -> str:
    return f"its samples are {named(job, at, [plan.rows(at.epoch_step)])}"


def named(job: Job, at: Position, rows: list) -> str:
    """'lines 3, 17 of data.jsonl' for lists of lists of sample indices."""
    lines = sorted({int(job.stores[at.epoch].lines[i]) for part in rows for row in part for i in row})
    more = f" and {len(lines) - 20} more" if len(lines) > 20 else ""
    return f"lines {', '.join(map(str, lines[:20]))}{more} of {job.run.data_path}"


def blame(job: Job, plan: loader.EpochPlan, at: Position, suspects: list[torch.Tensor]) -> str:
    """Names the samples of the micro-batches whose loss is not finite; collective."""
    mine = [my_rows(job, plan, at.epoch_step, micro) for micro, loss_sum in enumerate(suspects)
            if not torch.isfinite(loss_sum)]
    everyone = [None] * job.layout.ranks
    dist.all_gather_object(everyone, mine)
    return (f"the loss of step {at.step} is not finite; the update was not applied; the loss comes from "
            f"{named(job, at, [rows for part in everyone for rows in part])}")


@torch.no_grad()
def evaluate(job: Job, ds_engine) -> dict:
    """Loss per labelled token over the held-out set, all ranks."""
    run, layout, plan = job.run, job.layout, job.eval_plan
    sums = torch.zeros(2, dtype=torch.float64, device=layout.device)
    ds_engine.eval()
    for epoch_step in range(len(plan)):
        job.beat(f"evaluation, step {epoch_step + 1} of {len(plan)}")
        for micro in range(run.accumulation_steps):
            rows = my_rows(job, plan, epoch_step, micro)
            batch = my_share(job, loader.load_micro_batch(job.eval_store, rows, run.row_len, job.tokenizer.pad_id))
            out = ds_engine(batch.to(layout.device))
            sums += torch.tensor([float(out.loss_sum), out.n_labelled], device=layout.device)
    dist.all_reduce(sums)
    ds_engine.train()
    return {"eval_loss": (sums[0] / sums[1]).item(), "eval_tokens": int(sums[1])}
