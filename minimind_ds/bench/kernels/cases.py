"""What is computed: inputs of each operation at MiniMind's sizes, the exact answer in fp64, its least work.

Shape letters: T tokens, H heads, Hkv key heads, D head size, C hidden, I intermediate, E experts, K experts a token,
N labelled rows, V vocabulary.

    python -c "from minimind_ds.bench.kernels import cases; print(cases.document_lengths(cases.MINIMIND3, 0)[:9])"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ds.kernels import reference

EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Sizes of every operation; documents of `mean` tokens on average, none longer than `longest`."""

    T: int = 32768
    mean: int = 300
    longest: int = 768
    H: int = 8
    HKV: int = 4
    D: int = 96
    C: int = 768
    I: int = 2432  # noqa: E741
    E: int = 4
    N: int = 16384
    V: int = 6400


MINIMIND3 = Size()
# What the interpreter finishes in a second or two.
SMALL = Size(T=100, mean=30, longest=48, H=2, HKV=1, D=48, C=48, I=72, E=4, N=40, V=130)


@dataclass
class Case:
    """One operation on one set of inputs.

    leaves: what gradients are asked for.  douts: gradients of the outputs; None for outputs that have none.
    reference: leaves, by name the constants -> outputs.
    names: of outputs and then of the leaves' gradients.
    flops, bytes: least work of the forward pass, and of forward and backward together.  Bytes count each argument,
        result and gradient once, and nothing kept in between.
    """

    op: str
    name: str
    dtype: torch.dtype
    leaves: list[Tensor]
    douts: list[Tensor | None]
    reference: Callable
    names: list[str]
    flops: tuple[float, float]
    bytes: tuple[float, float]
    constants: dict = field(default_factory=dict)
    _exact: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    def exact(self) -> list[Tensor]:
        """Outputs and gradients in fp64 of the same rounded inputs; worked out once."""
        if self._exact is None:
            constants = {name: widen(value) for name, value in self.constants.items()}
            self._exact = run(lambda *leaves: self.reference(*leaves, **constants), map(widen, self.leaves),
                              map(widen, self.douts))
        return self._exact


def widen(x):
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run(function, leaves, douts) -> list[Tensor]:
    """Outputs and the leaves' gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    pairs = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if dout is not None]
    grads = torch.autograd.grad([out for out, _ in pairs], leaves, [dout.to(out.dtype) for out, dout in pairs])
    return [*(x.detach() for x in outputs), *grads]


def n_bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def document_lengths(size: Size, seed: int) -> list[int]:
    """T / mean lengths that fill T tokens, spread as instruction data is (log-normal, sigma 0.6)."""
    n = round(size.T / size.mean)
    drawn = np.random.default_rng(seed).lognormal(0, 0.6, size=n)
    lengths = np.clip(drawn / drawn.sum() * size.T, 8, size.longest).astype(int)
    # Clipping and rounding left some over: a token a document, in turn, where there is room.
    at = 0
    while (missing := size.T - lengths.sum()) != 0:
        step = 1 if missing > 0 else -1
        if 8 <= lengths[at % n] + step <= size.longest:
            lengths[at % n] += step
        at += 1
    return lengths.tolist()


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Draw:
    """Random tensors, drawn on the CPU so that every device gets the same ones."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator) * scale
        return drawn.to(dtype or self.dtype).to(self.device)


def attention(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    T, H, HKV, D = size.T, size.H, size.HKV, size.D
    draw, lengths = Draw(dtype, device, seed), document_lengths(size, seed)
    q, k, v, dout = draw(T, H, D), draw(T, HKV, D), draw(T, HKV, D), draw(T, H, D)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    # Two products forward and five backward (one of them the forward's, again), 2 D FLOP a pair of tokens and head.
    forward = 4.0 * pairs * H * D

    def reference_of(q, k, v, cu_seqlens, max_seqlen):
        return (reference.attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0),)

    moved = n_bytes(q, k, v, q)
    return Case("attention", f"{T} tokens, {len(lengths)} documents, {H}/{HKV} heads of {D}", dtype, [q, k, v],
                [dout], reference_of, ["out", "dq", "dk", "dv"], (forward, 3.5 * forward),
                (moved, moved + 2 * n_bytes(q, k, v, q)),
                dict(cu_seqlens=bounds_of(lengths), max_seqlen=max(lengths)))


def qk_norm_rope(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Case:
    T, H, HKV, D = size.T, size.H, size.HKV, size.D
    draw = Draw(dtype, device, seed)
    q, k, dq, dk = draw(T, H, D), draw(T, HKV, D), draw(T, H, D), draw(T, HKV, D)
    weights = [1 + draw(D, scale=0.1) for _ in range(2)]
    angles = draw(T, D // 2, dtype=torch.float32) * 100
    moved = 2 * n_bytes(q, k) + n_bytes(angles, angles)
    return Case("qk_norm_rope", f"{T} tokens, {H}/{HKV} heads of {D}", dtype, [q, k, *weights], [dq, dk],
                plain_qk_norm_rope, ["q", "k", "dq", "dk", "dq_weight", "dk_weight"], (0, 0),
                (moved, moved + 3 * n_bytes(q, k) + n_bytes(angles, angles)),
                dict(cos=angles.cos(), sin=angles.sin()))


def plain_qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    return tuple(reference.rotate(reference.rms_norm(x, weight, EPS), cos, sin)
                 for x, weight in ((q, q_weight), (k, k_weight)))


def rotate(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 2) -> Case:
    T, H, HKV, D = size.T, size.H, size.HKV, size.D
    draw = Draw(dtype, device, seed)
    q, k, dq, dk = draw(T, H, D), draw(T, HKV, D), draw(T, H, D), draw(T, HKV, D)
    angles = draw(T, D // 2, dtype=torch.float32) * 100
    moved = 2 * n_bytes(q, k) + n_bytes(angles, angles)
    return Case("rotate", f"{T} tokens, {H}/{HKV} heads of {D}", dtype, [q, k], [dq, dk],
                lambda q, k, cos, sin: (reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)),
                ["q", "k", "dq", "dk"], (0, 0), (moved, 2 * moved), dict(cos=angles.cos(), sin=angles.sin()))


def rms_norm(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 3) -> Case:
    draw = Draw(dtype, device, seed)
    x, dy, weight = draw(size.T, size.C), draw(size.T, size.C), 1 + draw(size.C, scale=0.1)
    return Case("rms_norm", f"{size.T} x {size.C}", dtype, [x, weight], [dy],
                lambda x, weight: (reference.rms_norm(x, weight, EPS),), ["y", "dx", "dweight"], (0, 0),
                (2 * n_bytes(x), 5 * n_bytes(x)))


def add_rms_norm(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 7) -> Case:
    draw = Draw(dtype, device, seed)
    x, residual, dtotal, dy = (draw(size.T, size.C) for _ in range(4))
    weight = 1 + draw(size.C, scale=0.1)
    return Case("add_rms_norm", f"{size.T} x {size.C}", dtype, [x, residual, weight], [dtotal, dy],
                lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS),
                ["total", "y", "dx", "dresidual", "dweight"], (0, 0), (4 * n_bytes(x), 8 * n_bytes(x)))


def swiglu(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 4) -> Case:
    draw = Draw(dtype, device, seed)
    gate, up, dy = (draw(size.T, size.I) for _ in range(3))
    return Case("swiglu", f"{size.T} x {size.I}", dtype, [gate, up], [dy], lambda *x: (reference.swiglu(*x),),
                ["y", "dgate", "dup"], (0, 0), (3 * n_bytes(gate), 8 * n_bytes(gate)))


def moe(size: Size, dtype: torch.dtype, device: torch.device, K: int = 1, seed: int = 5) -> Case:
    T, C, I, E = size.T, size.C, size.I, size.E  # noqa: E741
    draw = Draw(dtype, device, seed)
    x, dy = draw(T, C), draw(T, C)
    gate_up, down = draw(E, 2 * I, C, scale=C ** -0.5), draw(E, C, I, scale=I ** -0.5)
    weights = draw(T, K, dtype=torch.float32).sigmoid()
    experts = draw(T, E, dtype=torch.float32).topk(K, dim=1).indices
    forward = 6.0 * T * K * C * I
    moved = 2 * n_bytes(x) + n_bytes(gate_up, down, weights, experts)
    return Case("moe", f"{T} tokens of {C}, {E} experts of {I}, top-{K}", dtype, [x, gate_up, down, weights], [dy],
                lambda *leaves, experts: (reference.moe(*leaves, experts),),
                ["y", "dx", "dgate_up", "ddown", "dweights"], (forward, 3 * forward),
                (moved, 2 * moved + n_bytes(x, gate_up, down, weights)), dict(experts=experts))


def router(size: Size, dtype: torch.dtype, device: torch.device, K: int = 1, seed: int = 6) -> Case:
    """Softmax, top-k and what the balance loss sums up, per document.  Logits of a token differ by 1/8 or more."""
    T, E = size.T, size.E
    draw = Draw(torch.float32, device, seed)
    logits = (draw(T, E, dtype=torch.float64).argsort(dim=1) / 8 + draw(T, 1).round()).to(dtype)
    lengths = torch.tensor(document_lengths(size, seed))
    group = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    G = len(lengths)
    dweights, dsums = draw(T, K), draw(G, E, scale=0.1)
    moved = n_bytes(logits, dweights, group) + 8.0 * T * K
    return Case("router", f"{T} tokens, {E} experts, top-{K}, {G} groups", dtype, [logits],
                [dweights, dsums, None, None], textbook_router, ["weights", "sums", "experts", "counts", "dlogits"],
                (0, 0), (moved, 2 * moved + n_bytes(logits)), dict(K=K, group=group, n_groups=G))


def textbook_router(logits, K, group, n_groups):
    scores = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, experts = scores.topk(K, dim=-1)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    chosen = F.one_hot(experts, logits.shape[1]).sum(1).to(scores.dtype)
    sums, counts = (scores.new_zeros(n_groups, logits.shape[1]).index_add(0, group, x) for x in (scores, chosen))
    return weights, sums, experts, counts


def head_loss(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 7) -> Case:
    """Output projection and summed cross-entropy over labelled rows."""
    N, C, V = size.N, size.C, size.V
    draw = Draw(dtype, device, seed)
    hidden, weight = draw(N, C), draw(V, C, scale=C ** -0.5)
    labels = torch.randint(0, V, (N,), generator=draw.generator).to(device)
    forward = 2.0 * N * C * V
    return Case("head_loss", f"{N} rows of {C}, {V} words", dtype, [hidden, weight],
                [torch.ones((), dtype=torch.float32, device=device)], plain_head_loss,
                ["loss", "dhidden", "dweight"], (forward, 3 * forward),
                (n_bytes(hidden, weight), 3 * n_bytes(hidden, weight)), dict(labels=labels))


def plain_head_loss(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (F.cross_entropy(wide, labels, reduction="sum"),)
