"""Resume on another layout: other ranks, another ZeRO stage, optimizer states on the GPU or offloaded.

A checkpoint's files -> one whole state, by parameter name -> the partitions of the new layout, in the form in which
DeepSpeed itself writes and loads them.  Nothing is computed: masters and optimizer states keep every bit.
(DeepSpeed's universal format needs a conversion program and asserts between stages 2 and 3.)

    deepspeed --num_gpus 2 launch/sft.py --deepspeed ds_configs/zero2.json --save_dir out     # stopped
    deepspeed --num_gpus 1 launch/sft.py --deepspeed ds_configs/zero3.json --save_dir out --accumulation_steps 2
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib

import torch
import torch.distributed as dist

from minimind_ds import checkpoint
from minimind_ds.checkpoint.full_state import FullState
from minimind_ds.checkpoint.reading import Piece, check_layout, in_order, in_partitions, read
from minimind_ds.config.errors import UserError
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.distributed.world import current_device

# Of the layout (resume.layout_facts), what may differ between the halves of a run.
MAY_DIFFER = ("ranks", "ZeRO stage", "offload", "batch_size", "accumulation_steps", "sequence_parallel_size",
              "expert_parallel.autoep_size")


def check(then: dict, now: dict, path: pathlib.Path) -> None:
    """Raises ValueError, in one line, where the states cannot go from one layout to the other."""
    check_layout(path, then)
    back = f"resume it on {words(then)}, or start over with --from_resume none"
    if now["optimizer"].lower() not in ("adam", "adamw"):
        raise UserError(f"cannot resume from {path} on another layout with the optimizer {now['optimizer']}: only "
                         f"Adam and AdamW are reshaped; {back}")
    for key in ("round_robin_gradients", "sub_group_size"):
        if then.get(key):
            raise UserError(f"cannot resume from {path} on another layout: states with zero_optimization.{key} "
                            f"are not reshaped; {back}")
    if "nvme" in (then["offload"], now["offload"]):
        raise UserError(f"cannot resume from {path} on another layout with optimizer states on NVMe; {back}")


def words(layout: dict) -> str:
    """'2 ranks at ZeRO stage 2'."""
    ranks = f"{layout['ranks']} rank{'s' * (layout['ranks'] != 1)}"
    offload = "" if layout["offload"] == "none" else f" with optimizer states on the {layout['offload'].upper()}"
    rows = f", rows over {layout['sequence_parallel_size']}" if layout["sequence_parallel_size"] > 1 else ""
    experts = layout["expert_parallel.autoep_size"]
    experts = f", experts over {experts}" if experts > 1 else ""
    return f"{ranks} at ZeRO stage {layout['ZeRO stage']}{offload}{rows}{experts}"


def note(then: dict, now: dict) -> str:
    """What is done, for the log."""
    if words(then) != words(now):
        return f"written on {words(then)}; now {words(now).replace('ZeRO ', '')}: reshaped"
    before, after = (f"{facts['batch_size']} rows x {facts['accumulation_steps']} micro-batches"
                     for facts in (then, now))
    return f"written with {before} on each rank; now {after}: reshaped"


def load(ds_engine, path: pathlib.Path, *, layout: dict, same: bool, seed: int, step: int) -> None:
    """Load a verified checkpoint of another layout, or one that holds a whole state, into a fresh engine; collective.

    Args:
        layout: the checkpoint's.
        same: it is this run's too, whose draws go on where they stopped.
        seed, step: the run's seed and the step it goes on from: dropout's draws begin anew from these and the rank,
            because no other number of ranks can continue them.

    Raises:
        UserError: on every rank, if rank 0 cannot read it.
    """
    shapes, fixed = inventory(ds_engine)
    whole, error = None, None
    if dist.get_rank() == 0:
        try:
            whole = read(path, layout, shapes=shapes, fixed=set(fixed))
        except (OSError, ValueError, KeyError) as caught:
            error = caught
    checkpoint.together(error, f"reading {path}", UserError)
    write(ds_engine, whole)
    deepspeed_compat.continue_betas(ds_engine)
    if same:
        checkpoint.load_rng(path)
        return
    digest = hashlib.sha256(f"{seed} {step} {dist.get_rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def inventory(ds_engine) -> tuple[dict[str, torch.Size], dict[str, torch.Tensor]]:
    """-> (name -> whole shape of the parameters that are trained, name -> everything else in the module's state)."""
    module = ds_engine.module
    parameters = dict(module.named_parameters())
    shapes = {name: whole_shape(p) for name, p in parameters.items() if p.requires_grad}
    kept = module.state_dict(keep_vars=True).keys()
    others = itertools.chain(parameters.items(), module.named_buffers())
    return shapes, {name: t for name, t in others if name in kept and name not in shapes}


def whole_shape(p: torch.nn.Parameter) -> torch.Size:
    """A parameter's shape before ZeRO-3 cut it and before its experts were shared out."""
    shape = getattr(p, "ds_shape", p.shape)
    return torch.Size((shape[0] * expert_ranks(p), *shape[1:]))


def expert_ranks(p: torch.nn.Parameter) -> int:
    """How many ranks share out the experts of this parameter; 1 for every other."""
    if getattr(p, "ds_zero_partition_group_name", None) is None:
        return 1
    from minimind_ds.distributed import expert_parallel

    return dist.get_world_size(expert_parallel.group_of(p))


# Writing: every rank, from rank 0's whole state.


def write(ds_engine, whole: FullState | None) -> None:
    """Put a whole state, which rank 0 holds, into a fresh engine of any layout; collective.

    The engine's own state_dict() is filled in and handed back to its load_state_dict(), which is what loading a
    checkpoint of the same layout comes to.
    """
    stage, optimizer = ds_engine.zero_optimization_stage(), ds_engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    shapes, fixed = inventory(ds_engine)
    header = broadcast_header(whole)
    masters, slots = live_masters(ds_engine, stage), live_slots(ds_engine, stage, shapes)
    states = scatter(whole, header, masters, slots, shapes=shapes,
                     parameters=dict(ds_engine.module.named_parameters()))
    scatter_fixed(whole, header, fixed)
    template = optimizer.state_dict()
    name = {0: "optimizer_state_dict", 1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
    base = template.get(name[stage], template)
    base["state"] = with_step(states, header["step"], ds_engine.basic_optimizer)
    # Experts that are shared out have groups of their own; what is SCHEDULED is the same in all.
    for i, group in enumerate(base["param_groups"]):
        group.update(header["groups"][min(i, len(header["groups"]) - 1)])
    write_scaler(template, header["scaler"])
    if stage == 0:
        optimizer.load_state_dict(template)
        for low, high in (deepspeed_compat.stage_zero_masters(ds_engine) or {}).items():
            low.data.copy_(high.data)
    else:
        optimizer.load_state_dict([None] * dist.get_rank() + [template], load_optimizer_states=True,
                                  load_from_fp32_weights=True)
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_epilogue()
    for counter, value in header["counters"].items():
        setattr(ds_engine, counter, value)
    if ds_engine.lr_scheduler is not None:
        ds_engine.lr_scheduler.load_state_dict(header["scheduler"])


def broadcast_header(whole: FullState | None) -> dict:
    """Everything of the whole state that is no tensor, to every rank."""
    header = [None]
    if whole is not None:
        first = next(iter(whole.parameters.values()))
        header = [{"keys": {key: flat.dtype for key, flat in first.items()}, "step": whole.step,
                   "fixed": {name: (flat.numel(), flat.dtype) for name, flat in whole.fixed.items()},
                   "groups": whole.groups, "scaler": whole.scaler, "counters": whole.counters,
                   "scheduler": whole.scheduler}]
    dist.broadcast_object_list(header)
    return header[0]


def broadcast(flat: torch.Tensor | None, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank 0's flat tensor on every rank, on its device."""
    device = current_device()
    flat = torch.empty(numel, dtype=dtype, device=device) if flat is None else flat.to(device)
    dist.broadcast(flat, src=0)
    return flat


def live_masters(ds_engine, stage: int) -> list[torch.Tensor]:
    """The tensors that this rank's optimizer updates, in the order of its state."""
    optimizer = ds_engine.optimizer
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    if stage > 0:
        return optimizer.single_partition_of_fp32_groups
    return [p for group in ds_engine.basic_optimizer.param_groups for p in group["params"]]


def live_slots(ds_engine, stage: int, shapes: dict[str, torch.Size]) -> list[list[Piece]]:
    """Where parameters lie in live_masters."""
    optimizer, names = ds_engine.optimizer, {p: name for name, p in ds_engine.module.named_parameters()}
    if stage == 3:
        slots = []
        for group in optimizer.fp16_groups:
            # Experts that are shared out are cut over the ranks that hold the same ones.
            ranks = group[0].ds_process_group
            slots += in_partitions([{names[p]: p.ds_shape for p in group}], dist.get_rank(ranks),
                                   dist.get_world_size(ranks))
        return slots
    if stage > 0:
        slots = []
        for group in optimizer.bit16_groups:
            slots.append([Piece(names[p], *place) for p, *place in deepspeed_compat.fragments(group)])
        return slots
    return in_order([t.numel() for t in live_masters(ds_engine, stage)], shapes)


def scatter(whole: FullState | None, header: dict, masters: list[torch.Tensor], slots: list[list[Piece]], *,
            shapes: dict[str, torch.Size], parameters: dict) -> list[dict[str, torch.Tensor]]:
    """Fill this rank's masters, one broadcast parameter at a time; -> the optimizer state of each, padding zero."""
    states = [{key: torch.zeros(master.shape, dtype=dtype, device=master.device)
               for key, dtype in header["keys"].items() if key != "fp32"} for master in masters]
    mine = {}
    for i, pieces in enumerate(slots):
        for piece in pieces:
            mine.setdefault(piece.name, []).append((i, piece))
    for name, shape in shapes.items():
        for key, dtype in header["keys"].items():
            flat = my_experts(parameters[name], broadcast(whole and whole.parameters[name][key], shape.numel(), dtype))
            for i, (_, at, start, numel) in mine.get(name, ()):
                target = masters[i].data if key == "fp32" else states[i][key]
                target.view(-1)[at:at + numel].copy_(flat[start:start + numel])
    return states


def my_experts(p: torch.nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
    """Of a whole parameter, what this rank holds before ZeRO cuts it: its experts, or all of it."""
    if expert_ranks(p) == 1:
        return flat
    from minimind_ds.distributed import expert_parallel

    return expert_parallel.part(p, flat)


def scatter_fixed(whole: FullState | None, header: dict, fixed: dict[str, torch.Tensor]) -> None:
    """Fill frozen parameters and buffers; those the checkpoint does not hold stay as the model was built."""
    for name, target in fixed.items():
        if name not in header["fixed"]:
            continue
        flat, start = broadcast(whole and whole.fixed[name], *header["fixed"][name]), 0
        target = target.data
        if hasattr(fixed[name], "ds_tensor"):
            target = fixed[name].ds_tensor.data
            start = min(target.numel() * dist.get_rank(), flat.numel())
        part = flat[start:start + target.numel()]
        target.view(-1)[:part.numel()].copy_(part)


def with_step(states: list[dict], step: int, optimizer) -> dict[int, dict]:
    """torch's optimizers count in a tensor, DeepSpeed's in an int.  Before the first update there is no state."""
    in_torch = type(optimizer).__module__.startswith("torch.")
    return {i: {"step": torch.tensor(float(step)) if in_torch else step, **state}
            for i, state in enumerate(states) if state}


def write_scaler(template: dict, scaler: dict) -> None:
    target = vars(template["loss_scaler"]) if "loss_scaler" in template else template
    if "last_overflow_iter" in target:
        target.update({key: value for key, value in scaler.items() if key in target})
