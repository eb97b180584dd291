"""The model's matrix products through PyTorch (cuBLAS): each by itself, merged, and with sums in their epilogue.

    python -m minimind_ds.bench.gpu OUT_DIR --parts products
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minimind_ds.bench.kernels import cases, measure
from minimind_ds.bench.kernels.items import Item, Setting, rate_of


def items(part: str, name: str, setting: Setting, folder: pathlib.Path) -> Iterator[Item]:
    size = cases.SMALL if setting.small else cases.MINIMIND3
    T, C, V, N = size.T, size.C, size.V, min(4096, size.N)
    query, key, inner = size.H * size.D, size.HKV * size.D, size.I
    draw = functools.partial(tensor, setting.device)
    for what, widths in {"q, k, v": (query, key, key), "gate, up": (inner, inner)}.items():
        yield from shared_input(what, T, C, widths, draw, setting)
    for what, (rows, k, n) in {"o": (T, query, C), "down": (T, inner, C), "head, a chunk": (N, C, V)}.items():
        x, w, dy = draw(rows, k), draw(n, k), draw(rows, n)
        flops = 2.0 * rows * k * n
        yield timed(f"{what}: forward", lambda x=x, w=w: x @ w.T, flops, setting)
        yield timed(f"{what}: dx", lambda dy=dy, w=w: dy @ w, flops, setting)
        yield timed(f"{what}: dw", lambda dy=dy, x=x: dy.T @ x, flops, setting)


def shared_input(name: str, T: int, C: int, widths: tuple[int, ...], draw: Callable, setting: Setting) -> Iterator:
    """Products of one input: apart, and as one of all widths."""
    x, dx, whole = draw(T, C), draw(T, C), sum(widths)
    weights, dys = [draw(n, C) for n in widths], [draw(T, n) for n in widths]
    weight, dy = torch.cat(weights), draw(T, whole)
    flops = 2.0 * T * C * whole

    def added() -> Tensor:
        out = dys[0] @ weights[0]
        for one, w in zip(dys[1:], weights[1:]):
            out = out + one @ w
        return out

    def in_epilogue() -> Tensor:
        torch.mm(dys[0], weights[0], out=dx)
        for one, w in zip(dys[1:], weights[1:]):
            dx.addmm_(one, w)
        return dx

    yield timed(f"{name}: forward, apart", lambda: [x @ w.T for w in weights], flops, setting)
    yield timed(f"{name}: forward, merged", lambda: x @ weight.T, flops, setting)
    yield timed(f"{name}: forward, weights joined and merged", lambda: x @ torch.cat(weights).T, flops, setting)
    yield timed(f"{name}: dx, apart and added", added, flops, setting)
    yield timed(f"{name}: dx, added in the epilogue", in_epilogue, flops, setting)
    yield timed(f"{name}: dx, merged", lambda: dy @ weight, flops, setting)
    yield timed(f"{name}: dw, apart", lambda: [one.T @ x for one in dys], flops, setting)
    yield timed(f"{name}: dw, merged", lambda: dy.T @ x, flops, setting)


def tensor(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def timed(name: str, function: Callable, flops: float, setting: Setting) -> Item:
    def work() -> dict:
        found = measure.Clock(setting.device).time(function, limit_s=0.3)
        rate = rate_of(torch.bfloat16, setting)
        return {"op": "products", "case": name, "ours": False, "status": "right",
                "forward": measure.against_floor(found, flops, 0.0, rate)}

    return Item(name, work, ours=False)
