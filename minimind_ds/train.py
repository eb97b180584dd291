"""Training, as functions: main, the loop over a prepared run's plan, one optimizer step, one evaluation.

The plan of each epoch depends on data, seed and rows per step only, which makes the data position of a checkpoint two
numbers, and the loss the same on any layout.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json
"""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from minimind_ds import checkpoint, ds_config, engine, lora, parallel, reshape, restarts, weights
from minimind_ds.data import loader
from minimind_ds.data.packing import PackedBatch
from minimind_ds.engine import Layout, NonFinite
from minimind_ds.guard import MOST_SKIPPED, Guard, taken_losses
from minimind_ds.job import Job, prepare
from minimind_ds.loss import scaled_loss
from minimind_ds.metrics import Metrics
from minimind_ds.model import MiniMindForCausalLM
from minimind_ds.saving import SaveFailed
from minimind_ds.signals import STOPPED, Stopped
from minimind_ds.stragglers import Stopwatch, slowest
from minimind_ds.watchdog import Watchdog, lost_contact

# What a disk says that is full, failing or gone.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def main(program: str, argv: list[str]) -> int:
    """The whole of launch/sft.py and launch/pretrain.py.  Returns the exit code."""
    layout = engine.read_layout()
    try:
        job = prepare(program, argv, layout)
        engine.start(layout)
        start = find_start(job)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        return user_error(error, layout)
    except KeyboardInterrupt:
        return 130
    try:
        with job.stop, restarts.Attempt(job.folder, layout.rank):
            train(job, start)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (SaveFailed, OSError) as error:
        if not isinstance(error, SaveFailed) and error.errno not in DISK:
            raise
        print(f"error: rank {layout.rank} on {socket.gethostname()}: {error}; look at the disk of {job.folder}; "
              "--from_resume auto goes on from the last checkpoint", file=sys.stderr, flush=True)
        # As below: the others may be waiting for this one.
        os._exit(1)
    except RuntimeError as error:
        if layout.ranks == 1 or not lost_contact(error):
            raise
        doing = job.watchdog.doing if job.watchdog else "starting"
        print(f"error: rank {layout.rank} on {socket.gethostname()} lost the other ranks in '{doing}': one of them "
              f"ended or its node is gone ({str(error).splitlines()[0]}); --from_resume auto goes on from the last "
              "checkpoint", file=sys.stderr, flush=True)
        # Leaving the broken process group in order would wait for those that are gone.
        os._exit(1)
    except Stopped as stopped:
        if layout.rank == 0:
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED
    finally:
        engine.stop()
    return 0


def user_error(error: ValueError | OSError, layout: Layout) -> int:
    """One line from one rank; exit code 2, or 1 for a disk, which may be better the next time."""
    if layout.local_rank != 0:
        # Every rank finds the same mistake; the launcher ends the others as soon as the one that says so has left.
        time.sleep(10)
    if layout.rank == 0 or layout.local_rank == 0:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return 2 if isinstance(error, ValueError) else 1


class Position(NamedTuple):
    """A place in the data: optimizer step `step` of the run, counted from 1, is step `epoch_step` of `epoch`."""

    step: int
    epoch: int
    epoch_step: int


@dataclass(frozen=True)
class Start:
    """Where a run begins: after `step` steps, at step `epoch_step` of `epoch`; `path` is the checkpoint or None.

    `layout` is the checkpoint's, if it has to be reshaped into this run's.
    """

    path: pathlib.Path | None = None
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    finished: bool = False
    layout: dict | None = None


def find_start(job: Job) -> Start:
    """Where to begin, decided on rank 0 and agreed on by all.

    Raises:
        ValueError: on every rank, when a checkpoint is damaged or the folder belongs to another run.
        OSError: on every rank, when rank 0 cannot write to the folder.
    """
    found = [None]
    if job.layout.rank == 0:
        try:
            job.lock = checkpoint.lock(job.folder)
            start, notes = look_for_start(job)
            found = [(start, notes if start.finished else notes + restarts.begin(job.folder, start.step))]
        except (ValueError, OSError) as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    start, notes = found[0]
    job.notes.extend(notes)
    return start


def look_for_start(job: Job) -> tuple[Start, list[str]]:
    if job.run.from_resume == "auto" and job.done_path.exists():
        done = json.loads(job.done_path.read_text(encoding="utf-8"))
        compare(done["identity"], identity(job), job.folder)
        return Start(step=done["step"], finished=True), []
    path, manifest, complaints = checkpoint.find(job.run.from_resume, job.folder)
    if path is None:
        return Start(), complaints
    compare(manifest["identity"], identity(job), path)
    then, now = manifest["layout"], layout_facts(job)
    compare(then, {name: fact for name, fact in now.items() if name not in reshape.MAY_DIFFER}, path)
    if then != now:
        reshape.check(then, now, path)
    return Start(path, manifest["step"], manifest["epoch"], manifest["epoch_step"],
                 layout=then if then != now else None), complaints


def identity(job: Job) -> dict:
    """What must not change between the halves of a run: the model, the data and everything the curve depends on."""
    run = job.run
    names = ("preset", "seed", "max_seq_len", "too_long", "packing", "pack_len", "epochs", "max_steps",
             "learning_rate", "min_lr_ratio", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
             "adam_epsilon", "grad_clip", "eval_fraction", "random_system_ratio", "drop_empty_think_ratio",
             "moe_balance")
    facts = {name: getattr(run, name) for name in names}
    facts["rows per step"] = run.batch_size * run.accumulation_steps * job.rows_ranks
    facts["tokenizer"] = job.tokenizer.fingerprint
    facts["data"] = job.stores[0].content
    facts["LoRA"] = job.lora.identity() if job.lora else None
    return {**facts, **{f"model.{k}": v for k, v in job.model_config.to_dict().items()}}


def layout_facts(job: Job) -> dict:
    return {"ranks": job.layout.ranks, "ZeRO stage": job.stage, "dtype": job.run.dtype,
            "batch_size": job.run.batch_size, "accumulation_steps": job.run.accumulation_steps,
            "optimizer": job.ds["optimizer"]["type"], "offload": ds_config.optimizer_device(job.ds),
            "scheduler": job.ds.get("scheduler", {}).get("type"), "sequence_parallel_size": job.degrees.sequence,
            "expert_parallel.autoep_size": job.degrees.experts}


def compare(then: dict, now: dict, path) -> None:
    # The model first: of everything that differs it explains the most.
    for name in sorted(now, key=lambda n: not n.startswith("model.")):
        if then.get(name) != now[name]:
            raise ValueError(f"cannot resume from {path}: its {name.removeprefix('model.')} is {then.get(name)!r}, "
                             f"this run's is {now[name]!r}; --from_resume none starts over, another --save_dir "
                             "keeps both")


def train(job: Job, start: Start) -> None:
    """Run the plan from `start` to its end, then write the weights."""
    run, layout = job.run, job.layout
    if start.finished:
        if layout.rank == 0:
            print(f"{job.folder} holds a finished run of {start.step} steps; --from_resume none starts over, another "
                  "--save_dir keeps it")
        return
    ds_engine = build_engine(job)
    if start.path is not None:
        load_checkpoint(job, ds_engine, start)
    share_start(job, start)
    if layout.rank == 0:
        write_run_folder(job, start)
    dist.barrier()
    metrics = Metrics(job.folder, step=start.step, total_steps=job.total_steps, run=run, rank=layout.rank,
                      resolved={**asdict(run), "deepspeed_config": job.ds})
    try:
        for line in summary(job, start):
            metrics.say(line)
        with Watchdog(layout.rank, layout.ranks, 60 * run.hang_minutes) as job.watchdog:
            try:
                step = run_plan(job, ds_engine, start, metrics)
            except NonFinite:
                # A checkpoint from before is worth having all the more.
                job.finish_saving()
                raise
            job.finish_saving()
            job.beat("the final weights")
            write_weights(job, ds_engine, step, metrics)
    finally:
        metrics.close()


def write_weights(job: Job, ds_engine, step: int, metrics: Metrics) -> None:
    """The weights in the run folder, and the note that the run of `step` steps is finished; collective."""
    final = engine.full_weights(ds_engine, job.stage)
    if job.layout.rank == 0:
        if job.lora:
            lora.save_adapters(job.weights_path, final, job.lora, job.model_config)
        else:
            weights.save_safetensors(job.weights_path, final, job.model_config)
        checkpoint.write_durably(job.done_path, json.dumps({"step": step, "identity": identity(job)}))
        metrics.say(f"wrote {job.weights_path}")
    dist.barrier()


def share_start(job: Job, start: Start) -> None:
    """What every rank has to know and only one can: the losses before a resume, each rank's host; collective."""
    shared = [taken_losses(job.folder / "metrics.jsonl", start.step) if job.layout.rank == 0 else None]
    dist.broadcast_object_list(shared)
    job.guard, job.hosts = Guard(shared[0]), [None] * job.layout.ranks
    dist.all_gather_object(job.hosts, socket.gethostname())


def load_checkpoint(job: Job, ds_engine, start: Start) -> None:
    """DeepSpeed's own loading where its files fit this layout, ours where they do not; collective."""
    if start.layout is None and job.degrees.experts == 1:
        checkpoint.load(ds_engine, start.path)
    else:
        reshape.load(ds_engine, start.path, layout=start.layout or layout_facts(job), same=start.layout is None,
                     seed=job.run.seed, step=start.step)


def write_run_folder(job: Job, start: Start) -> None:
    """run.yaml, ds_config.json and the tokenizer; a run that starts over first removes the one before it."""
    job.done_path.unlink(missing_ok=True)
    if start.path is None and checkpoint.folder_of(job.folder).exists():
        shutil.rmtree(checkpoint.folder_of(job.folder))
    checkpoint.folder_of(job.folder).mkdir(exist_ok=True)
    checkpoint.write_durably(job.folder / "run.yaml", job.run.to_yaml())
    checkpoint.write_durably(job.folder / "ds_config.json", json.dumps(job.ds, indent=2))
    job.tokenizer.save(job.folder / "tokenizer")


def summary(job: Job, start: Start) -> list[str]:
    """What the run is, for its first lines of output."""
    run, layout, plan, store = job.run, job.layout, job.first_plan, job.stores[0]
    parameters = sum(math.prod(shape) for shape in weights.expected_shapes(job.model_config).values())
    stats = store.stats
    tokens, steps = int(plan.n_tokens.sum()), len(plan)
    lines = [*job.notes,
             f"model: {run.preset}, {parameters / 1e6:.1f} M parameters; tokenizer: {job.tokenizer.name}",
             f"data: {run.data_path}: {len(store.lengths):,} samples, {tokens:,} tokens, "
             f"{plan.n_labelled.sum() / max(tokens, 1):.0%} labelled; cut {stats['cut']}, dropped {stats['dropped']}, "
             f"without a label {stats['unlabelled']}, malformed {stats['skipped']}",
             f"rows: {plan.n_rows:,} of {run.row_len} tokens, {plan.fill:.2%} full",
             f"kernels: {job.kernels.reason}",
             f"engine: {ds_config.describe(job.ds, job.degrees)}; {layout.ranks} ranks x {run.batch_size} rows x "
             f"{run.accumulation_steps} micro-batches a step; {steps:,} steps an epoch, {job.total_steps:,} in all"]
    if job.lora:
        trained = sum(math.prod(shape) for shape in lora.shapes(job.model_config, job.lora).values())
        frozen = "; the experts stay as they are" if job.model_config.use_moe else ""
        lines.append(f"LoRA: {job.lora.describe()}; trains {trained:,} of {parameters + trained:,} parameters{frozen}")
    if start.path is not None:
        reshaped = f", {reshape.note(start.layout, layout_facts(job))}" if start.layout else ""
        lines.append(f"resuming from {start.path} after step {start.step}{reshaped}")
        if start.layout and job.model_config.dropout > 0:
            lines.append("dropout goes on with new draws, from seed, step and rank")
    return lines


def build_engine(job: Job):
    """The model on this rank's device, inside DeepSpeed."""
    run = job.run
    torch.manual_seed(run.seed)
    model = MiniMindForCausalLM(job.model_config, kernels=run.kernels, balance=run.moe_balance)
    if job.start_weights is not None:
        model.load_weights(job.start_weights)
        job.start_weights = None
    if job.lora:
        lora.attach(model, job.lora, lora.fresh(job.model_config, job.lora, seed=run.seed))
    model.gradient_checkpointing = run.gradient_checkpointing
    if run.compile:
        model.compile_layers()
    model.to(job.layout.device)
    parallel.install(model, job.degrees)
    ds_engine = engine.initialize(model, job.ds)
    # Dropout differs between ranks; everything else that is random was drawn above, alike on all.
    torch.manual_seed(run.seed + 1 + job.layout.rank)
    return ds_engine


def run_plan(job: Job, ds_engine, start: Start, metrics: Metrics) -> int:
    """Every step from `start` to the end; returns the number of the last one.

    Raises:
        Stopped: on all ranks after the same step, when any was asked to stop.
    """
    run, step = job.run, start.step
    owns_lr = "scheduler" not in job.ds
    for epoch in range(start.epoch, run.epochs):
        plan, first = job.plan(epoch), start.epoch_step if epoch == start.epoch else 0
        last = min(len(plan), first + run.max_steps - step) if run.max_steps else len(plan)
        batches = fetch(job, epoch, plan, range(first, last))
        with loader.Prefetcher(batches, pin=job.layout.device.type == "cuda") as ready:
            for epoch_step in range(first, last):
                step += 1
                if owns_lr:
                    engine.set_lr(ds_engine, learning_rate(progress(run, step, epoch, epoch_step, len(plan)), run))
                line = train_step(job, ds_engine, plan, Position(step, epoch, epoch_step), ready)
                metrics.write({"step": step, "epoch": epoch, **line})
                if "note" in line:
                    metrics.say(f"{'skipped: ' if 'skipped' in line else ''}{line['note']}")
                at_end = epoch_step + 1 == last
                if job.eval_plan and (step % run.eval_interval == 0 if run.eval_interval else at_end):
                    metrics.write({"step": step, "epoch": epoch, **evaluate(job, ds_engine)})
                # At the very end finishing takes no longer than a checkpoint.
                stopping = job.stop.agreed and step != job.total_steps
                if stopping or (run.save_interval and step % run.save_interval == 0):
                    job.beat(f"step {step}: checkpoint")
                    facts = {"step": step, "epoch": epoch, "epoch_step": epoch_step + 1,
                             "identity": identity(job), "layout": layout_facts(job)}
                    job.finish_saving()
                    job.saving = checkpoint.save(ds_engine, job.folder, facts=facts, keep=run.keep)
                if stopping:
                    job.finish_saving()
                    raise Stopped(step)
        if step == run.max_steps:
            break
    return step


def progress(run, step: int, epoch: int, epoch_step: int, epoch_steps: int) -> float:
    """How much of the run is done after this step, in (0, 1], by epochs or by max_steps, whichever ends it first."""
    by_epochs = (epoch + (epoch_step + 1) / epoch_steps) / run.epochs
    return max(by_epochs, step / run.max_steps) if run.max_steps else by_epochs


def learning_rate(done: float, run) -> float:
    """Linear warm-up, then a cosine down to min_lr_ratio of the peak.  `done`: the share of the run, up to 1."""
    if done < run.warmup_ratio:
        return run.learning_rate * done / run.warmup_ratio
    fallen = (done - run.warmup_ratio) / max(1 - run.warmup_ratio, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    return run.learning_rate * (run.min_lr_ratio + (1 - run.min_lr_ratio) * cosine)


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
