"""How fast a device runs each kind of work.py's operations: GPUs from a table, from one measured H200.

An operation takes its FLOPs over the rate of its kind's products plus its bytes over the rate of its kind's memory.
The shares of the vendor's figures that kernels reach were measured on one H200 (torch 2.11, triton 3.6, DeepSpeed
0.19.8, bf16, MiniMind-3's shape, 32,768 and 65,536 tokens a micro-batch) and are taken for other GPUs as they are.
This machine's CPU is measured by cpu_rates.py.

    python launch/plan.py --preset minimind-3 --gpu H200
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_ds.config.errors import UserError
from minimind_ds.config.untrusted import shown
from minimind_ds.plan.work import BACKWARD, FORWARD, UPDATE

NEVER = float("inf")


@dataclass(frozen=True)
class Rate:
    """FLOP/s and B/s of a kind of operation."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as a step sees it.

    rates: by (kind, part).  launch, update_launch: host seconds a launch, in forward and backward (our operators and
    autograd about each) and in the update; hook: of one of work.Launches.hooks.  exposed: the share of the shorter of
    device's and host's time that the longer does not hide; 1 where they are one.  fixed: host seconds a step beside
    launches.  network: B/s a rank sends; latency: seconds a collective.
    """

    name: str
    rates: dict[tuple[str, str], Rate]
    launch: float
    update_launch: float
    hook: float
    exposed: float
    fixed: float
    network: float
    latency: float
    measured: bool = False


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet: dense FLOP/s in half precision and in fp32 without tf32, B/s of memory, B/s each way to the
    other GPUs of its machine (NVLink, or PCIe), bytes of memory."""

    half: float
    fp32: float
    memory_rate: float
    link: float
    memory: float


SHEETS = {"H200": Sheet(989e12, 67e12, 4.8e12, 450e9, 141e9), "H100": Sheet(989e12, 67e12, 3.35e12, 450e9, 80e9),
          "A100": Sheet(312e12, 19.5e12, 2.04e12, 300e9, 80e9), "4090": Sheet(165e12, 82.6e12, 1.01e12, 20e9, 24e9)}
# Of the data sheet: what large products approach, what a copy reaches, and a ring among neighbours.
PRODUCTS, COPY, LINK = 0.9, 0.88, 0.75
# Of those products' FLOP/s and that copy's B/s, by kind and part.  A product's time is 0.9 of its FLOPs at the rate of
# a product of 8192^3 (a larger one warms the chip more) and 0.78 of its bytes at the copy's; above 1: what was written
# just before is read from the cache.
SHARES = {("products", FORWARD): (1.08, 1.28), ("products", BACKWARD): (1.12, 1.28),
          ("attention", FORWARD): (0.37, 0.66), ("attention", BACKWARD): (0.31, 0.42),
          ("experts", FORWARD): (0.61, NEVER), ("experts", BACKWARD): (0.47, NEVER),
          ("router", FORWARD): (NEVER, 0.41), ("router", BACKWARD): (NEVER, 0.6),
          ("norms", FORWARD): (NEVER, 1.3), ("norms", BACKWARD): (NEVER, 0.65),
          ("rope", FORWARD): (NEVER, 0.74), ("rope", BACKWARD): (NEVER, 0.72),
          # Not measured in a step: 0.68 and 0.70 by themselves in an earlier form, of blocks that move as wide.
          ("swiglu", FORWARD): (NEVER, 0.85), ("swiglu", BACKWARD): (NEVER, 0.85),
          ("loss", FORWARD): (NEVER, 0.54),
          ("rest", FORWARD): (NEVER, 0.45), ("rest", BACKWARD): (NEVER, 0.2),
          ("gradients", BACKWARD): (NEVER, 0.25), ("update", UPDATE): (NEVER, 0.7)}
# Host seconds, and what the device does not hide of them or they of it, fitted to six runs' forward and backward.
LAUNCH, UPDATE_LAUNCH, EXPOSED, FIXED = 60e-6, 12e-6, 0.2, 2.5e-3
# No run on a GPU stands behind these.
HOOK, LATENCY = 3e-6, 30e-6


def is_known(name: str) -> bool:
    return any(key.lower() in name.lower() for key in SHEETS)


def sheet_of(name: str) -> tuple[Sheet, str]:
    """The data sheet and the table's name of a GPU: one of SHEETS, in any case, or a name that holds one.

    Raises:
        ValueError: none of the table's.
    """
    for key, sheet in SHEETS.items():
        if key.lower() in name.lower():
            return sheet, key
    raise UserError(f"--gpu {shown(name)}: there are {', '.join(SHEETS)}")


def gpu(name: str, dtype: str, network: float | None = None) -> Device:
    """A GPU of the table, as sheet_of finds it.

    Args:
        network: B/s a rank sends; None: the machine's own links.
    """
    sheet, known = sheet_of(name)
    flops, moved = PRODUCTS * (sheet.fp32 if dtype == "fp32" else sheet.half), COPY * sheet.memory_rate
    rates = {key: Rate(flops * products, moved * memory) for key, (products, memory) in SHARES.items()}
    return Device(name=known, rates=rates, launch=LAUNCH, update_launch=UPDATE_LAUNCH, hook=HOOK, exposed=EXPOSED,
                  fixed=FIXED, network=network or LINK * sheet.link, latency=LATENCY)


def like(memory: float) -> str:
    """The table's GPU whose memory (bytes) is nearest to this."""
    return min(SHEETS, key=lambda name: abs(SHEETS[name].memory - memory))
