"""A plain training loop's update: 16-bit parameters by way of fp32 masters, as mixed precision has it.

    python -m pytest tests/bench/test_benchmark.py
"""

from __future__ import annotations

import torch


def masters_update(params: list, masters: list, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip to a global 2-norm of max_norm (0: not), step, and leave no gradients; `masters` may be `params` itself."""
    if masters is not params:
        for master, p in zip(masters, params):
            master.grad = p.grad.float()
    if max_norm > 0:
        torch.nn.utils.clip_grad_norm_(masters, max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if masters is not params:
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        for p in params:
            p.grad = None
