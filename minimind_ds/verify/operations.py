"""Each operation of the run's kernels by itself: its error against fp64 beside the reference backend's, and its bias.

The operations are recorded from the model's own forward pass, in the dtypes that really run there, and repeated on
the recorded inputs by the run's backend, by `reference` and by `reference` in fp64.

    deepspeed launch/verify.py --deepspeed ds_configs/zero2.json --dtype bf16
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_ds import kernels
from minimind_ds.model.decoder import MiniMindForCausalLM

from .checks import Check
from .patching import replaced


class Signature(NamedTuple):
    """Of an operation in minimind_ds/kernels: its arguments' names, which of them have a row for each token, which
    have gradients, its results, and how many roundings a backend may have where the one beside it has one."""

    arguments: tuple[str, ...]
    by_token: tuple[str, ...]
    leaves: tuple[str, ...]
    results: tuple[str, ...]
    roundings: int = 1


OPERATIONS = {
    # A fast backend rounds weights, their gradients, the result from which backward takes each row's sum, and its
    # result, where reference, in fp32 to its end, rounds once; in fp32 the row's sum, too, comes from the result.
    "attention": Signature(("q", "k", "v", "cu_seqlens", "max_seqlen"), ("q", "k", "v"), ("q", "k", "v"), ("out",), 4),
    "moe": Signature(("x", "gate_up", "down", "weights", "experts"), ("x", "weights", "experts"),
                     ("x", "gate_up", "down", "weights"), ("out",)),
    "route": Signature(("logits", "k", "norm", "group", "n_groups"), ("logits", "group"), ("logits",),
                       ("weights", "experts", "counts", "scores")),
    # A row's length that is taken as a root and squared again is rounded twice more, for the whole row.  The first
    # layer's residual is None.
    "norm_rope": Signature(("x", "weight", "cos", "sin", "eps"), ("x", "cos", "sin"), ("x", "weight"), ("out",), 2),
    "add_rms_norm": Signature(("x", "residual", "weight", "eps"), ("x", "residual"), ("x", "residual", "weight"),
                              ("total", "out"), 2),
    "swiglu": Signature(("gate", "up"), ("gate", "up"), ("gate", "up"), ("out",)),
    "token_losses": Signature(("logits", "labels"), ("logits", "labels"), (), ("losses", "dlogits")),
}
# How many times the reference's own error a backend's may be, before roundings and chance.
FACTOR = 1.5
# Standard errors of a mean signed error.
DEVIATIONS = 6
# Elements of an operation's first argument that make rounding's mean small enough to see 3e-4 in bf16: a product of
# two normal variables has n / 9 effective elements, and rounding twice to 8 bits is 2.3e-3 each (root mean square).
LEAST = 2**18
# Rows below which a mean's standard error says little.
FEWEST_ROWS = 64


class Call(NamedTuple):
    """One call of an operation: what it was given, and by which backend it ran."""

    name: str
    backend: str
    args: dict

    def dtype(self) -> torch.dtype:
        return self.args[OPERATIONS[self.name].arguments[0]].dtype


@contextlib.contextmanager
def through(model: MiniMindForCausalLM, wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """While it lasts, the model's operations are wrap(name, function)."""
    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(replaced(kernels, name, wrap(name, getattr(kernels, name))))
        stack.enter_context(replaced(model, "attend", wrap("attention", model.attend)))
        yield


def record(calls: dict[tuple, list[Call]]) -> Callable[[str, Callable], Callable]:
    """For `through`: keeps the first and the last call of each operation for each kind of arguments."""

    def wrap(name: str, function: Callable) -> Callable:
        def recorded(*args, backend, **options):
            kept = {key: arg.detach().clone() if isinstance(arg, Tensor) else arg
                    for key, arg in zip(OPERATIONS[name].arguments, args)}
            shapes = tuple(arg.shape if isinstance(arg, Tensor) else None for arg in kept.values())
            calls.setdefault((name, shapes), [])[1:] = [Call(name, backend, kept)]
            return function(*args, backend=backend, **options)

        return recorded

    return wrap


def enlarged(call: Call) -> Call:
    """The call on LEAST elements or more in half precision: its tokens again and again, each number moved by a tenth
    of itself.  In fp32 the errors' size alone shows a scale of 1e-5."""
    arguments, by_token, leaves, _, _ = OPERATIONS[call.name]
    first = call.args[arguments[0]]
    copies = math.ceil(LEAST / max(first.numel(), 1)) if first.numel() and is_half(call.dtype()) else 0
    generator = torch.Generator().manual_seed(0)
    args = dict(call.args)
    for key in by_token if copies > 1 else ():
        if args[key] is not None:
            x = args[key].repeat(copies, *[1] * (args[key].ndim - 1))
            if key in leaves or key == "logits":
                x = (x * (1 + 0.1 * torch.randn(x.shape, generator=generator).to(x.device))).to(x.dtype)
            args[key] = x
    if call.name == "attention" and copies > 1:
        bounds, tokens = args["cu_seqlens"], len(first)
        args["cu_seqlens"] = torch.cat([bounds[:1], *(bounds[1:] + copy * tokens for copy in range(copies))])
    return call._replace(args=args)


def results(call: Call, backend: str, *, wide: bool = False) -> dict[str, Tensor]:
    """What the operation gives, and the gradients of its arguments for drawn gradients of its results.

    wide: in fp64.
    """
    signature, args = OPERATIONS[call.name], dict(call.args)
    for key, value in args.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # Tables of cosines are no activations, and stay what they are.
            args[key] = value.to(torch.float64) if wide else value.clone()
            args[key].requires_grad_(key in signature.leaves)
    stepwise = call.name == "moe" and backend == "reference" and not wide
    found = (plain_moe if stepwise else getattr(kernels, call.name))(*args.values(), backend=backend)
    found = dict(zip(signature.results, found if isinstance(found, tuple) else (found,)))
    if call.name == "route":
        found = without_ties(call.args, found)
    leaves = {key: args[key] for key in signature.leaves if args[key] is not None}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        outputs = [value for value in found.values() if value.requires_grad]
        drawn = [torch.randn(out.shape, generator=generator).to(out.device, call.dtype()).to(out.dtype)
                 for out in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), drawn)
        found |= {f"d{key}": grad for key, grad in zip(leaves, grads)}
    return {key: value.detach() for key, value in found.items()}


def without_ties(args: dict, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A router's choices in the order of the experts; where two experts tie for the last place either is right, and
    the token's choice and weights are left out, as are the counts, in which it stands."""
    scores_TE = args["logits"].double().softmax(dim=-1)
    ranked_TE = scores_TE.sort(dim=-1, descending=True).values
    k, n_experts = args["k"], scores_TE.shape[1]
    clear_T1 = torch.ones_like(ranked_TE[:, :1], dtype=torch.bool) if k >= n_experts else (
        ranked_TE[:, k - 1:k] - ranked_TE[:, k:k + 1] > 1e-5 * ranked_TE[:, k - 1:k])
    order_TK = found["experts"].argsort(dim=-1)
    weights_TK, experts_TK = (torch.where(clear_T1, found[key].gather(1, order_TK), 0)
                              for key in ("weights", "experts"))
    ours = {"weights": weights_TK, "experts": experts_TK, "scores": found["scores"]}
    return ours | ({"counts": found["counts"]} if clear_T1.all() else {})


def plain_moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, backend: str) -> Tensor:
    """reference.moe, rounded to x's dtype after each step as any backend may that hands steps to PyTorch.

    The reference itself stays in fp32.  A rounded gate has a few hundred values in bf16, and so has its SiLU: their
    rounding errors leave a bias of 1e-4 that no number of tokens takes away.
    """
    y_TC = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        tokens, places = (experts == expert).nonzero(as_tuple=True)
        hidden = kernels.swiglu(*(x[tokens] @ gate_up[expert].T).chunk(2, dim=-1), backend=backend)
        y_TC = y_TC.index_add(0, tokens, hidden @ down[expert].T * weights[tokens, places, None].to(x.dtype))
    return y_TC


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|."""
    wrong, size = (got.double() - exact.double()).norm().item(), exact.double().norm().item()
    found = wrong / size if size else wrong
    return found if math.isfinite(found) else math.inf


def excess(ours: Tensor, theirs: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Our error in units of the reference's own, and both errors.

    The quotient of two rounded vectors' errors scatters by about 1 / sqrt(n) for n elements, so three times that is
    taken off; an error below a third of the unit roundoff (a rounded number's is 0.4) counts as that.
    """
    mine, own = error(ours, exact), error(theirs, exact)
    least = unit_roundoff(theirs.dtype) / 3
    chance = 1 + 3 / math.sqrt(max(ours.numel(), 1))
    return mine / max(own, least, 1e-30) / chance, mine, own


def bias_of(got: Tensor, exact: Tensor, *, shared_by: int | None) -> tuple[float, float]:
    """The mean signed relative error <err, exact> / <exact, exact> and its standard error.

    err is got - exact rounded to got's dtype: where numbers crowd at one value (a label's gradient, just short of -1),
    even the best rounding goes one way.  Rounding errors are independent from row to row of the last dimension
    (within a row they share a scale, as in a norm), so the standard error follows from the rows' own sums.

    shared_by: tokens over which a weight's gradient is a sum; their rounding errors are shared by all of its rows.
    """
    exact = exact.double()
    rows = (got.double() - exact.to(got.dtype).double()) * exact
    rows_n = rows.flatten(0, -2).sum(dim=-1) if rows.ndim > 1 else rows
    total = exact.square().sum().item()
    if rows_n.numel() < FEWEST_ROWS or total == 0:
        return 0.0, math.inf
    spread = rows_n.square().sum().sqrt().item() * (math.sqrt(1 + rows_n.numel() / shared_by) if shared_by else 1)
    return rows_n.sum().item() / total, spread / total


def deviation(ours: Tensor, theirs: Tensor, exact: Tensor, *, shared_by: int | None) -> tuple[float, float]:
    """Our bias in standard errors, and itself.

    What chance does not explain is taken off first: the reference's own bias (a function of few inputs may round one
    way), sums and functions in fp32, 16 units, and the slope of the numbers' density over a step, 4 u^2.
    """
    (bias, spread), (own, _) = (bias_of(x, exact, shared_by=shared_by) for x in (ours, theirs))
    half = unit_roundoff(ours.dtype) if is_half(ours.dtype) else 0.0
    if not math.isfinite(bias):
        return math.inf, bias
    beyond = abs(bias) - abs(own) - 16 * unit_roundoff(torch.float32) - 4 * half**2
    return max(beyond, 0.0) / max(spread, 1e-30), bias


class Worst(NamedTuple):
    """The largest of a measure so far, and what it was found in."""

    measured: float = 0.0
    what: str = ""


def check(calls: list[Call]) -> tuple[Worst, Worst]:
    """The worst excess and the worst deviation over an operation's calls, its results and gradients."""
    larger, biased = Worst(), Worst()
    for call in map(enlarged, calls):
        signature, first = OPERATIONS[call.name], next(iter(call.args.values()))
        if not first.numel():
            continue
        ours, theirs = results(call, call.backend), results(call, "reference")
        exact = results(call, "reference", wide=True)
        for key, true in exact.items():
            by, mine, own = excess(ours[key], theirs[key], true)
            by /= math.sqrt(signature.roundings)
            larger = max(larger, Worst(by, f"of {key} {mine:.1e}, the reference's own {own:.1e}"))
            summed = key[1:] in signature.leaves and key[1:] not in signature.by_token
            by, bias = deviation(ours[key], theirs[key], true, shared_by=len(first) if summed else None)
            biased = max(biased, Worst(by, f"of {key} {bias:+.1e}"))
    return larger, biased


def findings(calls: dict[tuple, list[Call]], dtype: str) -> list[Check]:
    """Two findings for each operation that the model ran."""
    by_name: dict[str, list[Call]] = {}
    for (name, _), some in calls.items():
        by_name.setdefault(name, []).extend(some)
    found = []
    for name, some in by_name.items():
        larger, biased = check(some)
        ran = f"{dtype} {name} ({some[0].backend}, {str(some[0].dtype()).removeprefix('torch.')} in)"
        found += [Check("kernels", f"{ran}: error, in the reference's own: {larger.what}", larger.measured, FACTOR),
                  Check("kernels", f"{ran}: mean signed error, in standard errors: {biased.what}", biased.measured,
                          DEVIATIONS)]
    return found
