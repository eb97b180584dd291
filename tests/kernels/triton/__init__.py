"""Proof of Triton kernels on a machine without a GPU: an interpreter (minimind_ds/bench/kernels/interpreter.py) runs
them, aot.py compiles them for real targets.

TRITON_INTERPRET is read when a kernel is decorated, so what is interpreted and what is compiled need processes of
their own: files named *_facts.py are pytest files that hold in the interpreter, and `hold` runs one.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]


def environment(interpret: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if interpret else {})}


def hold(name: str, slow: bool, timeout: float = 3600):
    """Runs tests/kernels/triton/NAME_facts.py in the interpreter; fails with its report."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
               f"tests/kernels/triton/{name}_facts.py", *(["--slow"] if slow else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment(interpret=True), capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout, done.stdout
