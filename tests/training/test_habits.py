"""Runs started as MiniMind's users start them: weights by a bare name, --from_resume 0 and 1, learning rates."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from minimind_ds.config import rates
from minimind_ds.config.model import ModelConfig
from minimind_ds.config.run import parse_run_config
from minimind_ds.convert import minimind, weight_files
from minimind_ds.distributed.world import World
from minimind_ds.training.boards import wandb_id
from minimind_ds.training.loop import write_run_folder
from minimind_ds.training.prepare import choose, find_start_weights, prepare
from minimind_ds.training.resume import ResumePoint, look_for_resume_point
from tests.conftest import ROOT, cache_dir, environment

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SIZES = ["--hidden_size", "32", "--num_hidden_layers", "1"]
SMALL = ModelConfig(hidden_size=32, num_hidden_layers=1)


def parsed(*flags, program="sft"):
    return parse_run_config([str(flag) for flag in flags], program, {"save_weight": program})


def write_weights(path, config=SMALL):
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = dict(minimind.fresh(config))
    if path.suffix == ".pth":
        torch.save({name: tensor.half() for name, tensor in minimind.to_minimind(state, config).items()}, path)
    else:
        weight_files.save_safetensors(path, state, config)


def test_a_run_from_pretrain_takes_its_weights_and_rate_and_zero_does_not_delete_it(tmp_path, monkeypatch):
    write_weights(tmp_path / "out" / "pretrain_32.pth")
    flags = ["--deepspeed", "zero0", "--cache_dir", cache_dir(), "--dtype", "float32", "--batch-size", "2",
             "--max_seq_len", "64", "--pack_len", "128", *SIZES, "--from_weight", "pretrain", "--save_dir", "runs/sft",
             "--max_steps", "2", "--save_interval", "2", "--from_resume", "0", "--warmup_ratio", "0.5"]
    done = subprocess.run([sys.executable, str(ROOT / "launch" / "sft.py"), *flags], cwd=tmp_path, env=environment(),
                          text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--from_weight pretrain: starts from out/pretrain_32.pth" in done.stdout
    assert "learning rate 1e-05, the default of full SFT that starts from weights" in done.stdout
    folder = tmp_path / "runs" / "sft"
    values = yaml.safe_load((folder / "run.yaml").read_text())
    assert values["learning_rate"] == 1e-5 and values["preset"] == "minimind-3"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([1e-5, 1e-6])
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--from_resume none starts over and deletes step_00000002 and the lines"):
        look_for_resume_point(prepare("sft", flags, ALONE))
    assert look_for_resume_point(prepare("sft", [*flags, "--from_resume", "1"], ALONE)).finished
    assert sorted(folder.rglob("*")) == before


def test_a_bare_name_is_looked_for_beside_the_run_and_what_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = parsed(*SIZES, "--from_weight", "pretrain", "--save_dir", "runs/sft")
    said = "no such file or folder, and no pretrain_32.safetensors or pretrain_32.pth in runs/sft or out; name a path$"
    with pytest.raises(ValueError, match="^--from_weight pretrain: " + said):
        find_start_weights(run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain_768.pth").touch()
    with pytest.raises(ValueError, match="; there is out/pretrain_768.pth: name its size .--preset.*, or the path$"):
        find_start_weights(run)
    for path in ("out/pretrain_32_moe.pth", "out/pretrain_32.pth", "out/pretrain_32.safetensors",
                 "runs/sft/pretrain_32.pth"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        moe = ["--use_moe", "1"] if "moe" in path else []
        found, notes = find_start_weights(parsed(*run_flags(run), *moe))
        assert found.from_weight == path and path in notes[0]
    (tmp_path / "pretrain").mkdir()
    assert find_start_weights(run) == (run, [])


def run_flags(run):
    return [*SIZES, "--from_weight", run.from_weight, "--save_dir", run.save_dir]


@pytest.mark.parametrize("flags, program, said", [
    (["--from_weight", "w.pth"], "sft", "learning rate 1e-05, the default of full SFT"),
    (["--from_weight", "w.pth", "--lr", "5e-4"], "sft", r"rate 0.0005 \(--lr\) is above 1e-05.*rates forget"),
    (["--from_weight", "w.pth", "--lr", "1e-5"], "sft", None), (["--lr", "1e-3"], "sft", None),
    ([], "sft", "learning rate 0.0005, the default of SFT that starts from nothing"), ([], "pretrain", None),
    (["--from_weight", "w.pth", "--lora_rank", "4"], "sft", "learning rate 0.0001, the default of LoRA")])
def test_the_start_says_who_chose_the_rate_and_what_a_large_one_does(flags, program, said):
    notes = rates.notes(program, parsed(*flags, program=program))
    assert len(notes) == (said is not None)
    for note in notes:
        assert re.search(said, note), note


def test_a_run_goes_on_with_the_rate_of_its_checkpoints(tmp_path):
    """Releases before these defaults began SFT from weights with 5e-4, and their checkpoints say so."""
    flags = ["--preset", "debug", "--from_weight", "w.pth", "--save_dir", tmp_path]
    manifest = tmp_path / "checkpoints" / "step_00000010" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"identity": {"learning_rate": 5e-4}}))
    run, _ = choose(parsed(*flags), ALONE)
    assert run.learning_rate == 5e-4
    assert rates.notes("sft", run) == ["learning rate 0.0005, as in the run that goes on; a new one would take 1e-05"]
    for more, rate in ((["--learning_rate", "2e-6"], 2e-6), (["--from_resume", "none"], 1e-5),
                       (["--from_resume", manifest.parent], 5e-4)):
        assert choose(parsed(*flags, *more), ALONE)[0].learning_rate == rate
    manifest.write_text("{")
    assert choose(parsed(*flags), ALONE)[0].learning_rate == 1e-5


def test_a_run_that_starts_over_has_a_curve_of_its_own_at_weights_and_biases(tmp_path):
    prepared = prepare("sft", ["--preset", "debug", "--deepspeed", "zero0", "--dtype", "fp32", "--save_dir",
                               str(tmp_path), "--cache_dir", cache_dir()], ALONE)
    first = wandb_id(tmp_path)
    write_run_folder(prepared, ResumePoint(path=tmp_path / "checkpoints" / "step_00000005", step=5))
    assert wandb_id(tmp_path) == first
    write_run_folder(prepared, ResumePoint())
    assert not (tmp_path / "wandb_id").exists() and wandb_id(tmp_path) != first
