"""Faults injected from outside into real runs, and whether the runs end as if nothing had happened.

    python -m tests.faults
"""
