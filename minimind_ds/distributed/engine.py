"""The DeepSpeed engine: find this process's rank, open the process group, wrap the model, take one honest step.

DeepSpeed divides a loss by the accumulation steps and averages gradients over ranks; the trainer normalises by the
labelled tokens of the whole step instead (minimind_ds/model/loss.py), so `backward` here switches the first off and
the loss undoes the second.

    deepspeed --num_gpus 2 launch/sft.py --deepspeed ds_configs/zero2.json
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import warnings

import torch
import torch.distributed as dist

from minimind_ds.distributed import build_lock
from minimind_ds.distributed.world import World, export

TIMEOUT_MINUTES = 30


class NonFinite(RuntimeError):
    """A loss or gradient is NaN or infinite; the update was not applied."""


def choose_accelerator(device: torch.device) -> None:
    """Before deepspeed is imported: it would look for a GPU by itself, and not find every CPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(world: World, hang_minutes: float = 0.0) -> None:
    """Open the process group and quieten DeepSpeed.  Imports deepspeed (some seconds).

    Args:
        hang_minutes: after which a watchdog ends the run; 0: none does.
    """
    if world.device.type == "cpu":
        # Ranks on one machine share its cores; more threads than cores is several times slower.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, world.local_size)))
    else:
        torch.cuda.set_device(world.device)
    export(world)
    choose_accelerator(world.device)
    # Some seconds, which --help and a mistake in a flag need not wait for.
    import deepspeed
    from deepspeed.utils import logger

    build_lock.install()
    logger.setLevel(logging.ERROR)
    # DeepSpeed still calls collectives by names that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cpu":
        # The shared-memory all-reduce is compiled at first use (about 45 s) and gains nothing at these sizes.
        # Whether it could be compiled is not asked either: that runs a compiler.
        deepspeed.ops.__compatible_ops__ = {}
        # Stage 3 asks for it at every gradient bucket, and each time a process (numactl) is started to find out.
        accelerator = deepspeed.get_accelerator()
        accelerator.device_count = functools.cache(accelerator.device_count)
    deepspeed.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False,
                               timeout=patience(hang_minutes))


def patience(hang_minutes: float) -> datetime.timedelta:
    """How long collectives wait: longer than the watchdog, which has more to say than that it has waited."""
    return datetime.timedelta(minutes=max(TIMEOUT_MINUTES, hang_minutes + 5))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def initialize(model: torch.nn.Module, config: dict):
    """Wrap a model.

    Args:
        model: on any device; every rank holds the same weights.
        config: a DeepSpeed configuration without "auto" (ds_config.resolve).

    Returns:
        The DeepSpeed engine.  Its learning rate is set by the caller unless the JSON names a scheduler.
    """
    import deepspeed

    if config.get("zero_optimization", {}).get("stage", 0) == 0 and not (config["fp16"]["enabled"]
                                                                         or config["bf16"]["enabled"]):
        # clip_gradients does it instead.
        config = {**config, "gradient_clipping": 0.0}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=trained)
    undo_warm_start(engine)
    engine.basic_optimizer.skip_update = False
    engine.basic_optimizer.register_step_pre_hook(stop_on_non_finite)
    return engine


def undo_warm_start(engine) -> None:
    """DeepSpeed's half-precision optimizer at stage 0 takes one step on zero gradients when it is made.

    That leaves Adam's step count at 1 and the masters decayed once, so that its first real update differs from every
    other stage's.  Both are put back here.
    """
    if not hasattr(engine.optimizer, "fp16_groups") or engine.zero_optimization_stage() > 0:
        return
    engine.optimizer.refresh_fp32_params()
    for state in engine.basic_optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()
        if isinstance(state.get("step"), int):
            state["step"] = 0


def continue_betas(ds_engine) -> None:
    """After a checkpoint is loaded: bring DeepSpeed's C++ Adam to where it was, to the last bit.

    It keeps beta^step as a running product in fp32, which no checkpoint holds, and after a jump of the step count
    takes pow() instead: a rounding apart.  Updates of a scratch element make the product again, 1.2 us each.
    """
    optimizer, kind = ds_engine.basic_optimizer, type(ds_engine.basic_optimizer).__name__
    # On a GPU FusedAdam is another program, which takes pow() at each step.
    if kind != "DeepSpeedCPUAdam" and not (kind == "FusedAdam" and current_device().type == "cpu"):
        return
    steps = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    group = optimizer.param_groups[0]
    p, grad, exp_avg, exp_avg_sq = torch.zeros(4, 1)
    for step in range(1, steps + 1):
        facts = (0.0, *group["betas"], group["eps"])
        if kind == "DeepSpeedCPUAdam":
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, *facts, 0.0, True, p, grad, exp_avg, exp_avg_sq)
        else:
            optimizer.multi_tensor_adam(1, optimizer._dummy_overflow_buf, [[grad], [p], [exp_avg], [exp_avg_sq]],
                                        *facts, step, optimizer.adam_w_mode, True, 0.0)


def stop_on_non_finite(optimizer, args, kwargs) -> None:
    """Runs before every optimizer update, on gradients already reduced, unscaled and clipped."""
    if optimizer.skip_update:
        # Without gradients Adam leaves parameters, moments and counts alone; DeepSpeed's too.
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    bad = torch.zeros((), device=grads[0].device if grads else "cpu")
    for grad in grads:
        # One pass: any NaN or infinity makes the sum so; a finite sum of finite parts cannot hide one.
        bad += ~torch.isfinite(grad.sum(dtype=torch.float32))
    if dist.get_world_size() > 1:
        bad = bad.to(current_device())
        dist.all_reduce(bad)
    if bad.item() > 0:
        raise NonFinite("a gradient is not finite")


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def clip_gradients(engine, most: float) -> float | None:
    """Clip the gradients to a global 2-norm of `most` (0: leave them) before engine.step(), at stage 0 in fp32.

    DeepSpeed clips at the other stages and in half precision; there this returns None.  At stage 0 in fp32 it takes
    the norm in fp32, which on a CPU is off by 1e-4 for an embedding's gradient: enough to tell the stages' curves
    apart.  Here it is taken in fp64, as at the other stages.

    Returns:
        The norm before clipping.
    """
    if engine.zero_optimization_stage() > 0 or hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
    if most > 0:
        factor = torch.clamp(most / (norm + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
    return norm.item()


def norm_scale(engine, stage: int) -> float:
    """What DeepSpeed's norm of the coming step has to be divided by: at stage 0 it still carries the loss scale."""
    if stage == 0 and hasattr(engine.optimizer, "loss_scale_config"):
        return float(engine.optimizer.loss_scale_config.cur_scale)
    return 1.0


def grad_norm(engine, scale: float) -> float | None:
    """Global 2-norm of the gradients before clipping, as DeepSpeed worked it out in the last step."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm) / scale


def set_lr(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def full_gradients(engine, stage: int) -> dict[str, torch.Tensor]:
    """Every trained parameter's whole gradient in fp32, on all ranks, as the coming update will see it.

    Collective; between the last backward of a step and engine.step(), before clipping.
    """
    from deepspeed.utils import safe_get_full_grad

    grads = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            grad = safe_get_full_grad(param) if stage > 0 else param.grad
            if hasattr(param, "ds_zero_placement_family"):
                from minimind_ds.distributed import expert_parallel

                grad = expert_parallel.whole(param, grad)
            grads[name] = grad.detach().float().clone()
    return grads


def full_weights(engine, stage: int) -> dict[str, torch.Tensor]:
    """Every trained parameter in fp32 (the optimizer's master copy where there is one), on rank 0; {} elsewhere.

    Collective.  A tied head is listed once.  Frozen parameters (the base beside LoRA adapters) are not gathered.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    masters = stage_zero_masters(engine)
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if masters is not None:
            full = masters.get(param, param)
        else:
            full = safe_get_full_fp32_param(param) if stage > 0 else param
        if full is None:
            full = param
        if hasattr(param, "ds_zero_placement_family"):
            from minimind_ds.distributed import expert_parallel

            full = expert_parallel.whole(param, full)
        if dist.get_rank() == 0:
            weights[name] = full.detach().float().cpu().clone()
    return weights


def stage_zero_masters(engine) -> dict | None:
    """Parameter -> fp32 master of DeepSpeed's half-precision optimizer at stage 0; None for every other optimizer."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups") or engine.zero_optimization_stage() > 0:
        return None
    masters = {}
    for i, lows in enumerate(optimizer.fp16_groups):
        if hasattr(optimizer, "fp32_groups"):
            highs = optimizer.fp32_groups[i]
        else:
            # Its variant for fused optimizers keeps each group's masters in one flat tensor.
            parts = optimizer.fp32_groups_flat[i][:sum(p.numel() for p in lows)].split([p.numel() for p in lows])
            highs = [part.view_as(low) for part, low in zip(parts, lows)]
        masters.update(zip(lows, highs))
    return masters
