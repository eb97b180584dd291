"""A checkpoint's files, DeepSpeed's own or a whole state's, put together on one process, one file at a time.

minimind_ds/checkpoint/reshape.py goes on from all of it on another layout, weights.py takes the weights alone.

    python -m pytest tests/checkpoint/test_reshape.py tests/checkpoint/test_weights.py
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from minimind_ds import checkpoint
from minimind_ds.checkpoint import full_state as whole_state
from minimind_ds.checkpoint.full_state import COUNTERS, SCHEDULED, FullState, read_scaler
from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.distributed import deepspeed_compat

# What files raise that are whole, but not what this program writes.
STRANGE = (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError, SafetensorError)
# What a manifest says of the layout, as far as it is read.
LAYOUT = {"ranks": (int, 1, 1 << 20), "ZeRO stage": (int, 0, 3), "batch_size": (int, 1, 1 << 24),
          "accumulation_steps": (int, 1, 1 << 24), "sequence_parallel_size": (int, 1, 1 << 20),
          "expert_parallel.autoep_size": (int, 1, 1 << 20), "dtype": (str, "", "~"), "optimizer": (str, "", "~"),
          "offload": (str, "", "~")}


@contextlib.contextmanager
def as_written(path: pathlib.Path) -> Iterator[None]:
    """Around the reading of a checkpoint whose hashes are right: anyone can make such.  Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except STRANGE as error:
        raise UserError(f"{path}: holds no MiniMind as this program writes them ({type(error).__name__}: "
                        f"{first_line(error)})") from None


def check_layout(path: pathlib.Path, layout: dict) -> None:
    """Raises UserError for what no run has."""
    for name, (kind, least, most) in LAYOUT.items():
        value = layout.get(name)
        if type(value) is not kind or not least <= value <= most:
            raise UserError(f"{path}: its manifest says that its {name} is {shown(value)}")


class Piece(NamedTuple):
    """`numel` elements of a parameter from its `start`, lying in a flat tensor from `at`."""

    name: str
    at: int
    start: int
    numel: int


class RankFile(NamedTuple):
    """What one rank wrote: the model's file, the optimizer's states, and where its masters' elements belong."""

    model: dict
    states: dict
    base: object
    masters: list[torch.Tensor]
    slots: list[list[Piece]]


def read(path: pathlib.Path, layout: dict, *, shapes: dict[str, torch.Size], fixed: set[str]) -> FullState:
    """The whole state in a verified checkpoint; one of its files is in memory at a time.

    Args:
        layout: the checkpoint's: 'ranks' and 'ZeRO stage'.
        shapes: the trained parameters, in the model's order.
        fixed: names of frozen parameters and buffers to look for.

    Raises:
        ValueError: the files do not hold exactly these parameters.
    """
    with as_written(path):
        return put_together(path, layout, shapes, fixed)


def put_together(path: pathlib.Path, layout: dict, shapes: dict[str, torch.Size], fixed: set[str]) -> FullState:
    folder, stage = path / checkpoint.TAG, layout["ZeRO stage"]
    if (folder / whole_state.FILE).exists():
        return whole_state.read_file(folder, shapes=shapes)
    whole, seen = FullState({name: {} for name in shapes}), {}
    for rank, part in enumerate(rank_files(folder, layout, shapes, seen)):
        if rank == 0:
            whole.counters = {name: part.model[name] for name in COUNTERS}
            whole.scheduler = part.model["lr_scheduler"]
        if not isinstance(part.base, dict):
            raise UserError(f"{folder}: it was written with zero_optimization.elastic_checkpoint, which only its own "
                             "layout can resume")
        gather(whole, part.slots, part.masters, part.base, seen=seen, shapes=shapes)
        gather_fixed(whole, part.model, fixed, whole_files=stage < 3)
        whole.groups = [{key: group[key] for key in SCHEDULED if key in group} for group in part.base["param_groups"]]
        whole.scaler = read_scaler(part.states)
    check_whole(folder, seen, shapes)
    return whole


def read_weights(path: pathlib.Path, layout: dict, *, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The trained weights alone, whole and in fp32, whatever the optimizer; arguments and errors are read's."""
    folder, stage = path / checkpoint.TAG, layout["ZeRO stage"]
    if (folder / whole_state.FILE).exists():
        flat = {name: parts["fp32"] for name, parts in whole_state.read_file(folder, shapes=shapes).parameters.items()}
        return {name: flat[name].view(shape) for name, shape in shapes.items()}
    whole, seen = FullState({name: {} for name in shapes}), {}
    if stage == 0 and layout["optimizer"].lower() == "muon" and layout["dtype"] != "fp32":
        raise UserError(f"{folder}: DeepSpeed's Muon at ZeRO stage 0 in {layout['dtype']} keeps the fp32 weights in "
                        "an order of its own, which is not read; the run's end writes its weights")
    for rank, part in enumerate(rank_files(folder, layout, shapes, seen)):
        slots, masters = part.slots, part.masters
        if stage == 3:
            # With zero_optimization.sub_group_size the groups lie in more tensors, one after the other.
            groups = part.model["param_shapes"]
            masters = [torch.cat(masters)]
            slots = in_partitions([{name: shape for group in groups for name, shape in group.items()}], rank,
                                  layout["ranks"])
        gather(whole, slots, masters, {"state": {}}, seen=seen, shapes=shapes)
        if stage == 0:
            check_order(folder, whole, part.model["module"])
    check_whole(folder, seen, shapes)
    return {name: parts["fp32"].view(shapes[name]) for name, parts in whole.parameters.items()}


def rank_files(folder: pathlib.Path, layout: dict, shapes: dict, seen: dict) -> Iterator[RankFile]:
    """DeepSpeed's files, rank by rank; `seen` counts the elements of each (parameter, key) that were gathered."""
    stage, ranks = layout["ZeRO stage"], layout["ranks"]
    for rank in range(ranks if stage > 0 else 1):
        model = open_file(folder, f"zero_pp_rank_{rank}_mp_rank_00_model" if stage == 3 else "mp_rank_00_model")
        states = model["optimizer"] if stage == 0 else open_file(
            folder, f"zero_pp_rank_{rank}_mp_rank_00_optim")["optimizer_state_dict"]
        if stage == 0:
            base, masters = stage_zero_parts(states, model["module"], shapes)
            slots = in_order([t.numel() for t in masters], shapes)
        elif stage == 3:
            base, masters = states["optimizer_state_dict"], states["fp32_flat_groups"]
            slots = in_partitions(model["param_shapes"], rank, ranks)
        else:
            base, masters = states["base_optimizer_state"], states["single_partition_of_fp32_groups"]
            slots = [[Piece(name, part.start, seen.get((name, "fp32"), 0), part.numel) for name, part in group.items()]
                     for group in states["param_slice_mappings"]]
        yield RankFile(model, states, base, masters, slots)


def check_whole(folder: pathlib.Path, seen: dict, shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError where some of a parameter's elements were not there."""
    keys = {key for _, key in seen}
    torn = [name for name in shapes for key in keys if seen.get((name, key), 0) != shapes[name].numel()]
    if torn:
        raise UserError(f"{folder}: it does not hold the whole of {torn[0]}")


def check_order(folder: pathlib.Path, whole: FullState, module: dict) -> None:
    """Raises ValueError where masters, which lie at stage 0 without names, are not the model's weights unrounded."""
    for name, parts in whole.parameters.items():
        if not torch.equal(parts["fp32"].to(module[name].dtype), module[name].reshape(-1)):
            raise UserError(f"{folder}: what it holds of {name} in fp32 is not its weight: its optimizer keeps the "
                            "parameters in another order, which is not read")


def open_file(folder: pathlib.Path, name: str) -> dict:
    """A file of a verified checkpoint, DeepSpeed's own."""
    path = folder / f"{name}_states.pt"
    if not path.exists():
        # DeepSpeed names the optimizer's files of a bf16 run so.
        path = folder / f"bf16_{name}_states.pt"
    if not path.exists():
        raise UserError(f"{folder}: holds no {name}_states.pt")
    return deepspeed_compat.load_states(path)


def stage_zero_parts(states: dict, module: dict, shapes: dict) -> tuple[dict, list[torch.Tensor]]:
    """-> (torch's optimizer state, masters in its order).  In fp32 the weights are the masters."""
    if "fp32_groups_flat" in states:
        return states["optimizer_state_dict"], list(states["fp32_groups_flat"])
    if "fp32_groups" in states:
        return states["optimizer_state_dict"], [t for group in states["fp32_groups"] for t in group]
    return states, [module[name] for name in shapes]


def in_order(sizes: list[int], shapes: dict[str, torch.Size]) -> list[list[Piece]]:
    """Where parameters lie in flat tensors of these sizes that are filled with them one after the other."""
    slots, names = [], iter(shapes)
    for size in sizes:
        slots.append([])
        at = 0
        while at < size:
            name = next(names, None)
            if name is None or at + shapes[name].numel() > size:
                raise UserError(f"{size} elements are not whole parameters; the next is {name}")
            slots[-1].append(Piece(name, at, 0, shapes[name].numel()))
            at += shapes[name].numel()
    return slots


def in_partitions(groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> list[list[Piece]]:
    """Where parameters lie in a rank's flat tensors at stage 3: each is cut into `ranks` parts of one size."""
    slots = []
    for group in groups:
        slots.append([])
        at = 0
        for name, shape in group.items():
            part = math.ceil(shape.numel() / ranks)
            start = min(part * rank, shape.numel())
            slots[-1].append(Piece(name, at, start, min(part, shape.numel() - start)))
            at += part
    return slots


def gather(whole: FullState, slots: list[list[Piece]], masters: list[torch.Tensor], base: dict, *, seen: dict,
           shapes: dict) -> None:
    """Copy one file's pieces into the whole; `seen` counts the elements of each (parameter, key)."""
    for i, (pieces, master) in enumerate(zip(slots, masters, strict=True)):
        tensors = dict(base["state"].get(i, {}))
        # DeepSpeed's fused Adam counts in one of a group's states only.
        whole.step = max(whole.step, int(tensors.pop("step", 0)))
        for key, flat in {"fp32": master, **tensors}.items():
            for name, at, start, numel in pieces:
                if name not in shapes:
                    raise UserError(f"the checkpoint trains {name}, this run does not")
                parts = whole.parameters[name]
                if key not in parts:
                    parts[key] = torch.empty(shapes[name].numel(), dtype=flat.dtype)
                parts[key][start:start + numel] = flat.detach().reshape(-1)[at:at + numel]
                seen[name, key] = seen.get((name, key), 0) + numel


def gather_fixed(whole: FullState, model: dict, names: set[str], *, whole_files: bool) -> None:
    """Frozen parameters and buffers: whole in each file, or frozen parameters in parts at stage 3."""
    parts = {} if whole_files else model.get("frozen_param_fragments") or {}
    for name in names:
        if name in parts:
            numel = model["frozen_param_shapes"][name].numel()
            before = whole.fixed.get(name, parts[name].new_empty(0))
            whole.fixed[name] = torch.cat([before, parts[name].reshape(-1)])[:numel]
        elif name in model["module"] and (whole_files or name in model["buffer_names"]):
            whole.fixed[name] = model["module"][name].detach().reshape(-1).clone()
