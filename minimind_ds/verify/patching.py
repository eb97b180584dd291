"""Puts another function in a name's place for a while: how calls are recorded, and how deliberate errors get in.

    with replaced(kernels, "swiglu", other): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name, replaced)
    setattr(owner, name, value)
    try:
        yield
    finally:
        # What the owner had from its class alone is not left as its own.
        if own is replaced:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
