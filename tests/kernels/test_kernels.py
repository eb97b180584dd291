"""Every backend against the reference, the reference against textbook formulas, gradients against differences."""

import functools

import pytest
import torch
import torch.nn.functional as F

from minimind_ds import kernels

pytestmark = pytest.mark.numeric

LENGTHS = [[1], [2, 1, 1, 3], [63, 64, 65], [300, 1, 17], [5, 0, 3]]
# Relative to the largest entry, or to 1 (a lone key has no gradient at all); half precision is judged against the
# reference in fp32 on the same rounded inputs.  fp64: anything computed in fp32 is off by 1e-8.  fp32: with AVX512
# PyTorch's attention may take an exponential good to 20 units in the last place, 2.4e-6; 9e-7 measured without.
# bf16: five times half a unit in the last place; 8e-3 measured.
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
OTHERS = [name for name in kernels.BACKENDS if name not in ("reference", "compiled")
          and kernels.BACKENDS[name].why_not("attention", torch.device("cpu"), torch.float32,
                                             kernels.KernelRequirements()) is None]


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention_inputs(lengths, heads, kv_heads, size, dtype):
    generator = torch.Generator().manual_seed(sum(lengths) + size)
    total = sum(lengths)
    return [torch.randn(total, h, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for h in (heads, kv_heads, kv_heads)]


def moe_inputs(tokens, size, inner, experts, k, dtype):
    generator = torch.Generator().manual_seed(tokens + k)
    draw = [torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((tokens, size), (experts, 2 * inner, size), (experts, size, inner))]
    weights, chosen = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).softmax(-1).topk(k)
    return [x.to(dtype).requires_grad_() for x in (*draw, weights)], chosen


def with_gradients(function, inputs):
    """Output and gradients of a weighted sum, at least fp32."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(x.grad for x in inputs)]


def assert_close(ours, theirs, bound):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a.double() - b.double()).abs().max() <= bound * b.double().abs().max().clamp(min=1)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 32), (4, 2, 96), (4, 1, 64)])
def test_attention_equals_the_reference(backend, dtype, lengths, heads, kv_heads, size):
    inputs = attention_inputs(lengths, heads, kv_heads, size, dtype)
    wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in inputs]
    bounds, longest = cu_seqlens(lengths), max(lengths)
    ours = with_gradients(lambda *x: kernels.attention(*x, bounds, longest, backend=backend), inputs)
    theirs = with_gradients(lambda *x: kernels.attention(*x, bounds, longest, backend="reference"), wide)
    assert ours[0].dtype == dtype
    assert_close(ours, theirs, BOUNDS[dtype])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens, experts, k", [(1, 4, 1), (3, 8, 2), (130, 4, 1), (130, 4, 4), (64, 1, 1)])
def test_moe_equals_the_reference(backend, dtype, tokens, experts, k):
    inputs, chosen = moe_inputs(tokens, 48, 24, experts, k, dtype)
    wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in inputs]
    ours = with_gradients(lambda *x: kernels.moe(*x, chosen, backend=backend), inputs)
    theirs = with_gradients(lambda *x: kernels.moe(*x, chosen, backend="reference"), wide)
    assert ours[0].dtype == dtype
    assert_close(ours, theirs, BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros(backend):
    (x, gate_up, down, weights), _ = moe_inputs(7, 8, 4, 4, 1, torch.float32)
    chosen = torch.tensor([[0], [2]] * 3 + [[0]])
    # Memory that was used before: a gradient that is allocated and not written would show.
    poison = [torch.full_like(parameter, torch.nan) for parameter in (gate_up, down)]
    del poison
    kernels.moe(x, gate_up, down, weights, chosen, backend=backend).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert (grad[1] == 0).all() and (grad[3] == 0).all()
        assert grad[0].norm() > 0 and grad[2].norm() > 0


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_elementwise_operations_equal_the_reference(backend, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    angle = torch.rand(9, 16, generator=generator) * 6
    cases = {
        kernels.swiglu: [draw(9, 40), draw(9, 40)],
        functools.partial(kernels.rms_norm, eps=1e-6): [draw(9, 3, 32), draw(32)],
        functools.partial(kernels.add_rms_norm, eps=1e-6): [draw(9, 3, 32), draw(9, 3, 32), draw(32)],
        functools.partial(kernels.norm_rope, cos=angle.cos(), sin=angle.sin(), eps=1e-6): [draw(9, 3, 32), draw(32)],
        functools.partial(kernels.norm_rope, weight=None, cos=angle.cos(), sin=angle.sin(), eps=0.0):
            [draw(9, 3, 32)],
    }
    for function, inputs in cases.items():
        wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in inputs]
        ours = with_gradients(functools.partial(function, backend=backend), inputs)
        assert ours[0].dtype == dtype
        assert_close(ours, with_gradients(functools.partial(function, backend="reference"), wide), BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
def test_gradients_are_those_of_finite_differences(backend):
    lengths = [1, 4, 3]
    q_k_v = attention_inputs(lengths, 4, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: kernels.attention(*x, cu_seqlens(lengths), 4, backend=backend), q_k_v)
    inputs, chosen = moe_inputs(5, 4, 3, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: kernels.moe(*x, chosen, backend=backend), inputs)
    x, gate_up, _, _ = inputs
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w[0, 0], 1e-3, backend=backend), (x, gate_up))
    assert torch.autograd.gradcheck(lambda x, y: kernels.swiglu(x, 2 * y, backend=backend), (x, x))
    angle = torch.arange(8.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q: kernels.norm_rope(q, q[0, 0], angle.cos()[:, None].expand(8, 2), angle.sin()[:, None].expand(8, 2),
                                    1e-3, backend=backend), q_k_v[:1])


def test_reference_attention_is_masked_softmax():
    lengths = [3, 1, 6]
    q, k, v = (x.detach() for x in attention_inputs(lengths, 4, 2, 8, torch.float64))
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (segment[:, None] == segment[None]) & torch.ones(10, 10, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), k.repeat_interleave(2, 1).transpose(0, 1),
                                              v.repeat_interleave(2, 1).transpose(0, 1), attn_mask=mask)
    ours = kernels.attention(q, k, v, cu_seqlens(lengths), 6, backend="reference")
    torch.testing.assert_close(ours, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_reference_moe_is_the_sum_over_chosen_experts_token_by_token():
    (x, gate_up, down, weights), chosen = moe_inputs(6, 8, 4, 3, 2, torch.float64)
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for t in range(6):
        for weight, e in zip(weights[t], chosen[t]):
            gate, up = gate_up[e, :4] @ x[t], gate_up[e, 4:] @ x[t]
            expected[t] += weight * (down[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(kernels.moe(x, gate_up, down, weights, chosen, backend="reference"), expected,
                               rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
def test_attention_dropout_keeps_the_mean(backend):
    q = torch.zeros(64, 2, 8)
    v = torch.ones(64, 2, 8)
    torch.manual_seed(0)
    out = kernels.attention(q, q, v, cu_seqlens([64]), 64, backend=backend, dropout_p=0.3)
    assert out.std() > 0 and abs(out.mean() - 1) < 0.1


def test_names_that_do_not_exist_are_refused_with_those_that_do():
    for spec in ("warp", "attention=warp", "moe=", "conv=sdpa", "activations=bf8"):
        with pytest.raises(ValueError, match="there are"):
            kernels.resolve(spec, "cpu", torch.float32)
    with pytest.raises(ValueError, match="sdpa"):
        kernels.attention(*(torch.zeros(1, 1, 8),) * 3, cu_seqlens([1]), 1, backend="warp")
    with pytest.raises(ValueError, match="cannot run here: only the elementwise"):
        kernels.resolve("attention=compiled", "cpu", torch.float32)


def test_a_bare_name_leaves_to_auto_what_the_backend_has_no_code_for_and_says_so():
    choice = kernels.resolve("compiled", "cpu", "float32")
    assert (choice.elementwise, choice.rope, choice.attention) == ("compiled", "compiled", "sdpa")
    assert "attention, moe, router = sdpa (auto: only the elementwise operations are compiled)" in choice.reason
    assert kernels.parse("reference, moe=sdpa,activations=native") == {
        **dict.fromkeys(kernels.OPS, "reference"), "moe": "sdpa", "activations": "native"}
    with pytest.raises(ValueError, match="attention is 'reference' and 'sdpa': give it once"):
        kernels.parse("attention=reference,attention=sdpa")
    asked = kernels.parse("deepspeed")
    assert asked["moe"] == "deepspeed" and {asked[op] for op in kernels.OPS if op != "moe"} == {"auto"}
    with pytest.raises(ValueError, match="moe = deepspeed cannot run here"):
        kernels.resolve("deepspeed", "cpu", torch.float32)


def test_triton_attention_is_not_chosen_for_what_it_does_not_do():
    gpu = torch.device("cuda")
    for needs, word in ((kernels.KernelRequirements(96, 0.1), "dropout"), (kernels.KernelRequirements(256), "256"),
                        (kernels.KernelRequirements(33), "33")):
        assert word in kernels.BACKENDS["triton"].why_not("attention", gpu, torch.bfloat16, needs)
    assert "head_dim" not in kernels.BACKENDS["triton"].why_not("attention", gpu, torch.bfloat16,
                                                                kernels.KernelRequirements(96))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_routing_and_losses_equal_the_reference(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=generator, dtype=torch.float64).to(dtype)
    group, labels = torch.arange(50) // 15 - 1, torch.arange(50) % 6
    for args in ((2, True, group, 3), (1, False, None, 0)):
        results = []
        for name in (backend, "reference"):
            leaf = logits.clone().requires_grad_()
            weights, experts, counts, sums = kernels.route(leaf, *args, backend=name)
            (weights.square().sum() + sums.square().sum()).backward()
            results.append([weights.detach(), experts, counts, sums.detach(), leaf.grad])
        assert_close(*results, BOUNDS[dtype])
    assert_close(kernels.token_losses(logits.clone(), labels, backend=backend),
                 kernels.token_losses(logits.clone(), labels, backend="reference"), BOUNDS[dtype])


def test_reference_losses_are_cross_entropy_and_its_gradient():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels = torch.arange(9) * 4
    losses = F.cross_entropy(logits, labels, reduction="none")
    gradient, = torch.autograd.grad(losses.sum(), logits)
    assert_close(kernels.token_losses(logits.detach().clone(), labels, backend="reference"), (losses, gradient), 1e-12)


def test_choice_names_every_operation_and_says_why():
    choice = kernels.resolve("attention=reference,activations=native", "cpu", "bfloat16")
    assert (choice.attention, choice.moe, choice.activations) == ("reference", "sdpa", torch.bfloat16)
    assert choice.reason.startswith("attention = reference (as asked); moe, router, rope, elementwise = sdpa (auto: ")
    assert "; activations = bfloat16 (as the parameters)" in choice.reason
    assert "as asked" in choice.reason and "auto" in choice.reason
