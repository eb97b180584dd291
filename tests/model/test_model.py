"""The decoder as a whole: against transformers' Qwen3, and its flags, losses and edges."""

import dataclasses
import functools
import shutil

import pytest
import torch
import torch.nn.functional as F

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate, kernels
from minimind_ds.convert import huggingface, minimind
from minimind_ds.model import loss
from minimind_ds.model.decoder import balance_loss
from minimind_ds.model.rotary import Rotary

pytestmark = pytest.mark.numeric

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=128)
CONFIGS = {"dense": ModelConfig(**SIZES), "moe": ModelConfig(**SIZES, use_moe=True, num_experts_per_tok=2)}


def draw(length, labelled=True, seed=0):
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed + length))
    labels = torch.cat((ids[1:], torch.tensor([-100]))) if labelled else torch.full_like(ids, -100)
    return Sample(ids, labels)


def model_of(config, kernels="auto", seed=0, **more):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(config, kernels, **more)


def step(model, batch):
    """Loss, balance loss and every gradient of both."""
    model.zero_grad()
    out = model(batch)
    (out.loss_sum + out.aux_loss).backward()
    return [out.loss_sum.detach(), out.aux_loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kernels", ["reference", "sdpa"])
def test_transformers_qwen3_has_the_same_logits_loss_and_gradients(kernels):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = CONFIGS["dense"]
    theirs = Qwen3ForCausalLM(Qwen3Config(**huggingface.to_hf_config(config, torch.float32)))
    ours = model_of(config, kernels)
    missing = theirs.load_state_dict(minimind.check(ours.state_dict(), config, "ours"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    lengths, their_logits, their_loss = [5, 40, 1, 18], [], 0
    for length in lengths:
        sample = draw(length)
        logits = theirs(sample.input_ids[None]).logits[0]
        their_loss = their_loss + F.cross_entropy(logits, sample.labels, reduction="sum", ignore_index=-100)
        their_logits.append(logits)
    their_loss.backward()
    out = ours(collate([[draw(length) for length in lengths]], 64), return_logits=True)
    out.loss_sum.backward()
    # Law 4's bounds.
    torch.testing.assert_close(out.logits[0], torch.cat(their_logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss_sum, their_loss, rtol=1e-5, atol=0)
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - grads[name].grad).norm() <= 1e-5 * grads[name].grad.norm(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_changes_no_bit(name):
    model, batch = model_of(dataclasses.replace(CONFIGS[name], dropout=0.1)), collate([[draw(20), draw(11)]], 40)
    torch.manual_seed(5)
    plain = step(model, batch)
    model.gradient_checkpointing = True
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(plain, step(model, batch)))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compiled_elementwise_parts_give_the_same_results():
    # Without QK-norm there is less to compile.
    model = model_of(dataclasses.replace(CONFIGS["dense"], qk_norm=False, num_key_value_heads=4))
    batch = collate([[draw(20), draw(11)]], 40)
    plain = step(model, batch)
    model.compile_layers()
    assert model.kernel_selection("cpu", torch.float32).elementwise == "compiled"
    for ours, theirs in zip(step(model, batch), plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients_for_every_parameter(name):
    model = model_of(CONFIGS[name])
    for rows in ([[draw(20, labelled=False)]], [[]]):
        for batch in (collate(rows, 32), dataclasses.replace(collate(rows, 32), labelled_index=None)):
            model.zero_grad()
            out = model(batch)
            (out.loss_sum + 0 * out.aux_loss).backward()
            assert out.loss_sum == 0 and out.n_labelled == 0 and out.loss_sum.dtype == torch.float32
            assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_an_empty_row_has_no_balance_loss():
    out = model_of(CONFIGS["moe"])(collate([[]], 32))
    assert out.aux_loss == 0 and (out.expert_counts == 0).all()


def test_initial_weights_depend_on_the_seed_only():
    first = model_of(CONFIGS["moe"], "reference").state_dict()
    second = model_of(CONFIGS["moe"], "sdpa").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(model_of(CONFIGS["moe"], seed=1).lm_head.weight, first["lm_head.weight"])
    for name, tensor in first.items():
        assert (tensor == 1).all() if tensor.dim() == 1 else abs(tensor.std() - 0.02) < 0.003, name


def test_a_tied_head_is_the_embedding_itself():
    model = model_of(CONFIGS["dense"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in model.named_parameters()] == list(minimind.expected_shapes(CONFIGS["dense"]))
    apart = model_of(dataclasses.replace(CONFIGS["dense"], tie_word_embeddings=False))
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


@pytest.mark.parametrize("activations", ["native", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_follows_fp32(name, activations):
    wide, batch = model_of(CONFIGS[name]), collate([[draw(100), draw(20)]], 128)
    narrow = model_of(CONFIGS[name], f"activations={activations}").bfloat16()
    ours, theirs = narrow(batch), wide(batch)
    assert ours.loss_sum.dtype == torch.float32
    # A quarter of a unit in bf16's last place: rounding of 120 tokens' losses averages out.
    torch.testing.assert_close(ours.loss_sum, theirs.loss_sum, rtol=1e-3, atol=0)
    ours.loss_sum.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in narrow.parameters())


def test_positions_keep_their_precision_when_the_model_is_cast():
    rotary = Rotary(ModelConfig(**{**SIZES, "max_position_embeddings": 8192}))
    cos, sin = rotary.bfloat16()(torch.tensor([4096, 4097]))
    assert cos.dtype == torch.float32 and not torch.equal(cos[0], cos[1])
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


def test_a_segment_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="129 tokens is longer than max_position_embeddings 128"):
        model_of(CONFIGS["dense"])(collate([[draw(129)]], 129))


def test_dropout_acts_in_training_only():
    model = model_of(dataclasses.replace(CONFIGS["dense"], dropout=0.5))
    batch = collate([[draw(20)]], 20)
    assert model(batch).loss_sum != model(batch).loss_sum
    model.eval()
    assert model(batch).loss_sum == model(batch).loss_sum == model_of(CONFIGS["dense"])(batch).loss_sum


def test_balance_loss_is_minimind_s_on_real_tokens_weighted_over_groups():
    scores = torch.rand(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    chosen = scores.topk(2).indices
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, -1, -1])

    def upstream(rows):
        load = F.one_hot(chosen[rows], 4).double().mean(0)
        return (load * scores[rows].mean(0)).sum() * 4

    _, experts, counts, sums = kernels.route(scores.log(), 2, False, group, 3, backend="reference")
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(balance_loss(counts, sums, 2, total_GE=counts),
                               (3 * upstream(slice(0, 3)) + 5 * upstream(slice(3, 8))) / 8)
    assert counts.sum(0).tolist() == F.one_hot(chosen[:8], 4).sum((0, 1)).tolist()


def test_balance_groups_are_the_batch_the_rows_or_the_documents():
    batch = collate([[draw(3), draw(4)], [draw(5)]], 8)
    expected = {"batch": [12], "row": [7, 5], "document": [3, 4, 0, 5, 0]}
    for balance, tokens in expected.items():
        group, n_groups = model_of(CONFIGS["moe"], balance=balance).balance_groups(batch)
        assert n_groups == len(tokens) and torch.bincount(group[group >= 0], minlength=n_groups).tolist() == tokens
    with pytest.raises(ValueError, match="'sample'"):
        model_of(CONFIGS["moe"], balance="sample")


def test_balance_loss_and_counts_are_for_training():
    model, batch = model_of(CONFIGS["moe"]), collate([[draw(20)]], 32)
    out = model(batch)
    assert out.aux_loss > 0 and out.expert_counts.sum(1).tolist() == [40, 40]
    out = model.eval()(batch)
    assert out.aux_loss == 0 and out.expert_counts is None


def test_loss_is_cross_entropy_summed_in_chunks():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(loss.CHUNK + 3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (len(hidden),), generator=generator)
    results = []
    for function in (functools.partial(loss.cross_entropy_sum, backend="auto"),
                     lambda h, w, y: F.cross_entropy(h @ w.T, y, reduction="sum")):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = function(*inputs, labels)
        (0.3 * value).backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results):
        # Sums of fp64 in another order; a chunk left out or taken twice is a tenth.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scaled_loss_sums_to_the_step_s_mean_on_any_layout():
    micro = [(30.0, 0.2, 8, 5), (0.0, 0.0, 0, 0), (7.0, 0.4, 3, 2), (11.0, 0.1, 9, 4)]
    n_labelled, n_real = (sum(m[i] for m in micro) for i in (3, 2))
    mean = sum(m[0] for m in micro) / n_labelled + sum(m[1] * m[2] for m in micro) / n_real
    for ranks in (1, 2, 4):
        shares = [loss.scaled_loss(torch.tensor(ce), torch.tensor(aux), n, step_labelled=n_labelled, step_real=n_real,
                                   dp_world=ranks) for ce, aux, n, _ in micro]
        # DeepSpeed averages over ranks what each sums over its micro-batches.
        torch.testing.assert_close(sum(shares) / ranks, torch.tensor(mean))
