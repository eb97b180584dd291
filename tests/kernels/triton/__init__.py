"""Proof of Triton kernels on a machine without a GPU: an interpreter (minimind_ds/bench/kernels/interpreter.py) runs
them, aot.py compiles them for real targets.

TRITON_INTERPRET is read when a kernel is decorated, so what is interpreted and what is compiled need processes of
their own: files named *_facts.py are pytest files that hold in the interpreter, and `hold` runs one.
"""

import fcntl
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
WHOLE = "whole"
# What decides what a compiler makes of a launch.
SOURCES = [*(ROOT / "minimind_ds" / "kernels").rglob("*.py"), *(ROOT / "minimind_ds" / "bench" / "gpu").glob("*.py"),
           *(ROOT / "tests" / "kernels").glob("*.py"), *pathlib.Path(__file__).parent.glob("*.py")]


def environment(interpret: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if interpret else {})}


def hold(name: str, slow: bool, timeout: float = 3600):
    """Runs tests/kernels/triton/NAME_facts.py in the interpreter; fails with its report, skips where none runs."""
    from minimind_ds.bench.kernels import interpretable

    if reason := interpretable.why_not():
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
               f"tests/kernels/triton/{name}_facts.py", *(["--slow"] if slow else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment(interpret=True), capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout, done.stdout


@functools.cache
def compiled(source: str, arch: int) -> list[dict]:
    """What "test_file:function" launches, compiled for an architecture: aot.Resources as dicts.

    They are kept beside Triton's own cache, for other test files and runs, as long as no source changes.
    """
    versions = [sys.version, *map(metadata.version, ("torch", "triton", "deepspeed"))]
    key = hashlib.sha256(f"{source} {arch} {versions}".encode())
    for path in sorted(SOURCES):
        key.update(path.read_bytes())
    folder = pathlib.Path(os.environ.get("TRITON_CACHE_DIR") or pathlib.Path.home() / ".triton" / "cache")
    folder = folder.with_name("compiled")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / key.hexdigest(), "a+", encoding="utf-8") as file:
        # Whoever else needs it waits.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()).endswith(WHOLE):
            command = [sys.executable, "-m", "tests.kernels.triton.aot", f"tests.kernels.{source}", str(arch)]
            done = subprocess.run(command, cwd=ROOT, env={**environment(interpret=False), "DS_ACCELERATOR": "cpu"},
                                  capture_output=True, text=True, timeout=1800)
            assert done.returncode == 0, done.stderr[-4000:]
            text = "\n".join(line for line in done.stdout.splitlines() if line.startswith("{"))
            # The last word says that it is whole.
            text = f"{text}\n{WHOLE}"
            file.truncate(0)
            file.write(text)
    return [json.loads(line) for line in text.splitlines()[:-1]]
