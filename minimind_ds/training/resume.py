"""Where a run goes on: at its beginning, after the newest complete checkpoint, or at its end.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json --from_resume auto
"""

from __future__ import annotations

import json
import math
import pathlib
import socket
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from minimind_ds import checkpoint
from minimind_ds.checkpoint import reshape
from minimind_ds.config import deepspeed_json, untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import DEFAULTS, MAY_CHANGE, MAY_GROW, MUST_STAY
from minimind_ds.convert.minimind import expected_shapes
from minimind_ds.data.sources import content_change
from minimind_ds.resilience import restarts
from minimind_ds.resilience.preflight import source
from minimind_ds.resilience.signals import Stopped
from minimind_ds.training import kept_weights
from minimind_ds.training.evaluations import Evaluations, recorded
from minimind_ds.training.live import LiveRun
from minimind_ds.training.lr_schedule import total_steps
from minimind_ds.training.prepare import PreparedRun
from minimind_ds.training.spikes import SpikeDetector, taken_losses

# Twice what an NFS server usually gives a client that is gone; how often to look meanwhile.
LEASE_S, LOOK_S = 180.0, 5.0
# How DeepSpeed lays out a rank's states unless a file says otherwise; checkpoints of earlier releases do not say.
PARTITIONS = {"round_robin_gradients": False, "sub_group_size": None}


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: after `step` steps, at step `epoch_step` of `epoch`; `path` is the checkpoint or None.

    layout: the checkpoint's, if it has to be reshaped into this run's.  changed: settings that may differ from the
    checkpoint's run and do, as {name: [then, now]}.  notes: lines for the start.
    """

    path: pathlib.Path | None = None
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    finished: bool = False
    layout: dict | None = None
    changed: dict | None = None
    notes: tuple[str, ...] = ()


def find_resume_point(prepared: PreparedRun, live: LiveRun) -> ResumePoint:
    """Where to begin, decided on rank 0, which holds the run folder from here on, and agreed on by all.

    Raises:
        ValueError: on every rank, when a checkpoint is damaged or the folder belongs to another run.
        OSError: on every rank, when rank 0 cannot write to the folder.
        Stopped: on every rank, when torchrun has started a run again that was asked to stop.
    """
    found = [None]
    if prepared.world.rank == 0:
        try:
            live.folder_lock = acquire_run_lock(prepared.folder)
            restarts.refuse_after_stop(prepared.folder)
            start = look_for_resume_point(prepared)
            if not start.finished:
                start = replace(start, notes=(*start.notes, *restarts.begin(prepared.folder, start.step)))
            found = [start]
        except (UserError, OSError, Stopped) as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def acquire_run_lock(folder: pathlib.Path):
    """The run folder, for this process; the result is checkpoint.lock's.

    A file server drops a lost node's lock when its lease runs out: a job that was started again by itself waits for
    that.  Raises ValueError as checkpoint.lock, after that time or at once.
    """
    deadline = time.monotonic() + (LEASE_S if restarts.goes_on(restarts.read(folder)) else 0)
    while True:
        try:
            return checkpoint.lock(folder)
        except UserError as error:
            if time.monotonic() > deadline:
                raise
            print(f"this job's start before may still hold the folder; waiting, {deadline - time.monotonic():.0f} s "
                  f"at most: {error}", flush=True)
            time.sleep(LOOK_S)


def look_for_resume_point(prepared: PreparedRun) -> ResumePoint:
    run, folder = prepared.run, prepared.folder
    kept_weights.check(run)
    if run.keep_weights_only and checkpoint.folder_of(folder).is_symlink():
        raise UserError(f"{run.place('keep_weights_only')}: {checkpoint.folder_of(folder)} is a link, and nothing is "
                        "deleted through one: leave the flag out, or name another --save_dir")
    if run.from_resume == "auto" and prepared.done_path.exists():
        done = untrusted.read_json(prepared.done_path)
        if not isinstance(done.get("identity"), dict) or not isinstance(done.get("step"), int):
            raise UserError(f"{prepared.done_path} is damaged: delete it to go on from the newest checkpoint")
        refuse_changes(done["identity"], identity(prepared), folder)
        if said := finished(prepared, done):
            return ResumePoint(step=done["step"], finished=True, notes=(said,))
    if run.from_resume == "0":
        refuse_to_delete(folder)
    path, manifest, notes = checkpoint.find("none" if run.from_resume == "0" else run.from_resume, folder)
    if path is None:
        if run.from_resume == "auto" and prepared.done_path.exists():
            raise UserError(f"{folder} holds a finished run of which only weights are left, no checkpoint to go on "
                            f"from: --from_weight {prepared.weights_path} with another --save_dir starts from them, "
                            "--from_resume none starts over")
        return ResumePoint(notes=tuple(notes))
    if missing := [name for name in checkpoint.FACTS if name not in manifest]:
        raise UserError(f"cannot resume from {path}: its manifest does not say its {missing[0]}")
    refuse_changes(manifest["identity"], identity(prepared), path)
    longer = length(manifest["identity"], prepared, path)
    then, now = {**PARTITIONS, **manifest["layout"]}, layout_facts(prepared)
    refuse_changes(then, {name: fact for name, fact in now.items() if name not in reshape.MAY_DIFFER}, path)
    if then != now:
        reshape.check(then, now, path)
    # Checkpoints of releases before this one say nothing of these.
    before = manifest.get("may_change", {})
    if not isinstance(before, dict):
        raise UserError(f"cannot resume from {path}: its manifest says that may_change is {untrusted.shown(before)}")
    changed = {name: [before[name], value] for name, value in may_change(prepared).items()
               if before.get(name, value) != value}
    notes = [*notes, *(f"{name} is {now!r} from here on; it was {then!r}" for name, (then, now) in changed.items())]
    if longer:
        grown = {name: [before_growth(manifest["identity"], name), getattr(run, name)] for name in MAY_GROW}
        changed |= {name: [was, now] for name, [was, now] in grown.items() if was != now}
        notes.append(longer)
    return ResumePoint(path, manifest["step"], manifest["epoch"], manifest["epoch_step"],
                       layout=then if then != now else None, changed=changed or None, notes=tuple(notes))


def finished(prepared: PreparedRun, done: dict) -> str | None:
    """What to say of a finished run that this command has nothing to add to; None where it goes on.

    done: what DONE holds.
    """
    run, what = prepared.run, f"{prepared.folder} holds a finished run of {done['step']} steps"
    other = "--from_resume none starts over, another --save_dir keeps it"
    more = "more --epochs or --max_steps go on, "
    if done.get("early") or length(done["identity"], prepared, prepared.folder):
        evaluations = Evaluations(recorded(prepared.folder / "metrics.jsonl", done["step"]))
        if not evaluations.gave_up(run.patience):
            return None
        what += f", the last {evaluations.since} evaluations without a lower loss"
        more = "a larger --patience goes on, "
    if run.keep_weights_only or not checkpoint.listed(checkpoint.folder_of(prepared.folder)):
        return f"{what}, of which only weights are left; {other}"
    return f"{what}; {more}{other}"


def length(then: dict, prepared: PreparedRun, path) -> str | None:
    """What a run says that goes on to another end than the one that wrote `then`, its identity; None for the same end.

    Raises:
        UserError: this run is no longer than that one.
    """
    run, before = prepared.run, {name: before_growth(then, name) for name in MAY_GROW}
    if all(before[name] == getattr(run, name) for name in MAY_GROW):
        return None
    was, steps = total_steps(run.replace(**before), len(prepared.first_plan)), prepared.total_steps
    if steps <= was:
        ends = "; ".join(f"its {name} is {before[name]}, this run's is {getattr(run, name)}" for name in MAY_GROW
                         if before[name] != getattr(run, name))
        raise UserError(f"cannot resume from {path}: {ends}: a run can be made longer, not shorter ({was} "
                        f"steps then, {steps} now); --from_resume none starts over, another --save_dir keeps both")
    rate = ("the learning rate is from here on that of a run of this length" if "scheduler" not in prepared.ds else
            "the DeepSpeed file's scheduler goes on")
    return f"the run goes on to {steps} steps instead of {was}: {rate}"


def before_growth(then: dict, name: str):
    """--epochs or --max_steps of the run that wrote `then`, its identity."""
    value = then.get(name, DEFAULTS[name])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"cannot resume: its {name} is {untrusted.shown(value)}")
    return value


def refuse_to_delete(folder: pathlib.Path) -> None:
    """Raises UserError where starting over, as MiniMind's --from_resume 0 does, would cost checkpoints."""
    held = sorted(path.name for path in checkpoint.listed(checkpoint.folder_of(folder)))
    if held:
        raise UserError(f"--from_resume 0, and {folder} holds checkpoints: --from_resume none starts over and deletes "
                        f"{', '.join(held)} and the lines of metrics.jsonl; --from_resume 1 goes on from the newest; "
                        "another --save_dir keeps both")


def identity(prepared: PreparedRun) -> dict:
    """What must not change between the halves of a run: the model, the data and everything the curve depends on."""
    run = prepared.run
    facts = {name: getattr(run, name) for name in (*MUST_STAY, *MAY_GROW)}
    facts["rows per step"] = run.batch_size * run.accumulation_steps * prepared.data_parallel_size
    facts["tokenizer"] = prepared.tokenizer.fingerprint
    facts["data"] = prepared.stores[0].content
    facts["optimizer settings"] = deepspeed_json.own_settings(prepared.ds, prepared.world.device.type)
    facts["LoRA"] = prepared.lora.identity() if prepared.lora else None
    return {**facts, **{f"model.{k}": v for k, v in prepared.model_config.to_dict().items()}}


def must_be_alike(prepared: PreparedRun) -> dict:
    """What all ranks of a run have to agree on before they begin; where it begins is rank 0's to decide."""
    run = prepared.run
    return {**identity(prepared), "torch": torch.__version__, "dtype": run.dtype, "from_weight": run.from_weight,
            "save_interval": run.save_interval, "eval_interval": run.eval_interval, "keep_best": run.keep_best,
            "patience": run.patience, "stop_after": run.stop_after, "keep_weights_only": run.keep_weights_only,
            "the DeepSpeed configuration": json.dumps(prepared.ds, sort_keys=True), "the code": source()}


def may_change(prepared: PreparedRun) -> dict:
    """Settings of a run that a resume may change; each change is reported."""
    return {name: getattr(prepared.run, name) for name in MAY_CHANGE}


def layout_facts(prepared: PreparedRun) -> dict:
    run, ds, zero = prepared.run, prepared.ds, prepared.ds.get("zero_optimization", {})
    # At stage 3 the states of so many parameters lie together; of all, where the model has no more.
    group, all_of_them = zero.get("sub_group_size", 1e9), sum(map(math.prod, expected_shapes(
        prepared.model_config).values()))
    return {**PARTITIONS, **({"round_robin_gradients": zero.get("round_robin_gradients", False)}
                             if prepared.stage in (1, 2) else {}),
            **({"sub_group_size": int(group)} if prepared.stage == 3 and group < all_of_them else {}),
            "ranks": prepared.world.size, "ZeRO stage": prepared.stage, "dtype": run.dtype,
            "batch_size": run.batch_size, "accumulation_steps": run.accumulation_steps,
            "optimizer": ds["optimizer"]["type"], "offload": deepspeed_json.optimizer_device(ds),
            "scheduler": ds.get("scheduler", {}).get("type"), "sequence_parallel_size": prepared.dims.sequence,
            "expert_parallel.autoep_size": prepared.dims.experts}


def manifest_facts(prepared: PreparedRun, step: int, epoch: int, epoch_step: int) -> dict:
    """What a checkpoint's manifest says of the run that wrote it."""
    return {"step": step, "epoch": epoch, "epoch_step": epoch_step, "identity": identity(prepared),
            "may_change": may_change(prepared), "layout": layout_facts(prepared), "job": restarts.job_facts(),
            **({"lora": prepared.lora.facts()} if prepared.lora else {})}


def refuse_changes(then: dict, now: dict, path) -> None:
    """Raises UserError, naming the first of `now`'s facts that was another `then`; how long the run is, is length's.

    A flag that the checkpoint's release did not know had the effect of its default; before "optimizer settings" were
    kept, nobody compared them.
    """
    then = {**{name: DEFAULTS.get(name, now[name]) for name in now if name in (*DEFAULTS, "optimizer settings")},
            **then}
    # The model first: of everything that differs it explains the most.
    for name in sorted((n for n in now if n not in MAY_GROW), key=lambda n: not n.startswith("model.")):
        if name == "data" and then.get(name) != now[name]:
            raise UserError(f"cannot resume from {path}: {content_change(then.get(name), now[name])}; --from_resume "
                            "none starts over, another --save_dir keeps both")
        if name == "tokenizer" and then.get(name) != now[name]:
            raise UserError(f"cannot resume from {path}: its tokenizer is another one; name it with --tokenizer, as "
                            "it lies in the run folder; --from_resume none starts over, another --save_dir keeps both")
        if then.get(name) != now[name]:
            means = (" (--batch_size x --accumulation_steps x ranks: raise --accumulation_steps on fewer ranks, lower "
                     "it on more)" if name == "rows per step" else "")
            raise UserError(f"cannot resume from {path}: its {name.removeprefix('model.')} is "
                            f"{then.get(name)!r:.100}, this run's is {now[name]!r:.100}{means}; --from_resume none "
                            "starts over, another --save_dir keeps both")


def share_start(prepared: PreparedRun, live: LiveRun, start: ResumePoint) -> None:
    """What every rank has to know and only one can: the losses before a resume, each rank's host; collective."""
    world, shared = prepared.world, [None, None]
    if world.rank == 0:
        path = prepared.folder / "metrics.jsonl"
        shared = [taken_losses(path, start.step), recorded(path, start.step)]
    dist.broadcast_object_list(shared)
    live.spikes, live.evaluations = SpikeDetector(shared[0]), Evaluations(shared[1])
    live.hosts = [None] * world.size
    dist.all_gather_object(live.hosts, socket.gethostname())


def load_checkpoint(prepared: PreparedRun, ds_engine, start: ResumePoint) -> None:
    """DeepSpeed's own loading where its files fit this layout, ours where they do not; collective."""
    if start.layout is None and prepared.dims.experts == 1:
        checkpoint.load(ds_engine, start.path)
    else:
        reshape.load(ds_engine, start.path, layout=start.layout or layout_facts(prepared), same=start.layout is None,
                     seed=prepared.run.seed, step=start.step)
