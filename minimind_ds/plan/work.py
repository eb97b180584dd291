"""What a step asks of a machine, counted: FLOPs, bytes and launches of each kind of operation, in each part of it.

Bytes are the least: each tensor that an operation reads or writes, once (docs/KERNELS.md has the same counts).  How
fast a kind of operation runs on a device is hardware.py's.

    python -m pytest tests/plan/test_time.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minimind_ds.convert import minimind
from minimind_ds.model.loss import CHUNK
from minimind_ds.model.memory_model import Setting, trained_parts

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
# What stage 3 costs the host for each parameter that it cuts, against stage 1, in launches: on one rank, and on many,
# where it is gathered.  Measured on a CPU, whose launches are its small products.
HOOKS, GATHERED = 120, 300
# Of a document's mean length: the mean number of keys that a token attends to.  Half of it, were all alike; lengths
# of instruction data scatter by 0.6 of their mean.
KEYS = 2 / 3


@dataclass(frozen=True)
class Work:
    """Operations of one kind in one part of a step: FLOPs of their products, and the least bytes moved."""

    kind: str
    part: str
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Launches:
    """Kernels that the host launches: in a micro-batch's forward and backward, and in an update.

    hooks: DeepSpeed's Python about a micro-batch's parameters that stage 3 cuts, in launches of a CPU.
    """

    forward: float
    backward: float
    update: float
    hooks: float = 0.0


def keys(s: Setting, document: float) -> float:
    """Mean keys attended per token, documents of so many tokens on average; no document is longer than a row."""
    return min(document * KEYS, s.row_len / 2)


def chained(s: Setting, width: int, outputs: list[int], kind: str = "products") -> Iterator[Work]:
    """Products that read one input (tokens, width), and hand its gradient on from one to the next."""
    T, w, n = s.tokens, s.active, len(outputs)
    flops, moved = 2.0 * T * width * sum(outputs), w * (T + width) * sum(outputs)
    yield Work(kind, FORWARD, flops, moved + w * n * T * width)
    # The first share of the input's gradient is written, the others are added to it.
    yield Work(kind, BACKWARD, flops, moved + w * (2 * n - 1) * T * width)
    if not s.adapters:
        yield Work(kind, BACKWARD, flops, moved + w * n * T * width)


def layer(s: Setting, attended: float) -> Iterator[Work]:
    """One layer on a rank's tokens of a micro-batch."""
    c, T, w = s.config, s.tokens, s.active
    C, H, HKV, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    yield from chained(s, C, [H * D, HKV * D, HKV * D])
    yield from chained(s, H * D, [C])
    pairs, qkv = 4.0 * T * attended * H * D, w * T * (H + 2 * HKV) * D
    out = w * T * H * D
    yield Work("attention", FORWARD, pairs, qkv + out)
    # Two products forward; backward makes one of them again and four more.  In: queries, keys, values, output and its
    # gradient; out: three gradients.
    yield Work("attention", BACKWARD, 2.5 * pairs, 2 * (qkv + out))
    yield Work("rope", FORWARD, bytes=2 * w * T * (H + HKV) * D)
    yield Work("rope", BACKWARD, bytes=3 * w * T * (H + HKV) * D)
    # Twice a layer: x and residual to their sum and its norm; both gradients and the sum to one gradient.
    yield Work("norms", FORWARD, bytes=2 * 4 * w * T * C)
    yield Work("norms", BACKWARD, bytes=2 * 4 * w * T * C)
    if not c.use_moe:
        intermediate = c.intermediate_size
        yield from chained(s, C, [intermediate, intermediate])
        yield from chained(s, intermediate, [C])
        yield Work("swiglu", FORWARD, bytes=3 * w * T * intermediate)
        yield Work("swiglu", BACKWARD, bytes=5 * w * T * intermediate)
        return
    yield from chained(s, C, [c.num_experts], "router")
    flops = 6.0 * T * c.num_experts_per_tok * C * c.moe_intermediate_size
    yield Work("experts", FORWARD, flops)
    yield Work("experts", BACKWARD, flops * (1 if s.adapters else 2))


def micro_batch(s: Setting, attended: float) -> list[Work]:
    """All of a micro-batch on one rank; `attended` keys a token."""
    c, T, w = s.config, s.tokens, s.active
    found = [Work(x.kind, x.part, x.flops * c.num_hidden_layers, x.bytes * c.num_hidden_layers)
             for x in layer(s, attended)]
    if s.recompute:
        found += [Work(x.kind, BACKWARD, x.flops, x.bytes) for x in found if x.part == FORWARD]
    labelled, head = T * s.labelled, c.vocab_size * c.hidden_size
    # Logits, and their gradient's two products, in the forward pass, a chunk at a time.
    times, chunks = 2 if s.adapters else 3, max(labelled / CHUNK, min(1.0, labelled))
    found.append(Work("products", FORWARD, times * 2.0 * labelled * head,
                      times * w * (labelled * (c.hidden_size + c.vocab_size) + chunks * head)))
    found.append(Work("loss", FORWARD, bytes=2 * w * labelled * c.vocab_size
                      + (0 if s.adapters else chunks * (8 + w) * head)))
    found.append(Work("rest", FORWARD, bytes=2 * w * (T + labelled) * c.hidden_size))
    found.append(Work("rest", BACKWARD, bytes=6 * w * T * c.hidden_size))
    trained = sum(part.total for part in trained_parts(s))
    # A copy of each gradient to where it is reduced, and at the sharding stages one from there.
    found.append(Work("gradients", BACKWARD, bytes=(2 if s.stage == 0 else 4) * s.width * trained))
    return found


def update(s: Setting) -> list[Work]:
    """One rank's update: it is the rank's share that is updated where the optimizer's states are cut."""
    moved = 0.0
    for part in trained_parts(s):
        mine = part.total / (part.ranks if s.stage else 1)
        # fp32: norm (read), clipping (read, write), Adam (three states and a gradient read, three states written).
        moved += (4 + 8 + 28) * mine
        if s.width < 4:
            # The gradient made fp32, the updated weights rounded.
            moved += 2 * (4 + s.width) * mine
        if 0 < s.stage < 3 and part.ranks > 1:
            # Gathered weights go into place.
            moved += 2 * s.width * part.total
    return [Work("update", UPDATE, bytes=moved)]


def tensors(s: Setting) -> int:
    """Trained parameters."""
    return sum(len(part.sizes) for part in trained_parts(s)) if s.adapters else len(minimind.expected_shapes(s.config))


def launches(s: Setting) -> Launches:
    """As counted over the real engine with the `triton` backend (tests/training/launches.py), but for a few."""
    c, L = s.config, s.config.num_hidden_layers
    count, chunks = tensors(s), max(s.tokens * s.labelled / CHUNK, 1.0)
    norms = 4 if c.qk_norm else 2
    # Norms, heads' norms and rotation, attention, products; MLP or router, experts and balance loss.
    forward = 2 + 2 + 1 + 4 + (4 if not c.use_moe else 22)
    # The same backward: two kernels of attention's, two products a weight, sums of the norms' weights and their casts.
    backward = 2 + 2 + 2 + 8 + 2 * norms + (7 if not c.use_moe else 14)
    of_layers, back = L * forward, L * backward
    if s.recompute:
        back += of_layers
    copies = {0: 1, 1: 2, 2: 2, 3: 4}[s.stage] * count
    hooks = (HOOKS if s.ranks == 1 else GATHERED) * cut_tensors(s) if s.stage == 3 else 0
    return Launches(of_layers + 11 + 6 * chunks, back + 18 + copies, {0: 13, 1: 28, 2: 28, 3: 2 * count + 20}[s.stage],
                    hooks)


def cut_tensors(s: Setting) -> int:
    """Parameters large enough for stage 3 to cut."""
    least = s.zero.get("stage3_param_persistence_threshold", 100_000)
    return sum(math.prod(shape) > least for shape in minimind.expected_shapes(s.config).values())


def collectives(s: Setting) -> float:
    """How often a rank waits for the others in a step, about."""
    if s.ranks == 1:
        return 0.0
    total = sum(part.total for part in trained_parts(s))
    bucket = float(s.zero.get("reduce_bucket_size", 5e8))
    buckets = max(1, math.ceil(total / bucket))
    if s.stage < 2:
        return 2 + buckets + (1 if s.stage else 0)
    if s.stage == 2:
        return 3 + buckets * s.accumulation
    # Gathered one by one, forward and backward, and reduced.
    return 3 + 3 * s.accumulation * cut_tensors(s)
