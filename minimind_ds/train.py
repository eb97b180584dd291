"""Training, as functions: main, where a run begins, and the loop over a prepared run's plan; steps are in step.py.

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
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from minimind_ds import checkpoint, ds_config, engine, lora, parallel, reshape, restarts, weights
from minimind_ds.data import loader
from minimind_ds.engine import Layout, NonFinite
from minimind_ds.guard import Guard, taken_losses
from minimind_ds.job import Job, prepare
from minimind_ds.metrics import Metrics
from minimind_ds.model import MiniMindForCausalLM
from minimind_ds.saving import SaveFailed
from minimind_ds.signals import STOPPED, Stopped
from minimind_ds.step import Position, evaluate, fetch, train_step
from minimind_ds.watchdog import Watchdog, lost_contact

# Twice what an NFS server usually gives a client that is gone; how often to look meanwhile.
LEASE_S, LOOK_S = 180.0, 5.0
# What a disk says that is full, failing or gone.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def main(program: str, argv: list[str]) -> int:
    """The whole of launch/sft.py and launch/pretrain.py.  Returns the exit code."""
    layout = engine.read_layout()
    try:
        job = prepare(program, argv, layout)
        engine.start(layout, job.run.hang_minutes)
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
            job.lock = hold(job.folder)
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


def hold(folder: pathlib.Path):
    """The run folder, for this process; the result is checkpoint.lock's.

    A lost node's hold is let go of by the file server, when its lease has run out: the job that is started again by
    itself waits for that.  Raises ValueError as checkpoint.lock, after that time or at once.
    """
    deadline = time.monotonic() + (LEASE_S if restarts.goes_on(restarts.read(folder)) else 0)
    while True:
        try:
            return checkpoint.lock(folder)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise
            print(f"this job's start before may still hold the folder; waiting, {deadline - time.monotonic():.0f} s "
                  f"at most: {error}", flush=True)
            time.sleep(LOOK_S)


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
            except (NonFinite, Stopped):
                # All ranks end alike.  A checkpoint from before is worth having all the more.
                job.finish_saving()
                job.watchdog.finish()
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
        checkpoint.keep_metrics(job.folder)
        checkpoint.write_durably(job.done_path, json.dumps({"step": step, "identity": identity(job)}))
        metrics.say(f"wrote {job.weights_path}")
    dist.barrier()
    job.watchdog.finish()


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
                if stopping and not job.keeps_checkpoints:
                    raise Stopped(step, kept=False)
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
