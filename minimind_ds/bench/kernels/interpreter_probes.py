"""Small wrong kernels that interpreter.py must catch, and right ones it must compute exactly: its own proof."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minimind_ds.bench.kernels import interpretable


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x * y + x)
    tl.store(out_ptr + N + i, tl.where(x < y, tl.exp2(x.to(tl.float32)).to(tl.bfloat16), y))
    tl.store(out_ptr + 2 * N + i, tl.cumsum(x, 0))
    tl.store(out_ptr + 3 * N, tl.max(x, 0))
    tl.store(out_ptr + 3 * N + 1, tl.sum(x.to(tl.float32), 0).to(tl.bfloat16))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(x_ptr + i), tl.load(y_ptr + i), input_precision=PRECISION))


@triton.jit
def load_past_the_end(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, 2 * N)
    tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < N)


@triton.jit
def store_past_the_end(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + 1 + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


@triton.jit
def sum_of_masked_lanes(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.sum(tl.load(x_ptr + i, mask=i < N // 2), 0) + tl.zeros([N], tl.float32))


@triton.jit
def store_where_others_store(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.program_id(0))


@triton.jit
def load_what_others_store(x_ptr, out_ptr, N: tl.constexpr):
    p = tl.program_id(0)
    tl.store(out_ptr + p, tl.load(x_ptr + p) + tl.load(out_ptr + (p + 1) % 4))


@triton.jit
def store_twice(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


@triton.jit
def order_of_programs(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(x_ptr, 1.0))


def raises(kernel, word: str, programs: int = 4) -> str | None:
    """None when the kernel is stopped for the right reason, else what happened."""
    x, out = torch.ones(16), torch.zeros(16)
    try:
        kernel[(programs,)](x, out, 16)
    except Exception as error:  # noqa: BLE001  (whatever the interpreter wraps it in is judged by its text)
        return None if word in str(error) else f"{kernel.__name__}: {error}"
    return f"{kernel.__name__} passed"


def failures() -> list[str]:
    """What is wrong with the honest interpreter on this Triton; empty when all is well."""
    found = [interpretable.why_not(),
             raises(load_past_the_end, "out of bounds", 1), raises(store_past_the_end, "out of bounds", 1),
             raises(store_where_others_store, "race"), raises(load_what_others_store, "race"),
             raises(store_twice, "race", 1)]
    x, out = torch.ones(16), torch.zeros(16)
    sum_of_masked_lanes[(1,)](x, out, 16)
    if not out.isnan().all():
        found.append("masked-off lanes were not poisoned")
    x[0] = 0
    order_of_programs[(16,)](x, out, 16)
    if out.tolist() == sorted(out.tolist()) or sorted(out.tolist()) != list(range(16)):
        found.append(f"programs did not run in a random order: {out.tolist()}")
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(3 * 16 + 2, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, 16)
    expected = torch.cat((x * y + x, torch.where(x < y, torch.exp2(x.float()).bfloat16(), y),
                          x.float().cumsum(0).bfloat16(), x.max()[None], x.float().sum()[None].bfloat16()))
    if not torch.equal(out, expected):
        found.append(f"bf16 arithmetic differs by {(out - expected).abs().tolist()}")
    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ y.double()
    for dtype, precision, low, high in ((torch.float32, "ieee", 0, 1e-6), (torch.float32, "tf32", 1e-5, 1e-2),
                                        (torch.bfloat16, "tf32", 0, 1e-6)):
        out = torch.zeros(16, 16)
        truth = exact if dtype == torch.float32 else x.to(dtype).double() @ y.to(dtype).double()
        product[(1,)](x.to(dtype), y.to(dtype), out, 16, precision)
        error = ((out - truth).norm() / truth.norm()).item()
        if not low <= error <= high:
            found.append(f"a product of {dtype} in {precision} has error {error}")
    return [item for item in found if item]


def check():
    found = failures()
    if found:
        raise RuntimeError(f"triton {triton.__version__}: the honest interpreter does not work here: "
                           + "; ".join(found))
