"""Names and shapes of weights: MiniMind's <-> ours.

Ours are transformers 5's: experts stacked in two parameters a layer, so that every rank and step touches all of them.
Files of MiniMind and of Hugging Face (Qwen3, Qwen3-MoE, Llama) hold one tensor per expert and projection.

    python -m pytest tests/convert/test_weights.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS, ModelConfig


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes, in the model's own order; a tied head is left out."""
    C, D, I, E = config.hidden_size, config.head_dim, config.intermediate_size, config.num_experts  # noqa: E741
    H, Hkv, M = config.num_attention_heads, config.num_key_value_heads, config.moe_intermediate_size
    shapes = {"model.embed_tokens.weight": (config.vocab_size, C)}
    for layer in range(config.num_hidden_layers):
        block = {"input_layernorm.weight": (C,), "self_attn.q_proj.weight": (H * D, C),
                 "self_attn.k_proj.weight": (Hkv * D, C), "self_attn.v_proj.weight": (Hkv * D, C),
                 "self_attn.o_proj.weight": (C, H * D)}
        if config.qk_norm:
            block |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
        block["post_attention_layernorm.weight"] = (C,)
        if config.use_moe:
            block |= {"mlp.gate.weight": (E, C), "mlp.experts.gate_up_proj": (E, 2 * M, C),
                      "mlp.experts.down_proj": (E, C, M)}
        else:
            block |= {"mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C), "mlp.down_proj.weight": (C, I)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (C,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, C)
    return shapes


def fresh(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Initial weights under our names: normal with deviation 0.02, norms 1 (as MiniMind), fixed by torch's seed."""
    for name, shape in expected_shapes(config).items():
        yield name, torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, 0.02)


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts -> one tensor per expert and projection, as MiniMind and Hugging Face's files have them."""
    split = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate
                split[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            split |= {f"{prefix}.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


def stack_experts(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of split_experts.  An incomplete set of experts is left as it is, for the check to name."""
    stacked = dict(state)
    for layer in range(config.num_hidden_layers if config.use_moe else 0):
        prefix = f"model.layers.{layer}.mlp.experts"
        names = {kind: [f"{prefix}.{expert}.{kind}_proj.weight" for expert in range(config.num_experts)]
                 for kind in ("gate", "up", "down")}
        parts = {kind: [state.get(name) for name in kind_names] for kind, kind_names in names.items()}
        if any(part is None for kind_parts in parts.values() for part in kind_parts):
            continue
        if len({part.shape for part in parts["gate"] + parts["up"]}) + len({p.shape for p in parts["down"]}) > 2:
            continue
        stacked[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(parts["gate"], parts["up"])])
        stacked[f"{prefix}.down_proj"] = torch.stack(parts["down"])
        for name in sum(names.values(), []):
            del stacked[name]
    return stacked


def check(state: dict[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """The same tensors in our order, without the copy a tied head is stored as.

    Raises:
        ValueError: one line that names `source` and what is missing, unexpected or of another shape.
    """
    shapes = expected_shapes(config)
    state = dict(state)
    if config.tie_word_embeddings and "lm_head.weight" in state:
        head, embedding = state.pop("lm_head.weight"), state.get("model.embed_tokens.weight")
        if embedding is not None and not (head is embedding or torch.equal(head, embedding)):
            raise UserError(f"{source}: lm_head.weight differs from model.embed_tokens.weight, but the configuration "
                             f"ties them (tie_word_embeddings)")
    return fit(state, shapes, source)


def fit(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Tensor]:
    """The same tensors in the order of `shapes`: all of those names and no others, each of its shape.

    Raises:
        ValueError: one line that names `source` and what is missing, unexpected or of another shape.
    """
    wrong = {
        "missing": [name for name in shapes if name not in state],
        "unexpected": [name for name in state if name not in shapes],
        "of another shape": [f"{name} {tuple(state[name].shape)} instead of {shape}" for name, shape in shapes.items()
                             if name in state and tuple(state[name].shape) != shape],
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {what} ({', '.join(f'{name:.200}' for name in names[:3])}"
                 f"{', ...' if len(names) > 3 else ''})" for what, names in wrong.items() if names]
        raise UserError(f"{source} does not fit the model: {'; '.join(parts)}")
    return {name: state[name] for name in shapes}


def from_minimind(state: dict[str, Tensor], config: ModelConfig, source: str = "state dict") -> dict[str, Tensor]:
    """MiniMind's names (experts apart, or already stacked) -> ours; Hugging Face's files use the same ones.

    Buffers that old checkpoints hold (freqs_cos, freqs_sin, rotary inv_freq) are left out.

    Raises:
        ValueError: one line naming what is missing, unexpected or of another shape.
    """
    derived = ("freqs_cos", "freqs_sin", "inv_freq")
    kept = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in derived}
    return check(stack_experts(kept, config), config, source)


def presets_of(state: dict[str, Tensor]) -> list[str]:
    """The presets whose weights have these names and shapes, whatever the vocabulary."""
    fitting, embedding = [], state.get("model.embed_tokens.weight")
    for name, preset in PRESETS.items():
        rows = preset.vocab_size if embedding is None or embedding.dim() != 2 else embedding.shape[0]
        with contextlib.suppress(UserError):
            from_minimind(state, replace(preset, vocab_size=rows))
            fitting.append(name)
    return fitting


def to_minimind(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Ours -> exactly the original's keys and shapes; a tied head appears twice, as it does there.

    transformers 5 and vLLM read Qwen3, Qwen3-MoE and Llama weights under these names too: Qwen3-MoE files hold one
    tensor per expert and projection, which transformers 5 stacks while it loads.
    """
    state = check(state, config, "state dict")
    split = split_experts(state)
    split.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return split
