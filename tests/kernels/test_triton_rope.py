"""The fused QK-norm and rotary kernel computes what the reference computes, interpreted, and on a GPU if there is one.
"""

import pytest
import torch

from minimind_ds.kernels import reference

from .triton import hold

pytest.importorskip("triton")


@pytest.mark.numeric
def test_rope_kernels_keep_their_facts(request):
    hold("rope", slow=request.config.getoption("--slow"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4), (torch.float32, 1e-6)],
                         ids=str)
@pytest.mark.parametrize("D", [64, 96, 128])
def test_on_a_gpu_results_and_gradients_equal_the_reference(D, dtype, bound):
    from minimind_ds.kernels.triton import rope

    generator = torch.Generator("cuda").manual_seed(D)
    shapes = ((1000, 8, D), (1000, 4, D), (D,), (D,), (1000, 8, D), (1000, 4, D))
    *leaves, dq, dk = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)
    angles = torch.randn(1000, D // 2, generator=generator, device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()

    def fused(q, k, q_weight, k_weight, cos, sin, eps):
        return tuple(rope.norm_rope(x, weight, cos, sin, eps) for x, weight in ((q, q_weight), (k, k_weight)))

    def plain(q, k, q_weight, k_weight, cos, sin, eps):
        return tuple(reference.rotate(reference.rms_norm(x, weight, eps), cos, sin)
                     for x, weight in ((q, q_weight), (k, k_weight)))

    results = []
    for function, wide in ((fused, False), (fused, False), (plain, True)):
        cast = torch.Tensor.double if wide else torch.Tensor.clone
        mine = [cast(x).requires_grad_() for x in leaves]
        out = function(*mine, cast(cos), cast(sin), 1e-6)
        results.append([*out, *torch.autograd.grad(out, mine, (cast(dq), cast(dk)))])
    for first, second, want in zip(*results):
        assert torch.equal(first, second)
        assert (first.double() - want).norm() <= bound * want.norm()
