"""Training, as functions: main, where a run begins, and the loop over a prepared run's plan; steps are in step.py.

The plan of each epoch depends on data, seed and rows per step only, which makes the data position of a checkpoint two
numbers, and the loss the same on any layout.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata

import torch.distributed as dist

from minimind_ds import __version__, checkpoint, terminal
from minimind_ds.checkpoint.async_save import SaveFailed
from minimind_ds.config.errors import DISK, UserError, first_line, one_line
from minimind_ds.data import loader
from minimind_ds.data.conversation import DataError
from minimind_ds.distributed import engine
from minimind_ds.distributed.engine import NonFinite
from minimind_ds.distributed.world import World, read_world
from minimind_ds.io import write_file
from minimind_ds.resilience import restarts
from minimind_ds.resilience.signals import Stopped
from minimind_ds.resilience.watchdog import Watchdog, lost_contact
from minimind_ds.training import history, kept_weights, run_log
from minimind_ds.training.build import build_engine
from minimind_ds.training.live import LiveRun
from minimind_ds.training.lr_schedule import learning_rate, progress, steps_of, warmup_share
from minimind_ds.training.metrics import Metrics
from minimind_ds.training.prepare import PreparedRun, prepare
from minimind_ds.training.resume import (
    ResumePoint,
    find_resume_point,
    identity,
    load_checkpoint,
    manifest_facts,
    must_be_alike,
    share_start,
)
from minimind_ds.training.step import Position, evaluate, fetch, train_step
from minimind_ds.training.summary import ending, summary


def main(program: str, argv: list[str], at_end: Callable[[PreparedRun], None] | None = None) -> int:
    """The whole of launch/sft.py and launch/pretrain.py.  Returns the exit code.

    at_end: what rank 0 does with a run that has ended, however it did; history.AtEnd calls it.
    """
    world = read_world()
    try:
        prepared = prepare(program, argv, world)
        engine.start(world, prepared.run.hang_minutes, must_be_alike(prepared))
        live = LiveRun()
        start = find_resume_point(prepared, live)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        return leave(user_error(error, world))
    except RuntimeError as error:
        return leave(contact_error(error, world, "the start"))
    except Stopped as stopped:
        return leave(say_stopped(stopped, world))
    except KeyboardInterrupt:
        return leave(130)
    with run_log.kept(prepared.folder, world.rank, opening(program, argv, world)) as live.log:
        return carry_out(prepared, live, start, at_end)


def opening(program: str, argv: list[str], world: World) -> str:
    """What the log says of each start."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    return (f"started: {shlex.join([program, *argv])}; {terminal.count(world.size, 'rank')}, {socket.gethostname()}, "
            f"minimind_ds {__version__}, {versions}")


def carry_out(prepared: PreparedRun, live: LiveRun, start: ResumePoint,
              at_end: Callable[[PreparedRun], None] | None) -> int:
    """The training, and each way in which it may end.  Returns the exit code."""
    world = prepared.world
    try:
        with live.stop, history.AtEnd(prepared, start, at_end), restarts.Attempt(prepared.folder, world.rank), \
                history.Recorded(prepared, start):
            train(prepared, live, start)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except DataError as error:
        # What was read of the data changed while the run went on; the others may wait for this one.
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(1)
    except UserError as error:
        # A checkpoint that cannot be loaded; the others may wait for this rank.
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(2)
    except (SaveFailed, OSError) as error:
        if not isinstance(error, SaveFailed) and error.errno not in DISK:
            raise
        print(f"error: rank {world.rank} on {socket.gethostname()}: {error}; look at the disk of {prepared.folder}; "
              "--from_resume auto goes on from the last checkpoint", file=sys.stderr, flush=True)
        # As below: the others may be waiting for this one.
        os._exit(1)
    except RuntimeError as error:
        # Leaving the broken process group in order would wait for those that are gone.
        os._exit(contact_error(error, world, live.watchdog.doing if live.watchdog else "starting"))
    except Stopped as stopped:
        return say_stopped(stopped, world)
    finally:
        engine.stop()
    return 0


def leave(code: int) -> int:
    """End before the training with this code: at once where a process group is open, whose own end may abort."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code


def say_stopped(stopped: Stopped, world: World) -> int:
    """Its line, from one rank; the exit code."""
    if world.rank == 0:
        print(stopped, file=sys.stderr, flush=True)
    return stopped.code


def contact_error(error: RuntimeError, world: World, doing: str) -> int:
    """One line where another rank is gone, and the exit code 1; any other error is raised again."""
    if world.size == 1 or not lost_contact(error):
        raise error
    print(f"error: rank {world.rank} on {socket.gethostname()} lost the other ranks in '{doing}': one of them "
          f"ended or its node is gone ({first_line(error)}); --from_resume auto goes on from the last "
          "checkpoint", file=sys.stderr, flush=True)
    return 1


def user_error(error: UserError | OSError, world: World) -> int:
    """One line from one rank; exit code 2, or 1 for a disk, which may be better the next time."""
    if world.local_rank != 0:
        # Every rank finds the same mistake; the launcher ends the others as soon as the one that says so has left.
        time.sleep(10)
    if world.rank == 0 or world.local_rank == 0:
        print(one_line(error), file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1


def train(prepared: PreparedRun, live: LiveRun, start: ResumePoint) -> None:
    """Run the plan from `start` to its end, then write the weights."""
    run, world = prepared.run, prepared.world
    if start.finished:
        if world.rank == 0:
            print(*start.notes)
            if run.keep_weights_only and prepared.weights_path.exists():
                # For a run that was killed on its way to do so, or was finished without the flag.
                checkpoint.clear(prepared.folder)
        return
    live.engine = build_engine(prepared)
    if start.path is not None:
        load_checkpoint(prepared, live.engine, start)
    share_start(prepared, live, start)
    if world.rank == 0:
        write_run_folder(prepared, start)
        after = checkpoint.name_of(start.step)
        live.passed_over = [path.name for path in checkpoint.listed(checkpoint.folder_of(prepared.folder))
                            if path.name > after]
    dist.barrier()
    metrics = Metrics(prepared.folder, step=start.step, total_steps=prepared.total_steps,
                      steps_an_epoch=len(prepared.first_plan), run=run, rank=world.rank,
                      resolved={**asdict(run), "deepspeed_config": prepared.ds}, log=live.log)
    try:
        for line in summary(prepared, start):
            metrics.say(line)
        if metrics.empty:
            metrics.write({"step": start.step, "epoch": start.epoch, "data": prepared.stores[0].table(),
                           "notes": [*prepared.notes, *start.notes]})
        if start.changed:
            metrics.write({"step": start.step, "epoch": start.epoch, "changed": start.changed})
        metrics.begin()
        with Watchdog(world.rank, world.size, 60 * run.hang_minutes) as live.watchdog:
            try:
                step, early = run_plan(prepared, live, start, metrics)
            except (NonFinite, Stopped):
                # All ranks end alike.  A checkpoint from before is worth having all the more.
                live.finish_save()
                live.watchdog.finish()
                raise
            engine.log_communication(prepared.ds)
            write_weights(prepared, live, step, metrics, early)
    finally:
        metrics.close()


def write_weights(prepared: PreparedRun, live: LiveRun, step: int, metrics: Metrics, early: bool) -> None:
    """The weights in the run folder, and the note that the run of `step` steps is finished; collective."""
    kept_weights.put(prepared, live, kept_weights.LAST, {"step": step, **live.evaluations.at(step)})
    live.finish_save()
    if prepared.world.rank == 0:
        checkpoint.keep_metrics(prepared.folder)
        done = {"step": step, **({"early": True} if early else {}), "identity": identity(prepared)}
        write_file(prepared.done_path, json.dumps(done))
        metrics.end_bar()
        if prepared.run.keep_weights_only:
            checkpoint.clear(prepared.folder)
            metrics.say("the checkpoints are deleted (--keep_weights_only): the run cannot be made longer")
        for line in ending(prepared, live, step, metrics.taken()):
            metrics.say(line)
    dist.barrier()
    live.watchdog.finish()


def write_run_folder(prepared: PreparedRun, start: ResumePoint) -> None:
    """run.yaml, ds_config.json and the tokenizer; a run that starts over first removes the one before it."""
    prepared.done_path.unlink(missing_ok=True)
    checkpoint.folder_of(prepared.folder).mkdir(exist_ok=True)
    if start.path is None:
        checkpoint.clear(prepared.folder)
        kept_weights.forget(prepared)
        # A new run has a curve of its own at Weights & Biases.
        (prepared.folder / "wandb_id").unlink(missing_ok=True)
    write_file(prepared.folder / "run.yaml", prepared.run.to_yaml())
    write_file(prepared.folder / "ds_config.json", json.dumps(prepared.ds, indent=2))
    prepared.tokenizer.save(prepared.folder / "tokenizer")


def run_plan(prepared: PreparedRun, live: LiveRun, start: ResumePoint, metrics: Metrics) -> tuple[int, bool]:
    """Every step from `start` to the end; returns the number of the last one, and whether --patience ended it early.

    Raises:
        Stopped: on all ranks after the same step, when any was asked to stop.
    """
    run, step = prepared.run, start.step
    if live.evaluations.gave_up(run.patience):
        # Killed before it was finished, or finished and extended.
        metrics.say(gave_up(live, step))
        return step, True
    owns_lr, warmup = "scheduler" not in prepared.ds, warmup_share(run, prepared.total_steps)
    for epoch in range(start.epoch, run.epochs_begun):
        plan, first = prepared.plan(epoch), start.epoch_step if epoch == start.epoch else 0
        steps = steps_of(run, epoch, len(plan))
        last = min(steps, first + run.max_steps - step) if run.max_steps else steps
        batches = fetch(prepared, epoch, plan, range(first, last))
        with loader.Prefetcher(batches, pin=prepared.world.device.type == "cuda") as ready:
            for epoch_step in range(first, last):
                step += 1
                if owns_lr:
                    done = progress(run, step, epoch, epoch_step, steps)
                    engine.set_lr(live.engine, learning_rate(done, run, warmup))
                stats = train_step(prepared, live, plan, Position(step, epoch, epoch_step), ready)
                metrics.write({"step": step, "epoch": epoch, **stats.line()})
                if stats.note:
                    metrics.say(f"{'skipped: ' if stats.skipped else ''}{stats.note}")
                at_end = epoch_step + 1 == last
                ends = at_end and (step == run.max_steps or epoch + 1 == run.epochs_begun)
                due = step % run.eval_interval == 0 if run.eval_interval else at_end
                if prepared.eval_sets and (due or ends):
                    judge(prepared, live, Position(step, epoch, epoch_step + 1), metrics)
                early = not ends and live.evaluations.gave_up(run.patience)
                if early:
                    metrics.say(gave_up(live, step))
                to, stop = Position(step, epoch, epoch_step + 1), None
                if step - start.step == run.stop_after:
                    stop = Stopped(step, planned=run.stop_after)
                elif stats.stop_requested:
                    stop = Stopped(step, kept=prepared.keeps_checkpoints)
                if ends or early:
                    # Finishing takes no longer than stopping.
                    save(prepared, live, to, due=bool(run.save_interval) and not run.keep_weights_only)
                    return step, early
                save_or_stop(prepared, live, to, stop)
        if step == run.max_steps:
            break
    return step, False


def judge(prepared: PreparedRun, live: LiveRun, at: Position, metrics: Metrics) -> None:
    """One evaluation, and its weights where they are to be kept; collective."""
    found = evaluate(prepared, live)
    metrics.write({"step": at.step, "epoch": at.epoch, **found})
    lowest = live.evaluations.record(at.step, found["eval_loss"])
    if lowest and prepared.run.keep_best:
        kept_weights.put(prepared, live, kept_weights.BEST, {"step": at.step, "epoch": at.epoch, **found})


def gave_up(live: LiveRun, step: int) -> str:
    """What an early end says."""
    best = "none was a number"
    if live.evaluations.best is not None:
        best = "the lowest was {1:.4f} after step {0}".format(*live.evaluations.best)
    return (f"ends early, after step {step}: {live.evaluations.since} evaluations in a row without a lower loss "
            f"(--patience); {best}")


def save_or_stop(prepared: PreparedRun, live: LiveRun, to: Position, stop: Stopped | None) -> None:
    """Begins a checkpoint where one is due; raises `stop`, once it is written, if the run is to stop here.

    to: the last step taken, and the place in the data from which a resume goes on.
    """
    interval = prepared.run.save_interval
    if stop is None:
        save(prepared, live, to, due=bool(interval) and to.step % interval == 0)
        return
    save(prepared, live, to, due=prepared.keeps_checkpoints)
    live.finish_save()
    raise stop


def save(prepared: PreparedRun, live: LiveRun, to: Position, *, due: bool) -> None:
    """Begins a checkpoint, if one is due, once the one before is written; collective."""
    if due:
        live.beat(f"step {to.step}: checkpoint")
        live.finish_save()
        live.pending_save = checkpoint.save(live.engine, prepared.folder, facts=manifest_facts(prepared, *to),
                                            keep=prepared.run.keep, passed_over=live.passed_over)
        live.passed_over = []
