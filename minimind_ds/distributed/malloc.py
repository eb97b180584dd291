"""What glibc's allocator keeps of the memory that is freed, and what it gives back to the system.

    python -m pytest tests/distributed/test_malloc.py
"""

from __future__ import annotations

import ctypes
import os
import platform

# 64 MiB of parameters: as much as glibc keeps by itself.  Of mallopt (malloc.h): nothing freed goes back, no block is
# mapped by itself, one arena for all threads.
KEPT_FROM = 2**24
KEPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def is_ours() -> bool:
    """Whether it is glibc's, and the user's environment does not tune it."""
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not tuned


def keep(parameters: int) -> None:
    """On a CPU: tensors that a step of a large model frees stay with the process for the next step.

    glibc gives large blocks back to the system, which hands them out again a page of zeros at a time: half of a step
    of 200 million parameters.
    """
    if parameters >= KEPT_FROM and is_ours():
        for parameter, value in KEPT.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def trim() -> None:
    """Gives back what is free in all arenas: what writing a checkpoint took lies between what lives on."""
    if is_ours():
        ctypes.CDLL(None).malloc_trim(0)
