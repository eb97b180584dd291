"""Facts about whole models on the Triton backend, in the honest interpreter; test_triton_model.py runs them:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/model_facts.py
"""

import dataclasses

import pytest
import torch

from minimind_ds import PRESETS, MiniMindForCausalLM, ModelConfig, Sample, collate, kernels
from minimind_ds.bench.kernels import interpreter  # noqa: F401
from tests.model.test_golden import *  # noqa: F403  (the goldens, through the backend that this process can run)


def rows(vocab_size):
    """Two packed rows of four samples, padded at their ends."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (1, 17, 20, 9):
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        samples.append(Sample(ids, torch.cat((torch.full((length // 3,), -100), ids[length // 3 + 1:],
                                              torch.tensor([-100])))[:length]))
    return [samples[:2], samples[2:]]


def losses(config: ModelConfig, backend: str, steps: int) -> list[float]:
    """Loss and balance loss of each of a few AdamW steps."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config, kernels=backend, balance="row").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, found = collate(rows(config.vocab_size), 32), []
    for _ in range(steps):
        out = model(batch)
        loss = out.loss_sum / out.n_labelled
        (loss + out.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.item(), out.aux_loss.item()]
    return found


# Whole presets are minutes of interpreting: here they lose all layers but one, and width.
@pytest.mark.parametrize("layers, steps", [(1, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("preset", ["debug", "debug-moe"])
def test_training_on_triton_follows_the_reference(preset, layers, steps):
    narrow = {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 160} if layers == 1 else {}
    config = dataclasses.replace(PRESETS[preset], num_hidden_layers=layers, vocab_size=800, **narrow)
    ours, theirs = losses(config, "triton", steps), losses(config, "reference", steps)
    assert theirs[-2] < theirs[0] and ours == pytest.approx(theirs, rel=1e-4)


def test_triton_runs_every_operation_and_auto_takes_it_where_it_can():
    choice = kernels.resolve("triton", "cpu", torch.float32, kernels.KernelRequirements(96))
    assert {getattr(choice, op) for op in kernels.OPS} == {"triton"}
    assert kernels.resolve("auto", "cpu", torch.float32, kernels.KernelRequirements(96)).attention == "triton"
    for needs in (kernels.KernelRequirements(96, 0.1), kernels.KernelRequirements(256)):
        assert kernels.resolve("auto", "cpu", torch.float32, needs).attention == "sdpa"
        with pytest.raises(ValueError, match="attention = triton cannot run here"):
            kernels.resolve("triton", "cpu", torch.float32, needs)
