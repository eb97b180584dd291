"""Triton's interpreter, made to fail where a GPU would go wrong.

Import it in a process started with TRITON_INTERPRET=1, before the first launch:

    TRITON_INTERPRET=1 python -m minimind_ds.bench.kernels.interpreter   # does it work with this Triton?

What it changes (the stock interpreter computes on the bits of bf16, and reads and writes wherever it is told):

- bf16: arithmetic in fp32, rounded to nearest even.  fp32 products in tf32 when the kernel leaves the precision open.
- Bounds: every lane that is not masked off lies in one tensor of the launch.
- Poison: a masked-off lane without `other` loads NaN (the lowest integer), not 0.
- Races: two programs of a launch never touch the same element, unless both only read it or both only add to it.
- Order: programs run in a random order (OPTIONS.seed), so a kernel that needs one another's results shows it.

What it cannot show: miscompiled code, races inside a program, fast-math error, speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import random

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

if not triton.knobs.runtime.interpret:
    raise RuntimeError("the kernels' interpreter needs TRITON_INTERPRET=1 in the environment of its process")

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


@dataclasses.dataclass
class Options:
    """What is checked; `seed` fixes the order of programs.  Races need three shadow words per element."""

    races: bool = True
    seed: int = 0


@dataclasses.dataclass
class Launch:
    """The memory of the launch that runs: tensors as byte ranges [start, end), and who touched which element.

    A tensor has a shadow word per element (`units` bytes).  In `writer` and `reader` 0 is nobody, p + 1 is program p,
    -1 is several programs (atomics, or more than one reader).  They start as untouched pages, so huge tensors cost
    what is used of them.
    """

    starts: np.ndarray
    ends: np.ndarray
    units: np.ndarray
    shadow: np.ndarray
    writer: np.ndarray
    reader: np.ndarray
    scratch: np.ndarray
    order: list[int] = dataclasses.field(default_factory=list)
    program: int = 0
    patched: set[frozenset[str]] = dataclasses.field(default_factory=set)


OPTIONS = Options()
LAUNCH = Launch(*(np.zeros(0, np.int64) for _ in range(7)))


# ------------------------------------------------------------------------------------------------ bf16 and tf32

def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen(handle):
    """bf16 bits as fp32; anything else as it is."""
    if not is_bf16(handle):
        return handle
    return Handle((np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def bf16_bits(values) -> np.ndarray:
    """fp32 values to the nearest bf16, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded = (bits >> np.uint32(16)).astype(np.uint16).reshape(values.shape)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def narrow(handle):
    """A float result back to bf16; a comparison stays a truth value."""
    if handle.data.dtype.kind == "f":
        return Handle(bf16_bits(handle.data), tl.bfloat16)
    return Handle(handle.data, tl.int1)


def tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).reshape(values.shape)


def through_fp32(name: str):
    """The builder's operation on values: bf16 in, fp32 inside, bf16 out."""
    stock = getattr(Builder, name)

    def operation(self, *args):
        if not any(isinstance(a, Handle) and is_bf16(a) for a in args):
            return stock(self, *args)
        return narrow(stock(self, *(widen(a) if isinstance(a, Handle) else a for a in args)))

    return operation


def reduce_through_fp32(kind, name: str):
    """A reduction or scan over bf16 tensors, values in fp32, result rounded once."""
    stock = getattr(kind, name)

    def apply(self, inputs):
        if not any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            return stock(self, inputs)
        wide = tuple(tl.core.tensor(widen(x.handle), x.type.with_element_ty(tl.float32) if x.type.is_block()
                                    else tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in inputs)
        results = stock(self, wide)
        single = not isinstance(results, (list, tuple))
        back = []
        for result in [results] if single else results:
            if result.handle.data.dtype.kind == "f":
                dtype = result.type.with_element_ty(tl.bfloat16) if result.type.is_block() else tl.bfloat16
                result = tl.core.tensor(narrow(result.handle), dtype)
            back.append(result)
        return back[0] if single else back

    return apply


def cast_impl(self, src, dst_type):
    target = dst_type.scalar
    if src.dtype.scalar == target:
        return src
    if target == tl.bfloat16:
        return Handle(bf16_bits(src.data), tl.bfloat16)
    return STOCK["cast_impl"](self, widen(src), dst_type) if target != tl.float32 or not is_bf16(src) else widen(src)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return cast_impl(self, src, dst_type)
    return STOCK["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar == tl.float32 and str(input_precision).endswith(".TF32"):
        a, b = Handle(tf32(a.data), tl.float32), Handle(tf32(b.data), tl.float32)
    # Not by matmul, as stock: with some processors' kernels a row's bits depend on its place in the tile.
    product = np.einsum("...mk,...kn->...mn", widen(a).data, widen(b).data, dtype=d.data.dtype)
    return Handle(product + d.data, d.dtype.scalar)


# ------------------------------------------------------------------------------------------------ memory

def touched(pointers, mask, what: str) -> np.ndarray:
    """Shadow words of every active lane.

    Raises:
        IndexError: a lane outside every tensor of the launch.
    """
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, active = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[active.astype(bool)].astype(np.int64)
    tensor = np.searchsorted(LAUNCH.starts, addresses, side="right") - 1
    outside = (tensor < 0) | (addresses + size > LAUNCH.ends[tensor])
    if outside.any():
        raise IndexError(f"out of bounds: program {LAUNCH.program} would {what} {int(outside.sum())} of "
                         f"{addresses.size} elements outside every tensor")
    index = LAUNCH.shadow[tensor] + (addresses - LAUNCH.starts[tensor]) // LAUNCH.units[tensor]
    # Wider than the tensor's elements (a pointer that was cast): several words.
    words = max(1, size // int(LAUNCH.units[tensor].min(initial=size)))
    return index if words == 1 else (index[:, None] + np.arange(words)).reshape(-1)


def note_load(index: np.ndarray):
    writer, me = LAUNCH.writer[index], LAUNCH.program + 1
    foreign = (writer != 0) & (writer != me)
    if foreign.any():
        raise RuntimeError(f"race: program {LAUNCH.program} loads what program {writer[foreign][0] - 1} stored")
    reader = LAUNCH.reader[index]
    LAUNCH.reader[index] = np.where((reader == 0) | (reader == me), me, -1)


def note_store(index: np.ndarray, adds: bool):
    me = LAUNCH.program + 1
    lane = np.arange(1, index.size + 1)
    LAUNCH.scratch[index] = lane
    if not adds and (LAUNCH.scratch[index] != lane).any():
        raise RuntimeError(f"race: program {LAUNCH.program} stores twice to one address in one store")
    writer, reader = LAUNCH.writer[index], LAUNCH.reader[index]
    # Adding to what others add to is allowed; storing over it, or over what anyone else touched, is not.
    foreign = (writer > 0) & (writer != me) if adds else (writer != 0) & (writer != me)
    if (foreign | ((reader != 0) & (reader != me))).any():
        raise RuntimeError(f"race: program {LAUNCH.program} {'adds to' if adds else 'stores over'} memory that "
                           "another program touched")
    LAUNCH.writer[index] = -1 if adds else me


def lowest(element) -> np.generic:
    """What a masked-off lane loads: NaN, or the least integer."""
    if element == tl.bfloat16:
        return np.uint16(0x7FC0)
    dtype = np.dtype(interpreter._get_np_dtype(element))
    if dtype.kind == "f":
        return dtype.type(np.nan)
    return dtype.type(True) if dtype == np.bool_ else dtype.type(np.iinfo(dtype).min)


def create_masked_load(self, ptrs, mask, other, *rest, **named):
    index = touched(ptrs, mask, "load")
    if OPTIONS.races:
        note_load(index)
    if other is None:
        element = ptrs.get_element_ty()
        other = Handle(np.full(ptrs.data.shape, lowest(element)), element)
    return STOCK["create_masked_load"](self, ptrs, mask, other, *rest, **named)


def create_masked_store(self, ptrs, value, mask, *rest, **named):
    index = touched(ptrs, mask, "store")
    if OPTIONS.races:
        note_store(index, adds=False)
    return STOCK["create_masked_store"](self, ptrs, value, mask, *rest, **named)


def create_atomic_rmw(self, rmwOp, ptr, val, mask, *rest):
    if val.dtype.scalar == tl.bfloat16:
        raise TypeError("NumPy has no bf16 to add to atomically: keep such sums in fp32, as the kernels do")
    index = touched(ptr, mask, "add to")
    if OPTIONS.races:
        note_store(index, adds=True)
    return STOCK["create_atomic_rmw"](self, rmwOp, ptr, val, mask, *rest)


# ------------------------------------------------------------------------------------------------ launches

def tensors_of(value):
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, torch.Tensor):
        if value.numel():
            yield value
    elif hasattr(value, "base"):
        yield from tensors_of(value.base)


def init_args_hst(self, args_dev, kwargs):
    """Stock, and then: these tensors are the memory of this launch."""
    args, named = STOCK["_init_args_hst"](self, args_dev, kwargs)
    ranges: list[list[int]] = []
    for start, end, unit in sorted((x.data_ptr(), x.data_ptr() + x.element_size() * (
            1 + sum((n - 1) * abs(step) for n, step in zip(x.shape, x.stride()))), x.element_size())
            for x in tensors_of((args, tuple(named.values())))):
        # Views that overlap are one tensor; neighbours are not.
        if ranges and start < ranges[-1][1]:
            ranges[-1][1:] = max(end, ranges[-1][1]), min(unit, ranges[-1][2])
        else:
            ranges.append([start, end, unit])
    LAUNCH.patched.clear()
    LAUNCH.starts, LAUNCH.ends, LAUNCH.units = np.array(ranges, np.int64).reshape(-1, 3).T.copy()
    words = (LAUNCH.ends - LAUNCH.starts) // LAUNCH.units
    LAUNCH.shadow = np.cumsum(words) - words
    LAUNCH.writer, LAUNCH.reader, LAUNCH.scratch = (
        np.zeros(int(words.sum()) if OPTIONS.races else 0, np.int32) for _ in range(3))
    return args, named


def set_grid_dim(self, nx, ny, nz):
    STOCK["set_grid_dim"](self, nx, ny, nz)
    LAUNCH.order = list(range(nx * ny * nz))
    random.Random(OPTIONS.seed).shuffle(LAUNCH.order)


def set_grid_idx(self, x, y, z):
    _, ny, nz = self.grid_dim
    LAUNCH.program = LAUNCH.order[(x * ny + y) * nz + z]
    STOCK["set_grid_idx"](self, LAUNCH.program // (ny * nz), LAUNCH.program // nz % ny, LAUNCH.program % nz)


@functools.cache
def languages(function) -> frozenset[str]:
    """By which of its modules a device function sees Triton's language."""
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


def call(self, *args, **kwargs):
    """Stock, but for what takes a third of its time: it replaces the language's functions at each call.

    They stay replaced until the launch ends.
    """
    if (seen := languages(self.fn)) not in LAUNCH.patched:
        interpreter._patch_lang(self.fn)
        LAUNCH.patched.add(seen)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@contextlib.contextmanager
def options(**changes):
    """with options(races=False, seed=3): ..."""
    before = dataclasses.asdict(OPTIONS)
    for name, value in changes.items():
        setattr(OPTIONS, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(OPTIONS, name, value)


@contextlib.contextmanager
def poisoned_outputs():
    """torch.empty and its kin give NaN (the lowest integer), so what a kernel leaves unwritten is seen."""
    names = ("empty", "empty_like")
    stock = {name: getattr(torch, name) for name in names}

    def poisoned(name):
        def make(*args, **kwargs):
            out = stock[name](*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else
                             True if out.dtype == torch.bool else torch.iinfo(out.dtype).min)
        return make

    try:
        for name in names:
            setattr(torch, name, poisoned(name))
        yield
    finally:
        for name, function in stock.items():
            setattr(torch, name, function)


# ------------------------------------------------------------------------------------------------ installing

# What is replaced, and the parameters it must have begun with: another Triton may have moved things.
REPLACED = [
    (Builder, "create_dot", create_dot, "self a b d input_precision"),
    (Builder, "cast_impl", cast_impl, "self src dst_type"),
    (Builder, "create_fp_to_fp", create_fp_to_fp, "self src dst_type rounding_mode"),
    (Builder, "create_masked_load", create_masked_load, "self ptrs mask other"),
    (Builder, "create_masked_store", create_masked_store, "self ptrs value mask"),
    (Builder, "create_atomic_rmw", create_atomic_rmw, "self rmwOp ptr val mask"),
    (Builder, "set_grid_dim", set_grid_dim, "self nx ny nz"),
    (Builder, "set_grid_idx", set_grid_idx, "self x y z"),
    (interpreter.GridExecutor, "_init_args_hst", init_args_hst, "self args_dev kwargs"),
    (interpreter.InterpretedFunction, "__call__", call, "self args kwargs"),
]
ON_VALUES = ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf")
STOCK: dict = {}


def install():
    """Replaces the interpreter's parts, then proves on small kernels that each replacement is really used.

    Raises:
        RuntimeError: this Triton's interpreter is built in another way than those known (3.6 to 3.9).
    """
    if STOCK:
        return
    for owner, name, _, parameters in REPLACED:
        stock = getattr(owner, name, None)
        if stock is None or list(inspect.signature(stock).parameters)[:len(parameters.split())] != parameters.split():
            raise RuntimeError(f"triton {triton.__version__}: {owner.__name__}.{name} is not what it was; "
                               "minimind_ds/bench/kernels/interpreter.py must be brought up to it")
    missing = [name for name in ON_VALUES if not hasattr(Builder, name)]
    if missing:
        raise RuntimeError(f"triton {triton.__version__}: its interpreter has no {', '.join(missing)}")
    STOCK.update({name: getattr(owner, name) for owner, name, _, _ in REPLACED})
    for name in ON_VALUES:
        setattr(Builder, name, through_fp32(name))
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = reduce_through_fp32(kind, "apply_impl")
    for owner, name, replacement, _ in REPLACED:
        setattr(owner, name, replacement)
    # A third of the rest of the time: it works out whether integers overflow and, outside debug mode, does not look.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # The probes are kernels: they can be made only once the language is replaced.
    from minimind_ds.bench.kernels import interpreter_probes

    interpreter_probes.check()


install()

if __name__ == "__main__":
    print(f"triton {triton.__version__}: arithmetic, bounds, poison, races and order are checked")
