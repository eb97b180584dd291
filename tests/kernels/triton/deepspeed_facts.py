"""Facts about the experts through DeepSpeed's Triton ops, in the honest interpreter (test_deepspeed_ops.py runs them):

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/deepspeed_facts.py

DeepSpeed defines its kernels only where a Triton driver is active, tunes them by timing and starts some inside
torch.cuda.device: `pretend` stands in for these three, and for nothing that computes.
"""

import contextlib

import pytest
import torch
from triton.backends import backends
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from minimind_ds.bench.kernels import interpreter

from .moe_facts import BF16, FP16, Case, error, exact, inputs, run

CASES = {
    "top-1": Case(70, 64, 96, 4, 1, BF16),
    "top-2": Case(50, 64, 96, 4, 2, BF16),
    "top-3 of 6 fp16, odd sizes": Case(23, 50, 75, 6, 3, FP16),
    "an expert without tokens": Case(50, 64, 64, 4, 1, BF16, "not 2"),
    "only the last expert": Case(50, 64, 64, 4, 1, BF16, "last"),
    "one token": Case(1, 64, 64, 4, 2, BF16),
}
# It rounds gate, up and their product to the dtype, where our kernels keep the product's factors in fp32.
BOUNDS = {BF16: 1.5e-2, FP16: 2e-3}


def boolean_masks(load):
    """triton 3.9's interpreter labels a comparison of scalars by its operands and then refuses it as a mask."""
    def create_masked_load(self, ptrs, mask, *rest, **named):
        return load(self, ptrs, TensorHandle(mask.data.astype(bool), mask.dtype), *rest, **named)

    return create_masked_load


def pretend():
    for backend in backends.values():
        backend.driver.is_active = staticmethod(lambda: True)
    # The first of the configurations a GPU would choose from.
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(*args, **{**kwargs, **self.configs[0].all_kwargs()})
    torch.cuda.device = lambda device: contextlib.nullcontext()
    InterpreterBuilder.create_masked_load = boolean_masks(InterpreterBuilder.create_masked_load)


pretend()
deepspeed_ops = pytest.importorskip("minimind_ds.kernels.deepspeed_ops")
pytest.importorskip("deepspeed")


def ours(tensors, **options):
    with interpreter.poisoned_outputs(), interpreter.options(**options):
        return run(deepspeed_ops.moe, *tensors)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name):
    tensors = inputs(CASES[name])
    got = ours(tensors)
    assert [a.dtype for a in got] == [CASES[name].dtype] * 4 + [torch.float32]
    assert error(got, exact(tensors)) <= BOUNDS[CASES[name].dtype]


def test_experts_without_tokens_have_gradients_of_zeros():
    _, _, dgate_up, ddown, _ = ours(inputs(CASES["an expert without tokens"]))
    assert not dgate_up[2].any() and not ddown[2].any()


def test_both_ways_to_swiglu_are_one_function(monkeypatch):
    """0.19.7 has no op that reads gate and up in place."""
    from deepspeed.ops.triton_ops import swiglu_triton

    tensors = inputs(CASES["top-1"])
    first = ours(tensors)
    monkeypatch.delattr(swiglu_triton, "swiglu_packed")
    assert all(torch.equal(a, b) for a, b in zip(first, ours(tensors)))


def test_more_than_32_bits_of_elements_are_refused():
    experts = torch.zeros(1, 1, dtype=torch.int64).expand(2 ** 20, 1)
    x = torch.zeros(1, 8, dtype=BF16).expand(2 ** 20, 8)
    with pytest.raises(ValueError, match="32 bits.*moe=triton"):
        deepspeed_ops.moe(x, torch.zeros(1, 2048, 8, dtype=BF16), torch.zeros(1, 8, 1024, dtype=BF16),
                          torch.zeros(1, 1).expand(2 ** 20, 1), experts)
