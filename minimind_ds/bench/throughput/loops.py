"""Training loops to be timed against each other: the trainer's own step, and what it is measured against.

They train one model from the same weights with the same AdamW; all but the padded one on the same batches.

    deepspeed launch/benchmark.py --compare plain
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minimind_ds.bench.masters import masters_update
from minimind_ds.bench.throughput.cell import full_steps
from minimind_ds.bench.throughput.padded import PaddedMiniMind
from minimind_ds.config.precision import DTYPES
from minimind_ds.convert import minimind
from minimind_ds.data.loader import load_micro_batch
from minimind_ds.data.packing import permutation
from minimind_ds.distributed import engine
from minimind_ds.model.loss import scaled_loss
from minimind_ds.training.build import build_engine, build_model
from minimind_ds.training.live import LiveRun
from minimind_ds.training.prepare import PreparedRun
from minimind_ds.training.step import Position, fetch, train_step


@dataclasses.dataclass
class Loop:
    """A training loop to be timed: `step()` trains once and returns the real tokens it saw and its loss."""

    name: str
    step: object


def padded_loop(prepared: PreparedRun, dtype: str, rows: int, length: int, start: dict) -> Loop:
    """MiniMind's trainer: `rows` samples padded to `length`, autocast in bf16, AdamW on fp32 weights, clipping at 1.

    Args:
        start: the weights both loops start from, in our names.
    """
    model = PaddedMiniMind(prepared.model_config).to(prepared.world.device).train()
    model.load_state_dict(minimind.to_minimind(start, prepared.model_config))
    optimizer = adamw(prepared, model.parameters())
    store, state = prepared.stores[0], {"at": 0}
    order = permutation(len(store.lengths), prepared.run.seed)

    def step():
        chosen = [int(order[(state["at"] + i) % len(order)]) for i in range(rows)]
        state["at"] += rows
        batch = load_micro_batch(store, [[i] for i in chosen], length,
                                 prepared.tokenizer.pad_id).to(prepared.world.device)
        with torch.autocast(prepared.world.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss, aux, _ = model(batch.input_ids, batch.labels)
        (loss + aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.n_tokens, loss.item()

    return Loop(f"padded {dtype}", step)


def packed_loop(prepared: PreparedRun, name: str) -> Loop:
    """This project: the trainer's own step on packed rows under DeepSpeed."""
    live = LiveRun(engine=build_engine(prepared))
    state = {"at": 0}

    def step():
        plan, at = prepared.first_plan, state["at"] % full_steps(prepared)
        state["at"] += 1
        engine.set_lr(live.engine, prepared.run.learning_rate)
        batches = fetch(prepared, 0, plan, range(at, at + 1))
        stats = train_step(prepared, live, plan, Position(state["at"], 0, at), batches)
        return stats.tokens, stats.loss

    return Loop(name, step)


def adamw(prepared: PreparedRun, parameters) -> torch.optim.AdamW:
    run = prepared.run
    return torch.optim.AdamW(parameters, lr=run.learning_rate, fused=True, betas=(run.adam_beta1, run.adam_beta2),
                             eps=run.adam_epsilon, weight_decay=run.weight_decay)


def torch_loop(prepared: PreparedRun, name: str, *, ddp: bool) -> Loop:
    """Our model without an engine: PyTorch alone on one rank, or under DistributedDataParallel.

    What DeepSpeed does at stage 0, and no more: in half precision parameters and gradients are 16 bits wide and AdamW
    updates fp32 masters; gradients are clipped; nothing is checked for being finite.
    """
    run, world = prepared.run, prepared.world
    model = build_model(prepared)
    if run.compile:
        model.compile_layers()
    params = list(model.to(world.device).train().parameters())
    half = run.dtype != "fp32"
    masters = [p.detach().clone().requires_grad_() for p in params] if half else params
    model.to(DTYPES[run.dtype])
    wrapped = DistributedDataParallel(model) if ddp else model
    optimizer, state = adamw(prepared, masters), {"at": 0}

    def step():
        at = state["at"] % full_steps(prepared)
        state["at"] += 1
        facts = prepared.first_plan.facts(at)
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for micro, batch in enumerate(fetch(prepared, 0, prepared.first_plan, range(at, at + 1))):
            batch = batch.to(world.device, non_blocking=True)
            last = micro + 1 == run.accumulation_steps
            with contextlib.nullcontext() if last or not ddp else wrapped.no_sync():
                out = wrapped(batch)
                scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                            step_real=facts.n_tokens, dp_world=world.size).backward()
            total += out.loss_sum.detach().double()
        if ddp:
            dist.all_reduce(total)
        masters_update(params, masters, optimizer, run.grad_clip)
        return facts.n_tokens, total.item() / facts.n_labelled

    return Loop(name, step)
