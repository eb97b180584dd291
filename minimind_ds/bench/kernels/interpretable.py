"""Whether Triton's interpreter runs kernels here at all, before a process gives itself to it.

    python -c "from minimind_ds.bench.kernels import interpretable; print(interpretable.why_not())"
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterError


def count(out_ptr, n):
    for i in range(n):
        tl.store(out_ptr + i, i)


@functools.cache
def why_not() -> str | None:
    """What keeps kernels from being interpreted here, in a line; None where nothing does.

    An older Triton makes a loop's bound a Python number by int() of an array of one element, which a newer NumPy
    refuses.
    """
    try:
        InterpretedFunction(count)[(1,)](torch.zeros(2, dtype=torch.int32), 2)
    except InterpreterError as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        # Anything else is a fault, and the honest interpreter's own probes fail by it.
        if "0-dimensional" not in str(cause):
            return None
        return (f"the interpreter of triton {triton.__version__}, for machines without a GPU, runs no loop with numpy "
                f"{np.__version__} ({cause}): it needs a newer triton, or 'numpy<2.4'")
    return None
