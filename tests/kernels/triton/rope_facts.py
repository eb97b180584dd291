"""Facts about a head's norm and rotary embedding in one kernel, in the honest interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/rope_facts.py
"""

import pytest
import torch

from minimind_ds.bench.kernels import interpreter
from minimind_ds.kernels import reference
from minimind_ds.kernels.triton import rope

# tokens, heads, key heads, head size, dtype, normalised
CASES = [
    (70, 4, 2, 96, torch.bfloat16, True),
    (33, 8, 1, 128, torch.float16, True),
    (40, 3, 1, 64, torch.float32, True),
    (40, 2, 2, 96, torch.float32, False),
    (1, 2, 1, 6, torch.float64, True),
    (300, 2, 1, 32, torch.float32, True),
]
# ||ours - exact|| / ||exact||: half precision rounds by 2e-3 and 2.4e-4 twice.  Beyond it the interpreter's functions
# are numpy's, which differ in their last places from processor to processor.
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6, torch.float64: 1e-13}
EPS = 1e-6


def inputs(T, H, HKV, D, dtype):
    """q, k, their norms' weights, gradients of both results; cos, sin."""
    generator = torch.Generator().manual_seed(T + D)
    shapes = ((T, H, D), (T, HKV, D), (D,), (D,), (T, H, D), (T, HKV, D))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    angles = torch.randn(T, D // 2, generator=generator, dtype=torch.promote_types(dtype, torch.float32)) * 100
    return tensors, (angles.cos(), angles.sin())


def both(q, k, q_weight, k_weight, cos, sin):
    return tuple(rope.norm_rope(x, weight, cos, sin, EPS) for x, weight in ((q, q_weight), (k, k_weight)))


def fused(*args):
    with interpreter.poisoned_outputs():
        return both(*args)


def plain(q, k, q_weight, k_weight, cos, sin):
    return tuple(reference.rotate(x if weight is None else reference.rms_norm(x, weight, EPS), cos, sin)
                 for x, weight in ((q, q_weight), (k, k_weight)))


def run(function, tensors, angles, norm):
    """Both results and the gradients of what is learnt."""
    q, k, q_weight, k_weight = (x.detach().clone().requires_grad_() for x in tensors[:4])
    out = function(q, k, *((q_weight, k_weight) if norm else (None, None)), *angles)
    leaves = (q, k, q_weight, k_weight) if norm else (q, k)
    with interpreter.poisoned_outputs():
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, tensors[4:])]


@pytest.mark.parametrize("T, H, HKV, D, dtype, norm", CASES)
def test_results_and_gradients_equal_the_reference(T, H, HKV, D, dtype, norm):
    tensors, angles = inputs(T, H, HKV, D, dtype)
    got = run(fused, tensors, angles, norm)
    want = run(plain, [x.double() for x in tensors], [x.double() for x in angles], norm)
    found = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert all(error <= BOUNDS[dtype] for error in found), found
    assert all(a.dtype == dtype for a in got)


def test_a_token_gets_the_same_bits_whatever_the_others_hold():
    tensors, angles = inputs(20, 2, 1, 96, torch.bfloat16)
    before = run(fused, tensors, angles, True)
    changed = [x.clone() for x in tensors]
    for i in (0, 1, 4, 5):
        changed[i][:10] = float("nan")
    after = run(fused, changed, angles, True)
    assert all(torch.equal(a[10:], b[10:]) for a, b in zip(before[:4], after[:4]))


def test_gradients_pass_gradcheck_in_fp64():
    tensors, angles = inputs(9, 3, 1, 6, torch.float64)
    leaves = [x.requires_grad_() for x in tensors[:4]]
    torch.autograd.gradcheck(lambda *x: both(*x, *angles), leaves, fast_mode=True)


def test_views_into_one_projection_need_no_copy():
    (q, k, *rest), angles = inputs(20, 4, 2, 32, torch.bfloat16)
    fused_TC = torch.cat((q.flatten(1), k.flatten(1)), dim=1)
    views = [x.unflatten(1, (-1, 32)) for x in fused_TC.split([128, 64], dim=1)]
    got, want = both(*views, *rest[:2], *angles), both(q, k, *rest[:2], *angles)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_torch_compile_takes_it_whole():
    tensors, angles = inputs(20, 2, 1, 32, torch.float32)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for norm in (True, False):
        got, want = run(compiled, tensors, angles, norm), run(fused, tensors, angles, norm)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_does_not_fit_is_refused():
    tensors, angles = inputs(8, 2, 1, 32, torch.float32)
    q, _, weight, *_ = tensors
    for wrong in ((q, weight, angles[0][:7], angles[1]), (q, weight[:-1], *angles), (q[..., 1:], None, *angles)):
        with pytest.raises(ValueError, match="do not fit"):
            rope.norm_rope(*wrong, EPS)
