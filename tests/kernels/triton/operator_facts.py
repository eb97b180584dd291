"""Facts about what torch.compile makes of our operators, in the honest interpreter; test_operators.py runs them:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/operator_facts.py
"""

import dataclasses

import pytest
import torch

from minimind_ds import PRESETS, MiniMindForCausalLM, collate
from minimind_ds.bench.kernels import interpreter  # noqa: F401
from minimind_ds.kernels.triton import elementwise, operations  # noqa: F401
from minimind_ds.model.decoder import Head

from .model_facts import rows

# In bf16 a compiled layer rounds the sum of an input's gradients once more than eager code.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def draw(*shape, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)


def whole(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def arguments() -> dict[str, list[tuple]]:
    """Of every operator, by name; every kind that an optional argument makes."""
    x, residual, weight = draw(12, 32), draw(12, 32, dtype=torch.float32) + 1, draw(32)
    bounds, angle = torch.tensor([0, 7, 12], dtype=torch.int32), draw(12, 8, grad=False)
    group = torch.arange(12) // 5
    q, k, v = draw(12, 4, 16), draw(12, 2, 16), draw(12, 2, 16)
    labels = torch.arange(12) % 32
    return {
        "packed_attention": [(q, k, v, bounds)],
        "norm_rope": [(q, draw(16), angle, angle, 1e-6), (q, None, angle, angle, 1e-6)],
        "add_rms_norm": [(x, residual, weight, 1e-6)],
        "rms_norm": [(x, weight, 1e-6)],
        "swiglu": [(x, residual)],
        "route": [(draw(12, 4), 2, True, group, 3), (draw(12, 4), 1, False, None, 0)],
        "moe": [(x, draw(3, 16, 32), draw(3, 32, 8), draw(12, 2), torch.arange(24).view(12, 2) % 3, "", True)],
        "token_losses": [(draw(12, 32, grad=False), labels)],
    }


# Made by one function: two of them, of which one has no gradient, in every run.
QUICK = ("swiglu", "token_losses")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in arguments()])
def test_an_operator_is_what_its_schema_its_fake_and_its_gradient_say(name):
    # Results are compared whole, and the table of row blocks has a column that nobody writes.
    torch.use_deterministic_algorithms(True)
    try:
        for args in arguments()[name]:
            torch.library.opcheck(getattr(torch.ops.minimind_ds, name).default, args)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("preset, dtype", [
    ("debug-moe", torch.float32),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("debug", torch.float32), ("debug", torch.bfloat16), ("debug-moe", torch.bfloat16)))])
def test_torch_compile_takes_a_layer_whole_both_ways(preset, dtype):
    """Two layers: the first has no residual, the second has."""
    # The width is not what counts here, and the interpreter takes its time for it.
    config = dataclasses.replace(PRESETS[preset], num_hidden_layers=2, vocab_size=400, hidden_size=128,
                                 intermediate_size=96, moe_intermediate_size=96)
    batch, results = collate(rows(config.vocab_size), 32), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config, "triton,activations=native", balance="row").train().to(dtype)
        for layer in model.model.layers:
            layer.forward = whole(layer.forward) if compiled else layer.forward
        out = model(batch)
        (out.loss_sum + 60 * out.aux_loss).backward()
        results.append([out.loss_sum.detach(), *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= BOUNDS[dtype] * eager.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_torch_compile_takes_the_head_and_its_loss_whole(frozen):
    head = Head(32, 40).requires_grad_(not frozen)
    results = []
    for function in (head, whole(head)):
        hidden = draw(50, 32)
        loss = function(hidden, torch.arange(50) % 40, "triton")
        results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, *([] if frozen else [head.weight])])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_profile_of_eager_code_shows_operations_by_name():
    x = draw(4, 32)
    for out in (*elementwise.add_rms_norm(x, x, draw(32), 1e-6), elementwise.swiglu(x, x)):
        assert out.grad_fn.name() in ("add_rms_normBackward", "swigluBackward")
