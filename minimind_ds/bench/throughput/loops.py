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

from minimind_ds.bench.throughput.cell import full_steps
from minimind_ds.bench.throughput.padded import PaddedMiniMind
from minimind_ds.convert import weights
from minimind_ds.data.loader import load_micro_batch
from minimind_ds.data.packing import permutation
from minimind_ds.distributed import engine
from minimind_ds.model.decoder import MiniMindForCausalLM
from minimind_ds.model.loss import scaled_loss
from minimind_ds.training.loop import build_engine
from minimind_ds.training.prepare import DTYPES, Job
from minimind_ds.training.step import Position, fetch, train_step


@dataclasses.dataclass
class Loop:
    """A training loop to be timed: `step()` trains once and returns the real tokens it saw and its loss."""

    name: str
    step: object


def padded_loop(job: Job, dtype: str, rows: int, length: int, start: dict) -> Loop:
    """MiniMind's trainer: `rows` samples padded to `length`, autocast in bf16, AdamW on fp32 weights, clipping at 1.

    Args:
        start: the weights both loops start from, in our names.
    """
    model = PaddedMiniMind(job.model_config).to(job.layout.device).train()
    model.load_state_dict(weights.to_minimind(start, job.model_config))
    optimizer = adamw(job, model.parameters())
    store, state = job.stores[0], {"at": 0}
    order = permutation(len(store.lengths), job.run.seed)

    def step():
        chosen = [int(order[(state["at"] + i) % len(order)]) for i in range(rows)]
        state["at"] += rows
        batch = load_micro_batch(store, [[i] for i in chosen], length, job.tokenizer.pad_id).to(job.layout.device)
        with torch.autocast(job.layout.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss, aux, _ = model(batch.input_ids, batch.labels)
        (loss + aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.n_tokens, loss.item()

    return Loop(f"padded {dtype}", step)


def packed_loop(job: Job, name: str) -> Loop:
    """This project: the trainer's own step on packed rows under DeepSpeed."""
    ds_engine = build_engine(job)
    state = {"at": 0}

    def step():
        plan, at = job.first_plan, state["at"] % full_steps(job)
        state["at"] += 1
        engine.set_lr(ds_engine, job.run.learning_rate)
        batches = fetch(job, 0, plan, range(at, at + 1))
        line = train_step(job, ds_engine, plan, Position(state["at"], 0, at), batches)
        return line["tokens"], line["loss"]

    return Loop(name, step)


def adamw(job: Job, parameters) -> torch.optim.AdamW:
    run = job.run
    return torch.optim.AdamW(parameters, lr=run.learning_rate, fused=True, betas=(run.adam_beta1, run.adam_beta2),
                             eps=run.adam_epsilon, weight_decay=run.weight_decay)


def torch_loop(job: Job, name: str, *, ddp: bool) -> Loop:
    """Our model without an engine: PyTorch alone on one rank, or under DistributedDataParallel.

    What DeepSpeed does at stage 0, and no more: in half precision parameters and gradients are 16 bits wide and AdamW
    updates fp32 masters; gradients are clipped; nothing is checked for being finite.
    """
    run, layout = job.run, job.layout
    torch.manual_seed(run.seed)
    model = MiniMindForCausalLM(job.model_config, kernels=run.kernels, balance=run.moe_balance)
    if job.start_weights is not None:
        model.load_weights(job.start_weights)
    model.gradient_checkpointing = run.gradient_checkpointing
    if run.compile:
        model.compile_layers()
    params = list(model.to(layout.device).train().parameters())
    half = run.dtype != "fp32"
    masters = [p.detach().clone().requires_grad_() for p in params] if half else params
    model.to(DTYPES[run.dtype])
    wrapped = DistributedDataParallel(model) if ddp else model
    optimizer, state = adamw(job, masters), {"at": 0}

    def step():
        at = state["at"] % full_steps(job)
        state["at"] += 1
        facts = job.first_plan.facts(at)
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        for micro, batch in enumerate(fetch(job, 0, job.first_plan, range(at, at + 1))):
            batch = batch.to(layout.device, non_blocking=True)
            last = micro + 1 == run.accumulation_steps
            with contextlib.nullcontext() if last or not ddp else wrapped.no_sync():
                out = wrapped(batch)
                scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                            step_real=facts.n_tokens, dp_world=layout.ranks).backward()
            total += out.loss_sum.detach().double()
        if ddp:
            dist.all_reduce(total)
        update(params, masters, optimizer, run.grad_clip)
        return facts.n_tokens, total.item() / facts.n_labelled

    return Loop(name, step)


def update(params: list, masters: list, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """Clip and step; 16-bit parameters by way of their masters."""
    if masters is not params:
        for master, p in zip(masters, params):
            master.grad = p.grad.float()
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(masters, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if masters is not params:
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        for p in params:
            p.grad = None
