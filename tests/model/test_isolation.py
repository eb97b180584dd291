"""Law 2: packing changes nothing but speed, and no sample sees its neighbour.

What is promised, bit for bit, when sample A of a row changes and sample B does not: B's outputs and B's gradients do
not move, dense or MoE with the `reference` backend, dense with `sdpa`.  With experts and `sdpa`, the same holds while
every expert gets as many tokens as before; when that changes, products change shape and B may move by rounding.
"""

import pytest
import torch

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate, kernels

pytestmark = pytest.mark.numeric

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=128)
CONFIGS = {
    "dense": ModelConfig(**SIZES),
    "minimind2": ModelConfig(**SIZES, qk_norm=False),
    "top1": ModelConfig(**SIZES, use_moe=True),
    "top2": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=2),
}
BACKENDS = ["reference", "sdpa"]
LENGTHS = [17, 1, 30, 2, 9]


def samples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, 97, (length,), generator=generator)
        labels = torch.cat((ids[1:], torch.tensor([-100])))
        labels[torch.rand(length, generator=generator) < 0.4] = -100
        made.append(Sample(ids, labels))
    return made


def model_of(name, backend, dtype=torch.float64, **more):
    torch.manual_seed(1)
    # Larger than at the start of training: attention and routing have to depend on what they see.
    model = MiniMindForCausalLM(CONFIGS[name], backend, **more).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def gradients(model, batches):
    """Loss and balance loss summed over batches, and the gradients of both together."""
    model.zero_grad()
    losses, balances = 0, 0
    for batch in batches:
        out = model(batch)
        n_real = batch.input_ids.numel() if batch.real_mask is None else int(batch.real_mask.sum())
        (out.loss_sum + out.aux_loss * n_real).backward()
        losses, balances = losses + out.loss_sum.detach(), balances + out.aux_loss.detach() * n_real
    return losses, balances, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, theirs, bound):
    for a, b in zip(ours[:2], theirs[:2]):
        assert abs(a - b) <= bound * max(abs(b), 1e-12)
    for name, grad in theirs[2].items():
        assert (ours[2][name] - grad).norm() <= bound * grad.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_has_the_loss_and_gradients_of_its_samples_alone(name, backend):
    model = model_of(name, backend, balance="document")
    all_samples = samples(LENGTHS)
    alone = gradients(model, [collate([[s]], len(s.input_ids)) for s in all_samples])
    packed = gradients(model, [collate([all_samples[:2], all_samples[2:]], 48)])
    # Law 2's; what a sample sees of its neighbour changes the third digit.
    assert_same(packed, alone, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "top2"])
@pytest.mark.parametrize("balance", ["batch", "row", "document"])
def test_padding_changes_nothing(name, backend, balance):
    model = model_of(name, backend, balance=balance)
    row = samples(LENGTHS)
    tight = gradients(model, [collate([row], sum(LENGTHS))])
    loose = gradients(model, [collate([row, [], []], sum(LENGTHS) + 40)])
    # Sums of fp64 in another order.
    assert_same(loose, tight, 1e-10)


@pytest.mark.parametrize("name", ["dense", "top1"])
def test_rows_may_be_dealt_to_micro_batches_in_any_way(name):
    model = model_of(name, "sdpa", balance="row")
    rows = [samples([20, 11], 1), samples([5], 2), samples([31], 3), []]
    together = gradients(model, [collate(rows, 32)])
    assert_same(gradients(model, [collate([row], 32) for row in rows]), together, 1e-10)
    assert_same(gradients(model, [collate(rows[2:], 32), collate(rows[:2], 32)]), together, 1e-10)


def run_b(model, a):
    """B's logits, and every weight's gradient of B's loss, in a row that holds A, B and C."""
    b, c = samples([23, 12], 9)
    silent = [Sample(s.input_ids, torch.full_like(s.labels, -100)) for s in (a, c)]
    model.zero_grad()
    out = model(collate([[silent[0], b, silent[1]]], 64), return_logits=True)
    out.loss_sum.backward()
    start = len(a.input_ids)
    return [out.logits[0, start:start + 23].detach().clone(), out.loss_sum.detach(),
            *(p.grad.clone() for p in model.parameters())]


# fp32 activations on bf16 weights are what `auto` takes on CPUs that multiply bf16 slowly; both are tried anywhere.
PRECISIONS = {"fp64": (torch.float64, "native"), "fp32": (torch.float32, "native"),
              "bf16": (torch.bfloat16, "native"), "bf16 in fp32": (torch.bfloat16, "fp32")}


def probe(name, backend, precision):
    """Differences of B's logits, loss and gradients between two rows in which A is another text."""
    dtype, activations = PRECISIONS[precision]
    spec = ",".join(f"{op}={backend}" for op in kernels.OPS)
    model = model_of(name, f"{spec},activations={activations}", dtype).eval()
    first, second = samples([21], 3)[0], samples([21], 4)[0]
    assert not torch.equal(first.input_ids, second.input_ids)
    return list(zip(run_b(model, first), run_b(model, second)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name, backend", [("dense", "reference"), ("dense", "sdpa"), ("minimind2", "sdpa"),
                                           ("top1", "reference"), ("top2", "reference")])
def test_changing_a_moves_no_bit_of_b(name, backend, precision):
    for one, other in probe(name, backend, precision):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["top1", "top2"])
def test_changing_a_moves_b_through_grouped_experts_by_rounding_at_most(name):
    found = list(probe(name, "sdpa", "fp64"))
    # Law 2's; a router that has one choice has no gradient but the rounding of others.
    most = max(one.norm() for one, _ in found)
    for one, other in found:
        assert (one - other).norm() <= 1e-10 * one.norm() + 1e-13 * most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_move_no_bit_of_b_while_they_get_as_many_tokens(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(4, *shape, generator=generator).to(dtype) for shape in ((96, 32), (32, 48)))
    chosen = torch.randint(0, 4, (100, 1), generator=generator)
    weights = torch.rand(100, 1, generator=generator)
    x, results = torch.randn(100, 32, generator=generator).to(dtype), []
    for seed in range(3):
        x[:40] = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        inputs = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        y = kernels.moe(*inputs, weights, chosen, backend=backend)
        y[40:].square().sum().backward()
        results.append([y[40:].detach(), inputs[0].grad[40:], inputs[1].grad, inputs[2].grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbour_s_overflow_stays_its_own(backend):
    # Were a mask a product with zero, the infinities of A would be NaN in B.
    q, k, v = torch.randn(3, 10, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    clean = kernels.attention(q, k, v, bounds, 6, backend=backend)[4:]
    for x in (q, k, v):
        x[:4] = torch.inf
    assert torch.equal(kernels.attention(q, k, v, bounds, 6, backend=backend)[4:], clean)


@pytest.mark.parametrize("name", ["dense", "top1"])
def test_the_same_input_gives_the_same_bits(name):
    batch = collate([samples(LENGTHS)], 64)
    model = model_of(name, "auto", torch.float32)
    first, second = gradients(model, [batch]), gradients(model, [batch])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(grad, second[2][key]) for key, grad in first[2].items())
