"""The experts through DeepSpeed's Triton ops: right in the interpreter, compiled at our sizes, right on a GPU if any.

Each needs a process of its own: TRITON_INTERPRET is read when a kernel is defined, and so is whether there is a GPU.
"""

import contextlib

import pytest
import torch

from minimind_ds.kernels import deepspeed_ops
from minimind_ds.kernels.needs import NOTHING

from .triton import compiled, hold

pytest.importorskip("triton")
pytest.importorskip("deepspeed")


@pytest.mark.numeric
@pytest.mark.slow
def test_facts_hold_in_the_honest_interpreter(request):
    hold("deepspeed", slow=request.config.getoption("--slow"))


def test_what_cannot_run_says_why():
    assert "packed segments" in deepspeed_ops.why_not("attention", torch.device("cuda"), torch.bfloat16, NOTHING)
    assert "rounds" in deepspeed_ops.why_not("elementwise", torch.device("cuda"), torch.bfloat16, NOTHING)
    assert "there is none" in deepspeed_ops.why_not("moe", torch.device("cpu"), torch.bfloat16, NOTHING)


def launches():
    """Forward and backward at MiniMind's sizes; under tests.kernels.triton.aot, which only compiles them."""
    from triton.backends import backends

    for backend in backends.values():
        backend.driver.is_active = staticmethod(lambda: True)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    T, C, I, E = 256, 768, 2432, 4
    x, gate_up, down = (torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)
                        for shape in ((T, C), (E, 2 * I, C), (E, C, I)))
    weights, experts = torch.ones(T, 1, requires_grad=True), torch.zeros(T, 1, dtype=torch.int64)
    y = deepspeed_ops.moe(x, gate_up, down, weights, experts)
    torch.autograd.grad(y, (x, gate_up, down, weights), y)


def row(found: dict) -> str:
    tile = {name.removeprefix("BLOCK_"): n for name, n in found["constants"].items() if name.startswith("BLOCK_")}
    return (f"sm_{found['arch']} {found['kernel']:34} {tile} warps {found['warps']} stages {found['stages']} "
            f"registers {found['registers']} stack {found['stack']} shared {found['shared']} {found['counts']}")


@pytest.mark.slow
@pytest.mark.parametrize("arch, instruction", [(80, "HMMA"), (90, "HGMMA")])
def test_it_compiles_at_our_sizes_and_multiplies_on_tensor_cores(arch, instruction):
    """Every configuration that DeepSpeed's tuning chooses from; the table is printed with -s."""
    table = compiled("test_deepspeed_ops:launches", arch)
    print("\n" + "\n".join(map(row, table)))
    assert not any(found["counts"]["STL"] or found["counts"]["LDL"] for found in table)
    products = [found for found in table if found["kernel"].startswith("_group_gemm")]
    # Forward, gradient of rows and gradient of weights in six configurations each; wgmma needs 64 rows, one has 32.
    assert len(products) == 18 and sum(found["counts"][instruction] > 0 for found in products) >= 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("K", [1, 2])
def test_on_a_gpu_output_and_gradients_equal_the_reference(K):
    from minimind_ds.kernels import reference

    device, dtype = torch.device("cuda"), torch.bfloat16
    if deepspeed_ops.why_not("moe", device, dtype, NOTHING):
        pytest.skip(deepspeed_ops.why_not("moe", device, dtype, NOTHING))
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device)

    T, C, I, E = 2000, 768, 2432, 4
    leaves = [x.to(dtype) for x in (draw(T, C), draw(E, 2 * I, C) * C ** -0.5, draw(E, C, I) * I ** -0.5)]
    leaves.append(draw(T, K).sigmoid())
    experts, dy = draw(T, E).topk(K, dim=1).indices, draw(T, C).to(dtype)
    results = []
    for function, wide in ((deepspeed_ops.moe, False), (reference.moe, True)):
        mine = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        y = function(*mine, experts)
        results.append([y, *torch.autograd.grad(y, mine, dy.to(y.dtype))])
    for got, want in zip(*results):
        assert (got.double() - want).norm() <= 1.5e-2 * want.norm()
