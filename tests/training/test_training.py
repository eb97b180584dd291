"""The training programs, started as a user starts them: what they print, write and refuse to go on with."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minimind_ds.convert import vocabulary, weight_files
from tests.conftest import cache_dir

pytestmark = pytest.mark.numeric

MODEL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96}
KEYS = {"step", "epoch", "loss", "aux_loss", "lr", "grad_norm", "tokens", "labelled_tokens", "packing_fill",
        "tokens_per_s", "step_s", "data_s", "forward_s", "backward_s"}


def flags(tmp_path, stage, **values):
    config = tmp_path / "run.yaml"
    config.write_text("preset: debug\nmodel: " + json.dumps({**MODEL, **values.pop("model", {})}))
    values = {"config": config, "deepspeed": f"ds_configs/zero{stage}.json", "save_dir": tmp_path / "run",
              "cache_dir": cache_dir(), "max_seq_len": 96, "pack_len": 192, "batch_size": 2, **values}
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def metrics(tmp_path):
    """The lines of steps and evaluations."""
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, deepspeed):
    """A 2-rank run with everything switched on: held-out share, TensorBoard, offline wandb, accumulation, MoE."""
    tmp_path = tmp_path_factory.mktemp("trained")
    words = flags(tmp_path, 2, accumulation_steps=2, max_steps=12, eval_fraction=0.1, eval_interval=6, save_interval=5,
                  use_wandb="true", use_tensorboard="true", learning_rate=0.003, model={"use_moe": True},
                  gradient_checkpointing="true", dtype="fp32")
    done = deepspeed(2, "launch/sft.py", *words, WANDB_MODE="offline", WANDB_SILENT="true")
    return tmp_path, done


def test_metrics_have_every_key_and_every_step_once(trained):
    lines = metrics(trained[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(KEYS <= set(line) for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] and all(math.isfinite(line["loss"]) for line in steps)
    assert all(line["packing_fill"] > 0.9 and line["aux_loss"] > 0 and line["grad_norm"] > 0 for line in steps)
    # The loss starts at the entropy of a guess over the vocabulary, whatever the weights that were drawn.
    assert steps[0]["loss"] == pytest.approx(math.log(6400), abs=0.3)


def test_the_held_out_set_is_evaluated_during_training(trained):
    evals = [line for line in metrics(trained[0]) if "eval_loss" in line]
    assert [line["step"] for line in evals] == [6, 12] and evals[1]["eval_loss"] < evals[0]["eval_loss"]


def test_the_run_folder_holds_what_the_contract_names(trained):
    run = trained[0] / "run"
    assert {"metrics.jsonl", "run.yaml", "ds_config.json", "checkpoints", "tokenizer", "DONE",
            "sft_48_moe.safetensors"} <= {p.name for p in run.iterdir()}
    resolved = yaml.safe_load((run / "run.yaml").read_text())
    assert resolved["accumulation_steps"] == 2 and resolved["dtype"] == "fp32"
    assert "auto" not in (run / "ds_config.json").read_text()
    assert list((run / "tensorboard").iterdir()) and list((run / "wandb").glob("offline-run-*"))


def test_the_choices_of_the_program_are_said_once(trained):
    said = trained[1].stdout
    for words in ("kernels: all = sdpa ", "ZeRO stage 2, fp32, AdamW\n", "step: 2 ranks x 2 rows x 2 micro-", "% full",
                  "sft_48_moe.safetensors"):
        assert said.count(words) == 1, (words, said)


def test_pretraining_runs_on_text_and_its_weights_start_sft_with_rows_for_more_ids(tmp_path, deepspeed):
    words = flags(tmp_path, 0, max_steps=4, dtype="fp32")
    deepspeed(1, "launch/pretrain.py", *words)
    weights = tmp_path / "run" / "pretrain_48.safetensors"
    assert weights.exists() and all(line["labelled_tokens"] > line["tokens"] * 0.8 for line in metrics(tmp_path))
    (tmp_path / "sft").mkdir()
    started = deepspeed(1, "launch/sft.py", *flags(tmp_path / "sft", 3, max_steps=1, dtype="fp32", learning_rate=0,
                                                   from_weight=tmp_path / "run", grow_vocab=96))
    assert "with which" in started.stdout and "32 rows are added" in started.stdout
    # A step of length 0 later they are still the same, to the last bit, and so are the rows that were added.
    then, path = load_file(weights), tmp_path / "sft" / "run" / "sft_48.safetensors"
    now = load_file(path)
    grown = vocabulary.grow(then, 6432, seed=42)
    assert grown.keys() == now.keys() and all(torch.equal(grown[name], now[name]) for name in grown)
    assert torch.equal(now["model.embed_tokens.weight"][:6400], then["model.embed_tokens.weight"])
    assert weight_files.read_config(path).vocab_size == 6432
    assert vocabulary.recorded(path) == vocabulary.recorded(weights) is not None


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_lines(tmp_path, deepspeed):
    done = deepspeed(1, "launch/sft.py", *flags(tmp_path, 2, max_steps=9, learning_rate=1e18, warmup_ratio=0,
                                                grad_clip=0, dtype="fp32"), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    step = len(metrics(tmp_path)) + 1
    assert f"step {step} " in said and "not finite" in said and "sft_train.jsonl" in said and "lines" in said
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, deepspeed, request):
    out = tmp_path_factory.mktemp("spoilt")
    which = "all" if request.config.getoption("--slow") else "some"
    deepspeed(2, "tests/distributed/ranks/non_finite.py", str(out), which)
    return out


def test_a_step_whose_loss_is_nan_or_a_spike_is_skipped_whole_and_the_next_one_is_taken(spoilt):
    results = [json.loads((spoilt / f"skipped_{rank}.json").read_text()) for rank in range(2)]
    for case in results[0]:
        first, other = results[0][case], results[1][case]
        assert first["moved"] == [True, False, False, True] and first["updates"] == [1, 1, 1, 2], (case, first)
        assert first["lines"] == other["lines"] and other["updates"] == [1, 1, 1, 2], case
        assert [line["skipped"] for line in first["lines"]] == [None, True, True, None]
        assert first["lines"][1]["loss"] is None and "is not finite" in first["lines"][1]["note"]
        assert "standard deviations" in first["lines"][2]["note"] and "lines" in first["lines"][2]["note"]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(spoilt, request):
    for rank in range(2):
        results = json.loads((spoilt / f"non_finite_{rank}.json").read_text())
        # All of a gradient at 4 stages, in 2 precisions or in turns; one element in 16 set-ups, in 3 ways or in turns.
        assert len(results) == (8 + 3 * 16 if request.config.getoption("--slow") else 4 + 16)
        for case, found in results.items():
            said = found["said"]
            assert "gradient is not finite" in said and "step 2 " in said and "lines" in said, (case, said)
            assert found["state"] > 0 and not found["state_moved"], case
            if rank == 0:
                assert found["good_moved"] and not found["bad_moved"], case
