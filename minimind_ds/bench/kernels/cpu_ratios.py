"""This project's operations on a CPU against MiniMind's own way, forward and backward, on the same samples.

MiniMind pads each sample to 768 tokens; attention, experts and all run over the padding.  padded.py, held to MiniMind
by the goldens, is what it does.  In bf16 it runs under autocast on fp32 weights, and attention gets bf16; this project
keeps weights in bf16 and activations in what `auto` finds faster here.

    OMP_NUM_THREADS=2 python launch/check_kernels.py --cpu_ratios OUT.json
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from dataclasses import replace

import torch
from torch import Tensor

from minimind_ds import kernels
from minimind_ds.bench.machine import machine
from minimind_ds.bench.throughput import padded

from . import cases, measure
from .cases import MINIMIND3, Draw
from .contenders import Expert

PADDED = 768
# |ours - theirs| / |theirs| on real tokens.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
CPU = torch.device("cpu")


def to_rows(x_T: Tensor, lengths: list[int], fill) -> Tensor:
    """(T, ...) as (samples, 768, ...), padding from `fill(shape)`."""
    x_BT = fill((len(lengths), PADDED, *x_T.shape[1:])).to(x_T.dtype)
    for row, sample in zip(x_BT, x_T.split(lengths)):
        row[:len(sample)] = sample
    return x_BT


def attention_pair(T: int, dtype: torch.dtype):
    """-> ours, theirs: functions that give [out, dq, dk, dv] of real tokens, and what was run."""
    size = replace(MINIMIND3, T=T, longest=PADDED)
    case = cases.attention(size, dtype, CPU)
    bounds, longest = case.constants["cu_seqlens"], case.constants["max_seqlen"]
    lengths = bounds.diff().tolist()
    choice = kernels.resolve("auto", CPU, dtype)
    leaves = [x.to(choice.activations, copy=True).requires_grad_() for x in case.leaves]
    dout = case.douts[0].to(choice.activations)
    draw = Draw(dtype, CPU, 11)
    rows = [to_rows(x, lengths, lambda shape: draw(*shape)).requires_grad_() for x in case.leaves]
    # Nothing is asked of padding: no label, and no later token that looks back.
    dout_rows = to_rows(case.douts[0], lengths, torch.zeros)
    real_BT = torch.arange(PADDED) < torch.tensor(lengths)[:, None]

    def ours():
        out = kernels.attention(*leaves, bounds, longest, backend=choice.attention)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    def theirs():
        out = padded.causal_attention(*rows)
        return [out, *torch.autograd.grad(out, rows, dout_rows)]

    return ours, theirs, lambda results: [x[real_BT] for x in results], lengths, choice.attention, choice.activations


def moe_pair(T: int, dtype: torch.dtype):
    size = replace(MINIMIND3, T=T, longest=PADDED)
    case = cases.moe(size, torch.float32, CPU)
    lengths = cases.document_lengths(size, 0)
    choice = kernels.resolve("auto", CPU, dtype)
    x, gate_up, down, weights = case.leaves
    experts, dy = case.constants["experts"], case.douts[0]
    leaves = [x.to(choice.activations), gate_up.to(dtype), down.to(dtype), weights]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    draw = Draw(torch.float32, CPU, 11)
    experts_rows = to_rows(experts, lengths, lambda shape: torch.randint(
        0, size.E, shape, generator=draw.generator)).flatten(0, 1)
    x_rows = to_rows(x, lengths, lambda shape: draw(*shape)).flatten(0, 1)
    weights_rows = to_rows(weights, lengths, torch.zeros).flatten(0, 1)
    dy_rows = to_rows(dy, lengths, torch.zeros).flatten(0, 1)
    gates, ups = zip(*(matrix.chunk(2) for matrix in gate_up))
    their_leaves = [x_rows, weights_rows, *gates, *ups, *down]
    their_leaves = [leaf.detach().clone().requires_grad_() for leaf in their_leaves]
    real_T = (torch.arange(PADDED) < torch.tensor(lengths)[:, None]).flatten()

    def ours():
        x, gate_up, down, weights = leaves
        # As the model does it: weights in the parameters' dtype, products in the activations'.
        y = kernels.moe(x, gate_up.to(x.dtype), down.to(x.dtype), weights, experts, backend=choice.moe)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def theirs():
        x, weights, *matrices = their_leaves
        low = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
        with low:
            y = padded.expert_loop(x, [Expert(*matrices[e::size.E]) for e in range(size.E)], experts_rows, weights)
        return [y, *torch.autograd.grad(y, their_leaves, dy_rows)]

    def collect(results):
        y, dx, dweights, *matrices = results
        dgate, dup, ddown = (torch.stack(matrices[i * size.E:(i + 1) * size.E]) for i in range(3))
        return [y[real_T], dx[real_T], torch.cat((dgate, dup), dim=1), ddown, dweights[real_T]]

    return ours, theirs, collect, lengths, choice.moe, choice.activations


PAIRS = {"attention": (attention_pair, ["out", "dq", "dk", "dv"]),
         "moe": (moe_pair, ["y", "dx", "dgate_up", "ddown", "dweights"])}


def race(op: str, T: int, dtype: torch.dtype, pairs: int) -> dict:
    """One line of the table: results compared, then timed in turns, ours, theirs, ours, theirs."""
    make, names = PAIRS[op]
    ours, theirs, collect, lengths, backend, activations = make(T, dtype)
    judged = measure.judge(ours(), collect(theirs()), names, BOUNDS[dtype])
    record = {"op": op, "tokens": T, "samples": len(lengths), "padded_tokens": len(lengths) * PADDED,
              "dtype": measure.short(dtype), "backend": backend, "activations": measure.short(activations), **judged}
    if not judged["right"]:
        return {**record, "ratio": math.nan}
    seconds = {ours: [], theirs: []}
    for _ in range(pairs):
        for function, taken in seconds.items():
            began = time.perf_counter()
            function()
            taken.append((time.perf_counter() - began) * 1e3)
    mine, minimind = (measure.quartiles(taken) for taken in seconds.values())
    return {**record, "ours": mine, "minimind": minimind, "ratio": minimind["ms"] / mine["ms"],
            "ratio_of_pairs": sorted(b / a for a, b in zip(*seconds.values()))}


def compare(out: pathlib.Path, lengths: list[int], pairs: int) -> int:
    """Runs the table, writes it to `out` and prints it; 1 if a result is not MiniMind's."""
    results = []
    print(f"{torch.get_num_threads()} threads; ms are medians of {pairs}, forward + backward", flush=True)
    for op in PAIRS:
        for T in lengths:
            for dtype in (torch.float32, torch.bfloat16):
                began = time.perf_counter()
                found = race(op, T, dtype, pairs)
                results.append(found)
                times = f"{found['ours']['ms']:8.1f} ms, MiniMind {found['minimind']['ms']:8.1f} ms" \
                    if found["right"] else f"wrong: {found['errors']}"
                print(f"{op:9} {T:5} tokens ({found['padded_tokens']} padded) {found['dtype']}: {times}, "
                      f"{found['ratio']:.2f} x   [{time.perf_counter() - began:.0f} s]", flush=True)
    document = {"what": "forward + backward of one operation on real tokens, against the same samples padded to 768 "
                        "in MiniMind's way; ms are medians, in turns, same process and threads",
                "ok": all(found["right"] for found in results), "results": results, "machine": machine()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    return 0 if document["ok"] else 1
