"""A run's memory as the planner has it, beside what was measured.

    python launch/report.py out/sft
"""

from __future__ import annotations

from typing import NamedTuple

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.model import memory_model
from minimind_ds.model.lora import Lora
from minimind_ds.report.folder import RunFolder, number_of


class Memory(NamedTuple):
    """Bytes of one rank: parts (what, planned), their planned peak, and what rank 0 measured (None: not recorded).

    on_cpu: measured is the process's peak less what it held before it had an engine, `before`.
    """

    parts: list[tuple[str, float]]
    planned: float
    measured: float | None
    before: float
    on_cpu: bool
    where: str


def of(found: RunFolder, labelled: float) -> Memory:
    """labelled: share of the tokens that have a label.

    Raises:
        UserError: the run folder does not say enough of the run.
    """
    start, run, ds = found.last_start, found.config, found.ds
    if not start or run is None or ds is None:
        raise UserError("memory cannot be planned without run.yaml, ds_config.json and starts.json")
    try:
        config = ModelConfig.from_dict(start["model"])
        dims = ParallelDims(sequence=int(start["sequence"]), experts=int(start["experts"]))
        on_cpu, ranks, width = start["device"] == "cpu", int(start["ranks"]), int(start["activation_bytes"])
        adapters = Lora(rank=run.lora_rank, alpha=run.lora_alpha, targets=tuple(run.lora_targets.split(",")),
                        dropout=run.lora_dropout) if run.lora_rank else None
        s = memory_model.Setting(config=config, ds=ds, dtype=run.dtype, ranks=ranks, row_len=run.row_len,
                                 rows=run.batch_size, accumulation=run.accumulation_steps, labelled=labelled,
                                 activations=width, on_cpu=on_cpu, dims=dims, adapters=adapters,
                                 recompute=run.gradient_checkpointing)
        states, made, peak = memory_model.states(s), memory_model.activations(s), memory_model.peak(s)
        gathered = memory_model.gathered(s)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"memory cannot be planned from this run folder ({type(error).__name__}: {error})") from None
    # Without a GPU the host is the device.
    host = sum(states["host"].values()) if on_cpu else 0
    held = {kind: states["device"][kind] + (states["host"][kind] if on_cpu else 0) for kind in states["device"]}
    parts = [*held.items(), ("gathered parameters", gathered),
             *((f"activations: {kind}", size) for kind, size in made.items())]
    ended = [start for start in found.starts if number_of(start.get("peak_bytes")) > 0]
    before = number_of(ended[-1].get("bytes_before")) if ended else 0
    measured = number_of(ended[-1]["peak_bytes"]) - before if ended else None
    return Memory([part for part in parts if part[1]], peak + host, measured, before, on_cpu,
                  f"rank 0, {start.get('name')}")
