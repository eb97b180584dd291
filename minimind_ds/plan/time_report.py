"""The plan's times, for people: which device they are for, a line a stage, hours and money of a run.

    python launch/plan.py --preset minimind-3 --ranks 8 --gpu H200 --tokens 4.5e9 --price 3.2
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.run import RunConfig
from minimind_ds.model.decoder import kernel_requirements
from minimind_ds.model.memory_model import GIB, Setting
from minimind_ds.plan import cpu_rates, hardware, time_model, work
from minimind_ds.plan.hardware import Device
from minimind_ds.terminal import columns, count

# How far off: runs on one H200, with the kernels and launches of their code, dense and with experts; runs on a CPU
# (docs/PLAN_AND_VERIFY.md).
GPU_ERROR = {False: "within 7 % of three runs on one H200", True: "5 to 22 % too short for three runs on one H200"}
# Of tokens, a price, a network and a document.
MOST = 1e18
CPU_ERROR = "median error on two cores 11 %, with experts up to 39 % too short"


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that cannot be."""
    for name, least in (("tokens", 1), ("price", 0), ("network", 1e-3), ("document", 1)):
        value = getattr(options, name)
        if value is not None and not least <= value <= MOST:
            raise UserError(f"--{name} is {value}; it must be from {least:g} to {MOST:g}")
    if options.price is not None and options.tokens is None:
        raise UserError("--price needs --tokens, the tokens to be trained")
    if options.gpu:
        hardware.sheet_of(options.gpu)


def device_of(s: Setting, run: RunConfig, options: argparse.Namespace) -> Device | None:
    """What the times are for: --gpu, else this machine's GPU, else the table's nearest to --memory, else this CPU.

    None: a GPU that the table does not have.
    """
    sends = options.network and options.network * 1e9
    if s.on_cpu:
        selection = kernels.resolve(run.kernels, "cpu", DTYPES[s.dtype], kernel_requirements(s.config))
        found = cpu_rates.measure(s, selection, work.keys(s, options.document))
        return dataclasses.replace(found, network=sends) if sends else found
    name = options.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available()
                           else hardware.like(options.memory * GIB))
    return hardware.gpu(name, s.dtype, sends) if hardware.is_known(name) else None


def times(settings: dict[str, Setting], device: Device, options: argparse.Namespace) -> dict[str, dict | None]:
    """By file: time_model.Time, the tokens from which launches no longer bind, hours and price where asked for."""
    found = {}
    for name, s in settings.items():
        time = time_model.predict(s, device, options.document)
        found[name] = time and dataclasses.asdict(time) | {
            "enough_tokens": time_model.enough_tokens(s, device, options.document)}
        if time and options.tokens:
            hours = options.tokens / time.tokens_per_s / 3600
            found[name] |= {"hours": hours, "price": options.price and hours * s.ranks * options.price}
    return found


def table(settings: dict[str, Setting], found: dict[str, dict | None], device: Device,
          options: argparse.Namespace) -> list[str]:
    s = next(iter(settings.values()))
    how = f"its rates measured now; {CPU_ERROR}" if device.measured else \
        f"predicted, not measured; {GPU_ERROR[s.config.use_moe]}{'' if device.name == 'H200' else ', none on this'}"
    parts = ("products", "memory", "launches", "update", "network", "step")
    rows = {name: [] for name in (*parts, "tokens/s", "bound by",
                                  *(() if device.measured else ("launch-bound under",)),
                                  *(("hours",) if options.tokens else ()),
                                  *(("price",) if options.price is not None else ()))}
    for time in found.values():
        cells = ["–"] * len(rows) if time is None else [
            *(f"{1e3 * time[part]:,.1f}" for part in parts), f"{time['tokens_per_s']:,.0f}", time["bound"],
            *(() if device.measured else ("–" if time["enough_tokens"] is None else f"{time['enough_tokens']:,}",)),
            *((f"{time['hours']:,.2f}",) if options.tokens else ()),
            *((f"{time['price']:,.2f}",) if options.price is not None else ())]
        for row, cell in zip(rows.values(), cells):
            row.append(cell)
    without = ", ".join(name for name, time in found.items() if time is None)
    return [f"time of a step on {device.name} ({how})",
            f"tokens: {s.tokens:,} a micro-batch and rank, {count(s.accumulation, 'micro-batch', 'micro-batches')} a "
            f"step, {options.document:g} a document; in ms:", *columns(list(found), rows.items()),
            *([f"{without}: not predicted: its optimizer's states are not on the device"] if without else [])]


def lines_of(settings: dict[str, Setting], plans: dict[str, dict], run: RunConfig,
             options: argparse.Namespace) -> list[str]:
    """The lines below the memory's, and `time` in each file's plan."""
    device = device_of(next(iter(settings.values())), run, options)
    if device is None:
        return [f"no times: {torch.cuda.get_device_name()} is not in the table; --gpu {'|'.join(hardware.SHEETS)}"]
    found = times(settings, device, options)
    for name, time in found.items():
        plans[name]["time"] = time
    return table(settings, found, device, options)
