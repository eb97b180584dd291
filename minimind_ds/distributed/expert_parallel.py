"""Experts shared out over ranks: each holds some of every layer's, tokens travel to them and back, none is dropped.

DeepSpeed's engine does the distribution (its AutoEP: gradients of experts are reduced over the ranks that hold the
same ones, ZeRO partitions them there, the norm counts each once); the layer is ours, so that routing, balance loss,
kernels and parameter names stay those of one rank holding all experts.  AutoEP's own layer would replace all four.

    deepspeed --num_gpus 2 launch/sft.py --deepspeed ds_configs/moe_ep.json --preset debug-moe
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimind_ds import kernels
from minimind_ds.distributed.deepspeed_compat import expert_parts

PARAMETERS = ("gate_up_proj", "down_proj")
AUTOEP = expert_parts()


class ShardedExperts(AUTOEP.layer):
    """This rank's experts of a layer, in place of model.Experts.

    A subclass, because by that DeepSpeed's engine tells expert parameters from others; none of its code runs but
    what finds the process groups.
    """

    def __init__(self, experts: nn.Module, size: int):
        nn.Module.__init__(self)
        self.ep_size, self.ep_group_name = size, f"ep_size_{size}"
        self.ep_group = AUTOEP.group(self.ep_group_name)
        self.ep_rank = dist.get_rank(self.ep_group)
        self.num_experts = experts.gate_up_proj.shape[0]
        self.num_local_experts = self.num_experts // size
        mine = slice(self.ep_rank * self.num_local_experts, (self.ep_rank + 1) * self.num_local_experts)
        for name in PARAMETERS:
            param = nn.Parameter(getattr(experts, name).detach()[mine].clone())
            # What AutoEP's engine looks at: reduce over this rank's replicas, partition there.
            param.allreduce, param.group_name = False, self.ep_group_name
            param.ds_zero_placement_family, param.ds_zero_partition_group_name = "autoep_expert", self.ep_group_name
            setattr(self, name, param)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False, folding_group_handles=None):
        """Called by the engine; the group is known already."""

    def forward(self, x_TC: Tensor, weights_TK: Tensor, experts_TK: Tensor, backend: str) -> Tensor:
        """The same as model.Experts.forward, on this rank's tokens and everybody's experts."""
        (T, K), E, n = experts_TK.shape, self.num_experts, self.ep_size
        # Choices sorted by expert are sorted by rank, too.
        order_M = experts_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=E)
        arriving_nE = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_nE, counts_E, group=self.ep_group)
        arriving_nE = arriving_nE.view(n, -1)
        sent, received = torch.stack((counts_E.view(n, -1).sum(1), arriving_nE.sum(1))).tolist()
        x_RC = AUTOEP.all_to_all.apply(self.ep_group, x_TC.index_select(0, order_M // K), sent, received)
        local_E = torch.arange(self.num_local_experts, device=x_TC.device)
        expert_R = local_E.repeat(n).repeat_interleave(arriving_nE.flatten(), output_size=len(x_RC))
        y_RC = self.compute(x_RC, expert_R, backend)
        y_MC = AUTOEP.all_to_all.apply(self.ep_group, y_RC, received, sent)
        place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(T * K, device=x_TC.device))
        y_TKC = y_MC.index_select(0, place_M).view(T, K, -1)
        return (y_TKC * weights_TK.to(x_TC.dtype)[..., None]).sum(dim=1)

    def compute(self, x_RC: Tensor, expert_R: Tensor, backend: str) -> Tensor:
        """Rows that arrived, through their experts.  Without any, a row of zeros keeps the experts in the graph."""
        R = len(x_RC)
        if R == 0:
            # The empty tensor stays in the graph too, so that its exchange takes part in backward.
            x_RC, expert_R = torch.cat((x_RC, x_RC.new_zeros(1, x_RC.shape[1]))), expert_R.new_zeros(1)
        ones_R1 = torch.ones(len(x_RC), 1, dtype=torch.promote_types(x_RC.dtype, torch.float32), device=x_RC.device)
        return kernels.moe(x_RC, self.gate_up_proj.to(x_RC.dtype), self.down_proj.to(x_RC.dtype), ones_R1,
                           expert_R[:, None], backend=backend)[:R]


def shard(model: nn.Module, size: int) -> None:
    """Cut every layer's experts over `size` neighbouring ranks; collective."""
    AUTOEP.create_groups(size)
    for layer in model.model.layers:
        layer.mlp.experts = ShardedExperts(layer.mlp.experts, size)


def group_of(param: nn.Parameter):
    """The ranks that share out the experts of a parameter."""
    return AUTOEP.group(param.ds_zero_partition_group_name)


def whole(param: nn.Parameter, tensor: Tensor) -> Tensor:
    """What this rank holds of an expert parameter (or of its optimizer state) and what the others do; collective.

    A parameter that is not shared out comes back as it is.
    """
    if getattr(param, "ds_zero_partition_group_name", None) is None:
        return tensor
    group = group_of(param)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def part(param: nn.Parameter, flat: Tensor) -> Tensor:
    """This rank's share of a whole, flattened expert parameter or optimizer state of it."""
    group = group_of(param)
    return flat.chunk(dist.get_world_size(group))[dist.get_rank(group)]
