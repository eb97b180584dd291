"""A law's measured differences, and how two results are compared.

    python -m pytest tests/verify/test_verify.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """What was compared, the largest difference found and the largest that the law allows."""

    law: str
    what: str
    measured: float
    bound: float

    @property
    def ok(self) -> bool:
        # Also false for NaN.
        return self.measured <= self.bound

    def to_dict(self) -> dict:
        # JSON has no infinity and no NaN.
        measured = self.measured if math.isfinite(self.measured) else str(self.measured)
        return {"law": self.law, "what": self.what, "measured": measured, "bound": self.bound, "ok": self.ok}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """What backward left, then forgotten there; zeros where nothing came."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            p.grad = None
    return found


def apart(a: float, b: float) -> float:
    """Relative difference of two numbers, infinite where one is not finite."""
    difference = abs(a - b) / max(abs(b), 1e-12) if a != b else 0.0
    return difference if math.isfinite(difference) else math.inf


def gradients_apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest |a - b| / |b| over parameters.  One below a thousandth of the largest counts as that."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    norms = {name: grad.double().norm().item() for name, grad in theirs.items()}
    least = max(1e-3 * max(norms.values()), 1e-12)
    worst = max((ours[name].double() - grad.double()).norm().item() / max(norms[name], least)
                for name, grad in theirs.items())
    return worst if math.isfinite(worst) else math.inf


def whole_norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))


def bits_apart(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> int:
    """How many elements differ; NaNs in one place are equal."""
    return sum(int((~torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)).sum()) for a, b in zip(ours, theirs))


def worst_over_ranks(findings: list[Check], device: torch.device) -> list[Check]:
    """Each finding with the largest difference any rank measured; collective."""
    values = torch.tensor([math.inf if math.isnan(f.measured) else f.measured for f in findings], dtype=torch.float64,
                          device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [replace(finding, measured=value) for finding, value in zip(findings, values.tolist())]
