"""Measure the real training step: real tokens per second of this project against MiniMind's padded way.

Both loops train the same model from the same weights on the same samples with the same AdamW, in turns
(padded, packed, padded, packed ...) so that a drifting machine weighs on both alike.  Only real tokens count.

    deepspeed launch/benchmark.py --compare padded --preset minimind-3 --data_path sft_gsm8k.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import statistics
import time

import torch

from minimind_ds import engine, weights
from minimind_ds.data.loader import load_micro_batch
from minimind_ds.data.packing import permutation
from minimind_ds.job import Job, prepare
from minimind_ds.padded import PaddedMiniMind
from minimind_ds.train import Position, build_engine, fetch, train_step

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.run.learning_rate, fused=True,
                                  betas=(job.run.adam_beta1, job.run.adam_beta2), eps=job.run.adam_epsilon,
                                  weight_decay=job.run.weight_decay)
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


def packed_loop(job: Job, dtype: str) -> Loop:
    """This project: the trainer's own step on packed rows under DeepSpeed."""
    ds_engine = build_engine(job)
    state = {"at": 0}

    def step():
        plan, at = job.first_plan, state["at"] % len(job.first_plan)
        state["at"] += 1
        engine.set_lr(ds_engine, job.run.learning_rate)
        batches = fetch(job, 0, plan, range(at, at + 1))
        line = train_step(job, ds_engine, plan, Position(state["at"], 0, at), batches)
        return line["tokens"], line["loss"]

    return Loop(f"packed {dtype}", step)


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
                   "loss_first": losses[name][0], "loss_last": losses[name][-1]} for name in rates}


def compare_padded(program_flags: list[str], *, dtypes: list[str], padded_rows: int, warm_up: int, steps: int,
                   say) -> dict:
    """The table of launch/benchmark.py --compare padded, as one JSON-ready dict.  Single process.

    Raises:
        ValueError: a user's mistake in the flags.
    """
    layout = engine.read_layout()
    if layout.ranks > 1:
        raise ValueError("--compare padded runs on one rank: the padded loop is MiniMind's single-device trainer")
    jobs = {dtype: prepare("sft", [*program_flags, "--dtype", dtype], layout) for dtype in dtypes}
    engine.start(layout)
    first = next(iter(jobs.values()))
    torch.manual_seed(first.run.seed)
    start = dict(weights.fresh(first.model_config))
    loops = []
    for dtype, job in jobs.items():
        loops += [padded_loop(job, dtype, padded_rows, job.run.max_seq_len, start)]
        job.start_weights = start
        loops += [packed_loop(job, dtype)]
    results = measure(loops, warm_up, steps, layout.device, say)
    plan, store = first.first_plan, first.stores[0]
    base = results[loops[0].name]["tokens_per_s"]
    for result in results.values():
        result["ratio_to_" + loops[0].name.replace(" ", "_")] = result["tokens_per_s"] / base
    ratios = {dtype: results[f"packed {dtype}"]["tokens_per_s"] / results[f"padded {dtype}"]["tokens_per_s"]
              for dtype in dtypes}
    return {"what": "real (non-padding) tokens per second, training step: forward, backward, clipping, AdamW",
            "preset": first.run.preset, "data": pathlib.Path(first.run.data_path).name,
            "mean_length": float(store.lengths.mean()), "padded": f"{padded_rows} rows of {first.run.max_seq_len}",
            "packed": f"{first.run.batch_size} rows of {first.run.row_len}",
            "packing_fill": plan.fill,
            "packed_to_padded_same_dtype": ratios, "loops": results, **machine()}


def machine() -> dict:
    """Where and with what a result was measured."""
    import deepspeed

    name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8")
                 if line.startswith("model name")), platform.processor()) if platform.system() == "Linux" else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu,
                        "python": platform.python_version(),
                        "torch": torch.__version__, "deepspeed": deepspeed.__version__,
                        "date": time.strftime("%Y-%m-%d")}}


def table(result: dict) -> str:
    """The result as Markdown."""
    first = next(iter(result["loops"]))
    rows = [f"| loop ({result['preset']}, {result['data']}) | real tokens/s | min to max | × {first} |",
            "|---|---:|---:|---:|"]
    for name, r in result["loops"].items():
        ratio = r["ratio_to_" + first.replace(" ", "_")]
        rows.append(f"| {name} | {r['tokens_per_s']:,.0f} | {r['tokens_per_s_min']:,.0f} to "
                    f"{r['tokens_per_s_max']:,.0f} | {ratio:.2f} |")
    return "\n".join(rows)


def write(result: dict, path: str | None) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if path:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    print(text)
