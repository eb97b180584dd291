"""What a model is: ModelConfig, the presets, and the checks that make a wrong size fail early.

ModelConfig carries MiniMind's own field names and defaults, so that a configuration reads the same in both
projects.  Every derived size (head_dim, intermediate_size, ...) is filled in when the object is made.

    python -c "from minimind_ds import PRESETS; print(PRESETS['minimind-3'])"
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from minimind_ds.config.errors import UserError
from minimind_ds.config.untrusted import shown


@dataclass(frozen=True)
class ParallelDims:
    """How many neighbouring ranks share a row, and how many share out the experts."""

    sequence: int = 1
    experts: int = 1


# No MiniMind is larger, by far; sizes beyond are typing errors.
MOST = {"num_hidden_layers": 1024, "num_experts": 4096, "num_experts_per_tok": 4096, "vocab_size": 1 << 22,
        "max_position_embeddings": 1 << 24, "bos_token_id": 1 << 22, "eos_token_id": 1 << 22}
LARGEST_SIZE = 1 << 18
YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor")


def check_field(name: str, kind: str, value) -> None:
    """Raises UserError unless a field of ModelConfig has its type and a possible size."""
    if value is None and "None" in kind:
        return
    kind = kind.removesuffix(" | None")
    if kind == "int":
        least, most = 0 if name.endswith("token_id") else 1, MOST.get(name, LARGEST_SIZE)
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most}")
    elif kind == "float":
        if type(value) not in (int, float) or not 0 <= value < 1e12:
            raise UserError(f"{name} is {shown(value)}; it must be a number, at least 0")
    elif type(value).__name__ != kind:
        raise UserError(f"{name} is {shown(value)}; it must be of type {kind}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a MiniMind decoder.

    Field names and defaults are MiniMind-3's (model/model_minimind.py of jingyaogong/minimind); `qk_norm` is ours:
    MiniMind-3 normalises queries and keys, MiniMind2 does not.  A size left None is derived as MiniMind derives it.

    Raises:
        ValueError: a size that is not positive, heads that do not divide, or an odd head_dim.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 8
    use_moe: bool = False
    vocab_size: int = 6400
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    dropout: float = 0.0
    bos_token_id: int = 1
    eos_token_id: int = 2
    # YaRN as MiniMind switches it on for inference on longer texts than it was trained on.
    inference_rope_scaling: bool = False
    rope_scaling: dict | None = None
    # Mixture of experts; ignored when use_moe is False.
    num_experts: int = 4
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 5e-4

    def __post_init__(self):
        def fill(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for f in dataclasses.fields(self):
            check_field(f.name, f.type, getattr(self, f.name))
        fill("head_dim", self.hidden_size // self.num_attention_heads)
        fill("intermediate_size", math.ceil(self.hidden_size * math.pi / 64) * 64)
        fill("moe_intermediate_size", self.intermediate_size)
        if self.inference_rope_scaling:
            fill("rope_scaling", dict(beta_fast=32, beta_slow=1, factor=16, original_max_position_embeddings=2048,
                                      attention_factor=1.0, type="yarn"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta}; it must be above 1")
        for name, value in (self.rope_scaling or {}).items():
            number = type(value) in (int, float) and 0 < value < 1e12
            if not isinstance(name, str) or not (number or name not in YARN_NUMBERS and isinstance(
                    value, (str, bool, type(None)))):
                raise UserError(f"rope_scaling.{shown(name)} is {shown(value)}; it must be a number above 0")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")
        if self.hidden_act != "silu":
            raise UserError(f"hidden_act {shown(self.hidden_act)} is not supported; MiniMind models use 'silu'")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and "
                             f"num_experts {self.num_experts}")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The inverse of to_dict.  Raises ValueError on an unknown key."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)}, key=str)
        if unknown:
            raise UserError(f"unknown model configuration key {shown(unknown[0])}")
        return cls(**values)


PRESETS: dict[str, ModelConfig] = {
    # 63.9 M parameters.
    "minimind-3": ModelConfig(),
    # 198.4 M parameters, 63.9 M active.
    "minimind-3-moe": ModelConfig(use_moe=True),
    # 104.0 M and 25.8 M parameters; Llama-shaped.
    "minimind2": ModelConfig(num_hidden_layers=16, num_key_value_heads=2, intermediate_size=2048, qk_norm=False,
                             rms_norm_eps=1e-5),
    "minimind2-small": ModelConfig(hidden_size=512, num_key_value_heads=2, intermediate_size=1408, qk_norm=False,
                                   rms_norm_eps=1e-5),
    # A few million parameters, for a laptop and for the tests.
    "debug": ModelConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=4096),
    "debug-moe": ModelConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=4096, use_moe=True, moe_intermediate_size=448),
}
