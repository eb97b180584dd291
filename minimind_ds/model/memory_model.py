"""What a run needs on each rank, worked out before it starts: states, activations, buckets, bytes sent, rows that fit.

States follow the ZeRO papers and what DeepSpeed 0.19 adds (counted.py counts them in a run).  Activations are the
tensors that the forward pass saves for backward, written down operation by operation for the backend `sdpa`, which
`--kernels auto` takes on a CPU; tests/plan/test_planner.py counts them in real runs.  For the `triton` backend the
formula is an estimate that no GPU has confirmed.

    python launch/plan.py --preset minimind-3 --ranks 8 --memory 80
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from minimind_ds.config.deepspeed_json import optimizer_device, stage_of
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.convert import minimind
from minimind_ds.model import lora
from minimind_ds.model.loss import CHUNK

GIB = 2**30
# Elements that DeepSpeed reduces at once at stage 0.
ALL_REDUCED = 500_000_000
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the bytes.

    ranks: all of them.  rows, row_len: a micro-batch of one rank, in rows and tokens.  labelled: the share of tokens
    with a label.  activations: bytes of an activation's element (4 for bf16 parameters on CPUs that are slow in bf16).
    """

    config: ModelConfig
    ds: dict
    dtype: str
    ranks: int
    row_len: int
    rows: int = 1
    accumulation: int = 1
    labelled: float = 0.5
    activations: int | None = None
    on_cpu: bool = False
    dims: ParallelDims = ParallelDims()
    adapters: lora.Lora | None = None
    recompute: bool = False

    @property
    def stage(self) -> int:
        return stage_of(self.ds)

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def active(self) -> int:
        return self.activations or self.width

    @property
    def zero(self) -> dict:
        return self.ds.get("zero_optimization", {})

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.rows * self.row_len // self.dims.sequence


@dataclass(frozen=True)
class Part:
    """Parameters that ZeRO treats alike: their sizes in the model's order, and the ranks it cuts them over."""

    sizes: tuple[int, ...]
    ranks: int

    @property
    def total(self) -> int:
        return sum(self.sizes)


def trained_parts(s: Setting) -> list[Part]:
    """The trained parameters: all together; experts that are shared out by themselves, one rank's share of them."""
    if s.adapters:
        return [Part(tuple(math.prod(shape) for shape in lora.shapes(s.config, s.adapters).values()), s.ranks)]
    shared, experts = [], []
    for name, shape in minimind.expected_shapes(s.config).items():
        cut = s.dims.experts > 1 and ".experts." in name
        (experts if cut else shared).append(math.prod(shape) // (s.dims.experts if cut else 1))
    parts = [Part(tuple(shared), s.ranks)]
    return [*parts, Part(tuple(experts), s.ranks // s.dims.experts)] if experts else parts


def frozen(s: Setting) -> tuple[int, ...]:
    """Sizes of the parameters that are not trained: the base beside LoRA's adapters."""
    return tuple(math.prod(shape) for shape in minimind.expected_shapes(s.config).values()) if s.adapters else ()


def states(s: Setting) -> dict[str, dict[str, float]]:
    """Bytes of one rank's states on its device and on the host (or NVMe), where they are offloaded to.

    Gradients are those at the end of a step's last backward, the largest rank's.
    """
    device = dict.fromkeys(("parameters", "optimizer", "gradients", "buckets"), 0.0)
    host = dict(device)
    half, stage = s.width == 2, s.stage
    masters = 0 if stage == 0 and not half else 4
    opt = host if optimizer_device(s.ds) != "none" else device
    par = host if offloads_parameters(s) else device
    for part in trained_parts(s):
        share = part.total / part.ranks
        par["parameters"] += s.width * (share if stage == 3 else part.total)
        opt["optimizer"] += (masters + 8) * (share if stage else part.total)
        opt["gradients"] += gradient_bytes(s, part)
    if stage == 3:
        device["parameters"] += s.width * kept_whole(s)
    par["parameters"] += s.width * sum(frozen(s)) / (s.ranks if stage == 3 else 1)
    device["buckets"] = buckets(s)
    return {"device": device, "host": host}


def gradient_bytes(s: Setting, part: Part) -> float:
    if s.stage == 0:
        return s.width * part.total
    if s.stage == 3:
        # Offloaded, they lie in DeepSpeed's flat buffer and beside the masters.
        return (s.width + (4 if optimizer_device(s.ds) != "none" else 0)) * part.total / part.ranks
    if s.stage == 1 and s.accumulation > 1:
        # Reduced at the step's last backward; until then each rank holds its own.
        return s.width * part.total
    if optimizer_device(s.ds) != "none":
        # On the host as the fp32 gradient of this rank's masters.
        return 4 * part.total / part.ranks
    return s.width * owned(part)


def owned(part: Part) -> int:
    """Elements of the gradients that the rank with most of them keeps at stages 1 and 2.

    They cut the flattened parameters into equal shares; both sides of a cut hold its parameter's gradient whole.
    """
    ends = np.cumsum(part.sizes)
    starts, share = ends - part.sizes, math.ceil(part.total / part.ranks)
    cuts = np.arange(part.ranks) * share
    first, behind = np.searchsorted(ends, cuts, "right"), np.searchsorted(starts, cuts + share, "left")
    whole = np.concatenate(([0], ends))
    return int((whole[np.maximum(first, behind)] - whole[first]).max())


def offloads_parameters(s: Setting) -> bool:
    return (s.zero.get("offload_param") or {}).get("device") not in (None, "none")


def kept_whole(s: Setting) -> int:
    """Elements of parameters too small for stage 3 to cut: whole on every rank, beside their share."""
    most = s.zero.get("stage3_param_persistence_threshold", 100_000)
    sizes = [size for part in trained_parts(s) for size in part.sizes] + list(frozen(s))
    return sum(size for size in sizes if size <= most)


def buckets(s: Setting) -> float:
    """What gradients travel in: of the size the file asks for, two of them where sending overlaps with computing."""
    size = float(s.zero.get("reduce_bucket_size", 5e8))
    if s.stage == 0 or not s.zero.get("contiguous_gradients", True):
        return 0.0
    double = 2 if s.stage < 3 and s.zero.get("overlap_comm", False) else 1
    return size * s.width * double


def layer_bytes(s: Setting) -> dict[str, float]:
    """Bytes that one layer saves for backward, for each token of a rank: of attention and norms, and of its MLP."""
    c, w = s.config, s.active
    C, H, HKV, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    # On a CPU attention works in fp32, on copies.
    a = max(w, 4) if s.on_cpu else w
    # Two norms save what they norm and its scale; their outputs are what the projections save.
    attention = 4 * C * w + 2 * 4
    if c.qk_norm:
        attention += (H + HKV) * (D * w + 4)
    # Queries, keys, values, outputs, the softmax's denominators; and the outputs once more, joined.
    attention += (2 * H + 2 * HKV) * D * a + 4 * H + H * D * w
    if not c.use_moe:
        return {"attention": attention, "mlp": 3 * c.intermediate_size * w}
    K, E = c.num_experts_per_tok, c.num_experts
    router = 4 * E + 8 * K + 4 * K + (4 if c.norm_topk_prob else 0) + (4 * s.rows if c.router_aux_loss_coef else 0)
    # Sorted copies of tokens on their way to experts and back, and where each went.
    experts = K * (2 * 8 + (2 * C + 3 * c.moe_intermediate_size) * w + (w if w < 4 else 0))
    return {"attention": attention, "mlp": router + experts}


def activations(s: Setting) -> dict[str, float]:
    """Bytes saved for backward when a micro-batch's forward has ended, by kind; "logits" live for a moment in it."""
    c, w, T, L = s.config, s.active, s.tokens, s.config.num_hidden_layers
    per_token = layer_bytes(s)
    layers = L * T * per_token["attention"], L * T * per_token["mlp"]
    if s.recompute:
        layers = T * (L * c.hidden_size * w + per_token["attention"]), T * per_token["mlp"]
    labelled = T * s.labelled
    found = {"attention": layers[0], "experts" if c.use_moe else "mlp": layers[1],
             "rest": T * (c.hidden_size * w + 4 + 4 * c.head_dim) + labelled * c.hidden_size * w}
    if not s.adapters:
        # The head's gradient is made in the forward pass.
        found["rest"] += c.vocab_size * c.hidden_size * w
    else:
        ranks = sum(shape[0] for name, shape in lora.shapes(c, s.adapters).items() if name.endswith("A.weight"))
        found["rest"] += T * ranks * w
    if w > s.width:
        found["copies of weights"] = w * sum(
            math.prod(shape) // (s.dims.experts if ".experts." in name else 1)
            for name, shape in minimind.expected_shapes(c).items() if ".layers." in name and len(shape) > 1)
    # Logits and their exponentials; then their gradient, its product with the hidden states, which becomes the head's
    # gradient, and a head that is wider than its parameter.
    rows, head = min(labelled, CHUNK), 0 if s.adapters else c.vocab_size * c.hidden_size * max(w, 4)
    found["logits"] = rows * c.vocab_size * w + max(rows * c.vocab_size * 4, head)
    if w > s.width:
        found["logits"] += c.vocab_size * c.hidden_size * w
    return found


def peak(s: Setting) -> float:
    """Bytes of one rank's device at its fullest."""
    held = states(s)["device"]
    return held["parameters"] + held["optimizer"] + gathered(s) + max(moments(s).values())


def moments(s: Setting) -> dict[str, float]:
    """Bytes beside parameters and optimizer at the moments of a step's last micro-batch that may be the fullest.

    Stages 1 and 2 make their buckets when the first gradient comes and let go of them when backward has ended; stage 3
    keeps its bucket, and stage 1 those of the micro-batch before.
    """
    held, made = states(s)["device"], activations(s)
    logits, travel = made.pop("logits"), held["buckets"]
    saved = sum(made.values())
    # Gradients come as activations go; those of earlier micro-batches are there already.
    still = held["gradients"] if s.accumulation > 1 or s.stage == 3 else 0
    standing = travel if s.stage == 3 or (s.stage == 1 and s.accumulation > 1) else 0
    # The tied head's gradient waits for the embedding's.
    head = 0 if s.adapters else s.config.vocab_size * s.config.hidden_size * s.width
    found = {"forward ends": still + standing + saved + logits,
             "backward begins": still + saved + max(standing + head, travel + last_mlp(s))}
    if s.stage in (1, 2):
        return found | reductions(s, made, still, travel, head)
    # Stage 0 flattens a copy of all gradients to send it, even on one rank.
    more = max(head, min(held["gradients"], s.width * ALL_REDUCED)) if s.stage == 0 else head
    return found | {"backward ends": held["gradients"] + standing + more}


def reductions(s: Setting, made: dict[str, float], still: float, travel: float, head: float) -> dict[str, float]:
    """The moments at which stages 1 and 2 empty a bucket: they copy what is in it to send it, and make room for all
    gradients this rank keeps when the first of them comes, which on the last rank is early."""
    parts, size = trained_parts(s), int(s.zero.get("reduce_bucket_size", 5e8))
    sizes, embedding = [n for part in parts for n in part.sizes], int(head / s.width)
    kept = 0 if optimizer_device(s.ds) != "none" else s.width * sum(owned(part) for part in parts)
    # The embedding's gradient is the last.
    layers, total = sum(sizes) - embedding, sum(sizes)
    early = size < layers and travel > 0
    # What the last bucket holds; a gradient larger than a bucket goes by itself.
    last = total if total <= size else max(total % size, embedding)
    found = {"embedding": travel + early * kept + 2 * head, "backward ends": travel + kept + s.width * last}
    if early:
        largest = max(n for n in sizes if n != embedding)
        gone = max(0, size - largest) / layers * sum(made.get(kind, 0) for kind in ("attention", "mlp", "experts"))
        found["first bucket"] = (still + sum(made.values()) - gone + travel + kept
                                 + s.width * (largest if largest > size else 0))
    if s.stage == 1:
        # Gradients larger than a bucket stay until the end even where they are not kept.
        found["backward ends"] += s.width * sum(n for n in sizes if n > size) * (1 - 1 / s.ranks)
    return found


def last_mlp(s: Setting) -> float:
    """What backward makes in the last layer's MLP: gradients of its activations and weights."""
    c, w = s.config, s.active
    experts, intermediate, K = 1, c.intermediate_size, 1
    if c.use_moe:
        experts, intermediate, K = c.num_experts // s.dims.experts, c.moe_intermediate_size, c.num_experts_per_tok
    made = s.tokens * K * (2 * c.hidden_size + 3 * intermediate) * w
    return made if s.adapters else made + 3 * experts * intermediate * c.hidden_size * w


def gathered(s: Setting) -> float:
    """Parameters that stage 3 has whole at once: all of them, unless the file lets fewer live.

    DeepSpeed keeps what it gathered as long as stage3_max_live_parameters and stage3_max_reuse_distance allow; their
    defaults (1e9) are more than models of these sizes have.
    """
    # One rank's share is the whole.
    if s.stage < 3 or s.ranks == 1:
        return 0.0
    shapes = minimind.expected_shapes(s.config)
    layer = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.0."))
    cut = sum(part.total for part in trained_parts(s)) + sum(frozen(s)) - kept_whole(s)
    allowed = min(float(s.zero.get(f"stage3_max_{name}", 1e9)) for name in ("live_parameters", "reuse_distance"))
    return s.width * min(cut, max(allowed, layer, s.config.vocab_size * s.config.hidden_size))


def most_rows(s: Setting, memory: float) -> int:
    """The most rows of a micro-batch whose peak fits in `memory` bytes; 0 if not even one does."""
    def fits(rows: int) -> bool:
        return peak(replace(s, rows=rows)) <= memory

    most = 0
    step = 1
    while fits(most + step) and most + step < 2**20:
        most += step
        step *= 2
    while step:
        if fits(most + step):
            most += step
        step //= 2
    return most


def sent(s: Setting) -> dict[str, float]:
    """Bytes one rank sends in an optimizer step, ring algorithms: (n - 1) / n of what is gathered or reduced."""
    found = {"gradients": 0.0, "parameters": 0.0}
    times = s.accumulation if s.stage >= 2 else 1
    for part in trained_parts(s):
        once = s.width * part.total * (part.ranks - 1) / part.ranks
        # Stages 0 and 1 all-reduce or reduce and gather: twice the bytes of a reduce-scatter.
        found["gradients"] += once * (2 if s.stage == 0 else times)
        found["parameters"] += {0: 0, 1: once, 2: once}.get(s.stage, 0)
    if s.stage == 3:
        every = sum(part.total * (part.ranks - 1) / part.ranks for part in trained_parts(s))
        every += sum(frozen(s)) * (s.ranks - 1) / s.ranks
        # Gathered for forward and again for backward.
        found["parameters"] = 2 * s.accumulation * s.width * (every - kept_whole(s) * (s.ranks - 1) / s.ranks)
    c, w, n = s.config, s.active, s.dims
    per_micro = 0.0
    if n.experts > 1:
        # There and back, forward and backward.
        per_micro += 4 * s.tokens * c.num_experts_per_tok * c.hidden_size * w * (n.experts - 1) / n.experts
    if n.sequence > 1:
        heads = (2 * c.num_attention_heads + 2 * max(c.num_key_value_heads, n.sequence)) * c.head_dim
        per_micro += 2 * s.tokens * heads * w * (n.sequence - 1) / n.sequence
    if per_micro:
        found["tokens"] = per_micro * c.num_hidden_layers * s.accumulation
    return found
