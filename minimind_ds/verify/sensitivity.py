"""How small an error may be that verify still finds: deliberate errors, made smaller until the law no longer fails.

    deepspeed --num_gpus 2 launch/verify.py --deepspeed ds_configs/zero2.json --sensitivity
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from minimind_ds import kernels
from minimind_ds.config.precision import DTYPES
from minimind_ds.model.decoder import kernel_requirements

from . import data, faults, kernels_law
from .checks import worst_over_ranks
from .laws import LAWS
from .reduced_run import ReducedRun
from .template import template_law

PRECISIONS = ("fp32", "bf16")
# Sizes that bisection begins between, and the quotient of the two at which it ends.
SMALLEST, LARGEST, CLOSE = 1e-8, 0.1, 1.5


class Fault(NamedTuple):
    """A deliberate error and the law that is to find it.

    make: to the context manager, of the error's size if it has one; otherwise the smallest case there is.
    """

    law: str
    what: str
    make: Callable
    sized: bool = False


def in_precision(b: ReducedRun, dtype: str) -> ReducedRun:
    """The run in this precision.  bf16 keeps its activations in bf16, as a GPU does, on every machine."""
    spec = b.spec
    if dtype != "fp32":
        spec = ",".join(f"{key}={'native' if key == 'activations' else name}"
                        for key, name in kernels.parse(spec).items())
    return dataclasses.replace(b, prepared=dataclasses.replace(b.prepared, run=b.prepared.run.replace(dtype=dtype)),
                               spec=spec)


def operations_of(b: ReducedRun) -> dict[str, str]:
    """The operations that the run's model has, and the backend that runs each."""
    choice = kernels.resolve(b.spec, b.prepared.world.device, DTYPES[b.prepared.run.dtype],
                             kernel_requirements(b.config))
    elementwise = ("add_rms_norm", "token_losses", *(() if b.config.use_moe else ("swiglu",)))
    found = {"attention": choice.attention, "norm_rope": choice.rope, **dict.fromkeys(elementwise, choice.elementwise)}
    return found | ({"moe": choice.moe, "route": choice.router} if b.config.use_moe else {})


def catalogue(b: ReducedRun) -> list[Fault]:
    """What is tried on this run."""
    store = b.prepared.stores[0]
    line = int(store.lines[data.some(store, 1, b.prepared.run.seed)[0]])
    backends = operations_of(b)
    found = [Fault("labels", f"one label {how}", functools.partial(faults.one_label, line, how))
             for how in ("changed", "lost", "added")]
    found += [Fault("template", "one line end of an open prompt lost", faults.lost_line_end),
              Fault("gradients", "one label of the step not learnt", lambda: faults.not_learnt("label")),
              Fault("gradients", "one row of the step dropped", lambda: faults.not_learnt("row")),
              Fault("gradients", "factor for ranks, off by", faults.wrong_ranks_factor, sized=True),
              Fault("gradients", "share of a mean of means", faults.mean_of_means, sized=True),
              Fault("layout", "share of a mean of means", faults.mean_of_means, sized=True),
              Fault("packing", "one token sees one key of its neighbour in one head",
                    lambda: faults.leaked_key(backends["attention"]))]
    found += [Fault("kernels", f"{name} scaled by 1 +", functools.partial(faults.scaled_kernel, name, backend),
                    sized=True) for name, backend in backends.items() if backend != "reference"]
    return [*found, Fault("resume", "one element of the optimizer's moments lost", lambda: faults.lost_moments("one"))]


def fails(b: ReducedRun, law: str, context, kind: str) -> bool | None:
    """Whether the law fails under its name, on any rank; None where it measures nothing in this precision.

    In bf16 what the law measures in fp32 besides does not count.  Collective.
    """
    dtype = b.prepared.run.dtype
    with context:
        if law in ("labels", "template"):
            found = data.labels_law(b.prepared, kind) if law == "labels" else template_law(b.prepared)
        else:
            found = kernels_law.in_precision(b, b.spec, dtype) if law == "kernels" else LAWS[law](b)
    counted = [f for f in found if dtype in f.what or "fp32" not in f.what]
    if not counted:
        return None
    return not all(f.ok for f in worst_over_ranks(counted, b.prepared.world.device))


def threshold(found: Callable[[float], bool | None]) -> float | None:
    """The smallest size, within a factor of CLOSE, from which on an error is found; infinity where LARGEST is not."""
    verdict = found(LARGEST)
    if not verdict:
        return None if verdict is None else math.inf
    missed, seen = SMALLEST, LARGEST
    while seen / missed > CLOSE:
        middle = math.sqrt(seen * missed)
        missed, seen = (missed, middle) if found(middle) else (middle, seen)
    return seen


def measure(b: ReducedRun, kind: str, say: Callable[[str], None]) -> list[dict]:
    """The table, a line for each fault; collective."""
    lines = []
    for number, fault in enumerate(catalogue(b)):
        line = {"law": fault.law, "fault": fault.what}
        for dtype in PRECISIONS:
            case = in_precision(b, dtype)
            # The bf16 backends may be others.
            fault = catalogue(case)[number]
            if fault.sized:
                smallest = threshold(lambda size: fails(case, fault.law, fault.make(size), kind))  # noqa: B023
                line[dtype] = "never" if smallest == math.inf else smallest
            else:
                verdict = fails(case, fault.law, fault.make(), kind)
                line[dtype] = None if verdict is None else "found" if verdict else "missed"
        lines.append(line)
        say(as_row(line))
    return lines


def as_row(line: dict) -> str:
    """A line of the table in Markdown; – where a law measures nothing in that precision."""
    cells = [line[dtype] for dtype in PRECISIONS]
    cells = ["–" if cell is None else cell if isinstance(cell, str) else f"{cell:.1e}" for cell in cells]
    return f"| {' | '.join((line['law'], line['fault'], *cells))} |"


def header() -> list[str]:
    return [f"| law | deliberate error | {' | '.join(PRECISIONS)} |", f"|---|---|{'---:|' * len(PRECISIONS)}"]
