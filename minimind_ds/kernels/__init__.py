"""The one door to attention over packed segments and dropless experts, whatever computes them.

A backend is a module with `why_not`, `attention` and `moe`; a new one is a file here and a line in BACKENDS.

    python -c "from minimind_ds import kernels; print(kernels.resolve('auto', 'cpu', 'bfloat16'))"
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, sdpa

# Fastest first: `auto` takes the first that can run.
BACKENDS = {
    "sdpa": sdpa,
    "reference": reference,
}
OPS = ("attention", "moe")


class Choice(NamedTuple):
    """The backend of each operation, and a line saying why."""

    attention: str
    moe: str
    reason: str


def parse(spec: str) -> dict[str, str]:
    """Reads "auto", a backend's name or "attention=NAME,moe=NAME" (an operation left out is "auto").

    Raises:
        ValueError: an operation or a backend that does not exist.
    """
    if "=" not in spec:
        asked = dict.fromkeys(OPS, spec.strip())
    else:
        asked = dict.fromkeys(OPS, "auto")
        for part in spec.split(","):
            op, _, name = (word.strip() for word in part.partition("="))
            if op not in OPS:
                raise ValueError(f"kernels {spec!r}: no operation {op!r}; the operations are {', '.join(OPS)}")
            asked[op] = name
    for name in asked.values():
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"kernels {spec!r}: no backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    return asked


def resolve(spec: str, device: torch.device | str, dtype: torch.dtype | str) -> Choice:
    """Names the backend of each operation for tensors of this device and dtype.

    "auto" takes the fastest that can run here; a name is taken at its word.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here; the message says why.
    """
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    chosen, reasons = {}, []
    for op, name in parse(spec).items():
        refusals = {other: module.why_not(op, device, dtype) for other, module in BACKENDS.items()}
        if name == "auto":
            chosen[op] = next(other for other, refusal in refusals.items() if refusal is None)
            passed = [f"{other}: {refusal}" for other, refusal in refusals.items() if refusal]
            reasons.append(f"{op} = {chosen[op]} (auto: the fastest that runs {dtype} on {device.type}"
                           + (f"; not {'; '.join(passed)})" if passed else ")"))
        elif refusals[name]:
            raise ValueError(f"kernels: {op} = {name} cannot run here: {refusals[name]}")
        else:
            chosen[op] = name
            reasons.append(f"{op} = {name} (as asked)")
    return Choice(**chosen, reason=", ".join(reasons))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str,
              dropout_p: float = 0.0) -> Tensor:
    """Causal self-attention inside each segment, softmax(q k^T / sqrt(D)) v; segments never see each other.

    Args:
        q: (T, H, D).  k, v: (T, Hkv, D) with Hkv dividing H: head h reads key head h // (H / Hkv).
        cu_seqlens: (N + 1,) int32, where segments start and end: 0 = first, T = last, not decreasing.
            On the CPU even when q is on a GPU, where the backend can use it so without waiting for the GPU.
        max_seqlen: the longest segment's length, in tokens.
        backend: "auto" or a name from BACKENDS.
        dropout_p: the probability with which an attention weight is dropped.

    Returns:
        (T, H, D) in q's dtype.

    Raises:
        ValueError: an unknown backend, or one that cannot run on this device and dtype.
    """
    name = resolve(f"attention={backend}", q.device, q.dtype).attention
    return BACKENDS[name].attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p)


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
    name = resolve(f"moe={backend}", x.device, x.dtype).moe
    return BACKENDS[name].moe(x, gate_up, down, weights, experts)
