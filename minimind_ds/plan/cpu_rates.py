"""This CPU's rates, measured on the spot: a layer's own operations on a few hundred tokens, by as many ranks at once.

Each rank is a thread here, with the operator threads that a rank would have, so that ranks share memory and cores as
they will.  A rate is what work.py counts for a kind of operation over the least seconds it took: processor time where
a rank has one thread, so that other programs on the machine change little.

    python launch/plan.py --preset debug --ranks 2
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minimind_ds import kernels
from minimind_ds.config.model import ParallelDims
from minimind_ds.config.precision import DTYPES
from minimind_ds.distributed import malloc
from minimind_ds.kernels import KernelSelection
from minimind_ds.model.memory_model import Setting, trained_parts
from minimind_ds.model.product import chained_product
from minimind_ds.plan import work
from minimind_ds.plan.hardware import NEVER, Device, Rate
from minimind_ds.plan.work import BACKWARD, FORWARD, UPDATE

# Tokens of the products measured, and of what moves memory, which is faster while it fits a cache.
FEW, MANY, LABELLED = 512, 2048, 256
# Products too small for anything but their launch.
TINY = 16
# An operation is repeated so long and so often.
SECONDS, LEAST, MOST = 0.05, 3, 20
# Parameters of the update and of gradients measured, at most: more than a cache holds, and than an allocator keeps.
# Elements that are sent.
WEIGHTS, GRADIENTS, SENT = 1 << 23, 1 << 25, 1 << 21
# What was measured before in this process, by what it was measured for.
MEASURED: dict[str, Device] = {}
# The part of a step of what has no leaves.
ALONE = {"update": UPDATE, "gradients": BACKWARD}
# Bytes of an update's element, as work.update counts them in fp32.
UPDATED = 40


def threads_of(ranks: int) -> tuple[int, int]:
    """-> operator threads of a rank on this machine, and how many ranks its cores hold at once."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, cores // ranks)
    return threads, max(1, min(ranks, cores // threads))


def measure(s: Setting, selection: KernelSelection, attended: float) -> Device:
    """The rates of a rank of this setting, alike for every stage; some seconds, the first time."""
    plain = replace(s, ds={}, rows=1, row_len=max(s.tokens, 1), accumulation=1, dims=ParallelDims(), adapters=None)
    key = repr((plain, selection, attended))
    if key not in MEASURED:
        MEASURED[key] = measured(plain, selection, attended)
    return MEASURED[key]


def measured(s: Setting, selection: KernelSelection, attended: float) -> Device:
    # As a run on a CPU does.
    malloc.keep(sum(part.total for part in trained_parts(s)))
    threads, together = threads_of(s.ranks)
    clock = time.thread_time if threads == 1 else time.perf_counter
    before, barrier = torch.get_num_threads(), threading.Barrier(together)

    def rank() -> dict[tuple[str, str], float]:
        torch.set_num_threads(threads)
        return {key: seconds for kind in operations(s, selection, attended)
                for key, seconds in timed(*kind, barrier, clock).items()}

    # The main thread's memory comes and goes as a process's does; the other threads are there to be in its way.
    others = [threading.Thread(target=rank) for _ in range(together - 1)]
    for other in others:
        other.start()
    found = rank()
    for other in others:
        other.join()
    network, latency = sending() if s.ranks > 1 else (NEVER, 0.0)
    torch.set_num_threads(before)
    # More ranks than cores hold take turns.
    turns = s.ranks / together
    seconds = {key: turns * took for key, took in found.items()}
    # One launch a product forward, two backward.
    rates, launch = {}, (seconds.pop(("launch", FORWARD)) + seconds.pop(("launch", BACKWARD))) / (3 * TINY)
    for (kind, part), took in seconds.items():
        flops, moved = asked(s, attended, kind, part)
        # What has products is measured by them alone, at the sizes it will have.
        rates[kind, part] = Rate(flops / took, NEVER) if flops else Rate(NEVER, moved / took)
    rates["rest", BACKWARD] = rates["rest", FORWARD]
    return Device(name="this CPU", rates=rates, launch=launch, update_launch=launch, hook=launch, exposed=1.0,
                  fixed=0.0, network=network, latency=latency, measured=True)


def tokens_of(s: Setting, kind: str, attended: float) -> int:
    most = FEW if kind in ("products", "experts", "router") else MANY
    return min(s.tokens, max(most, round(2 * attended)) if kind == "attention" else most)


def asked(s: Setting, attended: float, kind: str, part: str) -> tuple[float, float]:
    """What work.py counts for the operation that is measured: FLOPs and bytes."""
    if kind == "update":
        return 0.0, UPDATED * weights_of(s)
    if kind == "gradients":
        return 0.0, 2.0 * s.width * sum(sizes_of(s))
    if kind == "loss":
        return 0.0, 2.0 * s.active * min(s.tokens, LABELLED) * s.config.vocab_size
    tokens = tokens_of(s, kind, attended)
    if kind == "rest":
        return 0.0, 2.0 * s.active * tokens * s.config.hidden_size
    same = [x for x in work.layer(replace(s, row_len=tokens), attended) if (x.kind, x.part) == (kind, part)]
    # A router's product is a small part of it.
    return 0.0 if kind == "router" else sum(x.flops for x in same), sum(x.bytes for x in same)


def operations(s: Setting, selection: KernelSelection, attended: float) -> Iterator[tuple[str, list, Callable]]:
    """Each kind's operation: its leaves, and what makes of them the outputs (without leaves: all there is to do)."""
    c, dtype = s.config, selection.activations
    C, D, wide, narrow = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def rows(kind: str, *shape: int) -> Tensor:
        return drawn(tokens_of(s, kind, attended), *shape)

    yield "launch", [drawn(1, 8), *(drawn(8, 8) for _ in range(TINY))], functools.partial(products, [TINY])
    intermediates = [] if c.use_moe else [c.intermediate_size] * 2
    chains = [(C, [wide * D, narrow * D, narrow * D]), (wide * D, [C])]
    chains += [(C, intermediates), (intermediates[0], [C])] if intermediates else []
    leaves, sizes = [], [len(outs) for _, outs in chains]
    for width, outs in chains:
        leaves += [rows("products", width), *(drawn(out, width) for out in outs)]
    yield "products", leaves, functools.partial(products, sizes)
    q, k, v = (rows("attention", heads, D) for heads in (wide, narrow, narrow))
    # Documents of one length, that their tokens attend to as many keys.
    length = max(1, min(round(2 * attended), len(q)))
    bounds = torch.tensor([*range(0, len(q), length), len(q)], dtype=torch.int32)
    yield "attention", [q, k, v], lambda q, k, v: [kernels.attention(q, k, v, bounds, length,
                                                                    backend=selection.attention)]
    angles = torch.randn(tokens_of(s, "rope", attended), D // 2)
    weight = [drawn(D)] if c.qk_norm else []
    yield "rope", [rows("rope", wide, D), rows("rope", narrow, D), *weight], lambda q, k, *weight: [
        kernels.norm_rope(x, *(weight or [None]), angles, angles, 1e-6, backend=selection.rope) for x in (q, k)]
    yield "norms", [rows("norms", C), rows("norms", C), drawn(C)], lambda x, y, weight: [
        out for _ in range(2) for out in kernels.add_rms_norm(x, y, weight, 1e-6, backend=selection.elementwise)]
    if c.use_moe:
        yield from mixture(s, selection, rows, drawn)
    else:
        yield "swiglu", [rows("swiglu", c.intermediate_size), rows("swiglu", c.intermediate_size)], lambda gate, up: [
            kernels.swiglu(gate, up, backend=selection.elementwise)]
    logits = torch.randn(min(s.tokens, LABELLED), c.vocab_size).to(dtype)
    labels = torch.arange(len(logits)) % c.vocab_size
    yield "loss", [], lambda: kernels.token_losses(logits.clone(), labels, backend=selection.elementwise)
    many = rows("rest", C).detach()
    order = torch.randperm(len(many))
    yield "rest", [], lambda: many.index_select(0, order)
    gradients = [torch.zeros(size, dtype=DTYPES[s.dtype]) for size in sizes_of(s)]
    # All at once, so that they come to lie in fresh memory as a step's do.
    yield "gradients", [], lambda: [gradient.clone() for gradient in gradients]
    yield "update", [], update(weights_of(s))


def products(sizes: list[int], *leaves: Tensor) -> list[Tensor]:
    """A layer's products: chains of so many weights, each after its input."""
    made, left = [], list(leaves)
    for n in sizes:
        x, weights, left = left[0], left[1:n + 1], left[n + 1:]
        for weight in weights[:-1]:
            y, x = chained_product(x, weight)
            made.append(y)
        made.append(F.linear(x, weights[-1]))
    return made


def mixture(s: Setting, selection: KernelSelection, rows: Callable, drawn: Callable) -> Iterator[tuple]:
    c = s.config
    C, E, K, wide = c.hidden_size, c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
    x = rows("experts", C)
    chosen = torch.arange(len(x) * K).view(-1, K) % E
    yield "experts", [x, drawn(E, 2 * wide, C), drawn(E, C, wide), torch.rand(len(x), K).requires_grad_()], \
        lambda x, gate_up, down, weights: [kernels.moe(x, gate_up, down, weights, chosen, backend=selection.moe)]
    group = torch.zeros(len(x), dtype=torch.int64)

    def route(x, weight):
        y, x = chained_product(x, weight)
        weights, _, _, scores = kernels.route(y, K, c.norm_topk_prob, group, 1, backend=selection.router)
        return [weights, scores]

    yield "router", [rows("router", C), drawn(E, C)], route


def sizes_of(s: Setting) -> list[int]:
    """The largest of the trained parameters, as many as GRADIENTS has room for."""
    sizes = sorted((size for part in trained_parts(s) for size in part.sizes), reverse=True)
    return [size for size, before in zip(sizes, itertools.accumulate(sizes, initial=0)) if before < GRADIENTS]


def weights_of(s: Setting) -> int:
    return min(WEIGHTS, sum(part.total // (part.ranks if s.stage else 1) for part in trained_parts(s)))


def update(n: int) -> Callable[[], None]:
    """Clipping and AdamW of n parameters."""
    weight = torch.randn(n).requires_grad_()
    weight.grad = torch.randn(n)
    adam = torch.optim.AdamW([weight], lr=1e-4, fused=True)

    def run() -> None:
        norm = torch.linalg.vector_norm(weight.grad)
        weight.grad.mul_(1.0 / (1.0 + norm))
        adam.step()

    return run


def timed(kind: str, leaves: list[Tensor], function: Callable, barrier: threading.Barrier, clock: Callable) -> dict:
    """{(kind, part): seconds}, the least of some runs, all ranks' at once."""
    found, douts, spent = {}, None, 0.0
    barrier.wait()
    for turn in range(MOST):
        if turn >= LEAST and spent > SECONDS:
            break
        start = clock()
        outputs = function(*leaves)
        took = {(kind, ALONE.get(kind, FORWARD)): clock() - start}
        if leaves:
            douts = douts or [torch.ones_like(out) for out in outputs]
            start = clock()
            torch.autograd.grad(outputs, leaves, douts, allow_unused=True)
            took[kind, BACKWARD] = clock() - start
        del outputs
        if turn:
            # The first warms up.
            spent += sum(took.values())
            found = {key: min(seconds, found.get(key, NEVER)) for key, seconds in took.items()}
    return found


def sending() -> tuple[float, float]:
    """B/s that a rank of two sends to reduce, and seconds of a collective: gloo's own, between two threads here."""
    store = dist.HashStore()

    def rank(number: int) -> tuple[float, float]:
        group = dist.ProcessGroupGloo(store, number, 2, datetime.timedelta(seconds=60))
        seconds = []
        for elements in (SENT, 2):
            x, least = torch.ones(elements), NEVER
            for _ in range(10):
                began = time.perf_counter()
                group.allreduce([x]).wait()
                least = min(least, time.perf_counter() - began)
            seconds.append(least)
        return seconds[0], seconds[1]

    with ThreadPoolExecutor(2) as two:
        whole, latency = max(two.map(rank, range(2)))
    # A ring of two sends each element once.
    return 4 * SENT / whole, latency
