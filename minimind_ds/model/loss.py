"""The training loss: a sum over labelled tokens, and the factor that makes it one number on any layout.

    python -m pytest tests/model/test_model.py -k loss
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimind_ds import kernels

# Rows whose logits are alive at once: 4096 x 6400 in fp32 are 105 MB.
CHUNK = 4096


class LinearCrossEntropy(Function):
    """Logits and their gradient chunk by chunk, in place: neither outlives its chunk (as Liger-Kernel does)."""

    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, labels_N, backend):
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        total = hidden_NC.new_zeros((), dtype=wide)
        train, train_weight = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        dhidden_NC = torch.empty_like(hidden_NC)
        # A frozen head (LoRA) is spared a third of the work.
        dweight_VC = torch.zeros_like(weight_VC, dtype=wide) if train_weight else None
        for start in range(0, len(labels_N), CHUNK):
            rows = slice(start, start + CHUNK)
            logits_nV = F.linear(hidden_NC[rows], weight_VC)
            losses_n, dlogits_nV = kernels.token_losses(logits_nV, labels_N[rows], backend=backend)
            # Not in place: not every torch.compile takes a result that was added to for one with a gradient.
            total = total + losses_n.sum()
            if train:
                torch.mm(dlogits_nV, weight_VC, out=dhidden_NC[rows])
                if train_weight:
                    dweight_VC += dlogits_nV.T @ hidden_NC[rows]
        if train:
            ctx.save_for_backward(dhidden_NC, dweight_VC.to(weight_VC.dtype) if train_weight else None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        dhidden_NC, dweight_VC = ctx.saved_tensors
        dweight_VC = None if dweight_VC is None else dweight_VC * dtotal.to(dweight_VC.dtype)
        return dhidden_NC * dtotal.to(dhidden_NC.dtype), dweight_VC, None, None


def cross_entropy_sum(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, *, backend: str) -> Tensor:
    """Summed cross-entropy, nats, at least fp32, of the rows of hidden_NC @ weight_VC.T; 0 for no rows.

    backend: what runs kernels.token_losses.
    """
    return LinearCrossEntropy.apply(hidden_NC, weight_VC, labels_N, backend)


@torch.no_grad()
def count_correct(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
    """How many of the rows of hidden_NC @ weight_VC.T are largest at their label."""
    weight_VC, chunks = weight_VC.to(hidden_NC.dtype), zip(hidden_NC.split(CHUNK), labels_N.split(CHUNK))
    return sum(((F.linear(rows_nC, weight_VC).argmax(dim=-1) == labels_n).sum() for rows_nC, labels_n in chunks),
               start=labels_N.new_zeros(()))


def scaled_loss(ce_sum: Tensor, aux: Tensor, n_real: int, *, step_labelled: int, step_real: int,
                dp_world: int) -> Tensor:
    """What a micro-batch hands to `engine.backward(..., scale_wrt_gas=False)`.

    Summed over the step's micro-batches and averaged over its dp_world ranks (as DeepSpeed averages gradients), it is
    (sum of CE) / step_labelled + (mean of aux over the step's real tokens), whatever the layout.

    Args:
        ce_sum: this micro-batch's summed cross-entropy, nats.
        aux: its balance loss, a mean over its n_real real tokens, coefficient included.
        step_labelled, step_real: labelled and real tokens of the whole step: all ranks, all micro-batches.
        dp_world: data-parallel ranks.
    """
    return ce_sum * (dp_world / max(step_labelled, 1)) + aux * (n_real * dp_world / max(step_real, 1))
