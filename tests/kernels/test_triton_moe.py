"""The kernels of experts and router: right in the interpreter, well compiled, right on a GPU where there is one.

Each needs a process of its own: TRITON_INTERPRET is read when a kernel is defined.
"""

from importlib import metadata

import pytest
import torch

from tests.conftest import ROOT

from .triton import compiled, hold

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = {"count_kernel", "place_kernel", "gate_up_kernel", "linear_kernel", "hidden_gradient_kernel",
           "weight_gradient_kernel", "route_kernel", "route_gradient_kernel"}
PRODUCTS = {name for name in KERNELS if name.startswith(("gate_up", "linear", "hidden", "weight"))}
# Bytes of shared memory a block may have; Ampere's sizes are kept within the 99 KB of consumer GPUs.
SHARED = {80: 101_376, 90: 232_448}


# Forms that nothing runs yet are for a GPU to choose from.
@pytest.mark.numeric
@pytest.mark.parametrize("facts", ["moe", pytest.param("form", marks=pytest.mark.slow), "router"])
def test_facts_hold_in_the_honest_interpreter(facts, request):
    hold(facts, slow=request.config.getoption("--slow"))


def launches(C: int = 768, I: int = 2432, K: int = 1, dtype: torch.dtype = torch.bfloat16):  # noqa: E741
    """Forward and backward of experts and router; under tests.kernels.triton.aot, which only compiles them."""
    from minimind_ds.kernels.triton.experts import moe
    from minimind_ds.kernels.triton.router import route

    T, E = 256, 4
    x, gate_up, down = (torch.zeros(*shape, dtype=dtype, requires_grad=True)
                        for shape in ((T, C), (E, 2 * I, C), (E, C, I)))
    logits = torch.zeros(T, E, dtype=dtype, requires_grad=True)
    weights, _, _, sums = route(logits, K, True, torch.zeros(T, dtype=torch.int64), 2)
    # Nothing runs, so experts would be what memory happens to hold.
    y = moe(x, gate_up, down, weights.detach().requires_grad_(), torch.zeros(T, K, dtype=torch.int64))
    torch.autograd.grad(y, (x, gate_up, down), y)
    torch.autograd.grad((weights, sums), logits, (weights, sums))


def odd_launches():
    """Sizes that are no multiples of the tiles, as the debug preset's, and top-2."""
    launches(C=256, I=448, K=2, dtype=torch.float16)


def fp32_launches():
    launches(dtype=torch.float32)


def form_launches():
    """Every form of a kernel that minimind_ds.bench.gpu times, but for PyTorch's."""
    from minimind_ds.bench.gpu.variants import experts_variants

    for variant in experts_variants():
        # Its offsets would be what memory happens to hold, and PyTorch's product runs.
        if "grouped_mm" not in variant.label:
            with variant.installed():
                launches()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("function", ["launches", pytest.param("odd_launches", marks=pytest.mark.slow),
                                      pytest.param("fp32_launches", marks=pytest.mark.slow)])
def test_nothing_spills_and_everything_fits(function, arch):
    found = compiled(f"test_triton_moe:{function}", arch)
    assert {one["kernel"] for one in found} == KERNELS
    pinned = f"triton=={metadata.version('triton')};" in (ROOT / "constraints.txt").read_text()
    for one in found:
        # 16 bytes of stack without a load or store are a frame that ptxas reserves, no spill.  A bound on registers,
        # for a second block on an SM, costs Triton 3.9 six words of a thread, and the pinned one none.
        words = 8 if "maxnreg" in one["constants"] and not pinned else 0
        assert max(one["counts"]["STL"], one["counts"]["LDL"]) <= words and one["stack"] <= 16 + 4 * words, one
        assert one["shared"] <= SHARED[arch], one


@pytest.mark.parametrize("arch, instruction", [(80, "HMMA"), (90, "HGMMA")])
def test_products_run_on_tensor_cores_of_their_generation(arch, instruction):
    found = [one for one in compiled("test_triton_moe:launches", arch) if one["kernel"] in PRODUCTS]
    # linear and weight_gradient are compiled twice: for gate_up's and for down's shapes.
    assert len(found) == 6
    assert all(one["counts"][instruction] > 0 for one in found), found


def test_two_blocks_of_the_memory_bound_product_fit_a_hopper_sm():
    """hidden_gradient moves more bytes than its product hides: one block stores while the other multiplies."""
    one, = (one for one in compiled("test_triton_moe:launches", 90) if one["kernel"] == "hidden_gradient_kernel")
    assert one["blocks_per_sm"] >= 2


@pytest.mark.slow
def test_hoppers_forms_copy_through_descriptors_and_do_not_spill():
    found = [one for one in compiled("test_triton_moe:form_launches", 90) if "tma" in one["kernel"]]
    # gate_up in two forms, three tiles of hidden_gradient, two products for weights.
    assert len(found) == 7
    for one in found:
        assert one["counts"]["STL"] == one["counts"]["LDL"] == 0 and one["stack"] <= 16, one
        assert one["shared"] <= SHARED[90] and one["counts"]["HGMMA"] and one["counts"]["UTMALDG"], one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3), (torch.float32, 1e-5)],
                         ids=str)
@pytest.mark.parametrize("T, C, I, K", [(4096, 768, 2432, 1), (1000, 256, 448, 2), (1, 768, 2432, 1)])
def test_on_a_gpu_output_and_gradients_equal_the_reference(T, C, I, K, dtype, bound):  # noqa: E741
    from minimind_ds.kernels import reference
    from minimind_ds.kernels.triton import experts as triton_moe

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    leaves = [x.to(dtype) for x in (draw(T, C), draw(4, 2 * I, C) * C ** -0.5, draw(4, C, I) * I ** -0.5)]
    leaves.append(draw(T, K).sigmoid())
    experts, dy = draw(T, 4).topk(K, dim=1).indices, draw(T, C).to(dtype)
    results = []
    for function, wide in ((triton_moe.moe, False), (triton_moe.moe, False), (reference.moe, True)):
        mine = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        y = function(*mine, experts)
        results.append([y, *torch.autograd.grad(y, mine, dy.to(y.dtype))])
    for first, second, want in zip(*results):
        assert torch.equal(first, second)
        assert (first.double() - want).norm() <= bound * want.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("T, K", [(4096, 1), (1000, 2), (1, 1)])
def test_on_a_gpu_every_form_equals_the_reference_and_idle_experts_get_zeros(T, K):
    from minimind_ds.bench.gpu.variants import experts_variants
    from minimind_ds.kernels import reference
    from minimind_ds.kernels.triton import experts as triton_moe

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    C, I = 256, 448  # noqa: E741
    leaves = [x.bfloat16() for x in (draw(T, C), draw(4, 2 * I, C) * C ** -0.5, draw(4, C, I) * I ** -0.5)]
    leaves.append(draw(T, K).sigmoid())
    experts, dy = draw(T, 3).topk(K, dim=1).indices, draw(T, C).bfloat16()

    def results(function, wide=False):
        mine = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        y = function(*mine, experts)
        return [y, *torch.autograd.grad(y, mine, dy.to(y.dtype))]

    want = results(reference.moe, wide=True)
    for variant in experts_variants():
        with variant.installed():
            first, second = results(triton_moe.moe), results(triton_moe.moe)
        for a, b, exact in zip(first, second, want):
            assert torch.equal(a, b), variant.label
            assert (a.double() - exact).norm() <= 1e-2 * exact.norm(), variant.label
        assert not first[2][3].any() and not first[3][3].any(), variant.label


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_routing_equals_softmax_and_topk():
    from minimind_ds.kernels.triton.router import route

    logits = torch.randn(5000, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    group = torch.arange(5000, device="cuda") // 300
    weights, experts, counts, sums = route(logits, 2, False, group, 17)
    scores = logits.softmax(dim=-1)
    want, chosen = scores.topk(2)
    assert torch.equal(experts, chosen) and torch.allclose(weights, want, rtol=1e-6)
    assert counts.sum() == 10000 and torch.allclose(sums.sum(0), scores.sum(0), rtol=1e-5)
