"""Products that share an input are chained: the same gradients, and no pass over memory that only adds them."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate
from minimind_ds.kernels import elementwise, reference
from minimind_ds.model import decoder, lora, product

pytestmark = pytest.mark.numeric

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=128)
CONFIGS = {"dense": ModelConfig(**SIZES)} | {
    f"moe_top{k}": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=k) for k in (1, 2)}
T, C = 40, 32


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(length):
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length))
    return Sample(ids, torch.cat((ids[1:], torch.tensor([-100]))))


def batch():
    return collate([[sample(20), sample(11)]], T)


def model_of(config, adapters=(), dtype=torch.float32, **more):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config, **more).to(dtype)
    if adapters:
        about = lora.Lora(rank=4, alpha=8, targets=adapters)
        # B is zero in fresh adapters, and would leave A without a gradient.
        lora.attach(model, about, {name: draw(*x.shape, seed=i) / 8
                                   for i, (name, x) in enumerate(lora.fresh(config, about, seed=0).items())})
    return model


def gradients(model):
    """Of every trained parameter, by its name."""
    torch.manual_seed(1)
    model.zero_grad()
    out = model(batch())
    (out.loss_sum + out.aux_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class Additions(TorchDispatchMode):
    """Shapes of the sums of two tensors of one shape with two or more dimensions."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            first, second = args[:2]
            if isinstance(second, torch.Tensor) and first.ndim >= 2 and first.shape == second.shape:
                self.shapes.append(tuple(first.shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_backward_adds_no_gradients_of_activations(name):
    model = model_of(CONFIGS[name])
    out = model(batch())
    with Additions() as found:
        (out.loss_sum + out.aux_loss).backward()
    # The tied embedding's two gradients are added; the router has sums of its own, of a few numbers a token.
    assert [shape for shape in found.shapes if shape[-1] > 4] == [(97, C)]


def plain(x_TC, weight_NC):
    return F.linear(x_TC, weight_NC), x_TC


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("adapters", [(), ("q_proj", "k_proj", "v_proj", "gate_proj")], ids=["whole", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_chain_has_the_gradients_of_separate_products(name, adapters, recompute, monkeypatch):
    config = dataclasses.replace(CONFIGS[name], dropout=0.1)
    if config.use_moe:
        adapters = tuple("gate" if name == "gate_proj" else name for name in adapters)
    model = model_of(config, adapters, torch.float64)
    model.gradient_checkpointing = recompute
    chained = gradients(model)
    monkeypatch.setattr(decoder, "chained_product", plain)
    separate = gradients(model)
    assert chained.keys() == separate.keys() and len(chained) > 0
    for key, want in separate.items():
        assert want.norm() > 0 and (chained[key] - want).norm() <= 1e-12 * want.norm(), key


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("adapters", [(), ("q_proj", "k_proj")], ids=["whole", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nobody_else_holds_the_gradient_that_is_added_to_in_place(name, adapters, backend, monkeypatch):
    """Were it shared, writing it elsewhere would change some gradient."""
    model, times = model_of(CONFIGS[name], adapters, kernels=backend), 0
    in_place = gradients(model)

    def elsewhere(dx, dy, weight):
        nonlocal times
        times += 1
        return torch.addmm(dx, dy, weight)

    monkeypatch.setattr(torch.Tensor, "addmm_", elsewhere)
    apart = gradients(model)
    # The first layer's embedded tokens ask for no gradient where they are frozen.
    layers = SIZES["num_hidden_layers"] - bool(adapters)
    assert times >= 3 * layers
    assert all(torch.equal(in_place[key], apart[key]) for key in in_place)


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_gradcheck_of_a_chain_whichever_inputs_want_gradients(wants):
    inputs = [draw(5, 4).requires_grad_(wants[0]), *(draw(3, 4, seed=i).requires_grad_(wants[1]) for i in (1, 2))]

    def both(x, first, second):
        y, x = product.chained_product(x, first)
        return y, F.linear(x, second)

    assert torch.autograd.gradcheck(both, inputs)


def test_the_gradient_of_a_product_s_result_alone_or_of_what_it_handed_on_alone():
    x, weight = draw(5, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    y, same = product.chained_product(x, weight)
    dy, dx = draw(5, 3, seed=2), draw(5, 4, seed=3)
    assert torch.equal(same, x)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), dy, retain_graph=True), (dy @ weight, dy.T @ x))
    assert torch.autograd.grad(same, (x, weight), dx, allow_unused=True)[1] is None


def test_without_a_gradient_to_make_x_is_handed_on_itself():
    x, weight = draw(5, 4), draw(3, 4, seed=1).requires_grad_()
    assert product.chained_product(x, weight)[1] is x
    with torch.no_grad():
        assert product.chained_product(x.requires_grad_(), weight)[1] is x


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)],
                         ids=str)
@pytest.mark.parametrize("add", [True, False], ids=["sum", "first layer"])
def test_a_residual_s_gradient_is_added_in_the_norm_s(add, dtype, bound):
    inputs = [draw(9, C, seed=i).to(dtype) for i in range(2 if add else 1)]
    weight = draw(C, seed=2).to(dtype)
    douts = [draw(9, C, seed=i).to(dtype) for i in (3, 4)]

    def run(function, wide):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (*inputs, weight)]
        out = function(leaves[0], leaves[1] if add else None, leaves[-1], 1e-6)
        return [*out, *torch.autograd.grad(out, leaves, [dy.to(out[0].dtype) for dy in douts])]

    for got, want in zip(run(elementwise.add_rms_norm, False), run(reference.add_rms_norm, True), strict=True):
        assert (got.double() - want).norm() <= bound * want.norm()
    leaves = [x.double().requires_grad_() for x in (*inputs, weight)]
    norm = functools.partial(elementwise.add_rms_norm, eps=1e-3)
    assert torch.autograd.gradcheck(lambda *t: norm(t[0], t[1] if add else None, t[-1]), leaves)
