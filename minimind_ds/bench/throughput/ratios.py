"""Ratios between training loops, each pair in turns (A B A B ...) in one process: a drifting machine weighs on both.

Only real tokens count.

    deepspeed launch/benchmark.py --compare padded --preset minimind-3 --data_path sft_gsm8k.jsonl
    python launch/benchmark.py --compare plain
"""

from __future__ import annotations

import gc
import pathlib
import statistics
import time
from dataclasses import replace

import torch

from minimind_ds import terminal
from minimind_ds.bench.machine import machine
from minimind_ds.bench.throughput.cell import prepare_cell
from minimind_ds.bench.throughput.loops import Loop, packed_loop, padded_loop, torch_loop
from minimind_ds.config.errors import UserError
from minimind_ds.convert import minimind
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import read_world
from minimind_ds.training.prepare import PreparedRun, prepare

# One rank, as a share of the plain loop's tokens/s.
GOALS = {"zero1": 0.95, "zero2": 0.95, "zero3": 0.85}


def measure(loops: list[Loop], warm_up: int, steps: int, device: torch.device, say) -> dict:
    """Time the loops in turns.  -> by name: median, least and most tokens/s, median seconds, first and last loss."""
    seconds = {loop.name: [] for loop in loops}
    rates = {loop.name: [] for loop in loops}
    losses = {loop.name: [] for loop in loops}
    for round_number in range(warm_up + steps):
        for loop in loops:
            began = time.perf_counter()
            tokens, loss = loop.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            losses[loop.name].append(loss)
            if round_number >= warm_up:
                seconds[loop.name].append(took)
                rates[loop.name].append(tokens / took)
            say(f"round {round_number + 1}/{warm_up + steps}  {loop.name}: {tokens} tokens in {took:.2f} s = "
                f"{tokens / took:,.0f} tokens/s, loss {loss:.3f}")
    return {name: {"tokens_per_s": statistics.median(rates[name]), "tokens_per_s_min": min(rates[name]),
                   "tokens_per_s_max": max(rates[name]), "step_s": statistics.median(seconds[name]),
                   "loss_first": losses[name][0], "loss_last": losses[name][-1], "rates": rates[name],
                   "losses": losses[name]} for name in rates}


def pair(base: Loop, other: Loop, *, warm_up: int, steps: int, device: torch.device, say) -> dict:
    """other / base in tokens/s: the median over rounds of each round's own ratio, with its quartiles."""
    found = measure([base, other], warm_up, steps, device, say)
    a, b = found[base.name], found[other.name]
    ratios = [y / x for x, y in zip(a["rates"], b["rates"])]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    losses = [abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"])]
    return {"ratio": statistics.median(ratios), "ratio_q1": low, "ratio_q3": high, "rounds": steps,
            "tokens_per_s": {base.name: a["tokens_per_s"], other.name: b["tokens_per_s"]},
            "largest_loss_difference": max(losses)}


def compare_engines(program_flags: list[str], *, files: list[str], ddp: bool, warm_up: int, steps: int, say) -> dict:
    """Each DeepSpeed file against PyTorch alone on one rank, or against DistributedDataParallel; collective.

    The same batches from the same weights: in fp32 the losses must be the same too.

    Raises:
        ValueError: a user's mistake in the flags.
        RuntimeError: the loops do not train the same model.
    """
    world = read_world()
    if ddp and world.size < 2:
        raise UserError("--compare ddp needs ranks: deepspeed --num_gpus 2 launch/benchmark.py --compare ddp")
    if not ddp and world.size > 1:
        raise UserError("--compare plain is on one rank: python launch/benchmark.py --compare plain")
    runs = [prepare_cell([*program_flags, "--deepspeed", file], world) for file in files]
    for prepared in runs:
        if prepared.dims.sequence > 1 or prepared.dims.experts > 1 or prepared.lora:
            raise UserError(f"{prepared.run.deepspeed}: the plain loop has no sequence or expert parallelism "
                             "and no LoRA")
    engine.start(world)
    base_name, pairs = "ddp" if ddp else "plain", {}
    for prepared in runs:
        name = pathlib.Path(prepared.run.deepspeed).stem
        base = torch_loop(prepared, base_name, ddp=ddp)
        found = pair(base, packed_loop(prepared, name), warm_up=warm_up, steps=steps, device=world.device, say=say)
        if prepared.run.dtype == "fp32" and not found["largest_loss_difference"] < 1e-3:
            raise RuntimeError(f"{name} and {base_name} do not train the same model: their losses differ by "
                               f"{found['largest_loss_difference']:.1e}")
        goal = None if ddp else GOALS.get(name)
        pairs[f"{name} / {base_name}"] = {**found, **({"goal": goal} if goal else {})}
        del base
        gc.collect()
    return {"what": f"{world.size} rank(s): each DeepSpeed file / {base_name}, real tokens/s, in turns",
            **facts(runs[0]), "pairs": pairs, "machine": machine(world)}


def compare_moe(program_flags: list[str], *, preset: str, file: str, warm_up: int, steps: int, say) -> dict:
    """PRESET-moe / PRESET on the same data and rows; collective.

    Raises:
        ValueError: a user's mistake in the flags.
    """
    world = read_world()
    preset = preset.removesuffix("-moe")
    names = [preset, f"{preset}-moe"]
    dense, moe = (prepare_cell([*without(program_flags, "--preset"), "--preset", name, "--deepspeed", file], world)
                  for name in names)
    engine.start(world)
    found = pair(packed_loop(dense, names[0]), packed_loop(moe, names[1]), warm_up=warm_up, steps=steps,
                 device=world.device, say=say)
    # Two models: their losses are not meant to agree.
    del found["largest_loss_difference"]
    return {"what": "mixture of experts / dense, real tokens/s, in turns", **facts(dense),
            "pairs": {f"{names[1]} / {names[0]}": found}, "machine": machine(world)}


def without(flags: list[str], name: str) -> list[str]:
    """The flags but for `name VALUE`."""
    return [f for i, f in enumerate(flags) if f != name and (i == 0 or flags[i - 1] != name)]


def facts(prepared: PreparedRun) -> dict:
    run = prepared.run
    return {"preset": run.preset, "data": run.data_names, "dtype": run.dtype,
            "rows": f"{run.row_len}x{run.batch_size}x{run.accumulation_steps}", "ranks": prepared.world.size,
            "kernels": prepared.kernels.reason, "packing_fill": prepared.first_plan.fill}


def compare_padded(program_flags: list[str], *, dtypes: list[str], padded_rows: int, warm_up: int, steps: int,
                   say) -> dict:
    """The table of launch/benchmark.py --compare padded, as one JSON-ready dict.  Single process.

    Raises:
        ValueError: a user's mistake in the flags.
    """
    world = read_world()
    if world.size > 1:
        raise UserError("--compare padded runs on one rank: the padded loop is MiniMind's single-device trainer")
    runs = {dtype: prepare("sft", [*program_flags, "--dtype", dtype], world) for dtype in dtypes}
    engine.start(world)
    first = next(iter(runs.values()))
    torch.manual_seed(first.run.seed)
    start = dict(minimind.fresh(first.model_config))
    loops = []
    for dtype, prepared in runs.items():
        loops += [padded_loop(prepared, dtype, padded_rows, prepared.run.max_seq_len, start)]
        loops += [packed_loop(replace(prepared, start_weights=start), f"packed {dtype}")]
    results = measure(loops, warm_up, steps, world.device, say)
    for result in results.values():
        del result["rates"], result["losses"]
    plan, store = first.first_plan, first.stores[0]
    base = results[loops[0].name]["tokens_per_s"]
    for result in results.values():
        result["ratio_to_" + loops[0].name.replace(" ", "_")] = result["tokens_per_s"] / base
    ratios = {dtype: results[f"packed {dtype}"]["tokens_per_s"] / results[f"padded {dtype}"]["tokens_per_s"]
              for dtype in dtypes}
    return {"what": "real (non-padding) tokens per second, training step: forward, backward, clipping, AdamW",
            "preset": first.run.preset, "data": first.run.data_names,
            "mean_length": float(store.lengths.mean()), "padded": f"{padded_rows} rows of {first.run.max_seq_len}",
            "packed": f"{first.run.batch_size} rows of {first.run.row_len}",
            "packing_fill": plan.fill,
            "packed_to_padded_same_dtype": ratios, "loops": results, "machine": machine()}


def table(result: dict) -> str:
    """The result as Markdown."""
    if "pairs" in result:
        rows = [f"{result['preset']}, {result['data']}, {result['dtype']}, {terminal.count(result['ranks'], 'rank')}:",
                "", "| tokens/s | ratio | quartiles | goal |", "|---|---:|---:|---:|"]
        for name, p in result["pairs"].items():
            goal = f"{p['goal']:.2f} {'met' if p['ratio'] >= p['goal'] else 'missed'}" if "goal" in p else ""
            rows.append(f"| {name} | {p['ratio']:.3f} | {p['ratio_q1']:.3f} to {p['ratio_q3']:.3f} | {goal} |")
        return "\n".join([*rows, *(f"\n{note}" for note in result.get("notes", []))])
    first = next(iter(result["loops"]))
    rows = [f"{result['preset']}, {result['data']}:", "",
            f"| loop | real tokens/s | min to max | × {first} |", "|---|---:|---:|---:|"]
    for name, r in result["loops"].items():
        ratio = r["ratio_to_" + first.replace(" ", "_")]
        rows.append(f"| {name} | {r['tokens_per_s']:,.0f} | {r['tokens_per_s_min']:,.0f} to "
                    f"{r['tokens_per_s_max']:,.0f} | {ratio:.2f} |")
    return "\n".join(rows)
