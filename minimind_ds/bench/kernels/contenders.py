"""Who computes it: every way to do an operation, ours and others', each in the form it is used in.

A contender turns a Case into a Trial, or raises Absent with the reason.  What others' code wants in another shape
(padded rows, a module per expert) is prepared there, outside of what is timed.

    python -c "from minimind_ds.bench.kernels.contenders import OPS; print({op: [*all] for op, all in OPS.items()})"
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minimind_ds import kernels
from minimind_ds.bench.throughput import padded
from minimind_ds.model.loss import cross_entropy_sum

from .cases import EPS, Case, plain_head_loss, plain_qk_norm_rope, run, textbook_router


class Absent(Exception):
    """This contender cannot take part here; the message says why."""


@dataclass
class Trial:
    """function(*leaves) -> outputs, to which douts belong; `collect` brings results into the reference's form."""

    function: Callable
    leaves: list[Tensor]
    douts: list[Tensor | None]
    collect: Callable = list

    def results(self) -> list[Tensor]:
        return self.collect(run(self.function, self.leaves, self.douts))


class Contender(NamedTuple):
    """`ours`: a wrong result, or none, is a failure; where `optional`, none is not."""

    build: Callable[[Case], Trial]
    ours: bool = False
    optional: bool = False


def plain(case: Case, function) -> Trial:
    """A function that takes the case as it is: leaves, and its constants by name."""
    return Trial(functools.partial(function, **case.constants), case.leaves, case.douts)


def needs(module: str):
    """The module, or Absent."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as missing:
        raise Absent(f"{module} is not installed ({missing})") from None


def refuse(why: str | None):
    if why:
        raise Absent(why)


def backend(op: str, name: str, case: Case):
    """A backend's module, or Absent with its own reason."""
    refuse(kernels.BACKENDS[name].why_not(op, case.device, case.dtype, kernels.NOTHING))
    return kernels.operations_of(name)


# ------------------------------------------------------------------------------------------------ attention

def attention_by(name: str, case: Case) -> Trial:
    module = backend("attention", name, case)
    return plain(case, lambda *leaves, **c: (module.attention(*leaves, **c, dropout_p=0.0),))


def varlen_grouped(case: Case) -> Trial:
    """torch's varlen_attn on four key heads as they are (the sdpa backend repeats them)."""
    if case.device.type != "cuda":
        raise Absent("varlen_attn runs on GPUs only")
    varlen_attn = needs("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen_attn).parameters
    how = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        how["enable_gqa"] = True
    bounds, longest = case.constants["cu_seqlens"].to(case.device), case.constants["max_seqlen"]
    return Trial(lambda q, k, v: (varlen_attn(q, k, v, bounds, bounds, longest, longest, **how),), case.leaves,
                 case.douts)


def padded_sdpa(case: Case) -> Trial:
    """MiniMind's way: a row for each document, padded to the longest, keys repeated, is_causal."""
    lengths = case.constants["cu_seqlens"].diff().tolist()
    leaves, (dout,) = ([pad_sequence(x.split(lengths), batch_first=True) for x in xs]
                       for xs in (case.leaves, case.douts))
    real_NL = pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], batch_first=True).to(case.device)
    return Trial(lambda *leaves: (padded.causal_attention(*leaves),), leaves, [dout],
                 collect=lambda results: [x[real_NL] for x in results])


def flex(case: Case) -> Trial:
    module = needs("torch.nn.attention.flex_attention")
    if case.device.type != "cuda":
        raise Absent("compiled FlexAttention has no backward pass on a CPU")
    bounds = case.constants["cu_seqlens"].to(case.device)
    T = case.leaves[0].shape[0]
    document_T = torch.searchsorted(bounds[1:].long(), torch.arange(T, device=case.device), right=True)

    def same_document_and_not_later(b, h, q, k):
        return (document_T[q] == document_T[k]) & (q >= k)

    make = torch.compile(module.create_block_mask)
    block_mask = make(same_document_and_not_later, None, None, T, T, device=case.device)
    attend = torch.compile(module.flex_attention, dynamic=False)

    def function(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return (attend(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1),)

    return Trial(function, case.leaves, case.douts)


def flash_attn(module: str, case: Case) -> Trial:
    function = needs(module).flash_attn_varlen_func
    bounds, longest = case.constants["cu_seqlens"].to(case.device), case.constants["max_seqlen"]

    def attend(q, k, v):
        out = function(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
                       causal=True)
        return (out[0] if isinstance(out, tuple) else out,)

    return Trial(attend, case.leaves, case.douts)


# ------------------------------------------------------------------------------------------------ experts, router

def moe_by(name: str, case: Case) -> Trial:
    module = backend("moe", name, case)
    return plain(case, lambda *leaves, experts: (module.moe(*leaves, experts),))


def minimind_experts(case: Case) -> Trial:
    """MiniMind's way: a module for each expert, visited in a loop with masks."""
    x, gate_up, down, weights = case.leaves
    E = len(down)
    gates, ups = zip(*(matrix.chunk(2) for matrix in gate_up))
    experts = case.constants["experts"]

    def function(x, weights, *matrices):
        return (padded.expert_loop(x, [Expert(*matrices[e::E]) for e in range(E)], experts, weights),)

    def collect(results):
        y, dx, dweights, *matrices = results
        dgate, dup, ddown = (torch.stack(matrices[i * E:(i + 1) * E]) for i in range(3))
        return [y, dx, torch.cat((dgate, dup), dim=1), ddown, dweights]

    return Trial(function, [x, weights, *gates, *ups, *down], case.douts, collect)


class Expert(NamedTuple):
    """What padded.Dense computes, on matrices that are leaves."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def parameters(self):
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def triton_router(case: Case) -> Trial:
    module = backend("router", "triton", case)

    def function(logits, K, group, n_groups):
        weights, experts, counts, sums = module.route(logits, K, True, group, n_groups)
        return weights, sums, experts, counts

    return plain(case, function)


# ------------------------------------------------------------------------------------------------ elementwise, head

def eager(function, case: Case) -> Trial:
    return plain(case, function)


def compiled(function, case: Case) -> Trial:
    backend("elementwise", "compiled", case)
    return plain(case, torch.compile(function, dynamic=True))


def qk_norm_rope_by(name: str, case: Case) -> Trial:
    module = backend("rope", name, case)
    return plain(case, lambda q, k, q_weight, k_weight, cos, sin: tuple(
        module.norm_rope(x, weight, cos, sin, EPS) for x, weight in ((q, q_weight), (k, k_weight))))


def rotate_by(name: str, case: Case) -> Trial:
    module = backend("rope", name, case)
    return plain(case, lambda q, k, cos, sin: tuple(module.norm_rope(x, None, cos, sin, 0.0) for x in (q, k)))


def elementwise_by(name: str, case: Case) -> Trial:
    """rms_norm, add_rms_norm or swiglu of a backend."""
    module = backend("elementwise", name, case)

    def function(*leaves):
        out = getattr(module, case.op)(*leaves, *([EPS] if "norm" in case.op else []))
        return out if isinstance(out, tuple) else (out,)

    return plain(case, function)


def head_loss_by(name: str, case: Case) -> Trial:
    backend("elementwise", name, case)
    return plain(case, lambda hidden, weight, labels: (cross_entropy_sum(hidden, weight, labels, backend=name),))


def by_reference(case: Case) -> Trial:
    return plain(case, case.reference)


def by_compiled_reference(case: Case) -> Trial:
    return compiled(case.reference, case)


def liger(case: Case) -> Trial:
    """Liger-Kernel's operation; its norm with everything in fp32 ("gemma"), which is what MiniMind computes."""
    functions = needs("liger_kernel.transformers.functional")
    if case.op == "rms_norm":
        return plain(case, lambda x, weight: (functions.liger_rms_norm(x, weight, EPS, 0.0, "gemma", False),))
    if case.op == "swiglu":
        return plain(case, lambda gate, up: (functions.liger_swiglu(gate, up),))
    if case.op == "head_loss":
        return plain(case, lambda hidden, weight, labels: (functions.liger_fused_linear_cross_entropy(
            hidden, weight, labels, reduction="sum"),))
    cos, sin = (torch.cat((x, x), dim=1)[None] for x in (case.constants["cos"], case.constants["sin"]))

    def turn(q, k):
        turned = functions.liger_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        return tuple(x[0].transpose(0, 1) for x in turned)

    return Trial(turn, case.leaves, case.douts)


def torch_linear_cross_entropy(case: Case) -> Trial:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    return plain(case, lambda hidden, weight, labels: (function(hidden, weight, labels, reduction="sum"),))


def by(function, *first) -> Callable[[Case], Trial]:
    return functools.partial(function, *first)


OPS: dict[str, dict[str, Contender]] = {
    "attention": {
        "triton": Contender(by(attention_by, "triton"), ours=True),
        "sdpa": Contender(by(attention_by, "sdpa"), ours=True),
        "varlen_attn, grouped heads": Contender(varlen_grouped),
        "SDPA, padded rows (MiniMind)": Contender(padded_sdpa),
        "FlexAttention, compiled": Contender(flex),
        "flash-attn 2": Contender(by(flash_attn, "flash_attn")),
        "flash-attn 3": Contender(by(flash_attn, "flash_attn_interface")),
    },
    "moe": {
        "triton": Contender(by(moe_by, "triton"), ours=True),
        "sdpa": Contender(by(moe_by, "sdpa"), ours=True),
        "deepspeed": Contender(by(moe_by, "deepspeed"), ours=True, optional=True),
        "loop of experts (MiniMind)": Contender(minimind_experts),
    },
    "router": {
        "triton": Contender(triton_router, ours=True),
        "eager": Contender(by(eager, textbook_router)),
    },
    "qk_norm_rope": {
        "triton": Contender(by(qk_norm_rope_by, "triton"), ours=True),
        "native": Contender(by(qk_norm_rope_by, "sdpa"), ours=True),
        "eager": Contender(by(eager, plain_qk_norm_rope)),
        "compiled": Contender(by(compiled, plain_qk_norm_rope), ours=True),
    },
    "rms_norm": {
        "triton": Contender(by(elementwise_by, "triton"), ours=True),
        "native": Contender(by(elementwise_by, "sdpa"), ours=True),
        "eager": Contender(by_reference),
        "compiled": Contender(by_compiled_reference, ours=True),
        "Liger-Kernel": Contender(liger),
    },
    "add_rms_norm": {
        "triton": Contender(by(elementwise_by, "triton"), ours=True),
        "native": Contender(by(elementwise_by, "sdpa"), ours=True),
        "eager": Contender(by_reference),
        "compiled": Contender(by_compiled_reference, ours=True),
    },
    "swiglu": {
        "triton": Contender(by(elementwise_by, "triton"), ours=True),
        "native": Contender(by(elementwise_by, "sdpa"), ours=True),
        "eager": Contender(by_reference),
        "compiled": Contender(by_compiled_reference, ours=True),
        "Liger-Kernel": Contender(liger),
    },
    "rotate": {
        "triton": Contender(by(rotate_by, "triton"), ours=True),
        "native": Contender(by(rotate_by, "sdpa"), ours=True),
        "eager": Contender(by_reference),
        "compiled": Contender(by_compiled_reference, ours=True),
        "Liger-Kernel": Contender(liger),
    },
    "head_loss": {
        "triton": Contender(by(head_loss_by, "triton"), ours=True),
        "native": Contender(by(head_loss_by, "sdpa"), ours=True),
        "eager": Contender(by(eager, plain_head_loss)),
        "compiled": Contender(by(compiled, plain_head_loss)),
        "Liger-Kernel": Contender(liger),
        "torch linear_cross_entropy": Contender(torch_linear_cross_entropy),
    },
}
