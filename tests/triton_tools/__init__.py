"""Proof of Triton kernels on a machine without a GPU: honest.py runs them, aot.py compiles them for real targets."""
