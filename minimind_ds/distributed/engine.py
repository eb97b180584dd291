"""The DeepSpeed engine: find this process's rank, open the process group, wrap the model, step the optimizer.

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

from minimind_ds.distributed import deepspeed_compat, malloc, rendezvous, torch_compat
from minimind_ds.distributed.world import World, export

TIMEOUT_MINUTES = 30


class NonFinite(RuntimeError):
    """A loss or gradient is NaN or infinite; the update was not applied."""


def start(world: World, hang_minutes: float = 0.0, settings: dict | None = None) -> None:
    """Open the process group and quieten DeepSpeed.  Imports deepspeed (some seconds).

    Args:
        hang_minutes: after which a watchdog ends the run; 0: none does.
        settings: what must be alike on all ranks.

    Raises:
        ValueError: the ranks do not find each other, or differ.
    """
    if world.device.type == "cpu":
        # Ranks on one machine share its cores; more threads than cores is several times slower.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, world.local_size)))
    else:
        torch.cuda.set_device(world.device)
    export(world)
    deepspeed_compat.choose_accelerator(world.device)
    # Some seconds, which --help and a mistake in a flag need not wait for.
    import deepspeed
    from deepspeed.utils import logger

    torch_compat.lock_builds()
    deepspeed_compat.compile_without_symbols(deepspeed)
    logger.setLevel(logging.ERROR)
    # DeepSpeed still calls collectives by names that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cpu":
        deepspeed_compat.start_no_programs(deepspeed)
    backend, timeout = "gloo" if world.device.type == "cpu" else "nccl", patience(hang_minutes)
    if world.size > 1 and not dist.is_initialized():
        # Ranks of a loaded machine may begin a minute apart.
        limit = datetime.timedelta(minutes=max(hang_minutes or TIMEOUT_MINUTES, 5))
        store = rendezvous.join(world, settings or {}, limit)
        # Until here it was the time to gather; checkpoints and notes go through it from now on.
        store.set_timeout(timeout)
        device = {"device_id": world.device} if world.device.type == "cuda" else {}
        with rendezvous.opening(store, world, backend):
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout,
                                    **device)
    if world.size == 1:
        # It meets nobody, and the library looks for its interface all the same.
        rendezvous.check_interface((backend,))
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)


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
        config: a DeepSpeed configuration without "auto" (deepspeed_json.resolve).

    Returns:
        The DeepSpeed engine.  Its learning rate is set by the caller unless the JSON names a scheduler.
    """
    import deepspeed
    from deepspeed.utils import logger

    if asks_for_log(config):
        # What prints them has a level of its own.
        for one in (logger, *logger.handlers):
            one.setLevel(logging.INFO)
    if config.get("zero_optimization", {}).get("stage", 0) == 0 and not (config["fp16"]["enabled"]
                                                                         or config["bf16"]["enabled"]):
        # deepspeed_compat.clip_gradients does it instead.
        config = {**config, "gradient_clipping": 0.0}
    if next(model.parameters()).device.type == "cpu":
        malloc.keep(sum(p.numel() for p in model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=trained)
    deepspeed_compat.undo_warm_start(engine)
    # Groups with a rate of their own (Muon's) keep it, as a share of the optimizer's.
    peak, groups = config["optimizer"]["params"].get("lr") or 1.0, engine.optimizer.param_groups
    # Muon over ZeRO: what DeepSpeed takes the norm of is the orthogonal update.
    engine.has_gradient_norm = config["optimizer"]["type"].lower() != "muon" or engine.zero_optimization_stage() == 0
    engine.lr_shares = [1.0 if "scheduler" in config else float(group["lr"]) / peak for group in groups]
    engine.basic_optimizer.skip_update = False
    engine.basic_optimizer.register_step_pre_hook(leave_out_skipped)
    engine.before_update, take = None, functools.partial(take_norms, engine)
    engine.takes_norms = (deepspeed_compat.take_norm_once(engine, take)
                          or deepspeed_compat.update_together(engine, take))
    return engine


def leave_out_skipped(optimizer, args, kwargs) -> None:
    """Runs before every optimizer update, on gradients already reduced, unscaled and clipped."""
    if optimizer.skip_update:
        # Without gradients Adam leaves parameters, moments and counts alone; DeepSpeed's too.
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


def take_norms(engine, norms: list[torch.Tensor]) -> list[float]:
    """Runs in engine.step(), when all gradients are reduced and before the first weight changes.

    Args:
        norms: of the gradients, over all ranks; not finite, or -1, where a gradient is not finite on any rank.

    Returns:
        Them, through engine.before_update (list[Tensor] -> list[float]) where it is set; what that raises goes up.
    """
    return engine.before_update(norms) if engine.before_update else torch.stack(norms).tolist()


def grad_norm(engine, scale: float) -> float | None:
    """Global 2-norm of the gradients before clipping, as DeepSpeed took it in the last step; None if it did not."""
    norm = engine.get_global_grad_norm() if engine.has_gradient_norm else None
    return None if norm is None else float(norm) / scale


def asks_for_log(config: dict) -> bool:
    """Whether a DeepSpeed configuration has settings whose only effect is in DeepSpeed's log."""
    return (any(config.get(key, False) for key in ("wall_clock_breakdown", "memory_breakdown", "dump_state"))
            or config.get("comms_logger", {}).get("enabled", False))


def log_communication(config: dict) -> None:
    """DeepSpeed's summary of the collectives of a run, where the configuration asks for one; collective."""
    if config.get("comms_logger", {}).get("enabled", False):
        from deepspeed import comm

        comm.log_summary()


def set_lr(engine, lr: float) -> None:
    """The rate of every group: `lr`, times the group's share where the JSON gives it a rate of its own."""
    for group, share in zip(engine.optimizer.param_groups, engine.lr_shares):
        group["lr"] = lr * share


def learning_rates(engine) -> list[float]:
    """The rate of every group, as the coming update will use it."""
    return [float(group["lr"]) for group in engine.optimizer.param_groups]


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
    masters = deepspeed_compat.stage_zero_masters(engine)
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
