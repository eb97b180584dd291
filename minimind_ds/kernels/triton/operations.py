"""The operations of the Triton backend, each from the file that holds its kernels.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_attention.py
"""

from .attention import attention
from .elementwise import add_rms_norm, rms_norm, swiglu, token_losses
from .experts import moe
from .rope import norm_rope
from .router import route

__all__ = ["add_rms_norm", "attention", "moe", "norm_rope", "rms_norm", "route", "swiglu", "token_losses"]
