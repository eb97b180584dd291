"""The attention kernels compute what the reference computes, in Triton's interpreter and on a GPU if there is one.

The facts are in tests/kernels/triton/attention_facts.py; the interpreter that is made to fail where a GPU would is
minimind_ds/bench/kernels/interpreter.py, and it proves itself on seeded bugs first.
"""

import pytest
import torch

from .triton import hold
from .triton.attention_cases import BOUNDS, CASES, SLOW, cu_seqlens, errors, exact, inputs, run, within

pytest.importorskip("triton")


@pytest.mark.numeric
def test_attention_kernels_keep_their_facts(request):
    hold("attention", slow=request.config.getoption("--slow"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name, case in {**CASES, **SLOW}.items() if case[-1] != torch.float64])
def test_on_a_gpu_outputs_and_gradients_equal_the_reference(name):
    from minimind_ds.kernels.triton import attention

    lengths, H, HKV, D, dtype = {**CASES, **SLOW}[name]
    tensors, bounds = inputs(lengths, H, HKV, D, dtype), cu_seqlens(lengths)
    want = exact(*tensors, bounds)
    on_gpu = [x.cuda() for x in tensors]
    # Bounds on the CPU and on the GPU make different schedules of the same tiles.
    first, second = (run(attention.attention, *on_gpu, b) for b in (bounds, bounds.cuda()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    found = errors([x.cpu() for x in first], want)
    assert within(found, BOUNDS[dtype]), found
