"""The same training curve: a whole model trained on the bundled sample with our kernels and with the reference.

A plain AdamW loop without DeepSpeed: same start, same packed rows, same order.  In bf16 the optimizer keeps fp32
weights beside the model's.

    python launch/check_kernels.py OUT_DIR --parts curve
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from minimind_ds.bench.masters import masters_update
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.data.packing import PackedBatch, collate, pack
from minimind_ds.data.sample import Sample, build_sample
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.model.decoder import MiniMindForCausalLM
from minimind_ds.paths import EXAMPLES

from . import measure

DATA = EXAMPLES / "sft_train.jsonl"
# Largest difference of a step's loss, relative.  A token of a mixture whose two best experts score the same to the
# last digit may go either way, and bf16 rounds each kernel's intermediates elsewhere.
BOUNDS = {("fp32", False): 1e-4, ("fp32", True): 1e-3, ("bf16", False): 1e-2, ("bf16", True): 1e-2}
TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
            max_position_embeddings=1024)


def setting_of(small: bool, use_moe: bool) -> tuple[str, ModelConfig, int, int, int]:
    """-> name, model, steps, rows, row length."""
    if small:
        return "tiny" + "-moe" * use_moe, ModelConfig(**TINY, use_moe=use_moe), 4, 1, 128
    name = "minimind-3" + "-moe" * use_moe
    return name, PRESETS[name], 50, 2, 1024


def batches(config: ModelConfig, steps: int, rows: int, row_len: int) -> list[PackedBatch]:
    """The first rows of the sample's packing plan, `rows` to a step."""
    tokenizer = load_tokenizer()
    samples: list[Sample] = []
    n_tokens = 0
    with open(DATA, encoding="utf-8") as lines:
        for line in lines:
            if n_tokens > 1.2 * steps * rows * row_len:
                break
            sample = build_sample(json.loads(line), tokenizer, row_len)
            samples.append(sample)
            n_tokens += len(sample.input_ids)
    plan = pack([len(sample.input_ids) for sample in samples], row_len, seed=0)
    groups = [plan[i:i + rows] for i in range(0, len(plan) - rows + 1, rows)]
    # The sample is short: later steps see the first rows again.
    return [collate([[samples[i] for i in row] for row in groups[step % len(groups)]], row_len, tokenizer.pad_id)
            for step in range(steps)]


def train(config: ModelConfig, kernels: str, dtype: torch.dtype, device: torch.device, data: list[PackedBatch],
          say=lambda text: None) -> tuple[list[float], str]:
    """Losses (nats per labelled token, balance loss left out) of each step, and what ran."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config, kernels).to(device, dtype).train()
    masters = [p.detach().float().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for step, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10)
        out = model(batch.to(device))
        (out.loss_sum / out.n_labelled + out.aux_loss).backward()
        masters_update(list(model.parameters()), masters, optimizer, max_norm=1.0)
        losses.append(out.loss_sum.item() / out.n_labelled)
        if step % 10 == 9:
            say(f"    step {step + 1}: {losses[-1]:.5f}")
    return losses, model.kernel_selection(device, dtype).reason


def compare(dtype: torch.dtype, use_moe: bool, device: torch.device, small: bool, say) -> dict:
    """The record of one pair of curves."""
    name, config, steps, rows, row_len = setting_of(small, use_moe)
    config = replace(config, vocab_size=max(config.vocab_size, load_tokenizer().vocab_size))
    data = batches(config, steps, rows, row_len)
    other = "reference" if dtype == torch.float32 else "sdpa"
    curves, what, seconds = {}, {}, {}
    for key in ("triton", other):
        began = time.perf_counter()
        curves[key], what[key] = train(config, f"{key},activations=native", dtype, device, data, say)
        seconds[key] = time.perf_counter() - began
    bound = BOUNDS[measure.short(dtype), use_moe]
    worst = max(abs(a - b) / abs(b) for a, b in zip(*curves.values()))
    right = all(x == x for curve in curves.values() for x in curve) and worst <= bound
    return {"op": "training", "case": f"{name}, {steps} steps of {rows} rows of {row_len}",
            "dtype": measure.short(dtype), "contender": "triton", "ours": True,
            "status": "right" if right else "wrong", "bound": bound, "largest_relative_difference": worst,
            "curves": curves, "kernels": what, "seconds_by_kernels": seconds}


def comparisons(device: torch.device, small: bool, use_moe: bool, say) -> Iterator[tuple[str, object]]:
    """(name, work) of each pair."""
    for dtype in (torch.float32, torch.bfloat16):
        yield (f"{'mixture' if use_moe else 'dense'} {measure.short(dtype)}",
               lambda dtype=dtype: compare(dtype, use_moe, device, small, say))
