"""Whether what a run writes fits the disk, before it starts: bytes are known from the model and the layout.

    python -m pytest tests/checkpoint/test_saving.py -k disk
"""

from __future__ import annotations

import math
import pathlib
import shutil

from minimind_ds.config import deepspeed_json
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.config.run import RunConfig
from minimind_ds.convert.minimind import expected_shapes
from minimind_ds.model import lora
from minimind_ds.model.lora import Lora
from minimind_ds.terminal import size

# fp32 numbers beside each master; of optimizers that are not here, and of Muon's matrices, fewer are certain.
MOMENTS = {"adam": 2, "adamw": 2, "fusedadam": 2, "lamb": 2, "lion": 1, "adagrad": 1, "muon": 1}


def elements(shapes: dict) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def checkpoint_bytes(ds: dict, dtype: str, config: ModelConfig, adapters: Lora | None, *, experts: int = 1) -> int:
    """The least that a checkpoint takes: its tensors, without headers and programs.

    Args:
        experts: ranks that share them out; with more than one a checkpoint is the whole state.
    """
    stage, width = deepspeed_json.stage_of(ds), 4 if dtype == "fp32" else 2
    frozen = elements(expected_shapes(config)) if adapters else 0
    trained = elements(lora.shapes(config, adapters)) if adapters else elements(expected_shapes(config))
    states = 4 * (1 + MOMENTS.get(ds["optimizer"]["type"].lower(), 0)) * trained
    if experts > 1:
        return states
    if stage == 3:
        return states + width * frozen
    # In fp32 at stage 0 the weights are the masters.
    return states + width * (frozen + trained * (stage > 0 or dtype != "fp32"))


def check(run: RunConfig, ds: dict, config: ModelConfig, adapters: Lora | None, *, experts: int = 1) -> list[str]:
    """Lines for the start of a run that may fill its disk.

    Raises:
        UserError: not even one checkpoint and the final weights fit.
    """
    folder = next(path for path in (pathlib.Path(run.save_dir), *pathlib.Path(run.save_dir).absolute().parents)
                  if path.exists())
    free = shutil.disk_usage(folder).free
    one = checkpoint_bytes(ds, run.dtype, config, adapters, experts=experts) if run.save_interval else 0
    weights = 4 * elements(lora.shapes(config, adapters) if adapters else expected_shapes(config))
    said = f"{run.save_dir}: the disk has {size(free)} free"
    if one + weights > free:
        raise UserError(f"{said}, and a checkpoint takes {size(one)}, the final weights "
                        f"{size(weights)}: make room, or name another --save_dir")
    # The next one is written before the oldest goes.
    most = (run.keep + 1) * one + weights * (1 + run.keep_best)
    if run.save_interval and most > free:
        return [f"{said}, and {run.keep} checkpoints ({run.place('keep')}), the next one and the final weights take "
                f"{size(most)}: the run may fill it"]
    return []
