"""The attention kernels compute what the reference computes, in Triton's interpreter (no GPU has run them here).

The facts are in tests/triton_tools/attention_facts.py; the interpreter that is made to fail where a GPU would is
tests/triton_tools/honest.py, and it proves itself on seeded bugs first.
"""

import pytest

from .triton_tools import hold

pytest.importorskip("triton")


def test_attention_kernels_keep_their_facts(request):
    hold("attention", slow=request.config.getoption("--slow"))
