"""The training loss: a sum over labelled tokens, and the factor that makes it one number on any layout.

    python -m pytest tests/test_model.py -k loss
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_sum(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy, nats, at least fp32, of the rows of hidden_NC @ weight_VC.T; 0 for no rows."""
    logits_NV = F.linear(hidden_NC, weight_VC)
    accumulate = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(accumulate), labels_N, reduction="sum")


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
