"""Law 4: logits, loss, balance loss and every gradient are MiniMind's, through every backend.

Triton's kernels run in its interpreter, which needs a process of its own: tests/kernels/triton/model_facts.py.
"""

import json
import os

import pytest
import torch
from safetensors import safe_open

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate
from minimind_ds.convert import minimind

pytestmark = pytest.mark.numeric

# Law 4's.  Measured with and without vectors: logits 3e-7, gradients 1.1e-6.
BOUND = 1e-5
# A router of one choice learns from the balance loss alone: of the cross-entropy's gradient, which is 1e-3 where there
# are two choices, the rounding stays, 2e-10.  Smaller gradients than this are held to its share.
LEAST = 1e-4
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "sdpa", "compiled"]


@pytest.fixture(params=["dense", "moe_top1", "moe_top2"])
def golden(request, shared):
    with safe_open(shared / "golden" / f"{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, ModelConfig(**json.loads(file.metadata()["config"]))


def part(tensors: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_batch(tensors: dict):
    # MiniMind shifts inside the model; our labels are shifted already.
    none = torch.tensor([-100])
    rows = [[Sample(ids, torch.cat((labels[1:], none)))]
            for ids, labels in zip(tensors["input_ids"], tensors["labels"])]
    return collate(rows, tensors["input_ids"].shape[1])


def loaded(tensors: dict, config: ModelConfig, kernels: str) -> MiniMindForCausalLM:
    model = MiniMindForCausalLM(config, kernels)
    model.load_minimind(part(tensors, "weight."))
    return model


@pytest.mark.parametrize("kernels", BACKENDS)
def test_logits_losses_and_gradients_are_minimind_s(golden, kernels):
    tensors, config = golden
    model = loaded(tensors, config, kernels)
    out = model(golden_batch(tensors), return_logits=True)
    loss = out.loss_sum / out.n_labelled
    (loss + out.aux_loss).backward()
    assert (out.logits - tensors["logits"]).abs().max() <= BOUND
    assert (loss - tensors["loss"]).abs() <= BOUND
    assert (out.aux_loss - tensors["aux_loss"]).abs() <= BOUND * tensors["aux_loss"].abs()
    grads = minimind.to_minimind({name: p.grad for name, p in model.named_parameters()}, config)
    worst = {name: ((grads[name] - theirs).abs().max() / theirs.abs().max().clamp(min=LEAST)).item()
             for name, theirs in part(tensors, "grad.").items()}
    assert max(worst.values()) <= BOUND, max(worst, key=worst.get)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_minimind_s_rows_packed_into_one_give_the_same_logits(golden, kernels):
    tensors, config = golden
    ids = tensors["input_ids"]
    samples = [Sample(row, torch.full_like(row, -100)) for row in ids]
    with torch.no_grad():
        logits = loaded(tensors, config, kernels)(collate([samples], ids.numel()), return_logits=True).logits
    assert (logits.view_as(tensors["logits"]) - tensors["logits"]).abs().max() <= BOUND


def test_our_minimind_names_are_the_golden_s(golden):
    tensors, config = golden
    ours = minimind.to_minimind(dict(minimind.fresh(config)), config)
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in part(tensors, "weight.").items()}
