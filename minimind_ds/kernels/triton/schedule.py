"""Which program does what: tiles over the documents of a packed row, made without a host-device synchronization.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/attention_facts.py -k schedule
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def tiles_on_cpu(bounds: np.ndarray, block: int) -> np.ndarray:
    """Tiles of at most `block` tokens that cover every document: (n, 4) int32 rows of first, start, end, 0.

    `first` is the tile's first token, `start` and `end` are its document's bounds.  Longest documents come first, and
    in each its last tile, which has the most keys to go through: the short ones fill the gaps at the end.  A
    document's tiles stay together, so that its keys and values are read from memory once and then from the cache.
    """
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    counts = -(-lengths[order] // block)
    document = np.repeat(order, counts)
    from_last = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles = np.zeros((len(document), 4), dtype=np.int32)
    tiles[:, 0] = bounds[document] + (np.repeat(counts, counts) - 1 - from_last) * block
    tiles[:, 1] = bounds[document]
    tiles[:, 2] = bounds[document + 1]
    return tiles


def tiles_on_device(cu_seqlens: Tensor, n_tokens: int, block: int) -> Tensor:
    """The same tiles without asking the device for a number: as many rows as there can be, the rest empty."""
    bounds = cu_seqlens.long()
    lengths, order = bounds.diff().sort(descending=True, stable=True)
    ends = ((lengths + block - 1) // block).cumsum(0)
    item = torch.arange(n_tokens // block + len(lengths), device=bounds.device)
    place = torch.searchsorted(ends, item, right=True)
    used = place < len(lengths)
    place = place.clamp(max=len(lengths) - 1)
    start, end = bounds[order[place]], bounds[order[place] + 1]
    first = start + (ends[place] - 1 - item) * block
    return torch.stack((first, start, end, torch.zeros_like(start)), dim=1).where(used[:, None], 0).int()


def schedule(cu_seqlens: Tensor, n_tokens: int, block: int, device: torch.device) -> Tensor:
    """(n, 4) int32 tiles on `device`, made once per `cu_seqlens` and remembered on that tensor.

    A micro-batch has one `cu_seqlens`, so its layers share one schedule, forward and backward.  From the CPU it goes
    over as one asynchronous copy out of pinned memory; on a GPU it is made there.

    Raises:
        ValueError: bounds on the CPU that do not go from 0 to `n_tokens` without falling.
    """
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    made = cu_seqlens.__dict__.get("_attention_tiles")
    if made is None or made["version"] != version:
        made = cu_seqlens._attention_tiles = {"version": version}
    if (block, device) not in made:
        if cu_seqlens.device.type == "cpu":
            bounds = cu_seqlens.numpy().astype(np.int64)
            if bounds[0] != 0 or bounds[-1] != n_tokens or (np.diff(bounds) < 0).any():
                raise ValueError(f"cu_seqlens {bounds.tolist()} must go from 0 to {n_tokens} and not fall")
            tiles = torch.from_numpy(tiles_on_cpu(bounds, block))
            made[block, device] = tiles if device.type == "cpu" else tiles.pin_memory().to(device, non_blocking=True)
        else:
            made[block, device] = tiles_on_device(cu_seqlens, n_tokens, block)
    return made[block, device]
