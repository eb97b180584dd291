"""The model of a prepared run, and the DeepSpeed engine around it: one place for training, verify, plan and benchmark.

    live = LiveRun(engine=build_engine(prepared))
"""

from __future__ import annotations

import torch

from minimind_ds.distributed import engine, sequence_parallel
from minimind_ds.model import lora
from minimind_ds.model.decoder import MiniMindForCausalLM
from minimind_ds.training.prepare import PreparedRun


def build_model(prepared: PreparedRun, *, kernels: str | None = None,
                balance: str | None = None) -> MiniMindForCausalLM:
    """The model with the weights that training starts from, in fp32 on the CPU.

    Args:
        kernels: in place of the run's.
        balance: in place of the run's moe_balance.
    """
    run = prepared.run
    torch.manual_seed(run.seed)
    model = MiniMindForCausalLM(prepared.model_config, kernels=kernels or run.kernels,
                                balance=balance or run.moe_balance)
    if prepared.start_weights is not None:
        model.load_weights(prepared.start_weights)
    if prepared.lora:
        lora.attach(model, prepared.lora, lora.fresh(prepared.model_config, prepared.lora, seed=run.seed))
    model.gradient_checkpointing = run.gradient_checkpointing
    return model


def build_engine(prepared: PreparedRun):
    """The model on this rank's device, inside DeepSpeed."""
    run = prepared.run
    model = build_model(prepared)
    if run.compile:
        model.compile_layers()
    model.to(prepared.world.device)
    sequence_parallel.install(model, prepared.dims)
    ds_engine = engine.initialize(model, prepared.ds)
    # Dropout differs between ranks; everything else that is random was drawn above, alike on all.
    torch.manual_seed(run.seed + 1 + prepared.world.rank)
    return ds_engine
