"""A training state free of any layout: what a run on other ranks, stages and shares of the experts goes on from.

minimind_ds/checkpoint/reshape.py makes one out of a checkpoint's files and puts it into an engine.  Where experts are
shared out, checkpoints hold it as it is, because DeepSpeed's files of such a run fit its own MoE layer only.

    python -m pytest tests/checkpoint/test_reshape.py
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from minimind_ds.config.errors import UserError
from minimind_ds.distributed import deepspeed_compat

FILE = "whole.safetensors"
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
# What a scheduler writes into the optimizer's groups.
SCHEDULED = ("lr", "betas")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
HEADER = ("step", "groups", "scaler", "counters", "scheduler")


@dataclass
class FullState:
    """A training state free of any layout.

    parameters: name -> {"fp32": the master, "exp_avg", "exp_avg_sq"}, flat; only "fp32" before the first update.
    fixed: name -> frozen parameter or buffer, flat, in its own dtype; those the checkpoint holds.
    step: Adam's count.  groups: SCHEDULED of each of the optimizer's groups.
    scaler: SCALER of fp16's dynamic loss scale, else {}.  counters: COUNTERS.  scheduler: its state or None.
    """

    parameters: dict[str, dict[str, torch.Tensor]]
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    groups: list[dict] = field(default_factory=list)
    scaler: dict = field(default_factory=dict)
    counters: dict = field(default_factory=dict)
    scheduler: dict | None = None


def collect(ds_engine) -> FullState | None:
    """The state of an engine at ZeRO stage 1, 2 or 3 whose experts are shared out, on rank 0; None elsewhere.

    Collective; it goes through DeepSpeed's own accessors, one parameter at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from minimind_ds.distributed import expert_parallel

    stage, optimizer, basic = ds_engine.zero_optimization_stage(), ds_engine.optimizer, ds_engine.basic_optimizer
    assert stage > 0
    if stage < 3:
        deepspeed_compat.link_moments(optimizer)
    steps = (int(state["step"]) for state in basic.state.values() if "step" in state)
    whole = FullState({}, step=max(steps, default=0),
                  groups=[{key: group[key] for key in SCHEDULED if key in group} for group in basic.param_groups],
                  scaler=read_scaler({"loss_scaler": optimizer.loss_scaler}),
                  counters={name: getattr(ds_engine, name) for name in COUNTERS},
                  scheduler=ds_engine.lr_scheduler and ds_engine.lr_scheduler.state_dict())
    for name, p in ds_engine.module.named_parameters():
        assert p.requires_grad, name
        parts = {"fp32": safe_get_full_fp32_param(p)}
        if whole.step:
            parts |= {key: safe_get_full_optimizer_state(p, key) for key in KEYS[1:]}
        parts = {key: expert_parallel.whole(p, tensor) for key, tensor in parts.items()}
        if dist.get_rank() == 0:
            whole.parameters[name] = {key: tensor.detach().reshape(-1).cpu().clone() for key, tensor in parts.items()}
    return whole if dist.get_rank() == 0 else None


def write_file(whole: FullState, path: pathlib.Path) -> None:
    """One safetensors file, no pickle: tensors as "<name> <key>", the rest as JSON in its header."""
    tensors = {f"{name} {key}": flat for name, parts in whole.parameters.items() for key, flat in parts.items()}
    tensors |= {f"{name} fixed": flat for name, flat in whole.fixed.items()}
    save_file(tensors, path, metadata={name: json.dumps(getattr(whole, name)) for name in HEADER})


def read_file(folder: pathlib.Path, *, shapes: dict[str, torch.Size]) -> FullState:
    """What write_file wrote.

    Args:
        shapes: the trained parameters and their whole shapes.

    Raises:
        ValueError: the file does not hold exactly these parameters.
    """
    with safe_open(folder / FILE, "pt") as file:
        whole = FullState({}, **{name: json.loads(text) for name, text in file.metadata().items() if name in HEADER})
        for full in file.keys():
            name, key = full.rsplit(" ", 1)
            if key == "fixed":
                whole.fixed[name] = file.get_tensor(full)
            else:
                whole.parameters.setdefault(name, {})[key] = file.get_tensor(full)
    sizes = {name: parts["fp32"].numel() for name, parts in whole.parameters.items()}
    wanted = {name: shape.numel() for name, shape in shapes.items()}
    differing = sorted(name for name in sizes.keys() | wanted.keys() if sizes.get(name) != wanted.get(name))
    if differing:
        raise UserError(f"{folder / FILE} does not fit this model: {differing[0]}")
    return whole


def read_scaler(states: dict) -> dict:
    """fp16's dynamic loss scale; {} where the scale never moves."""
    source = vars(states["loss_scaler"]) if "loss_scaler" in states else states
    return {key: source[key] for key in SCALER if key in source} if "last_overflow_iter" in source else {}
