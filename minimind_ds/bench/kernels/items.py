"""The single checks and timings of each group: what runs, in which order, and the record each leaves.

A record says op, case, dtype, contender, whether it is ours, and its status:
right, wrong (beyond the bound), failed (an exception), absent (not here, with the reason), or stopped (by the clock).

    python -c "from minimind_ds.bench.kernels import items; print(items.GROUPS)"
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from . import cases, curve, leaks, measure
from .cases import MINIMIND3, SMALL, Case, Size
from .contenders import OPS, Absent, Contender, Trial

BF16, FP32 = torch.bfloat16, torch.float32
# Largest |got - exact| / |exact|: ours, and what others may differ by before their time means nothing.
OURS, OTHERS = {BF16: 1e-2, FP32: 1e-5}, {BF16: 3e-2, FP32: 1e-3}
ELEMENTWISE = ("rms_norm", "add_rms_norm", "swiglu", "rotate", "qk_norm_rope", "head_loss")
GROUPS = {
    "correctness": ("others_attention", "attention", "moe", "elementwise", "others", "router", "leaks"),
    "curve": ("dense", "mixture"),
    "timings": ("attention", "moe", "elementwise"),
}


class Setting(NamedTuple):
    """Where and how large; `without` are contenders left out, by a part of their name."""

    device: torch.device
    small: bool
    without: tuple[str, ...] = ()


class Item(NamedTuple):
    name: str
    work: Callable[[], dict]
    ours: bool = True


@functools.lru_cache(maxsize=1)
def case_of(op: str, size: Size, dtype: torch.dtype, device: torch.device, named: tuple) -> Case:
    """The case and, once asked for, its exact answer: shared by the contenders, which follow one another."""
    return getattr(cases, op)(size, dtype, device, **dict(named))


def examine(name: str, contender: Contender, case: Case) -> tuple[dict, Trial | None]:
    """Runs a contender once and compares outputs and gradients with fp64: its record, and the trial if it is right."""
    record = {"op": case.op, "case": case.name, "dtype": measure.short(case.dtype), "contender": name,
              "ours": contender.ours}
    try:
        trial = contender.build(case)
    except Absent as reason:
        required = contender.ours and not contender.optional and not missing_compiler(str(reason))
        return {**record, "status": "failed" if required else "absent", "reason": str(reason)}, None
    bound = (OURS if contender.ours else OTHERS)[case.dtype]
    judged = measure.judge(trial.results(), case.exact(), case.names, bound)
    right = judged.pop("right")
    return {**record, "status": "right" if right else "wrong", **judged}, trial if right else None


def missing_compiler(reason: str) -> bool:
    """torch.compile without a C++ compiler: missing on this machine, no failure of ours."""
    return "compiler" in reason


def check(name: str, contender: Contender, case: Case) -> dict:
    """A record of `examine`; for our Triton kernels a second run must give the same bits."""
    record, trial = examine(name, contender, case)
    if trial is not None and name == "triton":
        first, second = trial.results(), trial.results()
        same = all(torch.equal(a, b) for a, b in zip(first, second))
        record.update(same_bits_twice=same, status="right" if same else "wrong")
    return record


def clock_it(name: str, contender: Contender, case: Case, rate: dict) -> dict:
    """A record of `examine` with times of the forward pass and of forward and backward, only if it is right."""
    record, trial = examine(name, contender, case)
    if trial is None:
        return record
    leaves = [x.detach().clone().requires_grad_() for x in trial.leaves]
    douts = [dout for dout in trial.douts if dout is not None]

    def forward():
        return trial.function(*leaves)

    def both():
        outputs = [out for out, dout in zip(forward(), trial.douts) if dout is not None]
        return torch.autograd.grad(outputs, leaves, [d.to(out.dtype) for d, out in zip(douts, outputs)])

    clock = measure.Clock(case.device)
    for i, (what, function) in enumerate({"forward": forward, "forward_backward": both}.items()):
        record[what] = measure.against_floor(clock.time(function), case.flops[i], case.bytes[i], rate)
    return record


def sizes(op: str, setting: Setting, as_timed: bool) -> Iterator[tuple[Size, dict]]:
    """The sizes of an operation, those that are timed or those for correctness, with what else its case takes."""
    if setting.small:
        size = SMALL
    else:
        size = MINIMIND3 if as_timed else replace(MINIMIND3, T=8192, N=4096)
    if op in ("moe", "router"):
        yield from ((size, dict(K=K)) for K in ((1, 2) if op == "moe" or not as_timed else (1,)))
    else:
        yield size, {}
    if op == "attention" or (op == "qk_norm_rope" and not as_timed):
        yield replace(size, D=16 if setting.small else 64), {}
    if op == "attention" and not as_timed:
        # MiniMind2: groups of four heads.
        yield replace(size, H=4 if setting.small else 8, HKV=1 if setting.small else 2), {}


def operations(group: str, part: str) -> tuple[str, ...]:
    if group == "others":
        return ("moe", *ELEMENTWISE, "router")
    if group == "elementwise":
        return (*ELEMENTWISE, "router") if part == "timings" else ELEMENTWISE
    return (group.removeprefix("others_"),)


def takes_part(name: str, contender: Contender, part: str, group: str, setting: Setting) -> bool:
    """The groups named others run what is not ours, and all that is compiled, at the sizes that will be timed.

    So the time of the timings is not spent on compilers: what is compiled here is found on disk there.
    """
    if any(word in name for word in setting.without):
        return False
    if group.startswith("others"):
        return not contender.ours or contender.optional or "compiled" in name
    return contender.ours or part == "timings"


def items(part: str, group: str, setting: Setting) -> Iterator[Item]:
    """What a group runs, one after another.  Ours come first, then what is most trusted."""
    if group == "leaks":
        yield from (Item(name, work) for name, work in leaks.probes(setting.device, setting.small))
        return
    if part == "curve":
        yield from (Item(name, work) for name, work in curve.comparisons(
            setting.device, setting.small, group == "mixture", lambda text: print(text, flush=True)))
        return
    as_timed = part == "timings" or group.startswith("others")
    for op in operations(group, part):
        for size, named in sizes(op, setting, as_timed):
            for dtype in (BF16,) if as_timed else (BF16, FP32):
                for name, contender in OPS[op].items():
                    if not takes_part(name, contender, part, group, setting):
                        continue
                    key = (op, size, dtype, setting.device, tuple(named.items()))
                    label = f"{op} {measure.short(dtype)} D={size.D} H={size.H}/{size.HKV} {named or ''} {name}"
                    if part == "correctness":
                        yield Item(label, lambda c=contender, n=name, key=key: check(n, c, case_of(*key)),
                                   contender.ours)
                    else:
                        yield Item(label, lambda c=contender, n=name, key=key: clock_it(
                            n, c, case_of(*key), rate_of(key[2], setting)), contender.ours)


@functools.lru_cache
def rate_of(dtype: torch.dtype, setting: Setting) -> dict:
    return measure.rates(setting.device, dtype, setting.small)
