"""How far from rounding the choices of routers stand, for tests that compare two ways of computing the same.

A token within rounding of two experts goes to either, by its last digit, and takes gradients and a curve with it.

    with watched_routes() as gaps:
        ...
    assert_clear(gaps)
"""

import contextlib

import torch

from minimind_ds import kernels

# In logits; rounding moves those of a small model in fp32 by a hundredth of that.
CLEAR = 2e-5


@contextlib.contextmanager
def watched_routes():
    """A list: of each call in fp32 or fp64, the least that a chosen expert stood above one that was not, in logits."""
    route, gaps = kernels.route, []

    def watched(logits_TE, k, *args, **options):
        if logits_TE.dtype in (torch.float32, torch.float64) and len(logits_TE) and k < logits_TE.shape[1]:
            best_TK = logits_TE.detach().topk(k + 1).values
            gaps.append((best_TK[:, -2] - best_TK[:, -1]).min().item())
        return route(logits_TE, k, *args, **options)

    kernels.route = watched
    try:
        yield gaps
    finally:
        kernels.route = route


def assert_clear(gaps: list[float]) -> None:
    assert min(gaps, default=1.0) > CLEAR, f"a token stands {min(gaps)} from another expert: take other samples"
