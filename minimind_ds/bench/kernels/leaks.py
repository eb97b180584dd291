"""The leak probe: whatever document A is changed to, no bit of document B's results moves.

Changed are A's inputs and the gradients of A's outputs, to other numbers, NaN and infinity.  Experts are probed by
token, with other choices too.  A whole model is probed by its logits.

    python -m pytest tests/bench/test_gpu_check.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minimind_ds.config.model import ModelConfig
from minimind_ds.data.packing import lay_out
from minimind_ds.model.decoder import MiniMindForCausalLM

from . import cases, measure
from .cases import MINIMIND3, SMALL, Case
from .contenders import OPS

# Results that belong to a token, by operation: the leaves' rows and the outputs' alike.
OWN = {"attention": ("out", "dq", "dk", "dv"), "qk_norm_rope": ("q", "k", "dq", "dk"), "moe": ("y", "dx", "dweights"),
       "router": ("weights", "experts", "dlogits")}
NUMBERS, NAN, INFINITY = "other numbers", "NaN", "infinity"


def poison(x: Tensor, others_T: Tensor, kind: str) -> Tensor:
    """A copy of x (T, ...) whose rows of `others_T` hold something else."""
    changed = x.clone()
    if kind == NUMBERS:
        generator = torch.Generator().manual_seed(99)
        changed[others_T] = torch.randn(x[others_T].shape, generator=generator).to(x) * 3
    else:
        changed[others_T] = float("nan") if kind == NAN else float("inf")
    return changed


def changed_case(case: Case, others_T: Tensor, kind: str) -> Case:
    """The case with every tensor that has a row for each token changed there; experts choose anew."""
    T = len(others_T)

    def change(x):
        return poison(x, others_T, kind) if x is not None and x.ndim and x.shape[0] == T else x

    constants = dict(case.constants)
    if "experts" in constants:
        experts, E = constants["experts"].clone(), case.leaves[2].shape[0]
        experts[others_T] = (experts[others_T] + 1) % E
        constants["experts"] = experts
    return dataclasses.replace(case, leaves=[change(x) for x in case.leaves], douts=[change(x) for x in case.douts],
                               constants=constants, _exact=None)


def probe(case: Case, name: str, kinds: tuple[str, ...]) -> dict:
    """Compares a document's results, bit for bit, before and after all others change."""
    T = case.leaves[0].shape[0]
    bounds = cases.bounds_of(cases.document_lengths(SIZES[T], 0)).tolist()
    start, end = bounds[len(bounds) // 2 - 1:][:2]
    mine_T = torch.zeros(T, dtype=torch.bool, device=case.device)
    mine_T[start:end] = True
    build, moved = OPS[case.op][name].build, []
    # FlashAttention adds up dq by atomics, in any order, unless told otherwise; ours need no telling.
    torch.use_deterministic_algorithms(name != "triton", warn_only=True)
    try:
        before = dict(zip(case.names, build(case).results()))
        for kind in kinds:
            after = dict(zip(case.names, build(changed_case(case, ~mine_T, kind)).results()))
            moved += [f"{what} ({kind})" for what in OWN[case.op]
                      if not torch.equal(before[what][mine_T], after[what][mine_T])]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"op": case.op, "case": case.name, "dtype": measure.short(case.dtype), "contender": name, "ours": True,
            "probe": f"tokens {start} to {end} stay, the others become {', '.join(kinds)}",
            "status": "wrong" if moved else "right", "moved": moved}


SIZES = {size.T: size for size in (SMALL, dataclasses.replace(MINIMIND3, T=8192, N=4096))}


def probes(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, work) of every probe."""
    size = SMALL if small else SIZES[8192]
    everything, dtypes = (NUMBERS, NAN, INFINITY), (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for op in OWN:
            yield f"{op} {measure.short(dtype)} triton", lambda op=op, dtype=dtype: probe(
                getattr(cases, op)(size, dtype, device), "triton", everything)
        # Flash and block-wise kernels of others read beyond a document and mask: only numbers are promised there.
        yield f"attention {measure.short(dtype)} sdpa", lambda dtype=dtype: probe(
            cases.attention(size, dtype, device), "sdpa", (NUMBERS,))
    for use_moe in (False, True):
        yield f"model{' with experts' if use_moe else ''}", lambda use_moe=use_moe: probe_model(
            device, small, use_moe)


def probe_model(device: torch.device, small: bool, use_moe: bool) -> dict:
    """Logits of one document in a packed row, before and after its neighbours get other tokens."""
    config = ModelConfig(use_moe=use_moe, num_hidden_layers=2, **(dict(
        hidden_size=48, num_attention_heads=2, num_key_value_heads=1, vocab_size=130, moe_intermediate_size=40,
        intermediate_size=40) if small else {}))
    lengths = cases.document_lengths(SMALL if small else SIZES[8192], 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, sum(lengths)), generator=generator)
    start = sum(lengths[:len(lengths) // 2])
    mine = slice(start, start + lengths[len(lengths) // 2])
    ids[1, mine] = ids[0, mine]
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config, "triton,activations=native").to(device, torch.bfloat16)
    logits = []
    for row in ids:
        labels = torch.full_like(row, -100)
        labels[mine.start] = 1
        batch = lay_out(row.numpy(), labels.numpy(), [torch.tensor(lengths).numpy()], len(row), 0).to(device)
        with torch.no_grad():
            logits.append(model(batch, return_logits=True).logits[0, mine])
    same = torch.equal(*logits) and bool(logits[0].isfinite().all())
    return {"op": "model", "case": f"{len(lengths)} documents, {sum(lengths)} tokens, {config.hidden_size} wide",
            "dtype": "bf16", "contender": "triton", "ours": True, "probe": "logits stay when other documents change",
            "status": "right" if same else "wrong", "moved": [] if same else ["logits"]}
