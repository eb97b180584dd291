"""LoRA under every ZeRO stage: one loss curve, adapters alone, resumed bit for bit, taken by the programs."""

import json

import pytest
from safetensors.torch import load_file

from minimind_ds.inference import chat, score
from tests.conftest import ROOT
from tests.routes import assert_clear

pytestmark = pytest.mark.numeric

# Stage 1 is stage 2's code.
STAGES = (0, pytest.param(1, marks=pytest.mark.slow), 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, deepspeed, request):
    """(one rank at stage 0, two ranks at each stage): their facts, and the folder of the second."""
    found, each = [], "0123" if request.config.getoption("--slow") else "023"
    for ranks, accumulation, stages in ((1, 4, "0"), (2, 2, each)):
        out = tmp_path_factory.mktemp(f"lora_{ranks}")
        deepspeed(ranks, "tests/distributed/ranks/lora.py", str(out), str(accumulation), stages)
        found.append(json.loads((out / "facts.json").read_text()))
    return (*found, out)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_curve_of_one_rank(runs, model, stage):
    control, case = runs[0][f"{model}_0"], runs[1][f"{model}_{stage}"]
    assert_clear(control["gaps"])
    assert control["loss"][-1] < control["loss"][0] - 0.1
    # Law 3's.
    for key in ("loss", "aux", "norm"):
        assert case[key] == pytest.approx(control[key], rel=1e-5), key


@pytest.mark.parametrize("model", ["dense", "moe", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_train_and_only_they_have_optimizer_states(runs, model, stage):
    case = runs[1][f"{model}_{stage}"]
    assert case["base kept"] and case["written"] and not case["unmoved adapters"]
    assert case["adapters"] < case["all"] / 50
    # Two moments a number, shared by two ranks from stage 1 on; every adapter divides evenly here.
    assert case["numbers"] == (2 * case["adapters"] if stage == 0 else case["adapters"])


@pytest.mark.parametrize("model", ["dense", "moe", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_bit_for_bit(runs, model, stage):
    assert runs[1][f"{model}_{stage}"]["resumed alike"]


def test_a_checkpoint_is_not_resumed_with_other_adapters_or_none(runs):
    said = runs[1]["refusals"]
    assert len(said) == 3 and all("its LoRA is" in line for line in said)
    assert "this run's is None" in said[0] and "its LoRA is None" in said[1] and "'rank 2, alpha 2" in said[2]


def test_a_run_writes_its_adapters_alone_and_the_programs_take_them(runs, capsys):
    out = runs[2]
    files = [path.name for path in (out / "run").glob("*.safetensors")]
    assert files == ["sft_lora_48_moe.safetensors"]
    adapters = load_file(out / "run" / files[0])
    assert all(name.endswith((".lora.A.weight", ".lora.B.weight")) and tensor.any()
               for name, tensor in adapters.items()) and len(adapters) == 8
    base = str(out / "base_moe.safetensors")
    together = ["--weight", base, "--lora", str(out / "run"), "--tokenizer", str(out / "run" / "tokenizer")]
    chats, scores = chat.main, score.main
    assert chats([*together, "--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "3"]) == 0
    capsys.readouterr()
    assert scores([*together, "--data_path", str(ROOT / "examples" / "sft_heldout.jsonl"), "--limit", "2",
                   "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert chats([*together[:3], str(out / "absent"), *together[4:], "--prompt", "Hi"]) == 2
    assert "absent: no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="use_moe is True there and False here"):
        chat.load_model(str(out / "base_dense.safetensors"), lora=str(out / "run"))
