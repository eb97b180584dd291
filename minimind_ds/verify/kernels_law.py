"""The law of kernels: what the run's backends give, in the precisions they run in, is as exact as the reference's.

    deepspeed launch/verify.py --deepspeed ds_configs/zero2.json --dtype bf16
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.precision import DTYPES
from minimind_ds.data.packing import collate
from minimind_ds.model.decoder import MiniMindForCausalLM, kernel_requirements

from . import operations
from .checks import Check, gradients
from .reduced_run import ReducedRun

# The whole model's largest error, in the reference's own: it is put together from its operations' errors, and
# attention's may be 1.5 x sqrt(4) of the reference's.  A tiny model showed 1.6.
MODEL_FACTOR = 3.0


class Routing:
    """The choices of one pass, made again in others: a near tie that rounding decides moves a whole token."""

    def __init__(self):
        self.choices: list[tuple[Tensor, Tensor]] = []
        self.at: int | None = None

    def route(self, function: Callable) -> Callable:
        def routed(logits, k, norm, group=None, n_groups=0, *, backend):
            weights_TK, experts_TK, counts_GE, scores_GE = function(logits, k, norm, group, n_groups, backend=backend)
            order_TK = experts_TK.argsort(dim=-1)
            weights_TK, experts_TK = weights_TK.gather(1, order_TK), experts_TK.gather(1, order_TK)
            if self.at is None:
                self.choices.append((experts_TK, counts_GE))
                return weights_TK, experts_TK, counts_GE, scores_GE
            chosen_TK, counts_GE = self.choices[self.at]
            self.at += 1
            other_TK = logits.softmax(dim=-1, dtype=weights_TK.dtype).gather(1, chosen_TK)
            if norm:
                other_TK = other_TK / other_TK.sum(dim=-1, keepdim=True)
            same_T1 = (experts_TK == chosen_TK).all(dim=-1, keepdim=True)
            return (torch.where(same_T1, weights_TK, other_TK), chosen_TK, counts_GE.to(scores_GE.dtype), scores_GE)

        return routed


def pass_over(b: ReducedRun, model: MiniMindForCausalLM, routing: Routing, calls: dict | None = None,
              **others: Callable) -> dict[str, Tensor]:
    """Each labelled token's loss and every parameter's gradient over this rank's rows.

    calls: receives the operations.  others: functions that stand in for operations.
    """
    losses = []

    def wrap(name: str, function: Callable) -> Callable:
        function = others.get(name, function)
        function = routing.route(function) if name == "route" else function
        function = function if calls is None else operations.record(calls)(name, function)
        if name != "token_losses":
            return function

        def kept(*args, **options):
            found = function(*args, **options)
            losses.append(found[0].detach().clone())
            return found

        return kept

    rows = [row for row in b.rows() if row]
    world = b.prepared.world
    batch = collate(rows[world.rank::world.size] or rows, b.row_len).to(world.device)
    with operations.through(model, wrap):
        out = model.train()(batch)
        (out.loss_sum + out.aux_loss * batch.n_tokens).backward()
    # Rows without a label have no losses.
    return {"losses": torch.cat(losses) if losses else out.loss_sum.detach()[None], **gradients(model)}


def in_precision(b: ReducedRun, spec: str, dtype: str, calls: dict | None = None) -> list[Check]:
    """The whole model, then each of its operations, whose calls are left in `calls`."""
    plain = f"reference,activations={kernels.parse(spec)['activations']}"
    routing, calls = Routing(), {} if calls is None else calls
    exact = pass_over(b, b.model(plain, DTYPES[dtype]).double(), routing)
    routing.at = 0
    theirs = pass_over(b, b.model(plain, DTYPES[dtype]), routing, moe=operations.plain_moe)
    routing.at = 0
    ours = pass_over(b, b.model(spec, DTYPES[dtype]), routing, calls)
    worst = operations.Worst()
    for name, true in exact.items():
        by, mine, own = operations.excess(ours[name], theirs[name], true)
        worst = max(worst, operations.Worst(by, f"of {name} {mine:.1e}, the reference's own {own:.1e}"))
    what = f"{dtype} losses and gradients of {len(exact) - 1} parameters: error, in the reference's own: {worst.what}"
    return [Check("kernels", what, worst.measured, MODEL_FACTOR), *operations.findings(calls, dtype)]


def kernels_law(b: ReducedRun) -> list[Check]:
    """The run's kernels against fp64, beside the reference backend, in the run's precision and in fp32."""
    found = in_precision(b, b.spec, b.prepared.run.dtype)
    if b.prepared.run.dtype != "fp32" and takes_fp32(b):
        found += in_precision(b, b.spec, "fp32")
    return found


def takes_fp32(b: ReducedRun) -> bool:
    try:
        kernels.resolve(b.spec, b.prepared.world.device, torch.float32, kernel_requirements(b.prepared.model_config))
    except UserError:
        return False
    return True
