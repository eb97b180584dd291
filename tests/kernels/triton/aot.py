"""Compiles Triton launches for a GPU that is not there, and reports what each needs.

`install(arch)` turns every kernel[grid](...) on CPU tensors into a compile for that architecture: the code that
starts the kernels in earnest picks their sizes here too, so what is measured is what would run.  Outputs stay as they
were allocated.  The command runs a function and prints one JSON object per kernel compiled:

    python -m tests.kernels.triton.aot tests.kernels.test_triton_aot:attention 90

It shows registers, spills, shared memory and which matrix instructions the compiler chose.  It does not show that the
machine code is right, how its loads overlap, or how fast it is.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

PROGRAMS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block may have: A100, H100 and H200.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
# Matrix instructions: HGMMA is Hopper's (wgmma), HMMA Ampere's; a bf16 kernel with FFMA products only is a slow one.
# UTMALDG is a copy through a tensor descriptor.
COUNTED = ("HGMMA", "HMMA", "DMMA", "UTMALDG", "STL", "LDL")
# Bytes that one thread moves at once, by a modifier of LDG or STG; without any of these, 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel, compiled: `stack` is bytes per thread, `shared` bytes per block; `constants` tell cases apart.

    loads, stores: instructions on global memory by the bytes that a thread moves at once, copies into shared memory
    apart.
    """

    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    constants: dict
    dtypes: list[str]
    waits: list[int]
    waiting_loads: int

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks fit an SM: 65,536 registers given out by the 8 a thread, all shared memory, 64 warps."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = (SHARED_LIMIT[self.arch] + 1024) // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // self.warps, 32)


class NoDriver:
    """Stands where the CUDA driver would: it knows the target and nothing else."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def install(arch: int) -> list:
    """From now on launches compile.  Returns the list that fills with (kernel, compiled, arguments) as they do.

    Raises:
        RuntimeError: interpreter mode, which compiles nothing, or a Triton whose launch works in another way.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    driver.set_active(NoDriver(arch))
    compiled: list = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        result = original(self, *args, grid=grid, warmup=True, **kwargs)
        if "cubin" not in getattr(result, "asm", {}):
            raise RuntimeError(f"triton {triton.__version__}: {self.__name__} was launched and gave no cubin")
        compiled.append((self, result, args, kwargs))
        return result

    def run_every(self, *args, **kwargs):
        return [self.fn.run(*args, **{**kwargs, **config.all_kwargs()}) for config in self.configs][-1]

    JITFunction.run, Autotuner.run = run, run_every
    return compiled


def widths(code: str, instruction: str) -> dict[int, int]:
    """Bytes at once -> how many LDG or STG instructions move that many."""
    found = re.findall(rf"\b{instruction}((?:\.\w+)+)", code)
    return dict(collections.Counter(next((WIDTHS[part] for part in modifiers.split(".") if part in WIDTHS), 4)
                                    for modifiers in found))


def loops(code: str) -> list[str]:
    """The bodies of the loops of a kernel's TTGIR that hold matrix products."""
    found, open_loops = [], []
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            open_loops.append((indent, []))
        for _, body in open_loops:
            body.append(line)
        if open_loops and line.lstrip().startswith("}") and indent == open_loops[-1][0]:
            found.append("\n".join(open_loops.pop()[1]))
    return [body for body in found if re.search(r"warp_group_dot |tt\.dot ", body)]


def pipelining(code: str) -> tuple[list[int], int]:
    """-> waits and waiting_loads of a kernel's TTGIR, as Resources has them."""
    waits, waiting = [], 0
    for body in loops(code):
        waits.append(max(map(int, re.findall(r"async_wait.*?num = (\d+)", body)), default=-1))
        for name in re.findall(r"(%\w+) = tt\.load", body):
            # What only the loop's yield takes arrives by the next round.
            users = [line for line in body.splitlines() if re.search(rf"{name}\b", line.split(" = ", 1)[-1])
                     and not line.strip().startswith(f"{name} = ")]
            waiting += any("scf.yield" not in line for line in users)
    return waits, waiting


def read(kernel, result, args, kwargs, arch: int) -> Resources:
    """Reads the compiled code: cuobjdump for resources, nvdisasm for instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([PROGRAMS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
        code = subprocess.run([PROGRAMS / "nvdisasm", "-c", file.name], capture_output=True, text=True,
                              check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")
    waits, waiting = pipelining(result.asm["ttgir"])
    plain = {name: value for name, value in kwargs.items() if isinstance(value, int | float | str | bool)}
    return Resources(
        kernel=kernel.__name__, arch=arch, warps=result.metadata.num_warps, stages=result.metadata.num_stages,
        registers=int(numbers[1]), stack=int(numbers[2]), shared=result.metadata.shared,
        counts={name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED},
        loads=widths(code, "LDG"), stores=widths(code, "STG"), constants=plain,
        waits=waits, waiting_loads=waiting,
        dtypes=[str(x.dtype).removeprefix("torch.") for x in args if hasattr(x, "dtype")])


def measure(function: str, arch: int) -> list[Resources]:
    """Runs "module:function" with launches turned into compiles; each different kernel is read once."""
    compiled = install(arch)
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)()
    unique = {id(result): (kernel, result, args, kwargs) for kernel, result, args, kwargs in compiled}
    return [read(*item, arch) for item in unique.values()]


if __name__ == "__main__":
    for resources in measure(sys.argv[1], int(sys.argv[2])):
        print(json.dumps({**dataclasses.asdict(resources), "blocks_per_sm": resources.blocks_per_sm}))
