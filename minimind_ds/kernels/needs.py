"""What a model asks of its kernels besides device and dtype, so that `auto` chooses once and rightly."""

from __future__ import annotations

from typing import NamedTuple


class KernelRequirements(NamedTuple):
    """head_dim: size of an attention head, None where it does not matter.  dropout: of attention weights."""

    head_dim: int | None = None
    dropout: float = 0.0


NOTHING = KernelRequirements()
