"""Rotary position embeddings (arXiv:2104.09864), with YaRN where the configuration asks for it.

    python -m pytest tests/model/test_golden.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minimind_ds.config.model import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(D / 2,) inverse wavelengths and the factor on cos and sin; YaRN (arXiv:2309.00071) as MiniMind blends it."""
    D, base, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    freqs = 1.0 / (base ** (torch.arange(0, D, 2).float() / D))
    if yarn is None:
        return freqs, 1.0
    original, factor = yarn.get("original_max_position_embeddings", 2048), yarn.get("factor", 16)
    attention_factor = yarn.get("attention_factor", 1.0)
    if config.max_position_embeddings <= original:
        return freqs, attention_factor

    def dimension(rotations: float) -> float:
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(yarn.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(dimension(yarn.get("beta_slow", 1.0))), D // 2 - 1)
    ramp = ((torch.arange(D // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs * (1 - ramp + ramp / factor), attention_factor


class Rotary(nn.Module):
    """cos and sin by position.

    The tables are not buffers: casting a module to bf16 would round them, and 4,097 is not exact in bf16.  They
    are made where and when they are first needed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tables: tuple[Tensor, Tensor] | None = None

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        if self.tables is None or self.tables[0].device != positions_T.device:
            freqs, factor = rotary_frequencies(self.config)
            angles = torch.outer(torch.arange(self.config.max_position_embeddings), freqs).float()
            self.tables = tuple((f(angles) * factor).to(positions_T.device) for f in (torch.cos, torch.sin))
        return self.tables[0][positions_T], self.tables[1][positions_T]
