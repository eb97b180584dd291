"""The baseline computes what MiniMind computes: its goldens, in MiniMind's own names."""

import json

import pytest
import torch
from safetensors import safe_open

from minimind_ds.bench.throughput.padded import PaddedMiniMind
from minimind_ds.config.model import ModelConfig

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("name", ["dense", "moe_top1", "moe_top2"])
def test_the_padded_baseline_equals_minimind(shared, name):
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as f:
        golden = {key: f.get_tensor(key) for key in f.keys()}
        config = ModelConfig(**json.loads(f.metadata()["config"]))
    model = PaddedMiniMind(config).train()
    model.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    # MiniMind shifts inside; here targets are given.
    targets = torch.cat([golden["labels"][:, 1:], torch.full((len(golden["labels"]), 1), -100)], dim=1)
    loss, aux, logits = model(golden["input_ids"], targets)
    (loss + aux).backward()
    # Law 4's; gradients as small as a router's of one choice by what is lost where others cancel.
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    assert aux.item() == pytest.approx(golden["aux_loss"].item(), rel=1e-5)
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-5, atol=1e-5)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, golden[f"grad.{key}"], rtol=1e-4, atol=1e-6)
