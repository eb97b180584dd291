"""Whether a run fits a rank's memory by the planner's arithmetic, before anything is built.

    python -m pytest tests/plan/test_planner.py -k fits
"""

from __future__ import annotations

import math

import psutil
import torch

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.config.run import RunConfig
from minimind_ds.convert import minimind
from minimind_ds.distributed.world import World
from minimind_ds.model import memory_model
from minimind_ds.model.lora import Lora
from minimind_ds.model.memory_model import GIB

# Arithmetic that is off by half says nothing of a run that is refused.
IMPOSSIBLE = 2


def check_size(config: ModelConfig) -> None:
    """Raises ValueError for a model of which not even the weights come near this machine's memory."""
    n_bytes = 4 * sum(math.prod(shape) for shape in minimind.expected_shapes(config).values())
    memory = psutil.virtual_memory().total
    if n_bytes > IMPOSSIBLE * memory:
        raise UserError(f"the model's weights alone take {n_bytes / GIB:,.0f} GiB in fp32, and this machine has "
                        f"{memory / GIB:,.0f} GiB of memory: choose smaller sizes, or see launch/plan.py")


def setting(run: RunConfig, ds: dict, world: World, config: ModelConfig, dims: ParallelDims, adapters: Lora | None,
            selection: kernels.KernelSelection, labelled: float) -> memory_model.Setting:
    """What a run is to the planner.  labelled: the share of its micro-batch's tokens that have a label."""
    return memory_model.Setting(config=config, ds=ds, dtype=run.dtype, ranks=world.size, row_len=run.row_len,
                                rows=run.batch_size, accumulation=run.accumulation_steps, labelled=labelled,
                                activations=selection.activations.itemsize, on_cpu=world.device.type == "cpu",
                                dims=dims, adapters=adapters, recompute=run.gradient_checkpointing)


def of_a_rank(world: World) -> int:
    """Bytes of this rank's device; of a machine's memory its ranks share."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().total // world.local_size


def check(s: memory_model.Setting, memory: int) -> list[str]:
    """Lines for the start of a run that may not fit.

    Raises:
        UserError: it needs more than IMPOSSIBLE times what there is.
    """
    needed = memory_model.peak(s)
    if needed <= memory:
        return []
    said = (f"{s.rows:,} x {s.row_len:,} tokens a micro-batch of this model at ZeRO stage {s.stage} take "
            f"{needed / GIB:,.1f} GiB a rank by the planner's arithmetic, and a rank has {memory / GIB:,.1f} GiB")
    if needed > IMPOSSIBLE * memory:
        raise UserError(f"{said}: choose smaller sizes, --pack_len or --batch_size; launch/plan.py says what fits")
    return [f"{said}: it may run out of memory; launch/plan.py says what fits"]
