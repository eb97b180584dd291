"""A model on the Triton backend is MiniMind's and trains as the reference does: triton/model_facts.py."""

import pytest
import torch

from .triton import hold

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.numeric
def test_models_on_triton_keep_their_facts(request):
    hold("model", slow=request.config.getoption("--slow"))


@pytest.mark.numeric
def test_elementwise_kernels_keep_their_facts(request):
    hold("elementwise", slow=request.config.getoption("--slow"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4), (torch.float32, 1e-6)],
                         ids=str)
def test_on_a_gpu_elementwise_kernels_equal_the_reference(dtype, bound):
    from minimind_ds.kernels import reference
    from minimind_ds.kernels.triton import elementwise

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    cases = {"rms_norm": [draw(3000, 768), draw(768)], "add_rms_norm": [draw(3000, 768), draw(3000, 768), draw(768)],
             "swiglu": [draw(3000, 2432), draw(3000, 2432)]}
    for name, inputs in cases.items():
        results = []
        for module, wide in ((elementwise, False), (elementwise, False), (reference, True)):
            leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
            out = getattr(module, name)(*leaves, *([1e-6] if "norm" in name else []))
            out = out if isinstance(out, tuple) else (out,)
            results.append([*out, *torch.autograd.grad(out, leaves, [x.cos() for x in out])])
        for first, second, want in zip(*results):
            assert torch.equal(first, second)
            assert (first.double() - want).norm() <= 2 * bound * want.norm()
    logits, labels = 4 * draw(500, 6400), torch.arange(500, device="cuda") * 12
    want, gradient = reference.token_losses(logits.double(), labels)
    losses, dlogits = elementwise.token_losses(logits.clone(), labels)
    assert (losses - want).norm() <= 1e-5 * want.norm()
    assert (dlogits.double() - gradient).norm() <= bound * gradient.norm()
