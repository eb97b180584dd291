"""Facts about norms, SwiGLU and the loss of a token in Triton, in the honest interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/elementwise_facts.py
"""

import pytest
import torch

from minimind_ds.bench.kernels import interpreter
from minimind_ds.kernels import reference
from minimind_ds.kernels.triton import elementwise

# ||ours - exact|| / ||exact||: half precision rounds by 2e-3 and 2.4e-4 up to three times.  Beyond it the
# interpreter's exponentials are numpy's, which differ in their last places from processor to processor.
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-6, torch.float64: 1e-13}
EPS = 1e-6
# rows and width: one row, a width that is no power of two, more rows than one backward program goes through.
SHAPES = [(1, 768), (70, 48), (150, 768), (9, 5000)]


def draw(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(function, inputs, *rest):
    """Results and the gradients of a weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with interpreter.poisoned_outputs():
        out = function(*leaves, *rest)
        out = out if isinstance(out, tuple) else (out,)
        duals = [draw(*y.shape, dtype=torch.float32, seed=7).to(y.dtype) for y in out]
        return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, duals)]


def assert_equal_to_the_reference(name, inputs, *rest):
    dtype = inputs[0].dtype
    got = run(getattr(elementwise, name), inputs, *rest)
    want = run(getattr(reference, name), [x.double() for x in inputs], *rest)
    found = [((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(got, want, strict=True)]
    assert all(error <= BOUNDS[dtype] for error in found), found
    assert all(a.dtype == dtype for a in got)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_norms_equal_the_reference(rows, width, dtype):
    x, residual = (draw(rows, width, dtype=dtype, seed=i) for i in range(2))
    weight = draw(width, dtype=dtype)
    assert_equal_to_the_reference("rms_norm", [x, weight], EPS)
    assert_equal_to_the_reference("add_rms_norm", [x, residual, weight], EPS)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_norm_without_a_residual_hands_its_input_on(dtype):
    inputs = [draw(70, 48, dtype=dtype), draw(48, dtype=dtype)]
    got = run(lambda x, weight: elementwise.add_rms_norm(x, None, weight, EPS), inputs)
    want = run(lambda x, weight: reference.add_rms_norm(x, None, weight, EPS), [x.double() for x in inputs])
    assert torch.equal(got[0], inputs[0])
    assert all((a.double() - b).norm() <= BOUNDS[dtype] * b.norm() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_swiglu_equals_the_reference_far_out_too(dtype):
    gate, up = draw(70, 97, dtype=dtype), draw(70, 97, dtype=dtype, seed=1)
    assert_equal_to_the_reference("swiglu", [gate, up])
    gate[0, :4] = torch.tensor([-1e4, -80, 80, 1e4])
    assert_equal_to_the_reference("swiglu", [gate, up])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(5, 6400), (3, 40), (2, 9000), (0, 40)])
def test_losses_and_their_gradients_equal_the_reference(rows, vocabulary, dtype):
    logits = draw(rows, vocabulary, dtype=dtype) * 8
    labels = torch.arange(rows) * 7 % vocabulary
    if rows:
        labels[-1] = vocabulary - 1
        logits[0, :2] = 200
    want, gradient = reference.token_losses(logits.clone().double(), labels)
    losses, dlogits = elementwise.token_losses(logits.clone(), labels)
    assert losses.dtype == torch.promote_types(dtype, torch.float32) and dlogits.dtype == dtype
    assert torch.allclose(losses.double(), want, rtol=1e-6, atol=1e-6)
    assert (dlogits.double() - gradient).norm() <= BOUNDS[dtype] * max(gradient.norm(), 1e-9)


def test_a_token_gets_the_same_bits_whatever_the_others_hold():
    inputs = [draw(20, 96, dtype=torch.bfloat16, seed=i) for i in range(2)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:10] = float("nan")
    for function, rest in ((elementwise.add_rms_norm, (torch.ones(96), EPS)), (elementwise.swiglu, ())):
        before, after = run(function, inputs, *rest), run(function, changed, *rest)
        assert all(torch.equal(a[10:], b[10:]) for a, b in zip(before, after))


def test_gradients_pass_gradcheck_in_fp64():
    x, residual, weight = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((7, 6), (7, 6), (6,)))
    check = torch.autograd.gradcheck
    assert check(lambda *t: elementwise.add_rms_norm(*t, 1e-3), (x, residual, weight), fast_mode=True)
    assert check(lambda *t: elementwise.rms_norm(*t, 1e-3), (x, weight), fast_mode=True)
    assert check(elementwise.swiglu, (x, residual), fast_mode=True)
