"""Other tiles, stages and warps of our kernels than those chosen on paper: right, and how fast?

    python -m minimind_ds.bench.gpu OUT_DIR --parts agreement,variants
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch

from minimind_ds.bench.kernels import cases
from minimind_ds.bench.kernels.contenders import OPS
from minimind_ds.bench.kernels.items import Item, Setting, case_of, check, clock_it, rate_of
from minimind_ds.kernels.triton import attention, elementwise, experts, rope

# MiniMind-3's rows, and a row of few long documents.
LONG = replace(cases.MINIMIND3, mean=4000, longest=8192)


class Variant(NamedTuple):
    """`op` with one module's attribute set to something else."""

    op: str
    label: str
    module: ModuleType | None = None
    attribute: str = ""
    value: object = None
    size: cases.Size = cases.MINIMIND3

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if self.module is None:
            yield
            return
        before = getattr(self.module, self.attribute)
        setattr(self.module, self.attribute, self.value)
        try:
            yield
        finally:
            setattr(self.module, self.attribute, before)


def attention_variants() -> Iterator[Variant]:
    """Rows x keys; warps, stages (and a bound for registers) of each of the three kernels."""
    kinds = {
        "forward": [(64, 32, 4, 2), (64, 32, 4, 4), (64, 32, 4, 3, 104), (64, 64, 4, 2, 168), (64, 64, 4, 3)],
        "query_gradient": [(64, 32, 4, 3), (64, 32, 4, 4), (64, 32, 4, 2, 104)],
        "key_gradient": [(32, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3, 168), (16, 64, 4, 3)],
    }
    long_too = {(64, 64, 4, 2, 168), (64, 64, 4, 3), (64, 64, 4, 2)}
    for size in (cases.MINIMIND3, LONG):
        yield Variant("attention", "as shipped", size=size)
        for kernel, all_sizes in kinds.items():
            for sizes in all_sizes:
                if size is LONG and sizes not in long_too:
                    continue
                label = f"{kernel} {sizes[0]} x {sizes[1]}; {', '.join(map(str, sizes[2:]))}"
                yield Variant("attention", label, attention, "config",
                              functools.partial(other_config, attention.config, kernel, sizes), size)


def other_config(shipped, kernel: str, sizes: tuple, asked: str, D: int, dtype: torch.dtype, arch: int):
    return attention.Config(*sizes) if asked == kernel else shipped(asked, D, dtype, arch)


def experts_variants() -> Iterator[Variant]:
    yield Variant("moe", "as shipped")
    for kernel, all_sizes in {
        "gate_up": [(128, 128, 64, 8, 4), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4)],
        "linear": [(128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4)],
        "hidden_gradient": [(128, 128, 64, 8, 4), (128, 64, 64, 4, 4)],
        "gate_up_gradient": [(128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4)],
        "down_gradient": [(256, 128, 64, 8, 4), (128, 128, 64, 4, 4)],
    }.items():
        for sizes in all_sizes:
            yield Variant("moe", f"{kernel} {sizes[0]} x {sizes[1]} x {sizes[2]}; {sizes[3]}, {sizes[4]}", experts,
                          "HOPPER", {**experts.HOPPER, kernel: experts.Sizes(*sizes)})


def elementwise_variants() -> Iterator[Variant]:
    yield Variant("swiglu", "as shipped")
    for block in (512, 2048, 4096):
        yield Variant("swiglu", f"blocks of {block}", elementwise, "BLOCK", block)
    for op in ("rms_norm", "add_rms_norm"):
        yield Variant(op, "as shipped")
        for tile in (1024, 2048):
            yield Variant(op, f"tiles of {tile}", elementwise, "TILE", tile)
        for tiles in (4, 8, 16):
            yield Variant(op, f"{tiles} tiles a program backward", elementwise, "TILES", tiles)
    yield Variant("qk_norm_rope", "as shipped")
    for rows in (16, 64):
        yield Variant("qk_norm_rope", f"{rows} rows", rope, "ROWS", rows)
    for tiles in (4, 8, 32):
        yield Variant("qk_norm_rope", f"{tiles} tiles a program backward", rope, "TILES", tiles)
    yield Variant("head_loss", "as shipped")


def items(part: str, name: str, setting: Setting, folder: pathlib.Path) -> Iterator[Item]:
    """Checked at few tokens (and compiled by the way, so that the clock need not wait), or timed at MiniMind's."""
    timed, found = part == "variants", {"attention_variants": attention_variants, "experts_variants": experts_variants,
                                        "elementwise_variants": elementwise_variants}
    for variant in list(found[name]())[:3 if setting.small else None]:
        size = variant.size if timed else replace(variant.size, T=4096, N=1024)
        size = cases.SMALL if setting.small else size
        where = " long documents" if variant.size is LONG else ""
        yield Item(f"{variant.op}{where}: {variant.label}", functools.partial(tried, variant, size, setting, timed))


def tried(variant: Variant, size: cases.Size, setting: Setting, timed: bool) -> dict:
    named = (("K", 1),) if variant.op == "moe" else ()
    case = case_of(variant.op, size, torch.bfloat16, setting.device, named)
    contender = OPS[variant.op]["triton"]
    # What a tile needs and this device lacks is no fault: it is an answer.
    if variant.module is not None:
        contender = contender._replace(ours=False)
    with variant.installed():
        if timed:
            record = clock_it("triton", contender, case, rate_of(torch.bfloat16, setting))
        else:
            record = check("triton", contender, case)
    return {**record, "variant": variant.label, "as_shipped": variant.module is None}
