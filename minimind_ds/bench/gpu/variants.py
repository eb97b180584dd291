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
from minimind_ds.bench.kernels.contenders import OPS, Contender
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
    """Forms of the kernels (kernels/triton/experts.py): rows, columns, depth, warps, stages, form, ahead, bound."""
    Sizes, shipped = experts.Sizes, experts.HOPPER
    gate_up_gradient, down_gradient = Sizes(128, 256, 64, 8, 4), Sizes(256, 128, 64, 8, 4)

    def weights(form: str, stages: int) -> dict:
        return {"gate_up_gradient": gate_up_gradient._replace(form=form, stages=stages),
                "down_gradient": down_gradient._replace(form=form, stages=stages)}

    hidden = {"128 x 128, 128 registers": Sizes(128, 128, 64, 8, 3, "tma", 0, 128),
              "128 x 128, 4 ahead": Sizes(128, 128, 64, 8, 3, "tma", 4)}
    gate_up = {"persistent 128 x 128": Sizes(128, 128, 64, 8, 4, "persistent"),
               "tma 128 x 64": Sizes(128, 64, 64, 4, 3, "tma"), "tma 128 x 128": Sizes(128, 128, 64, 8, 4, "tma")}
    yield Variant("moe", "as shipped")
    yield Variant("moe", "weights' gradients tma", experts, "HOPPER", {**shipped, **weights("tma", 4)})
    yield Variant("moe", "weights' gradients early", experts, "HOPPER", {**shipped, **weights("early", 3)})
    yield Variant("moe", "weights' gradients grouped_mm", experts, "HOPPER", {**shipped, **weights("grouped_mm", 4)})
    for label, sizes in hidden.items():
        yield Variant("moe", f"hidden_gradient tma {label}", experts, "HOPPER", {**shipped, "hidden_gradient": sizes})
    for label, sizes in gate_up.items():
        yield Variant("moe", f"gate_up {label}", experts, "HOPPER", {**shipped, "gate_up": sizes})
    together = {"hidden_gradient": hidden["128 x 128, 128 registers"], "gate_up": gate_up["persistent 128 x 128"]}
    yield Variant("moe", "all tma", experts, "HOPPER", {**shipped, **weights("tma", 4), **together})
    yield Variant("moe", "weights' gradients beside dx", experts, "BESIDE", True)


def elementwise_variants() -> Iterator[Variant]:
    yield Variant("swiglu", "as shipped")
    for block in (512, 2048, 4096):
        yield Variant("swiglu", f"blocks of {block}", elementwise, "BLOCK", block)
    yield Variant("add_rms_norm", "as shipped")
    for tile in (1024, 2048):
        yield Variant("add_rms_norm", f"tiles of {tile}", elementwise, "TILE", tile)
    for tiles in (4, 16, 32):
        yield Variant("add_rms_norm", f"{tiles} tiles a program backward", elementwise, "TILES", tiles)
    yield Variant("qk_norm_rope", "as shipped")
    for rows in (8, 32):
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
            if variant.op == "moe" and record["status"] == "right" and case.device.type == "cuda":
                record["kernels_ms"] = kernel_times(contender, case)
        else:
            record = check("triton", contender, case)
    return {**record, "variant": variant.label, "as_shipped": variant.module is None}


def kernel_times(contender: Contender, case: cases.Case, repeats: int = 5) -> dict[str, float]:
    """Mean ms on the GPU of each kernel in forward and backward, by name, slowest first; calls of one are added."""
    trial = contender.build(case)
    leaves = [x.detach().clone().requires_grad_() for x in trial.leaves]

    def both():
        outputs = [(out, dout.to(out.dtype)) for out, dout in zip(trial.function(*leaves), trial.douts)
                   if dout is not None]
        torch.autograd.grad([out for out, _ in outputs], leaves, [dout for _, dout in outputs])

    both()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            both()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.self_device_time_total / repeats / 1000 for event in found.key_averages()}
    return {name: round(ms, 4) for name, ms in sorted(times.items(), key=lambda item: -item[1])[:12] if ms > 0}
