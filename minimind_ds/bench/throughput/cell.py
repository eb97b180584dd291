"""One cell of a sweep: the trainer's own step on real packed data, timed and taken apart, on the ranks at hand.

Runs on every rank.  Warm-up and timed steps are step.train_step as the trainer calls it, prefetching and all.  What
disturbs the clock comes after them: one step that counts memory and traffic, then steps taken apart.

    deepspeed --num_gpus 2 launch/benchmark.py --append out.json --deepspeed ds_configs/zero2.json --preset debug
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist

from minimind_ds import kernels
from minimind_ds.bench.machine import machine
from minimind_ds.bench.throughput.watch import PARTS, Collectives, PartTimer, parted
from minimind_ds.config.errors import UserError
from minimind_ds.config.precision import DTYPES
from minimind_ds.data import loader
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World
from minimind_ds.model import memory_model
from minimind_ds.plan import counted, measure
from minimind_ds.training.build import build_engine
from minimind_ds.training.live import LiveRun
from minimind_ds.training.metrics import flops_per_token
from minimind_ds.training.prepare import PreparedRun, prepare
from minimind_ds.training.step import Position, StepStats, fetch, train_step

MFU = ("6 x matmul parameters (tied head included) + 12 x layers x heads x head_dim x mean keys attended FLOPs a real "
       "token, nothing for recomputation; over the rate of a square matrix product of the same dtype, measured in the "
       "same process on all ranks at once; mfu_vendor is over the vendor's dense figure where that is known")
# Dense bf16 FLOP/s by the vendor's data sheet, by part of the device's name.
VENDOR = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def full_steps(prepared: PreparedRun) -> int:
    """Steps of the first epoch that have all their rows.

    Raises:
        ValueError: not even one has.
    """
    run, plan = prepared.run, prepared.first_plan
    if plan.n_rows < plan.rows_per_step:
        raise UserError(f"{run.data_path}: {plan.n_rows} rows of {run.row_len} tokens are fewer than the "
                         f"{plan.rows_per_step} of one step; use more data, or shorter or fewer rows")
    return plan.n_rows // plan.rows_per_step


def prepare_cell(flags: list[str], world: World) -> PreparedRun:
    """Raises ValueError for what cannot be run, before ranks talk."""
    if world.device.type == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise UserError(f"{world.size} ranks are more than this machine's {torch.cuda.device_count()} GPUs")
    prepared = prepare("sft", flags, world)
    full_steps(prepared)
    return prepared


def run(prepared: PreparedRun, *, warm_up: int, steps: int, split_steps: int = 2) -> dict:
    """Collective.  -> the measured part of the cell's record (docs/BENCHMARK.md), alike on every rank."""
    world, plan = prepared.world, prepared.first_plan
    peak = matmul_rate(prepared)
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    live = LiveRun(engine=build_engine(prepared))
    total = warm_up + steps + 1 + split_steps
    order = [i % full_steps(prepared) for i in range(total)]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine.set_lr(live.engine, prepared.run.learning_rate)
    with loader.Prefetcher(fetch(prepared, 0, plan, order), pin=world.device.type == "cuda") as batches:
        stats, seconds, cpu_seconds = [], [], []
        for i in range(warm_up + steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            one = train_step(prepared, live, plan, Position(i + 1, 0, order[i]), batches)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warm_up:
                stats.append(one)
                seconds.append(time.perf_counter() - began)
                cpu_seconds.append(time.process_time() - cpu_began)
        peaks = peak_memory(world)
        at = warm_up + steps
        held, traffic = counted_step(prepared, live, Position(at + 1, 0, order[at]), batches)
        parts = [split_step(prepared, live, Position(i + 1, 0, order[i]), batches) for i in range(at + 1, total)]
    mine = {"held": held, "traffic": traffic, **peaks, "rss_before_engine": rss_before}
    everyone = [None] * world.size
    dist.all_gather_object(everyone, mine)
    return {**rates(prepared, stats, seconds, peak), "step_cpu_s_all": cpu_seconds,
            "split_s": {part: statistics.median(p[part] for p in parts) for part in PARTS} if parts else None,
            "memory": memory_facts(prepared, live.engine, everyone), "traffic": traffic,
            "sent_bytes_per_step": max(sum(kind["sent"] for kind in r["traffic"].values()) for r in everyone),
            "kernels_chosen": prepared.kernels.reason, "dtype": prepared.run.dtype, "machine": machine(world)}


def rates(prepared: PreparedRun, stats: list[StepStats], seconds: list[float], peak: float) -> dict:
    """Tokens a second and what they make of the machine."""
    ranks, lengths = prepared.world.size, prepared.stores[0].lengths.astype(np.float64)
    real = [one.tokens / s for one, s in zip(stats, seconds)]
    mean_keys = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    flops = flops_per_token(prepared.model_config, mean_keys)
    rate = statistics.median(real)
    vendor = None
    if prepared.world.device.type == "cuda" and prepared.run.dtype != "fp32":
        vendor = next((f for name, f in VENDOR.items() if name in torch.cuda.get_device_name()), None)
    return {"steps": len(stats), "step_s": statistics.median(seconds), "step_s_all": seconds,
            "tokens_per_s": rate, "tokens_per_s_min": min(real), "tokens_per_s_max": max(real),
            "tokens_per_s_per_device": rate / ranks,
            "labelled_tokens_per_s": statistics.median(one.labelled_tokens / s for one, s in zip(stats, seconds)),
            "tokens_per_step": statistics.mean(one.tokens for one in stats),
            "packing_fill": statistics.mean(one.packing_fill for one in stats),
            "flops_per_token": flops, "matmul_flops_per_s_per_device": peak,
            "mfu": rate / ranks * flops / peak, "mfu_vendor": vendor and rate / ranks * flops / vendor,
            "loss_first": stats[0].loss, "loss_last": stats[-1].loss}


def counted_step(prepared: PreparedRun, live: LiveRun, at: Position, batches) -> tuple[dict, dict]:
    """-> (most bytes of state held at any of the step's updates or after it, by kind; collectives by kind)."""
    ds_engine, found = live.engine, []
    step = ds_engine.step

    def look_then_step():
        found.append(counted.held(ds_engine))
        return step()

    ds_engine.step = look_then_step
    try:
        with Collectives() as collectives:
            train_step(prepared, live, prepared.first_plan, at, batches)
    finally:
        del ds_engine.step
    found.append(counted.held(ds_engine))
    return {kind: max(f[kind] for f in found) for kind in counted.KINDS}, collectives.kinds


def split_step(prepared: PreparedRun, live: LiveRun, at: Position, batches) -> dict[str, float]:
    """Seconds of one step by part; collectives are taken out of the part they happen in."""
    stopwatch = PartTimer(prepared.world.device)
    with parted(live.engine, stopwatch), Collectives(stopwatch):
        train_step(prepared, live, prepared.first_plan, at, stopwatch.data(batches))
    stopwatch.turn()
    return stopwatch.seconds


def peak_memory(world: World) -> dict:
    cuda = world.device.type == "cuda"
    return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
            "peak_reserved": torch.cuda.max_memory_reserved() if cuda else None}


def memory_facts(prepared: PreparedRun, ds_engine, everyone: list[dict]) -> dict:
    """Bytes of the rank that holds most, beside what launch/plan.py plans."""
    n = sum(getattr(p, "ds_numel", p.numel()) for p in ds_engine.module.parameters())
    most = {key: max((r[key] for r in everyone if r[key] is not None), default=None)
            for key in ("peak_rss", "peak_allocated", "peak_reserved", "rss_before_engine")}
    return {"parameters": n, "held": {kind: max(r["held"][kind] for r in everyone) for kind in counted.KINDS},
            "planned": planned(prepared),
            **most}


def planned(prepared: PreparedRun) -> dict[str, float]:
    """States by kind as memory_model.states has them, on device and host together, as counted.held counts them.

    Without buckets: stages 1 and 2 have let go of them before the update, when `held` is counted.
    """
    states = memory_model.states(measure.setting(prepared, labelled=0.0))
    return {kind: states["device"][kind] + states["host"][kind] for kind in counted.KINDS if kind != "buckets"}


def matmul_rate(prepared: PreparedRun) -> float:
    """FLOP/s of one rank's square matrix product while all ranks run theirs: the peak that MFU refers to."""
    device = prepared.world.device
    dtype = DTYPES[prepared.run.dtype]
    if device.type == "cpu" and kernels.why_slow(device, dtype):
        # Computed in fp32 there.
        dtype = torch.float32
    n, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    dist.barrier()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    rate = torch.tensor(2 * n**3 / best, dtype=torch.float64, device=device)
    dist.all_reduce(rate)
    return rate.item() / prepared.world.size
