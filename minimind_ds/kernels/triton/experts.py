"""Dropless mixture of SwiGLU experts on a GPU: grouped products in Triton, forward and backward.

The method is ScatterMoE's (arXiv:2403.08245), with the activation fused in as well:

- Choices (token, k) are sorted by expert on the device, stably, by two small kernels.  Nothing waits for the GPU: a
  launch has as many programs as there can be row blocks, and a table tells each its expert or that it has none.
- Gathering is part of the loads and scattering part of the stores: no permuted copy of x, y or their gradients.
- Gate and up are one launch with silu(gate) * up in its epilogue.  Backward reads gate and up back, and makes
  silu(gate) * up again beside their gradients: storing costs a third of what another product would.
- Every number is written once, by one program, in an order that does not depend on the others: deterministic, without
  atomics, and a token's result does not depend on what other tokens are or choose, to the bit.

    python -m pytest tests/kernels/test_triton_moe.py        (docs/KERNELS.md has the figures)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import hopper
from .grouped_gemm import gate_up_kernel, hidden_gradient_kernel, linear_kernel, weight_gradient_kernel
from .host import architecture, on, processors
from .operator import operator
from .sort import Plan, blocks_at_most, plan


class Sizes(NamedTuple):
    """A kernel's tile: `rows` x `columns` of output, summed over `depth` at a time; and which form of it runs.

    form: "gathered" reads x and dy by token; others than "early" need a sorted copy of them first.  gate_up: "tma",
        "persistent".  hidden_gradient: "tma".  Weights' gradients: "early" (tokens are read earlier), "sorted" (the
        same kernel), "tma", "grouped_mm" (PyTorch's).  linear has one form.
    ahead: quarters of gate and up that hidden_gradient's "tma" reads before its product, 0, 1 or 4.
    bound: registers a thread may have, so that more blocks fit an SM; None: the compiler's choice.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    form: str = "gathered"
    ahead: int = 0
    bound: int | None = None

    @property
    def by_token(self) -> bool:
        """Whether x and dy are read by token, not from a sorted copy."""
        return self.form in ("gathered", "early")

    @property
    def tail(self) -> int:
        """Rows for each expert behind this weight gradient's operands."""
        return self.depth if self.form == "tma" else 0


# From compiled resource tables (docs/KERNELS.md): no spills, both operands of every product copied asynchronously.
# The kernels over rows share one table of row blocks, so one number of `rows`; gate_up has two tiles of its columns.
GATHERED = {
    "gate_up": Sizes(128, 128, 64, 8, 3),
    "linear": Sizes(128, 256, 64, 8, 3),
    # Two blocks share an SM: not every Triton keeps to their registers by itself.
    "hidden_gradient": Sizes(128, 128, 64, 8, 3, bound=128),
    "gate_up_gradient": Sizes(128, 256, 64, 8, 3),
    "down_gradient": Sizes(256, 128, 64, 8, 3),
}
# What runs on Hopper where descriptors can be made; GATHERED where they cannot.
HOPPER = dict(GATHERED)
# Within the 99 KB of shared memory that consumer GPUs have as well.
AMPERE = {
    "gate_up": Sizes(128, 128, 32, 8, 4),
    "linear": Sizes(128, 256, 32, 8, 4),
    "hidden_gradient": Sizes(128, 64, 64, 4, 3),
    "gate_up_gradient": Sizes(128, 256, 32, 8, 4),
    "down_gradient": Sizes(256, 128, 32, 8, 4),
}
# fp32 without tensor cores: exact products, for tests and small models.
WIDE = dict.fromkeys(HOPPER, Sizes(64, 64, 16, 4, 2))


# Whether the weights' gradients run beside the product for dx: their last, partly idle waves are filled by its tiles.
BESIDE = False


def sizes_for(dtype: torch.dtype) -> dict[str, Sizes]:
    """Tiles for the GPU that kernels start on."""
    if dtype.itemsize > 2:
        return WIDE
    return HOPPER if 90 <= architecture() < 120 else AMPERE


def table(sizes: dict[str, Sizes] | str, x: Tensor, down: Tensor, experts: Tensor) -> dict[str, Sizes]:
    """`sizes`, or what suits the GPU where they are "" (an operator takes no dict); GATHERED where descriptors that
    they ask for cannot be made."""
    sizes = sizes or sizes_for(x.dtype)
    _, C, I = down.shape
    if any(not size.by_token for size in sizes.values()) and not hopper.fits(
            experts.numel(), C, I, x.element_size(), sizes["hidden_gradient"].depth):
        return GATHERED
    return sizes


def splits(tiles: int, rows: int, device: torch.device) -> int:
    """How many programs share the sum of one tile of a weight's gradient: enough to fill the GPU, 512 rows for each.

    Their sums are stored apart and added in order.  At MiniMind's own sizes it is one.
    """
    return max(1, min(processors(device) // tiles, rows // 512))


def constants(sizes: Sizes, dtype: torch.dtype) -> dict:
    return dict(ROWS=sizes.rows, COLUMNS=sizes.columns, DEPTH=sizes.depth, num_warps=sizes.warps,
                num_stages=sizes.stages, maxnreg=sizes.bound,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def apply_gate_up(x: Tensor, weight: Tensor, K: int, made: Plan, sizes: Sizes, save: bool) -> tuple[Tensor, Tensor]:
    """x (T, C), weight (E, 2 I, C) -> gate_up (M, 2 I), empty unless `save`, and silu(gate) * up (M, I), sorted."""
    M, C, I, n = len(made.order), x.shape[1], weight.shape[1] // 2, len(made.blocks)
    gate_up, hidden = empty(x, M if save else 0, 2 * I), empty(x, M, I)
    if not sizes.by_token:
        hopper.gate_up(hopper.sort_rows(x, made, K, 0), weight, gate_up, hidden, made, sizes,
                       constants(sizes, x.dtype))
        return gate_up, hidden
    gate_up_kernel[(n * triton.cdiv(I, sizes.columns),)](
        x, weight, gate_up, hidden, made.order, made.blocks, n, C, C=C, I=I, K=K, SAVE=save,
        **constants(sizes, x.dtype))
    return gate_up, hidden


def apply_linear(a: Tensor, weight: Tensor, scale: Tensor | None, K: int, made: Plan, sizes: Sizes) -> Tensor:
    """Sorted rows a (M, D) times their experts' weights, by token: (T, N).

    weight is (E, N, D) with a scale (T, K), and (E, D, N) without one.  A token's K results are stored apart and then
    added, in order.
    """
    (M, D), N, n = a.shape, weight.shape[1 if scale is not None else 2], len(made.blocks)
    out, scaled = empty(a, M, N), scale is not None
    linear_kernel[(n * triton.cdiv(N, sizes.columns),)](
        a, weight, scale if scaled else out, out, made.order, made.blocks, n, D, N=N, D=D, TRANSPOSED=scaled,
        SCALED=scaled, **constants(sizes, a.dtype))
    return out if K == 1 else out.view(M // K, K, N).sum(dim=1)


def hidden_gradient(dy: Tensor, sorted_dy: Tensor | None, down: Tensor, scale: Tensor, gate_up: Tensor, made: Plan,
                    sizes: dict[str, Sizes]) -> tuple[Tensor, Tensor, Tensor]:
    """dy (T, C) -> dgate_up (M, 2 I) and scale * hidden (M, I), both sorted, and dscale (T, K).

    Behind the sorted rows of both is room for their weight gradients' tails.
    """
    M, E, C, I, n = len(made.order), down.shape[0], dy.shape[1], down.shape[2], len(made.blocks)
    own = sizes["hidden_gradient"]
    column_blocks = triton.cdiv(I, own.columns)
    dgate_up = empty(dy, M + E * sizes["gate_up_gradient"].tail, 2 * I)
    hidden = empty(dy, M + E * sizes["down_gradient"].tail, I)
    dscale = empty(dy, column_blocks, M, dtype=torch.promote_types(dy.dtype, torch.float32))
    if not own.by_token:
        hopper.hidden_gradient(sorted_dy, down, scale, gate_up, dgate_up, hidden, dscale, made, sizes["gate_up"].rows,
                               own, constants(own, dy.dtype))
    else:
        hidden_gradient_kernel[(n * column_blocks,)](
            dy, down, scale, gate_up, dgate_up, hidden, dscale, made.order, made.blocks, n, M, C, C=C, I=I,
            K=scale.shape[1], **constants(own, dy.dtype))
    return dgate_up, hidden, dscale.sum(dim=0).view(scale.shape).to(scale.dtype)


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """Before the current one: what starts there first is not held up by what fills its gaps."""
    return torch.cuda.Stream(device, priority=-1)


@contextlib.contextmanager
def after_current(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Launches on `stream`, after what the current one holds by now; on the current one if None.

    Who joins them keeps all tensors until then: memory is freed for the current stream.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def weight_gradient(a: Tensor, b: Tensor, gathered: str, K: int, made: Plan, sizes: Sizes,
                    stream: torch.cuda.Stream | None = None) -> Tensor:
    """sum of a^T b over each expert's rows: (E, P, Q) from a (., P) and b (., Q).

    gathered: which of them is by token, for forms that read by token.  Other forms get both sorted; tails, if any,
    are there for that one, and are made here for the other.
    """
    M, E, P, Q = len(made.order), len(made.offsets) - 1, a.shape[1], b.shape[1]
    # For other types PyTorch has only a fallback, which waits for the GPU.
    if sizes.form == "grouped_mm" and a.dtype == torch.bfloat16:
        return F.grouped_mm(a[:M].T, b[:M], offs=made.offsets[1:])
    tiles = E * triton.cdiv(P, sizes.rows) * triton.cdiv(Q, sizes.columns)
    split = splits(tiles, M // E, a.device)
    out = empty(a, split, E, P, Q, dtype=a.dtype if split == 1 else torch.promote_types(a.dtype, torch.float32))
    if sizes.tail:
        hopper.add_tails(a if gathered == "b" else b, made, sizes.tail)
    gather = gathered if sizes.by_token else ""
    with after_current(stream if split == 1 else None):
        if sizes.tail:
            hopper.weight_gradient(a, b, out, tiles, made, sizes, constants(sizes, a.dtype))
        else:
            weight_gradient_kernel[(tiles, split)](
                a, b, out, made.order, made.offsets, E, P=P, Q=Q, K=K, GATHER_A=gather == "a",
                GATHER_B=gather == "b", EARLY=sizes.form == "early", SPLIT=split, **constants(sizes, a.dtype))
    return out[0] if split == 1 else out.sum(dim=0).to(a.dtype)


def apply(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, sizes: str,
          save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y (T, C), gate_up's products (M, 2 I), empty unless `save`, and the plan."""
    K, sizes = experts.shape[1], table(sizes, x, down, experts)
    with on(x.device):
        made = plan(experts, gate_up.shape[0], sizes["gate_up"].rows)
        saved, hidden = apply_gate_up(x, gate_up, K, made, sizes["gate_up"], save)
        return apply_linear(hidden, down, weights, K, made, sizes["linear"]), saved, *made


def gradient(dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, saved: Tensor, order: Tensor,
             offsets: Tensor, blocks: Tensor, sizes: str, wants_x: bool, wants_gate_up: bool,
             wants_down: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dgate_up, ddown (empty where not wanted) and dweights."""
    made, K, sizes, dy = Plan(order, offsets, blocks), weights.shape[1], table(sizes, x, down, order), dy.contiguous()
    own, of_gate_up, of_down = (sizes[name] for name in ("hidden_gradient", "gate_up_gradient", "down_gradient"))
    M, sorted_dy, dx, dweight, ddown = len(order), None, *(empty(dy, 0) for _ in range(3))
    stream = second_stream(x.device) if BESIDE and x.device.type == "cuda" else None
    with on(x.device):
        if not (own.by_token and of_down.by_token):
            sorted_dy = hopper.sort_rows(dy, made, K, of_down.tail)
        dgate_up, hidden, dweights = hidden_gradient(dy, sorted_dy, down, weights, saved, made, sizes)
        if wants_gate_up:
            x_rows = x if of_gate_up.by_token else hopper.sort_rows(x, made, K, of_gate_up.tail)
            dweight = weight_gradient(dgate_up, x_rows, "b", K, made, of_gate_up, stream)
        if wants_down:
            dy_rows = dy if of_down.by_token else sorted_dy
            ddown = weight_gradient(dy_rows, hidden, "a", K, made, of_down, stream)
        if wants_x:
            dx = apply_linear(dgate_up[:M], gate_up, None, K, made, sizes["linear"])
        if stream is not None:
            torch.cuda.current_stream(x.device).wait_stream(stream)
    return dx, dweight, ddown, dweights


def save(ctx, inputs, output):
    x, gate_up, down, weights, _, ctx.sizes, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, gate_up, down, weights, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def formula(gradient, ctx, dy: Tensor | None, *_):
    if dy is None:
        return (None,) * 7
    wants = ctx.needs_input_grad[:3]
    *found, dweights = gradient(dy, *ctx.saved_tensors, ctx.sizes, *wants)
    return *(dx if wanted else None for dx, wanted in zip(found, wants)), dweights, None, None, None


def fake(x, gate_up, down, weights, experts, sizes, save):
    M, (E, _, I), rows = experts.numel(), down.shape, table(sizes, x, down, experts)["gate_up"].rows
    made = (empty(x, *shape, dtype=torch.int32) for shape in ((M,), (E + 1,), (blocks_at_most(M, E, rows), 4)))
    return x.new_empty(x.shape), empty(x, M if save else 0, 2 * I), *made


def fake_gradient(dy, x, gate_up, down, weights, saved, order, offsets, blocks, sizes, *wants):
    return *(empty(dy, *(like.shape if wanted else (0,))) for like, wanted in zip((x, gate_up, down), wants)), \
        weights.new_empty(weights.shape)


mixture = operator("moe", apply, gradient, save=save, formula=formula, fake=fake, fake_gradient=fake_gradient)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor,
        sizes: dict[str, Sizes] | None = None) -> Tensor:
    """y_t = sum_k weights[t, k] * down_e @ (silu(gate_e @ x_t) * (up_e @ x_t)) with e = experts[t, k].

    Args:
        x: (T, C).  gate_up: (E, 2 I, C), gate first.  down: (E, C, I).  All of one dtype.
        weights: (T, K) floating.  experts: (T, K) integers in [0, E); others are undefined behaviour.
        sizes: the kernels' tiles, by name; chosen for the GPU if None, as it must be under torch.compile.

    Returns:
        (T, C) in x's dtype.  Experts that nobody chose get gradients of exactly zero.

    Raises:
        ValueError: dtypes that differ, shapes that do not fit.
    """
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(f"x, gate_up and down must have one dtype, not {x.dtype}, {gate_up.dtype}, {down.dtype}")
    E, C, I = down.shape
    if gate_up.shape != (E, 2 * I, C) or x.shape != (len(weights), C) or weights.shape != experts.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gate_up, down, weights, experts))
        raise ValueError(f"x, gate_up, down, weights, experts do not fit each other: {shapes}")
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gate_up, down, weights))
    return mixture(x.contiguous(), gate_up.contiguous(), down.contiguous(), weights.contiguous(), experts, sizes or "",
                   save)[0]
