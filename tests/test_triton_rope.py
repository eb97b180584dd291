"""The fused QK-norm and rotary kernel computes what the reference computes, in Triton's interpreter."""

import pytest

from .triton_tools import hold

pytest.importorskip("triton")


def test_rope_kernels_keep_their_facts(request):
    hold("rope", slow=request.config.getoption("--slow"))
