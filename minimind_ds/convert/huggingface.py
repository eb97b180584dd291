"""A model's configuration as Hugging Face has it: Qwen3, Qwen3-MoE, or Llama where there is no QK-norm.

    python -m pytest tests/convert/test_weights.py
"""

from __future__ import annotations

import torch

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.config.untrusted import shown


def to_hf_config(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json for transformers (4.51 and later, 5) and vLLM: Qwen3, Qwen3-MoE, or Llama without QK-norm.

    Raises:
        ValueError: experts without QK-norm, for which there is no such architecture.
    """
    if config.use_moe and not config.qk_norm:
        raise UserError("a mixture of experts without qk_norm has no counterpart in transformers")
    kind, name = ("qwen3_moe", "Qwen3Moe") if config.use_moe else ("qwen3", "Qwen3")
    if not config.qk_norm:
        kind, name = "llama", "Llama"
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "hidden_act", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
            "tie_word_embeddings", "bos_token_id", "eos_token_id")
    values = {field: getattr(config, field) for field in same}
    rope = dict(config.rope_scaling or {})
    kind_of_rope = rope.pop("type", rope.pop("rope_type", "default"))
    # transformers 5 reads rope_parameters; transformers 4 and older vLLM read rope_theta and rope_scaling.
    values["rope_parameters"] = {"rope_type": kind_of_rope, "rope_theta": config.rope_theta, **rope}
    if rope:
        values["rope_scaling"] = {"rope_type": kind_of_rope, **rope}
    values |= {"architectures": [f"{name}ForCausalLM"], "model_type": kind, "attention_bias": False,
               "attention_dropout": config.dropout, "initializer_range": 0.02, "use_cache": True,
               "dtype": str(dtype).removeprefix("torch.")}
    if kind == "llama":
        values |= {"mlp_bias": False}
    else:
        values |= {"use_sliding_window": False, "sliding_window": None}
    if config.use_moe:
        values |= {"num_experts": config.num_experts, "num_local_experts": config.num_experts,
                   "num_experts_per_tok": config.num_experts_per_tok, "norm_topk_prob": config.norm_topk_prob,
                   "moe_intermediate_size": config.moe_intermediate_size, "decoder_sparse_step": 1,
                   "mlp_only_layers": [], "router_aux_loss_coef": config.router_aux_loss_coef}
    return values


def from_hf_config(values: dict) -> ModelConfig:
    """The inverse of to_hf_config, for folders written by anyone.

    Raises:
        ValueError: an architecture, or a part of one, that MiniMind does not have.
    """
    kind = values.get("model_type")
    if kind not in ("qwen3", "qwen3_moe", "llama", "minimind"):
        raise UserError(f"model_type {shown(kind)} is none of qwen3, qwen3_moe, llama")
    refused = {"attention_bias": (None, False), "mlp_bias": (None, False), "use_sliding_window": (None, False),
               "mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)}
    for name, allowed in refused.items():
        if values.get(name) not in allowed:
            raise UserError(f"{name} is {shown(values[name])}, which MiniMind does not have")
    known = set(ModelConfig.__dataclass_fields__) - {"rope_scaling", "use_moe", "qk_norm"}
    fields = {name: value for name, value in values.items() if name in known and value is not None}
    # Several stop tokens are the tokenizer's to know; exports take them from there.
    if isinstance(fields.get("eos_token_id"), list):
        del fields["eos_token_id"]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters is {shown(rope)}, not an object")
    rope = dict(rope)
    fields["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kind_of_rope = rope.pop("rope_type", rope.pop("type", "default"))
    if kind_of_rope not in ("default", "yarn"):
        raise UserError(f"rope_type {shown(kind_of_rope)} is neither default nor yarn")
    if kind_of_rope == "yarn":
        fields["rope_scaling"] = {**rope, "type": "yarn"}
    if kind == "qwen3_moe":
        fields["num_experts"] = values.get("num_experts", values.get("num_local_experts", 128))
    fields["use_moe"] = values.get("use_moe", kind == "qwen3_moe")
    return ModelConfig(**fields, qk_norm=kind != "llama")
