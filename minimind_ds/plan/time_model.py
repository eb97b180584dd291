"""The time of a step before it is run, what bounds it, and the micro-batch from which launches no longer do.

    python launch/plan.py --preset minimind-3 --ranks 8 --gpu H200 --tokens 4.5e9 --price 3.2
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from minimind_ds.config.deepspeed_json import optimizer_device
from minimind_ds.model import memory_model
from minimind_ds.model.memory_model import Setting
from minimind_ds.plan import work
from minimind_ds.plan.hardware import Device

# Mean tokens of a document where the data is not asked.
DOCUMENT = 300
# Micro-batches are looked at up to so many tokens.
MOST_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one rank's step; products, memory, launches, update and network add up to it.

    launches: what the host adds to the device's forward and backward.  bound: what the step would be shorter
    without, first of all.  tokens_per_s: of all ranks, places of packed rows.
    """

    products: float
    memory: float
    launches: float
    update: float
    network: float
    step: float
    bound: str
    tokens_per_s: float


def device_seconds(works: list[work.Work], device: Device) -> tuple[float, float]:
    """Seconds of products and of memory."""
    products = sum(x.flops / device.rates[x.kind, x.part].flops for x in works)
    return products, sum(x.bytes / device.rates[x.kind, x.part].bytes for x in works)


def overlapped(device_s: float, host_s: float, exposed: float) -> float:
    """Both at once: the longer, and the share of the shorter that it does not hide."""
    return max(device_s, host_s) + exposed * min(device_s, host_s)


def micro_seconds(s: Setting, device: Device, attended: float) -> tuple[Counter, Counter]:
    """A micro-batch's seconds by part: on the device {(part, "products" or "memory")}, on the host {part}."""
    on_device, counted = Counter(), work.launches(s)
    for one in work.micro_batch(s, attended):
        products, memory = device_seconds([one], device)
        on_device[one.part, "products"] += products
        on_device[one.part, "memory"] += memory
    # Of three hooks a parameter one is the forward pass's.
    hooks = counted.hooks * device.hook
    return on_device, Counter({work.FORWARD: counted.forward * device.launch + hooks / 3,
                               work.BACKWARD: counted.backward * device.launch + hooks * 2 / 3})


def predict(s: Setting, device: Device, document: float = DOCUMENT) -> Time | None:
    """One step; None where the optimizer's states are not on the device, whose time nothing here tells.

    Sending is taken to hide behind nothing: buckets of the shipped files are about as large as these models.
    """
    if optimizer_device(s.ds) != "none":
        return None
    attended = work.keys(s, document)
    on_device, host = micro_seconds(s, device, attended)
    products = sum(v for (_, what), v in on_device.items() if what == "products")
    memory = sum(v for (_, what), v in on_device.items() if what == "memory")
    micro = sum(overlapped(on_device[part, "products"] + on_device[part, "memory"], host[part], device.exposed)
                for part in (work.FORWARD, work.BACKWARD))
    update = overlapped(sum(device_seconds(work.update(s), device)),
                        work.launches(s).update * device.update_launch, device.exposed) + device.fixed
    network = (sum(memory_model.sent(s).values()) / device.network + work.collectives(s) * device.latency)
    n = s.accumulation
    step = n * micro + update + network
    if network > n * micro:
        bound = "network"
    elif waits_for_launches(s, device, attended):
        bound = "launches"
    else:
        bound = "products" if products >= memory else "memory"
    return Time(products=n * products, memory=n * memory, launches=n * (micro - products - memory), update=update,
                network=network, step=step, bound=bound, tokens_per_s=s.tokens * s.ranks * n / step)


def waits_for_launches(s: Setting, device: Device, attended: float) -> bool:
    """Whether the host takes longer to launch a micro-batch than the device to run it."""
    on_device, host = micro_seconds(s, device, attended)
    return device.exposed < 1 and sum(host.values()) > sum(on_device.values())


def enough_tokens(s: Setting, device: Device, document: float = DOCUMENT) -> int | None:
    """The fewest tokens of a rank's micro-batch with which it does not wait for launches; None: however many."""
    attended = work.keys(s, document)

    def waits(tokens: int) -> bool:
        return waits_for_launches(replace(s, rows=tokens * s.dims.sequence, row_len=1), device, attended)

    low, high = 0, 1
    while waits(high):
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if waits(middle) else (low, middle)
    return high
