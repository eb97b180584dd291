"""A run cut down to what a minute can prove: some of its samples, and its model or one of the same architecture.

    python launch/verify.py --deepspeed ds_configs/zero2.json --preset minimind-3
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.config.precision import DTYPES
from minimind_ds.convert import minimind
from minimind_ds.data.packing import permutation
from minimind_ds.data.sample import Sample
from minimind_ds.data.sources import Mixture
from minimind_ds.model.decoder import MiniMindForCausalLM, kernel_requirements
from minimind_ds.training.build import build_model
from minimind_ds.training.prepare import PreparedRun, plan_epoch

# What is taken of data and model.  Parameters and tokens of a law's step, on a CPU and on a GPU.
MOST_PARAMETERS = {"cpu": 8e6, "cuda": 300e6}
TOKENS = {"cpu": 2048, "cuda": 16384}
LONGEST = {"cpu": 512, "cuda": 4096}
# Rows of a step for each rank, so that it can be cut into 1, 2 or 4 micro-batches.
ROWS = 4
STEPS = 4


def count(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in minimind.expected_shapes(config).values())


def cut_down(config: ModelConfig, most: float) -> tuple[ModelConfig, str | None]:
    """The configuration, or a smaller one of the same architecture, and what was cut.

    Heads, head size, experts, vocabulary and everything without a size stay; layers go first, then widths.
    """
    if count(config) <= most:
        return config, None
    small = dataclasses.replace(config, num_hidden_layers=min(2, config.num_hidden_layers))
    while count(small) > most and small.hidden_size > 64:
        halves = {name: max(32, getattr(small, name) // 2 // 16 * 16)
                  for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")}
        small = dataclasses.replace(small, **halves)
    said = f"{small.num_hidden_layers} of {config.num_hidden_layers} layers"
    if small.hidden_size != config.hidden_size:
        said += f", hidden size {small.hidden_size} instead of {config.hidden_size}"
    return small, f"{said}: {count(small) / 1e6:.1f} M parameters instead of {count(config) / 1e6:.1f} M"


def choose_samples(store: Mixture, *, tokens: int, longest: int, seed: int) -> Mixture:
    """Samples of about so many tokens together: drawn from those short enough, or the shortest four."""
    fitting = np.flatnonzero(store.lengths <= longest)
    if len(fitting) < 4:
        fitting = np.argsort(store.lengths, kind="stable")[:4]
    drawn = fitting[permutation(len(fitting), seed, 9)]
    enough = int(np.searchsorted(np.cumsum(store.lengths[drawn]), tokens)) + 1
    return store.subset(np.sort(drawn[:max(4, enough)]), "verify")


@dataclass(frozen=True)
class ReducedRun:
    """The user's run, its small model, the samples the laws are proved on, and what they are proved with.

    cut: what was cut off the model, or None.  spec32: the run's kernels, or auto if they have no fp32.
    """

    prepared: PreparedRun
    config: ModelConfig
    cut: str | None
    store: Mixture
    row_len: int
    spec: str
    spec32: str

    def layout(self, *, accumulation: int, dtype: str, **changes) -> PreparedRun:
        """The small run with this split of a step's rows, in this precision; other RunConfig fields as changed.

        Dropout is off unless the run keeps it: two runs are compared that draw apart.
        """
        prepared, ds = self.prepared, copy.deepcopy(self.prepared.ds)
        dropout = {} if changes.pop("keep_dropout", False) else {"dropout": 0.0}
        run = prepared.run.replace(**{
            "batch_size": ROWS // accumulation, "accumulation_steps": accumulation, "pack_len": self.row_len,
            "max_seq_len": self.row_len, "dtype": dtype, "kernels": self.spec if dtype == prepared.run.dtype
            else self.spec32, "compile": False, "epochs": STEPS, "max_steps": STEPS, "eval_interval": 0,
            "stop_after": 0, "patience": 0, "keep_best": False, "keep_weights_only": False, **changes})
        ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"] = ROWS // accumulation, accumulation
        ds["gradient_clipping"] = float(run.grad_clip)
        for name in ("bf16", "fp16"):
            ds[name]["enabled"] = dtype == name
        adapters = prepared.lora and dataclasses.replace(prepared.lora, **dropout)
        stores = [self.store] * STEPS
        return dataclasses.replace(
            prepared, run=run, ds=ds, model_config=dataclasses.replace(self.config, **dropout), stores=stores,
            eval_sets=(), first_plan=plan_epoch(self.store, run, prepared.data_parallel_size, 0),
            lora=adapters,
            start_weights=None if self.cut else prepared.start_weights, notes=())

    def model(self, spec: str, dtype: torch.dtype, *, balance: str = "document") -> MiniMindForCausalLM:
        """The small model outside DeepSpeed, with the weights build_engine gives it."""
        prepared = self.layout(accumulation=1, dtype="fp32")
        return build_model(prepared, kernels=spec, balance=balance).to(prepared.world.device, dtype)

    def rows(self) -> list[list[Sample]]:
        """The samples of a run's first step, row by row."""
        plan = self.layout(accumulation=1, dtype="fp32").first_plan
        return [[self.store[index] for index in row] for row in plan.rows(0)]


def make_reduced_run(prepared: PreparedRun, tokens: int) -> ReducedRun:
    """tokens: of a law's step, about; 0: what fits this machine."""
    kind = prepared.world.device.type
    config, cut = cut_down(prepared.model_config, MOST_PARAMETERS[kind])
    store = choose_samples(prepared.stores[0], tokens=tokens or TOKENS[kind], longest=LONGEST[kind],
                           seed=prepared.run.seed)
    rows = ROWS * prepared.data_parallel_size
    # Rows that fill about two steps, whose length can be cut over the ranks that share a row.
    enough = max(int(store.lengths.max()), math.ceil(int(store.lengths.sum()) / (2 * rows)))
    multiple = 8 * prepared.dims.sequence
    spec = kernels.with_compiled(prepared.run.kernels) if prepared.run.compile else prepared.run.kernels
    return ReducedRun(prepared, config, cut, store, math.ceil(enough / multiple) * multiple, spec, in_fp32(spec,
                                                                                                           prepared))


def in_fp32(spec: str, prepared: PreparedRun) -> str:
    try:
        kernels.resolve(spec, prepared.world.device, DTYPES["fp32"], kernel_requirements(prepared.model_config))
    except UserError:
        return "auto"
    return spec
