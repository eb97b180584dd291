"""One optimizer step and one evaluation, on every rank: what the trainer, the benchmark and verify.py all run.

    from minimind_ds.training.step import Position, fetch, train_step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from minimind_ds.data import loader
from minimind_ds.data.packing import PackedBatch
from minimind_ds.distributed import deepspeed_compat, engine
from minimind_ds.distributed.engine import NonFinite
from minimind_ds.distributed.world import World
from minimind_ds.model.decoder import ModelOutput
from minimind_ds.model.loss import scaled_loss
from minimind_ds.resilience.stragglers import DeviceTimer, slowest
from minimind_ds.training.evaluations import perplexity
from minimind_ds.training.live import LiveRun
from minimind_ds.training.prepare import PreparedRun
from minimind_ds.training.spikes import MOST_SKIPPED


class Position(NamedTuple):
    """A place in the data: optimizer step `step` of the run, counted from 1, is step `epoch_step` of `epoch`."""

    step: int
    epoch: int
    epoch_step: int


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, the same on every rank.

    loss: nats per labelled token over the step.  lr: of the first group, as the update used it; lr_groups: of every
    group, where they differ.  grad_norm: global 2-norm before clipping.  stop_requested: a rank was
    asked to stop.  note: what was wrong with the loss.  slow_rank: the metrics' facts about a straggler, or nothing.
    parts: this rank's seconds of waiting for data, of forward and of backward; the rest of step_s is the update's.
    """

    loss: float
    aux_loss: float
    lr: float
    lr_groups: list[float] | None
    grad_norm: float | None
    tokens: int
    labelled_tokens: int
    packing_fill: float
    step_s: float
    stop_requested: bool
    skipped: bool
    note: str | None
    slow_rank: dict
    parts: dict[str, float]

    def line(self) -> dict:
        """The step's line of metrics.jsonl."""
        return {"loss": finite(self.loss), "aux_loss": finite(self.aux_loss), "lr": self.lr,
                **({"lr_groups": self.lr_groups} if self.lr_groups else {}),
                "grad_norm": finite(self.grad_norm), "tokens": self.tokens, "labelled_tokens": self.labelled_tokens,
                "packing_fill": self.packing_fill, "tokens_per_s": self.tokens / self.step_s, "step_s": self.step_s,
                **self.parts, **({"skipped": True} if self.skipped else {}),
                **({"note": self.note} if self.note else {}), **self.slow_rank}


class StepSums:
    """This rank's share of what a step's one all-reduce carries, that all-reduce, and the host's one read of it."""

    class Reduced(NamedTuple):
        """Sums over all ranks; forward_s is each rank's own.  norms: what was read with them."""

        ce_sum: float
        aux_sum: float
        stop_requests: float
        forward_s: list[float]
        norms: list[float]

    def __init__(self, world: World):
        self.world, self.micro_losses = world, []
        self.values = torch.zeros(3 + world.size, dtype=torch.float64, device=world.device)

    def add(self, out: ModelOutput, n_tokens: int) -> None:
        """A micro-batch's summed cross-entropy, and its balance loss weighted by its real tokens."""
        self.values[:2] += torch.stack([out.loss_sum.detach().double(), out.aux_loss.detach().double() * n_tokens])
        self.micro_losses.append(out.loss_sum.detach())

    def reduce(self, *, stop_asked: bool, forward_s: float) -> None:
        """Collective, once per step."""
        # Not values[2] = ..., which is a copy to the GPU that waits for it.
        self.values[2].fill_(float(stop_asked))
        self.values[3 + self.world.rank].fill_(forward_s)
        if self.world.size > 1:
            dist.all_reduce(self.values)

    def read(self, norms: list[torch.Tensor]) -> Reduced:
        """Waits for the device, once for all."""
        more = torch.stack(norms).to(self.values) if norms else self.values[:0]
        ce_sum, aux_sum, stop_requests, *others = torch.cat([self.values, more]).tolist()
        return self.Reduced(ce_sum, aux_sum, stop_requests, others[:self.world.size], others[self.world.size:])


class Verdict:
    """What becomes of a step: decided once, between the reduction of its gradients and the update, alike on all ranks.

    Called with the gradients' norms (engine.take_norms), it reads them together with the step's sums, which is the
    step's one wait for the device, sets optimizer.skip_update and gives the norms back as numbers.

    total: the sums, None until called.  loss, aux: nats per labelled token, the balance loss.  note: what is wrong
    with the loss.
    """

    def __init__(self, prepared: PreparedRun, live: LiveRun, plan: loader.EpochPlan, at: Position, sums: StepSums):
        self.prepared, self.live, self.plan, self.at, self.sums = prepared, live, plan, at, sums
        self.total = None

    def __call__(self, norms: list[torch.Tensor]) -> list[float]:
        """Raises NonFinite as check_loss does, and for gradients (with fp16 DeepSpeed lowers the loss scale)."""
        facts = self.plan.facts(self.at.epoch_step)
        self.total = self.sums.read(norms)
        self.live.beat(f"step {self.at.step}: update")
        self.loss, self.aux = self.total.ce_sum / max(facts.n_labelled, 1), self.total.aux_sum / max(facts.n_tokens, 1)
        skip, self.note = check_loss(self.prepared, self.live, self.plan, self.at,
                                     self.loss if math.isfinite(self.aux) else self.aux, self.sums.micro_losses)
        sound = all(math.isfinite(norm) and norm >= 0 for norm in self.total.norms)
        if not sound and not skip and self.prepared.run.dtype != "fp16":
            self.refuse_gradients()
        self.live.engine.basic_optimizer.skip_update = skip
        return self.total.norms

    def refuse_gradients(self) -> NoReturn:
        raise NonFinite(f"a gradient is not finite; {where(self.prepared, self.plan, self.at)}")


def fetch(prepared: PreparedRun, epoch: int, plan: loader.EpochPlan, steps: range) -> Iterator[PackedBatch]:
    """This rank's micro-batches of those steps of an epoch, in order."""
    run, store, pad_id = prepared.run, prepared.stores[epoch], prepared.tokenizer.pad_id
    for epoch_step in steps:
        for micro in range(run.accumulation_steps):
            rows = local_rows(prepared, plan, epoch_step, micro)
            yield local_shard(prepared, loader.load_micro_batch(store, rows, run.row_len, pad_id))


def local_shard(prepared: PreparedRun, batch: PackedBatch) -> PackedBatch:
    """What this rank holds of a micro-batch that it may share with its neighbours."""
    n = prepared.dims.sequence
    return batch if n == 1 else batch.share(prepared.world.rank % n, n)


def local_rows(prepared: PreparedRun, plan: loader.EpochPlan, epoch_step: int, micro: int) -> list[list[int]]:
    """The samples of one of this rank's micro-batches; ranks that share rows have the same."""
    run = prepared.run
    return plan.micro_batch_rows(epoch_step, prepared.world.rank // prepared.dims.sequence, micro,
                                 ranks=prepared.data_parallel_size, accumulation=run.accumulation_steps,
                                 batch_size=run.batch_size)


def train_step(prepared: PreparedRun, live: LiveRun, plan: loader.EpochPlan, at: Position,
               batches: Iterator[PackedBatch]) -> StepStats:
    """One optimizer step: forward and backward of each micro-batch, then the update.

    Raises:
        NonFinite: before the update, naming the step and the samples.
    """
    run, world, ds_engine = prepared.run, prepared.world, live.engine
    began, optimizer = time.perf_counter(), ds_engine.basic_optimizer
    # A scheduler of the JSON sets the next step's rate within the update.
    rates = engine.learning_rates(ds_engine)
    facts, sums, waited = plan.facts(at.epoch_step), StepSums(world), 0.0
    forward, backward = DeviceTimer(world.device), DeviceTimer(world.device)
    live.beat(f"step {at.step}: forward and backward")
    ds_engine.train()
    scale = deepspeed_compat.loss_scale(ds_engine)
    for micro in range(run.accumulation_steps):
        waits = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - waits
        batch = batch.to(world.device, non_blocking=True)
        with forward:
            out = ds_engine(batch)
        loss = scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                           step_real=facts.n_tokens, dp_world=world.size)
        with backward:
            ds_engine.backward(loss if scale == 1.0 else loss * scale, scale_wrt_gas=False)
        sums.add(out, batch.n_tokens)
        if micro + 1 < run.accumulation_steps:
            # It only counts.
            ds_engine.step()
    # Once per step, before the update, and the same on every rank.
    sums.reduce(stop_asked=live.stop.asked is not None, forward_s=live.forward_s)
    verdict = Verdict(prepared, live, plan, at, sums)
    norm = update(ds_engine, verdict)
    # The verdict has waited for the device: both are done.
    live.forward_s = forward.take()
    parts = {"data_s": waited, "forward_s": live.forward_s, "backward_s": backward.take()}
    skipped = optimizer.skip_update or not ds_engine.was_step_applied()
    optimizer.skip_update = False
    if not skipped:
        live.spikes.record(verdict.loss)
    return StepStats(loss=verdict.loss, aux_loss=verdict.aux, lr=rates[0],
                     lr_groups=rates if len(set(rates)) > 1 else None, grad_norm=norm, tokens=facts.n_tokens,
                     labelled_tokens=facts.n_labelled, packing_fill=facts.fill, step_s=time.perf_counter() - began,
                     stop_requested=verdict.total.stop_requests > 0, skipped=skipped, note=verdict.note,
                     slow_rank=slowest(verdict.total.forward_s, live.hosts), parts=parts)


def update(ds_engine, verdict: Verdict) -> float | None:
    """The step's last engine.step(), and the verdict before it changes anything.  -> the norm before clipping."""
    run = verdict.prepared.run
    # The loss scale may change in the update.
    scale = deepspeed_compat.norm_scale(ds_engine)
    norm = deepspeed_compat.clip_gradients(ds_engine, run.grad_clip)
    ds_engine.before_update = verdict
    if norm is not None:
        engine.take_norms(ds_engine, [norm])
    elif not ds_engine.takes_norms:
        verdict([])
    ds_engine.step()
    ds_engine.before_update = None
    if verdict.total is None:
        # fp16: DeepSpeed found that the loss scale was too high, and lowered it.
        verdict([])
    if not (ds_engine.was_step_applied() or run.dtype == "fp16" or ds_engine.basic_optimizer.skip_update):
        verdict.refuse_gradients()
    return engine.grad_norm(ds_engine, scale) if norm is None else verdict.total.norms[0]


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def check_loss(prepared: PreparedRun, live: LiveRun, plan: loader.EpochPlan, at: Position, loss: float,
               micro_losses: list[torch.Tensor]) -> tuple[bool, str | None]:
    """Whether this step's update is to be skipped, and what is wrong with its loss; the same on every rank.

    Raises:
        NonFinite: the run is to stop for it, or too many steps in a row were skipped.
    """
    wrong, run = live.spikes.check(loss), prepared.run
    if wrong is None:
        return False, None
    if math.isfinite(loss):
        policy, note = run.on_spike, f"the loss of step {at.step} {wrong}; {samples_of(prepared, plan, at)}"
    else:
        policy, note = run.on_non_finite, locate_non_finite(prepared, plan, at, micro_losses)
    if policy == "stop":
        raise NonFinite(note)
    if policy == "skip" and not live.spikes.skip():
        raise NonFinite(f"{MOST_SKIPPED} steps in a row were skipped; {note}")
    return policy == "skip", note


def where(prepared: PreparedRun, plan: loader.EpochPlan, at: Position) -> str:
    return f"the update of step {at.step} was not applied; {samples_of(prepared, plan, at)}"


def samples_of(prepared: PreparedRun, plan: loader.EpochPlan, at: Position) -> str:
    return f"its samples are {named(prepared, at, [plan.rows(at.epoch_step)])}"


def named(prepared: PreparedRun, at: Position, rows: list) -> str:
    """'lines 3, 17 of data.jsonl' for lists of lists of sample indices."""
    return prepared.stores[at.epoch].where(i for part in rows for row in part for i in row)


def locate_non_finite(prepared: PreparedRun, plan: loader.EpochPlan, at: Position,
                      micro_losses: list[torch.Tensor]) -> str:
    """Names the samples of the micro-batches whose loss is not finite; collective."""
    mine = [local_rows(prepared, plan, at.epoch_step, micro) for micro, loss_sum in enumerate(micro_losses)
            if not torch.isfinite(loss_sum)]
    everyone = [None] * prepared.world.size
    dist.all_gather_object(everyone, mine)
    return (f"the loss of step {at.step} is not finite; the update was not applied; the loss comes from "
            f"{named(prepared, at, [rows for part in everyone for rows in part])}")


@torch.no_grad()
def evaluation_sums(prepared: PreparedRun, live: LiveRun,
                    measure: Callable[[PackedBatch], list[torch.Tensor | int]]) -> torch.Tensor:
    """(held-out sets, figures): the sums of measure(micro-batch on the device) over each set, in fp64; collective."""
    run, world, sets, sums = prepared.run, prepared.world, prepared.eval_sets, None
    live.engine.eval()
    for number, (name, store, plan) in enumerate(sets):
        for epoch_step in range(len(plan)):
            live.beat(f"evaluation of {name}, step {epoch_step + 1} of {len(plan)}")
            for micro in range(run.accumulation_steps):
                rows = local_rows(prepared, plan, epoch_step, micro)
                batch = local_shard(prepared, loader.load_micro_batch(store, rows, run.row_len,
                                                                      prepared.tokenizer.pad_id))
                found = measure(batch.to(world.device, non_blocking=True))
                if sums is None:
                    sums = torch.zeros(len(sets), len(found), dtype=torch.float64, device=world.device)
                for figure, value in enumerate(found):
                    sums[number, figure] += value
    if world.size > 1:
        dist.all_reduce(sums)
    live.engine.train()
    return sums


def evaluate(prepared: PreparedRun, live: LiveRun) -> dict:
    """Loss per labelled token over the held-out samples, its exponential, and the loss of each source where there are
    several; collective."""
    def measure(batch: PackedBatch) -> list[torch.Tensor | int]:
        out = live.engine(batch)
        return [out.loss_sum, out.n_labelled]

    sets, sums = prepared.eval_sets, evaluation_sums(prepared, live, measure)
    loss, tokens = sums.sum(0).tolist()
    of_sources = {f"eval_loss/{part.name}": finite(loss / tokens) for part, (loss, tokens) in zip(sets, sums.tolist())}
    mean = finite(loss / tokens)
    return {"eval_loss": mean, "eval_perplexity": perplexity(mean), "eval_tokens": int(tokens),
            **(of_sources if len(sets) > 1 else {})}
