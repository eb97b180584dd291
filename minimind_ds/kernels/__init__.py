"""The one door to attention over packed segments, dropless experts, their router and the elementwise parts.

A backend is a module with `why_not(op, device, dtype, needs)` and the functions of the operations it does not refuse;
LACKS, if it has one, says which operations it has no code for, and why; `load()`, if it has one, gives the module with
the functions (what it imports may be missing).  A new one is a file here and a line in BACKENDS.

    python -c "from minimind_ds import kernels; print(kernels.resolve('auto', 'cpu', 'bfloat16').reason)"
"""

from __future__ import annotations

import functools
import pathlib
import platform
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_ds.config.errors import UserError
from minimind_ds.config.untrusted import shown

from . import compiled, deepspeed_ops, reference, sdpa, triton
from .needs import NOTHING, KernelRequirements

# Fastest first: `auto` takes the first that can run.  What stands behind `reference` has to be asked for by name.
BACKENDS: dict[str, ModuleType] = {
    "triton": triton,
    "sdpa": sdpa,
    "reference": reference,
    "deepspeed": deepspeed_ops,
    "compiled": compiled,
}
OPS = ("attention", "moe", "router", "rope", "elementwise")
ACTIVATIONS = ("auto", "native", "fp32")


class KernelSelection(NamedTuple):
    """What runs: a backend for each operation, the dtype activations are kept in, and a line saying why."""

    attention: str
    moe: str
    router: str
    rope: str
    elementwise: str
    activations: torch.dtype
    reason: str


def parse(spec: str) -> dict[str, str]:
    """Reads "auto", a backend's name, "attention=NAME,moe=NAME,..." or both; what is left out is "auto".

    Keys are OPS (a backend each) and activations (native: the parameters' dtype, or fp32).  A backend's bare name
    leaves to "auto" the operations that it lacks.

    Raises:
        ValueError: an operation or a backend that does not exist.
    """
    keys = (*OPS, "activations")
    asked, given = dict.fromkeys(keys, "auto"), set()
    for part in spec.split(","):
        key, named, name = (word.strip() for word in part.partition("="))
        if not named:
            asked.update({op: key for op in OPS if op not in lacks(key)})
        elif key not in keys:
            raise UserError(f"kernels {shown(spec)}: no operation {shown(key)}; there are {', '.join(keys)}")
        elif asked[key] not in ("auto", name) and key in given:
            raise UserError(f"kernels {shown(spec)}: {key} is {shown(asked[key])} and {shown(name)}: give it once")
        else:
            asked[key] = name
            given.add(key)
    for key, name in asked.items():
        names = ACTIVATIONS if key == "activations" else ("auto", *BACKENDS)
        if name not in names:
            raise UserError(f"kernels {shown(spec)}: no {key} {shown(name)}; there are {', '.join(names)}")
    return asked


def lacks(name: str) -> dict[str, str]:
    """The operations that a backend has no code for, and why."""
    return getattr(BACKENDS.get(name), "LACKS", {})


def with_compiled(spec: str) -> str:
    """The same specification with the elementwise operations through torch.compile (the --compile flag).

    Raises:
        ValueError: an unknown name, or another backend asked for by "elementwise=".
    """
    asked = parse(spec)
    if "elementwise" in spec and asked["elementwise"] not in ("auto", "compiled"):
        raise UserError(f"kernels {spec!r}: elementwise = {asked['elementwise']} and --compile exclude each other")
    asked["elementwise"] = "compiled"
    asked["rope"] = "compiled" if asked["rope"] == "auto" else asked["rope"]
    return ",".join(f"{op}={name}" for op, name in asked.items())


@functools.lru_cache
def resolve(spec: str, device: torch.device | str, dtype: torch.dtype | str,
            needs: KernelRequirements = NOTHING) -> KernelSelection:
    """Names what runs each operation for parameters of this device and dtype, in a model with these needs.

    "auto" takes the fastest that can run here; a name is taken at its word.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here; the message says why.
    """
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    asked = parse(spec)
    activations, slow = dtype, None
    if asked["activations"] == "fp32":
        activations = torch.promote_types(dtype, torch.float32)
    elif asked["activations"] == "auto":
        slow = why_slow(device, dtype)
        activations = torch.float32 if slow else dtype
    chosen = {op: choose(op, asked[op], device, activations, needs) for op in OPS}
    how = {op: "auto: the fastest that runs here" if asked[op] == "auto" else "as asked" for op in OPS}
    how.update({op: f"auto: {why}" for op, why in lacks(spec.split(",")[0].strip()).items() if asked[op] == "auto"})
    alike: dict[str, list[str]] = {}
    for op in OPS:
        alike.setdefault(f"{chosen[op]} ({how[op]})", []).append(op)
    parts = [f"{', '.join(ops) if len(alike) > 1 else 'all'} = {said}" for said, ops in alike.items()]
    parts.append(f"activations = {str(activations).removeprefix('torch.')} ({slow or 'as the parameters'})")
    return KernelSelection(**chosen, activations=activations, reason="; ".join(parts))


@functools.lru_cache
def choose(op: str, name: str, device: torch.device, dtype: torch.dtype, needs: KernelRequirements) -> str:
    if name == "auto":
        return next(other for other, module in BACKENDS.items() if module.why_not(op, device, dtype, needs) is None)
    refusal = BACKENDS[name].why_not(op, device, dtype, needs)
    if refusal:
        raise UserError(f"kernels: {op} = {name} cannot run here: {refusal}")
    return name


def why_slow(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in this dtype are slower than fp32's on this CPU, or None if they are not.

    Told by the CPU's name and flags, not by a stopwatch, so that a resumed run decides the same.  Measured: Intel's
    AVX512-BF16 without AMX runs half as fast as its fp32, AMD's about twice as fast.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return None
    text = cpuinfo.read_text()
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    if f"amx_{short}" in flags or ("AuthenticAMD" in text and f"avx512_{short}" in flags):
        return None
    return f"this CPU multiplies {short} more slowly than fp32; parameters stay {short}"


def backend_module(op: str, backend: str, x: Tensor, needs: KernelRequirements = NOTHING) -> ModuleType:
    """The module that runs `op` for tensors like x.  Raises ValueError as the operations below do."""
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"kernels: no backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    if backend != "auto" and torch.compiler.is_compiling():
        # A model's were chosen before its layers run; torch.compile need not follow what why_not asks the machine.
        return operations_of(backend)
    return operations_of(choose(op, backend, x.device, x.dtype, needs))


def operations_of(backend: str) -> ModuleType:
    """The module that holds a backend's operations."""
    module = BACKENDS[backend]
    return module.load() if hasattr(module, "load") else module


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str,
              dropout_p: float = 0.0) -> Tensor:
    """Causal self-attention inside each segment, softmax(q k^T / sqrt(D)) v; segments never see each other.

    Args:
        q: (T, H, D).  k, v: (T, Hkv, D) with Hkv dividing H: head h reads key head h // (H / Hkv).
        cu_seqlens: (N + 1,) int32, where segments start and end: 0 = first, T = last, not decreasing.
            On the CPU even when q is on a GPU: backends read it there without waiting for the GPU.
        max_seqlen: the longest segment's length, in tokens.
        backend: "auto" or a name from BACKENDS.
        dropout_p: the probability with which an attention weight is dropped.

    Returns:
        (T, H, D) in q's dtype.

    Raises:
        ValueError: an unknown backend, or one that cannot run on this device and dtype.
    """
    module = backend_module("attention", backend, q, KernelRequirements(q.shape[2], dropout_p))
    return module.attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, backend: str) -> Tensor:
    """Dropless mixture of SwiGLU experts: y_t = sum_k weights[t, k] * expert_{experts[t, k]}(x_t).

    Args:
        x: (T, C).
        gate_up: (E, 2 I, C), an expert's gate rows first, then its up rows.  down: (E, C, I).
        weights: (T, K) float, the router's.  experts: (T, K) int64 in [0, E), different within a row.
        backend: "auto" or a name from BACKENDS.

    Returns:
        (T, C) in x's dtype.  An expert that no token chose is in the graph all the same: its gradient is zero.

    Raises:
        ValueError: an unknown backend, or one that cannot run on this device and dtype.
    """
    return backend_module("moe", backend, x).moe(x, gate_up, down, weights, experts)


def route(logits: Tensor, k: int, norm: bool, group: Tensor | None = None, n_groups: int = 0, *,
          backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest experts of each token, their weights, and what a balance loss needs to know.

    Args:
        logits: (T, E).
        k: experts per token.
        norm: divide a token's weights by their sum (plus 1e-20).
        group: (T,) integers, the group in whose statistics a token counts; -1 for none (padding).
        n_groups: how many groups there are.
        backend: "auto" or a name from BACKENDS.

    Returns:
        weights (T, k), of softmax(logits) in at least fp32; experts (T, k) int64, different within a row; and per
        group (n_groups, E) how often each expert was chosen, and the sum of its score.  Weights and sums have
        gradients.
    """
    return backend_module("router", backend, logits).route(logits, k, norm, group, n_groups)


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, backend: str) -> Tensor:
    """A head's RMSNorm (with a weight (D,)) and rotary embedding, halves convention.

    Args:
        x: (T, H, D).  weight: (D,), or None for the rotation alone.  cos, sin: (T, D / 2).

    Returns:
        (T, H, D) in x's dtype, worked out in at least fp32.
    """
    return backend_module("rope", backend, x, KernelRequirements(x.shape[2])).norm_rope(x, weight, cos, sin, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in at least fp32, then in x's dtype."""
    return backend_module("elementwise", backend, x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *,
                 backend: str) -> tuple[Tensor, Tensor]:
    """total = x + residual (x itself without one), and rms_norm(total); all (..., C).

    Who goes on with total, not with x, saves an addition of gradients: backward makes x's in one pass.
    """
    return backend_module("elementwise", backend, x).add_rms_norm(x, residual, weight, eps)


def swiglu(gate: Tensor, up: Tensor, *, backend: str) -> Tensor:
    """silu(gate) * up."""
    return backend_module("elementwise", backend, gate).swiglu(gate, up)


def token_losses(logits: Tensor, labels: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """logits (n, V), labels (n,) in [0, V) -> each token's cross-entropy (n,), nats, and its gradient (n, V).

    The gradient may be written over the logits.  No autograd: minimind_ds/model/loss.py is what calls it.
    """
    return backend_module("elementwise", backend, logits).token_losses(logits, labels)
