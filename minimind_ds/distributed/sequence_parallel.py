"""Sequence and expert parallelism: rows and experts cut over neighbouring ranks.

Sequence parallelism (Ulysses, arXiv:2309.14509): `sequence` ranks share a row, each holding a run of its tokens.  Only
attention needs the others' tokens: an all-to-all before it trades tokens for heads, one after it trades back, and
`cu_seqlens` stay those of the whole row.  The loss is a sum over labelled tokens divided by the step's count, so to
ZeRO these ranks are data-parallel ranks like any others.

Expert parallelism: `experts` ranks share out each layer's experts; see minimind_ds/distributed/expert_parallel.py.

    deepspeed --num_gpus 2 launch/sft.py --deepspeed ds_configs/ulysses.json
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.distributed import deepspeed_compat

# Keys of DeepSpeed's expert_parallel block that mean here what they mean there.
EXPERT_KEYS = {"enabled", "autoep_size", "preset_model"}


def read_dims(path: str, raw: dict, ranks: int) -> ParallelDims:
    """Sequence and expert parallelism, as DeepSpeed's own keys ask for them.

    Raises:
        ValueError: sizes that are no whole numbers or contradict `ranks`, or options of AutoEP's own layer.
    """
    sizes = {key: raw.get(key, 1) for key in ("sequence_parallel_size", "data_parallel_size")}
    experts = raw.get("expert_parallel", {})
    if not isinstance(experts, dict):
        raise UserError(f"{path}: expert_parallel is {experts!r}; it must be an object")
    sizes["expert_parallel.autoep_size"] = experts.get("autoep_size", 1) if experts.get("enabled", False) else 1
    for key, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{path}: {key} is {size!r}; it must be a positive whole number")
    others = sorted(set(experts) - EXPERT_KEYS)
    if others:
        raise UserError(f"{path}: expert_parallel.{others[0]} belongs to AutoEP's own MoE layer, which is not used "
                         f"here; leave it out (known: {', '.join(sorted(EXPERT_KEYS))})")
    if experts.get("preset_model") not in (None, "qwen3_moe"):
        raise UserError(f"{path}: expert_parallel.preset_model is {experts['preset_model']!r}; the models here carry "
                         "Qwen3-MoE's names: \"qwen3_moe\", or leave it out")
    sequence = sizes["sequence_parallel_size"]
    if "data_parallel_size" in raw and sizes["data_parallel_size"] * sequence != ranks:
        raise UserError(f"{path}: data_parallel_size {sizes['data_parallel_size']} x sequence_parallel_size "
                         f"{sequence} is not the {ranks} ranks of this run")
    return ParallelDims(sequence, sizes["expert_parallel.autoep_size"])


def check(dims: ParallelDims, config: ModelConfig, *, ranks: int, row_tokens: int, stage: int, path: str) -> None:
    """Raises ValueError, naming the file and what would work, if these degrees cannot be.

    Args:
        row_tokens: tokens of a micro-batch, rows x row length.
        path: the DeepSpeed JSON that asks for them.
    """
    n, H, HKV = dims.sequence, config.num_attention_heads, config.num_key_value_heads
    works = [m for m in range(1, H + 1) if H % m == 0 and (HKV % m == 0 or m % HKV == 0)]
    if n not in works:
        raise UserError(f"{path}: sequence_parallel_size {n} does not divide {H} heads over {HKV} key heads; "
                         f"{', '.join(map(str, works))} do")
    if row_tokens % n:
        raise UserError(f"{path}: sequence_parallel_size {n} does not divide batch_size x pack_len = {row_tokens} "
                         "tokens; choose another --pack_len")
    for name, degree in (("sequence_parallel_size", n), ("expert_parallel.autoep_size", dims.experts)):
        if ranks % degree:
            raise UserError(f"{path}: {name} {degree} does not divide the {ranks} ranks of this run")
    if dims.experts == 1:
        return
    if not config.use_moe:
        raise UserError(f"{path}: expert_parallel is enabled, and the model has no experts")
    if config.num_experts % dims.experts:
        raise UserError(f"{path}: expert_parallel.autoep_size {dims.experts} does not divide "
                         f"{config.num_experts} experts")
    if stage == 0:
        raise UserError(f"{path}: expert_parallel needs ZeRO stage 1, 2 or 3 (DeepSpeed reduces experts' gradients "
                         "apart from the others' there)")


def install(model: nn.Module, dims: ParallelDims) -> None:
    """Make a model work on its rank's share; collective.  Call it before the engine wraps the model."""
    group = groups_of(dims.sequence)
    if dims.sequence > 1:
        model.attend = Ulysses(group)
    if model.balance == "global" and dist.get_world_size() > 1:
        model.total_counts = TotalCounts(dist.group.WORLD)
    elif dims.sequence > 1:
        model.total_counts = TotalCounts(group)
    if dims.experts > 1:
        from minimind_ds.distributed import expert_parallel

        expert_parallel.shard(model, dims.experts)


def groups_of(size: int):
    """This rank's group of `size` neighbours; every rank makes all groups, as torch.distributed.new_group requires."""
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    return mine


class Ulysses:
    """kernels.attention on all of a row's tokens and this rank's heads."""

    def __init__(self, group):
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **more) -> Tensor:
        """q (t, H, D), k and v (t, Hkv, D) of this rank's t tokens -> (t, H, D); one exchange before, one after."""
        n, HKV = self.size, k.shape[1]
        if HKV < n:
            # Fewer key heads than ranks: each rank gets the one its query heads read.
            k, v = (x.repeat_interleave(n // HKV, dim=1) for x in (k, v))
        heads = [x.shape[1] // n for x in (q, k, v)]
        # A rank's heads of q, k and v side by side travel as one.
        mixed = torch.cat([x.unflatten(1, (n, -1)) for x in (q, k, v)], dim=2).flatten(1, 2)
        q, k, v = self.exchange(mixed, to_heads=True).split(heads, dim=1)
        return self.exchange(kernels.attention(q, k, v, cu_seqlens, max_seqlen, **more), to_heads=False)

    def exchange(self, x: Tensor, *, to_heads: bool) -> Tensor:
        """(t, H, D) -> (t * n, H / n, D), or back; DeepSpeed's all-to-all, whose gradient is the way back."""
        scatter, gather = (2, 1) if to_heads else (1, 2)
        return deepspeed_compat.all_to_all_heads(self.group, x[None], scatter, gather)[0]


class TotalCounts:
    """Counts of the experts' choices, summed over a group of ranks.  No gradient: choices have none."""

    def __init__(self, group):
        self.group = group

    def __call__(self, counts: Tensor) -> Tensor:
        counts = counts.detach().clone()
        dist.all_reduce(counts, group=self.group)
        return counts
