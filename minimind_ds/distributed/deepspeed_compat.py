"""Every reach into DeepSpeed that its documentation does not cover: faults put right, and what has no public door.

WORKAROUNDS says of each what is wrong upstream, the releases it was seen in and when it can go.

    python -m pytest tests/distributed/test_compat.py
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import math
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.distributed.torch_compat import Workaround
from minimind_ds.distributed.world import current_device

SEEN = "0.19.7, 0.19.8"
WORKAROUNDS = {
    "choose_accelerator": Workaround("without a GPU the choice of a device starts programs, and may find none", SEEN,
                                     "a documented way to say so in the configuration"),
    "start_no_programs": Workaround("runs a compiler to see whether operations could be built; stage 3 starts numactl "
                                    "at every bucket of gradients to count devices, and every operation others to "
                                    "know the processor", SEEN, "they are remembered upstream"),
    "compile_without_symbols": Workaround("C++ operations are compiled with symbols for debuggers: two thirds of the "
                                          "time", SEEN, "-g is gone from the builder's arguments"),
    "undo_warm_start": Workaround("stage 0 in half precision takes one step on zero gradients when it is made, so "
                                  "Adam begins at count 1", SEEN, "the count is 0 after initialize"),
    "continue_betas": Workaround("C++ Adam keeps beta^step as a running product that no checkpoint holds", SEEN,
                                 "the product is restored on load"),
    "clip_gradients": Workaround("stage 0 in fp32 takes the gradients' norm in fp32: off by 1e-4 on a CPU", SEEN,
                                 "the norm is taken in fp64, as at the other stages"),
    "take_norm_once": Workaround("stages 1 to 3 wait for the GPU at the norm, stages 1 and 2 again for every group of "
                                 "parameters; these take it, and look for infinities, by kernels of each parameter's "
                                 "own: 1,400 with MiniMind-3", SEEN,
                                 "a hook that is given the norm before the update, and foreach kernels"),
    "update_together": Workaround("stage 0 in half precision updates parameter by parameter: 2,300 kernels and 90 "
                                  "waits for the GPU with MiniMind-3, its norm is taken in fp32", SEEN,
                                  "FP16_UnfusedOptimizer has foreach kernels and a norm in fp64"),
    "loss_scale": Workaround("stage 0 with fp16 divides gradients by a loss scale that engine.backward has not "
                             "multiplied the loss with: nothing is clipped, Adam's eps outweighs small gradients, and "
                             "underflow stays", SEEN, "engine.backward scales the loss at every stage"),
    "norm_scale": Workaround("stage 0 with fp16 reports the gradients' norm with the loss scale still in it, unless "
                             "DeepSpeed's own fused Adam updates", SEEN,
                             "get_global_grad_norm is unscaled at every stage"),
    "stage_zero_masters": Workaround("the fp32 masters of stage 0 have no accessor", SEEN,
                                     "safe_get_full_fp32_param serves stage 0"),
    "link_moments": Workaround("moments are linked to parameters once, after the update of the first group: experts "
                               "with a group of their own are left out", SEEN,
                               "safe_get_full_optimizer_state finds them"),
    "fragments": Workaround("where a parameter lies in a rank's flat partition has no accessor", SEEN,
                            "a public mapping of parameters to fragments"),
    "recorded_files": Workaround("a checkpoint is written where it is made, and rank 0 copies programs into it while "
                                 "the others wait", SEEN, "a documented checkpoint engine that takes the states over"),
    "load_states": Workaround("checkpoint files are unpickled with all that a pickle may do", SEEN,
                              "DeepSpeed loads with weights_only=True"),
    "safe_loading": Workaround("as load_states, in load_checkpoint", SEEN, "DeepSpeed loads with weights_only=True"),
    "all_to_all_heads": Workaround("the all-to-all of Ulysses is private, its public layer reshapes for itself", SEEN,
                                   "a public autograd all-to-all"),
    "expert_parts": Workaround("AutoEP knows expert parameters by its own layer's class, and finds their groups by "
                               "private functions", SEEN, "a documented mark for expert parameters"),
}


def choose_accelerator(device: torch.device) -> None:
    """Before deepspeed is imported: it would look for a GPU by itself, and not find every CPU.

    Raises:
        UserError: DS_ACCELERATOR names another device than the one that is trained on.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    said = os.environ.get("DS_ACCELERATOR", device.type)
    if said != device.type:
        raise UserError(f"the environment says DS_ACCELERATOR={shown(said)}, and this is {device.type}: unset it")


def start_no_programs(deepspeed) -> None:
    """On a CPU: nothing is compiled to find out whether it could be, and devices are counted once."""
    # Every operation that is built or loaded asks twice, by programs that run a second.
    with contextlib.suppress(ImportError):
        import cpuinfo

        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    # The shared-memory all-reduce is compiled at first use (about 45 s) and gains nothing at these sizes.
    deepspeed.ops.__compatible_ops__ = {}
    accelerator = deepspeed.get_accelerator()
    accelerator.device_count = functools.cache(accelerator.device_count)


def compile_without_symbols(deepspeed) -> None:
    """All C++ optimizers of this accelerator are compiled without symbols for debuggers."""
    adam = deepspeed.get_accelerator().get_op_builder("CPUAdamBuilder")
    if adam is None:
        return
    # Lion, Adagrad and the CPU's FusedAdam have it from the same class.
    base = next(kind for kind in adam.__mro__ if "cxx_args" in vars(kind))
    if not hasattr(base.cxx_args, "__wrapped__"):
        base.cxx_args = functools.wraps(base.cxx_args)(
            lambda builder, own=base.cxx_args: [*own(builder), "-g0"])


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


def clip_gradients(engine, max_norm: float) -> Tensor | None:
    """Clip the gradients to a global 2-norm of `max_norm` (0: leave them) before engine.step(), at stage 0 in fp32.

    DeepSpeed clips at the other stages and in half precision; there this returns None.  At stage 0 in fp32 it takes
    the norm in fp32, which on a CPU is off by 1e-4 for an embedding's gradient: enough to tell the stages' curves
    apart.  Here it is taken in fp64, as at the other stages.

    Returns:
        The norm before clipping, fp64, on the gradients' device: nothing here waits for it.
    """
    if engine.zero_optimization_stage() > 0 or hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    # torch documents its foreach functions under these names.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)))
    if max_norm > 0:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
    return norm


def take_norm_once(engine, take: Callable[[list[Tensor]], list[float]]) -> bool:
    """At stages 1 to 3: within engine.step(), once all gradients are reduced and before any update, `take` is given
    their norms and gives them back as numbers; DeepSpeed goes on with those, and waits for the GPU no more.

    A norm is not finite where a gradient is not, so it also stands for DeepSpeed's check of every gradient at stages 1
    and 2, unless bf16.check_grad_overflow asks for that (with fp16 it is always made: a step that it skips has no
    norm).

    Returns:
        Whether it is so: not at stage 0.
    """
    from deepspeed import comm

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return False

    def numbers(norms: list[Tensor]) -> list[Tensor]:
        return [torch.tensor(value, dtype=norm.dtype) for value, norm in zip(take(norms), norms)]

    if stage == 3:
        groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: numbers(groups())
        return True
    total = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda norm_type=2: numbers([total(norm_type)])[0]
    if not optimizer.check_grad_overflow:
        # DeepSpeed would not look at the norm either.
        optimizer.check_grad_overflow, optimizer.check_overflow = True, lambda partition_gradients=True: None

    def partition_norm(gradients, params, norm_type=2):
        norms = torch._foreach_norm([g for g in gradients if not getattr(g, "_zero_padding", False)], 2,
                                    dtype=torch.float64)
        square = torch.stack(norms).pow(2).sum().float() if norms else torch.zeros((), device=optimizer.device)
        comm.all_reduce(square, group=optimizer.dp_process_group)
        return square.pow(0.5)

    optimizer.get_grad_norm_direct = partition_norm
    return True


def update_together(engine, take: Callable[[list[Tensor]], list[float]]) -> bool:
    """At stage 0 in half precision: DeepSpeed's update, all parameters at once, with `take` as in take_norm_once.

    The norm is taken in fp64, as at the other stages; everything else is DeepSpeed's, to the last bit.

    Returns:
        Whether it is so: not for DeepSpeed's own fused Adam and Lamb, which have an update of another kind.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() > 0:
        return False
    if hasattr(optimizer, "fp32_groups_flat"):
        # The norm that it takes next tells the same as its check of every gradient.
        optimizer.overflow_checker.has_overflow = lambda params: False
    if not hasattr(optimizer, "fp32_groups") or optimizer.fused_lamb_legacy:
        return False
    highs, lows = (list(itertools.chain(*groups)) for groups in (optimizer.fp32_groups, optimizer.fp16_groups))

    @torch.no_grad()
    def step(closure=None):
        for high, low in zip(highs, lows):
            high.grad = torch.zeros_like(high) if low.grad is None else torch.empty_like(high)
        pairs = [(high.grad, low.grad) for high, low in zip(highs, lows) if low.grad is not None]
        torch._foreach_copy_(*map(list, zip(*pairs)))
        grads = [high.grad for high in highs]
        norm, = take([torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)))])
        if not math.isfinite(norm):
            return optimizer._skip_invalid_grad_norm()
        optimizer.overflow, optimizer._global_grad_norm = False, norm
        optimizer._update_scale(False)
        scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        if scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / scale)
        optimizer.optimizer.step()
        for high in highs:
            high.grad = None
        torch._foreach_copy_(lows, highs)
        return False

    optimizer.step = step
    return True


def loss_scale(engine) -> float:
    """What the loss has to be multiplied with before engine.backward: at stage 0 with fp16 the scale that DeepSpeed
    divides the gradients by, else 1."""
    if engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "loss_scale_config"):
        return float(engine.optimizer.loss_scale_config.cur_scale)
    return 1.0


def norm_scale(engine) -> float:
    """What DeepSpeed's norm of the coming step has to be divided by."""
    return loss_scale(engine) if hasattr(engine.optimizer, "fp32_groups") else 1.0


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


def link_moments(optimizer) -> None:
    """At stages 1 and 2: link all moments to their parameters, those of experts' groups too."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def fragments(group: list[torch.nn.Parameter]) -> list[tuple[torch.nn.Parameter, int, int, int]]:
    """At stages 1 and 2, of a bit16 group: (parameter, start in this rank's partition, start in the parameter, size)
    of every piece that this rank holds."""
    linked = [(p, p._hp_mapping) for p in group if p._hp_mapping is not None]
    return [(p, link.hp_fragment_address.start, link.lp_fragment_address.start, link.hp_fragment_address.numel)
            for p, link in linked]


@contextlib.contextmanager
def recorded_files(engine, copy: Callable) -> Iterator[list[tuple[pathlib.Path, object, Callable | None]]]:
    """Around engine.save_checkpoint: what it would write: (path, state, None) or (path, None, function of it).

    States are copies in memory, made by `copy`; nothing touches the disk.
    """
    own, copy_scripts, files = engine.checkpoint_engine, engine._copy_recovery_script, []

    class Recorder:
        """Stands in for DeepSpeed's writer of files."""

        def __getattr__(self, name: str):
            return getattr(own, name)

        def makedirs(self, path: str, exist_ok: bool = False):
            pass

        def save(self, state_dict, path: str):
            files.append((pathlib.Path(path), copy(state_dict), None))

    engine.checkpoint_engine = Recorder()
    # Were rank 0 to copy programs here and the disk full, the others would wait at DeepSpeed's next barrier for ever.
    engine._copy_recovery_script = lambda folder: files.append(
        (pathlib.Path(folder) / "zero_to_fp32.py", None, lambda path: copy_scripts(path.parent)))
    try:
        yield files
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def load_states(path: str | pathlib.Path, map_location="cpu"):
    """A file of training states, which holds tensors, plain values and four of DeepSpeed's types: no code runs.

    Raises:
        ValueError: anything else is in it.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: it holds more than tensors and DeepSpeed's own types, and opening it could "
                        "run code") from None
    # A manifest can be made for any bytes, and what they say may be a seek to nowhere.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise UserError(f"{path}: not a readable file of training states: {first_line(error)}") from None


@contextlib.contextmanager
def safe_loading(engine) -> Iterator[None]:
    """Around engine.load_checkpoint: files are read by load_states."""
    engine.checkpoint_engine.load = load_states
    try:
        yield
    finally:
        del engine.checkpoint_engine.load


def all_to_all_heads(group, x: Tensor, scatter: int, gather: int) -> Tensor:
    """DeepSpeed's all-to-all for Ulysses: x cut over `group` along `scatter`, put together along `gather`; its
    gradient is the way back."""
    from deepspeed.sequence.layer import _SeqAllToAll

    return _SeqAllToAll.apply(group, x, scatter, gather, 0)


class ExpertParts(NamedTuple):
    """AutoEP's layer (its class marks expert parameters), its autograd all-to-all of unequal parts, and two functions:
    the process group of a name, and the one that makes all groups of a size."""

    layer: type
    all_to_all: type
    group: Callable
    create_groups: Callable


def expert_parts() -> ExpertParts:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV
    from deepspeed.utils import groups

    return ExpertParts(AutoEPMoELayer, _AllToAllV, groups._get_expert_parallel_group,
                       groups._create_expert_and_data_parallel)
