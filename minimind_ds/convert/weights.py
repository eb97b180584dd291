"""Names of weights: MiniMind's .pth <-> ours <-> Hugging Face, and the files that hold them.

Ours are transformers 5's: experts stacked in two parameters a layer, so that every rank and step touches all of them.
Files of MiniMind and of Hugging Face (Qwen3, Qwen3-MoE, Llama) hold one tensor per expert and projection.  Nothing
is loaded that could run code: safetensors, or torch.load(weights_only=True).

    python -m pytest tests/convert/test_weights.py
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.io import write_file

# Fields that may differ between the configuration of a file and the one it is loaded into: they change no weight and
# no logit on texts that both can read.
FREE_FIELDS = {"dropout", "router_aux_loss_coef", "max_position_embeddings", "bos_token_id", "eos_token_id",
               "inference_rope_scaling", "rope_scaling"}
MOE_FIELDS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}


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
        parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for what, names in wrong.items() if names]
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


def to_minimind(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Ours -> exactly the original's keys and shapes; a tied head appears twice, as it does there.

    transformers 5 and vLLM read Qwen3, Qwen3-MoE and Llama weights under these names too: Qwen3-MoE files hold one
    tensor per expert and projection, which transformers 5 stacks while it loads.
    """
    state = check(state, config, "state dict")
    split = split_experts(state)
    split.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return split


def file_name(save_weight: str, config: ModelConfig) -> str:
    """The name of a run's final weights, as MiniMind names its own."""
    return f"{save_weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}.safetensors"


def save_safetensors(path: str | Path, state: dict[str, Tensor], config: ModelConfig):
    """Writes weights (our names) with their configuration: wholly or not at all, even through a power cut.

    Raises:
        ValueError: weights that do not fit the configuration.
    """
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in check(state, config, str(path)).items()}
    write_file(Path(path), save(state, metadata={"config": json.dumps(config.to_dict()), "format": "pt"}))


def find(path: str | Path) -> list[Path]:
    """The weight files that a path means: a file itself, a run folder's one .safetensors, a Hugging Face folder's.

    Raises:
        ValueError: nothing there, or several weights to choose from.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    if (path / "config.json").is_file():
        if not files:
            raise UserError(f"{path}: a Hugging Face folder without .safetensors files (pickled ones are not read)")
        return files
    if not files:
        raise UserError(f"{path}: holds no .safetensors file")
    if len(files) > 1:
        raise UserError(f"{path}: holds several weights ({', '.join(f.name for f in files)}); name one of them")
    return files


def read_config(path: str | Path) -> ModelConfig | None:
    """The configuration that weights carry with them, or None (a .pth, or a .safetensors of another origin).

    Raises:
        ValueError: nothing there, or a configuration that is not a MiniMind's.
    """
    first = find(path)[0]
    folder_config = first.parent / "config.json"
    if first.suffix != ".safetensors":
        return None
    metadata = read_metadata(first)
    if "lora" in metadata:
        raise UserError(f"{path}: holds LoRA adapters, not a whole model: name the weights they were trained on, and "
                         f"these with --lora (chat, score, export)")
    stored = metadata.get("config")
    try:
        if stored is not None:
            return ModelConfig.from_dict(json.loads(stored))
        if folder_config.is_file():
            return from_hf_config(json.loads(folder_config.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its configuration is not a MiniMind's: {error}") from None
    return None


def read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def load_weights(path: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """Weights under our names, on the CPU, in the dtype of the file.

    Args:
        path: a run folder or its .safetensors file, the original MiniMind's .pth, or a Hugging Face folder.

    Raises:
        ValueError: one line: no such file, unreadable, not plain tensors, or weights of another model.
    """
    theirs = read_config(path)
    if theirs is not None:
        check_same_model(path, theirs, config)
    state = {}
    for file in find(path):
        state |= read_safetensors(file) if file.suffix == ".safetensors" else read_pth(file)
    return from_minimind(state, config, str(path))


def check_same_model(path: str | Path, theirs: ModelConfig, ours: ModelConfig):
    """Raises ValueError naming the first field of the file's configuration that makes it another model's."""
    fields = [name for name in ours.to_dict() if name not in FREE_FIELDS]
    for name in fields if ours.use_moe else [name for name in fields if name not in MOE_FIELDS]:
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(f"{path}: {name} is {getattr(theirs, name)} there and {getattr(ours, name)} here")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def read_pth(path: Path) -> dict[str, Tensor]:
    """A state dict, or the "model" of one of MiniMind's resume files."""
    try:
        with warnings.catch_warnings():
            # torch remarks on a pickle's protocol; whether the file is read is what counts.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: it is not a plain file of tensors (torch.load with weights_only=True "
                         f"does not read it)") from None
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(f"{path}: not a readable .pth file: {str(error).partition(chr(10))[0]}") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not (isinstance(state, dict) and state and all(isinstance(tensor, Tensor) for tensor in state.values())):
        raise UserError(f"{path}: holds no state dict")
    return state


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
        raise UserError(f"model_type {kind!r} is none of qwen3, qwen3_moe, llama")
    refused = {"attention_bias": (None, False), "mlp_bias": (None, False), "use_sliding_window": (None, False),
               "mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)}
    for name, allowed in refused.items():
        if values.get(name) not in allowed:
            raise UserError(f"{name} is {values[name]!r}, which MiniMind does not have")
    known = set(ModelConfig.__dataclass_fields__) - {"rope_scaling", "use_moe", "qk_norm"}
    fields = {name: value for name, value in values.items() if name in known and value is not None}
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    fields["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kind_of_rope = rope.pop("rope_type", rope.pop("type", "default"))
    if kind_of_rope not in ("default", "yarn"):
        raise UserError(f"rope_type {kind_of_rope!r} is neither default nor yarn")
    if kind_of_rope == "yarn":
        fields["rope_scaling"] = {**rope, "type": "yarn"}
    if kind == "qwen3_moe":
        fields["num_experts"] = values.get("num_experts", values.get("num_local_experts", 128))
    fields["use_moe"] = values.get("use_moe", kind == "qwen3_moe")
    return ModelConfig(**fields, qk_norm=kind != "llama")
