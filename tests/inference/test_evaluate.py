"""launch/evaluate.py gives what the training's own evaluation gives, of weights in any form, alone and on ranks."""

import json
import math
import pathlib
import shutil

import pytest
import torch

from minimind_ds import Sample, collate
from minimind_ds.checkpoint import name_of
from minimind_ds.config import program_flags
from minimind_ds.convert import export, weight_files
from minimind_ds.data.packing import IGNORE
from minimind_ds.inference import evaluate
from minimind_ds.model import loss
from tests.conftest import ROOT, cache_dir

pytestmark = pytest.mark.numeric


def held(out) -> list[str]:
    return [str(out / "held" / name) for name in ("one.jsonl", "other.jsonl")]


@pytest.fixture(scope="module")
def out(tmp_path_factory, deepspeed):
    """Two runs of two ranks with evaluations of two files, and what the program on two ranks says of the first."""
    out = tmp_path_factory.mktemp("evaluate")
    (out / "held").mkdir()
    lines = (ROOT / "examples" / "sft_heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for path, some in zip(held(out), (lines[:60], lines[60:150])):
        pathlib.Path(path).write_text("".join(some), encoding="utf-8")
    deepspeed(2, "tests/distributed/ranks/speak.py", str(out), "whole", "adapters")
    said = deepspeed(2, "launch/evaluate.py", "--weight", str(out / "whole"), "--data_path", *held(out), "--cache_dir",
                     str(out / "cache"), "--out", str(out / "ranks.json")).stdout
    (out / "said").write_text(said)
    return out


@pytest.fixture
def run(tmp_path, capsys):
    """run(*flags) -> (exit code, result or None, stdout, stderr), in this process alone."""
    def run(*flags):
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        code = evaluate.main(["--cache_dir", cache_dir(), "--out", str(path), *map(str, flags)])
        return code, json.loads(path.read_text()) if path.exists() else None, *capsys.readouterr()

    return run


def trained(folder) -> dict:
    """The last evaluation in a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line][-1]


def losses(result: dict) -> list[float]:
    return [result["all"]["loss"], *(source["loss"] for source in result["sources"])]


def own_losses(folder) -> list[float]:
    line = trained(folder)
    return [line["eval_loss"], line["eval_loss/one"], line["eval_loss/other"]]


def test_on_the_run_s_ranks_the_numbers_are_the_training_s_to_the_last_digit(out):
    result = json.loads((out / "ranks.json").read_text())
    assert losses(result) == own_losses(out / "whole")
    assert result["all"]["labelled_tokens"] == trained(out / "whole")["eval_tokens"]
    assert (result["ranks"], result["dtype"], result["pack_len"], result["batch_size"]) == (2, "bf16", 256, 2)
    said = (out / "said").read_text()
    assert f"as in {out / 'whole' / 'run.yaml'}: max_seq_len 128, too_long cut, " in said and "packing 1, " in said
    head, *rows = said[said.index("token accuracy"):].splitlines()[:4]
    assert head == "token accuracy  labelled tokens" and [row.split()[0] for row in rows] == ["one", "other", "all"]


def test_alone_with_adapters_beside_their_base_they_are_the_training_s_to_1e_6(out, run):
    for adapters in (out / "adapters", out / "adapters" / "checkpoints"):
        code, result, _, err = run("--weight", out / "base", "--lora", adapters, "--data_path", *held(out))
        assert code == 0 and (result["dtype"], result["ranks"]) == ("fp32", 1)
        assert losses(result) == pytest.approx(own_losses(out / "adapters"), rel=1e-6)
        # What takes long is said before.
        assert err.endswith("evaluating 150 samples …\n")
    # Without them it is another model.
    base = run("--weight", out / "base", "--data_path", *held(out), "--max_seq_len", "128")[1]
    assert abs(losses(base)[0] - losses(result)[0]) > 1e-2


def test_the_best_weights_of_a_run_are_evaluated_as_the_run_s(out, run, tmp_path):
    shutil.copytree(out / "whole", tmp_path / "best", ignore=shutil.ignore_patterns("checkpoints", "run.yaml"))
    shutil.copy(out / "whole" / "run.yaml", tmp_path)
    best, last = (run("--weight", folder, "--data_path", held(out)[0])[1]
                  for folder in (tmp_path / "best", out / "whole"))
    assert (best["dtype"], best["pack_len"]) == ("bf16", 256) and losses(best) == losses(last)


def test_weights_say_the_same_in_any_form_packed_or_not(out, run, tmp_path):
    file, = weight_files.find(out / "whole")
    export.run(out / "whole", "hf", tmp_path / "hf", dtype=None, preset=None, tokenizer=None, overwrite=False)
    flags = ["--data_path", held(out)[0], "--dtype", "fp32", "--max_seq_len", "128"]
    found = [run("--weight", weight, *flags, *more)[1] for weight, more in (
        (file, []), (out / "whole" / "checkpoints" / name_of(4), []), (tmp_path / "hf", []),
        (file, ["--packing", "0", "--batch_size", "7"]))]
    for result in found:
        assert losses(result) == pytest.approx(losses(found[0]), rel=1e-6)
        assert result["all"]["accuracy"] == pytest.approx(found[0]["all"]["accuracy"], abs=2e-3)
        assert result["all"]["perplexity"] == pytest.approx(math.exp(result["all"]["loss"]), rel=1e-12)
    # A Hugging Face folder has no run beside it.
    assert (found[2]["pack_len"], found[0]["pack_len"], found[3]["packing"]) == (4096, 256, False)


def test_accuracy_counts_the_labels_that_have_the_largest_logit(out, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    state, config = export.load(out / "whole")
    model, drawn = evaluate.build(state, config, None, "reference"), torch.Generator().manual_seed(3)
    ids = torch.randint(0, 6400, (60,), generator=drawn)
    # Every third label is what the model itself would say.
    blank = collate([[Sample(ids, torch.full_like(ids, IGNORE))]], 64)
    said = model(blank, return_logits=True).logits[0, :60].argmax(-1)
    other = (said + 1) % 6400
    labels = torch.where(torch.arange(60) % 3 == 0, said, other)
    labels[-5:] = IGNORE
    found = model(collate([[Sample(ids, labels)]], 64), count_correct=True)
    assert (found.n_labelled, int(found.n_correct)) == (55, 19)


def test_a_text_file_is_evaluated_as_text(out, run):
    text = ROOT / "examples" / "pretrain.jsonl"
    code, result, _, _ = run("--weight", out / "whole", "--data_path", text, "--kind", "text", "--too_long", "cut")
    assert code == 0 and result["kind"] == "text" and result["all"]["loss"] > 0


@pytest.mark.parametrize("flags, said", [
    (["--weight", "absent"], "absent"), (["--weight", "base", "--lora", "whole"], "no LoRA adapters"),
    (["--weight", "adapters"], "holds LoRA adapters, not a whole model"),
    (["--weight", "whole", "--device", "nowhere"], "--device nowhere"),
    (["--weight", "whole", "--out", "none/result.json"], "there is no folder none"),
    (["--weight", "whole", "--max_seq_len", "1"], "--max_seq_len is 1"),
    (["--weight", "whole", "--kernels", "triton"], "triton"),
    (["--weight", "whole", "--kind", "text", "--too_long", "split"], "text")])
def test_a_mistake_is_one_line(out, run, monkeypatch, flags, said):
    monkeypatch.chdir(out)
    code, result, _, err = run("--data_path", held(out)[0], *flags)
    assert code == 2 and result is None and err.count("\n") == 1 and said in err, err


def test_help_names_the_training_s_flags_with_their_defaults():
    text = " ".join(program_flags.evaluate().format_help().split())
    assert "length of a packed row, in tokens (default: 4096)" in text and "run.yaml beside the weights" in text


def test_settings_are_said_as_flags_have_them():
    said = [evaluate.spelt(value) for value in (True, False, 0.0, 1.0, 1, "cut")]
    assert said == ["1", "0", "0.0", "1.0", "1", "cut"]
