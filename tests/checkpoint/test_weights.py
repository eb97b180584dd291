"""A checkpoint of any layout speaks: its weights, put together on one process, are those that the engine held."""

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minimind_ds import checkpoint
from minimind_ds.checkpoint import weights
from minimind_ds.checkpoint.async_save import sha256
from minimind_ds.checkpoint.weights import opened
from minimind_ds.config.run import parse_run_config
from minimind_ds.convert import export, weight_files
from minimind_ds.inference import chat, export_weights
from minimind_ds.training import starting_weights
from tests.conftest import ROOT
from tests.distributed.ranks.speak import CASES, STEPS

STEP = checkpoint.name_of(STEPS)
GREEDY = ["--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "4", "--show_speed", "0"]


@pytest.fixture(scope="module")
def out(tmp_path_factory, deepspeed):
    """Run folders of two ranks, each with a checkpoint, and the engines' own weights."""
    out = tmp_path_factory.mktemp("speak")
    (out / "held").mkdir()
    for name in ("one", "other"):
        shutil.copy(ROOT / "examples" / "sft_heldout.jsonl", out / "held" / f"{name}.jsonl")
    deepspeed(2, "tests/distributed/ranks/speak.py", str(out), "cases", "whole")
    return out


def alike(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def altered(source: pathlib.Path, to: pathlib.Path, change) -> pathlib.Path:
    """A copy of a checkpoint whose manifest change(manifest) has altered, with its hash put right."""
    shutil.copytree(source, to)
    manifest = json.loads((to / "manifest.json").read_text())
    change(manifest)
    (to / "manifest.json").write_text(json.dumps(manifest))
    (to / "manifest.sha256").write_text(sha256(to / "manifest.json") + "\n")
    return to


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_engine_s_to_the_last_bit_at_every_stage(out, name):
    found, wanted = opened(out / name / "checkpoints" / STEP), load_file(out / f"{name}.safetensors")
    assert alike(found.state, wanted) and all(tensor.dtype == torch.float32 for tensor in found.state.values())
    assert ("lora" in found.metadata) == name.startswith("lora") and found.tokenizer == out / name / "tokenizer"


def test_a_run_s_last_checkpoint_is_its_weights_file(out):
    found, [file] = opened(out / "whole" / "checkpoints"), weight_files.find(out / "whole")
    assert found.path.name == checkpoint.name_of(4) and alike(found.state, load_file(file))
    assert found.metadata == {key: value for key, value in weight_files.read_metadata(file).items() if key != "format"}


def test_chat_and_export_say_of_a_checkpoint_what_they_say_of_the_weights_file(out, tmp_path, capsys):
    said = []
    for weight in (out / "whole", out / "whole" / "checkpoints"):
        assert chat.main(["--weight", str(weight), *GREEDY]) == 0
        said.append(capsys.readouterr().out)
        assert export_weights.main(["--weight", str(weight), "--to", "hf", "--out", str(tmp_path / weight.name)]) == 0
        capsys.readouterr()
    assert said[0] == said[1]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "checkpoints"))
    assert alike(one, other) and {tensor.dtype for tensor in one.values()} == {torch.float32}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "checkpoints" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["lora_0", "lora_3"])
def test_a_lora_checkpoint_speaks_beside_its_base(out, name, capsys, tmp_path):
    step, base = out / name / "checkpoints" / STEP, out / "base"
    assert chat.main(["--weight", str(base), "--lora", str(step), *GREEDY]) == 0
    capsys.readouterr()
    state, _ = export.load(base, lora=opened(step))
    adapters = load_file(out / f"{name}.safetensors")
    moved = "model.layers.1.self_attn.v_proj"
    before = load_file(base / "sft_48.safetensors")[f"{moved}.weight"]
    wanted = before + 1.5 * (adapters[f"{moved}.lora.B.weight"] @ adapters[f"{moved}.lora.A.weight"])
    assert torch.equal(state[f"{moved}.weight"], wanted) and not torch.equal(wanted, before)
    assert chat.main(["--weight", str(step), *GREEDY]) == 2
    assert "holds LoRA adapters, not a whole model" in capsys.readouterr().err
    assert chat.main(["--weight", str(out / "whole"), "--lora", str(step), *GREEDY]) == 2
    assert "the adapters were trained on other weights than these" in capsys.readouterr().err


def test_a_run_starts_from_a_checkpoint_with_its_tokenizer(out):
    home = out / "whole" / "checkpoints"
    asked = parse_run_config(["--config", str(out / "dense_0.yaml"), "--from_weight", str(home)], "sft", {})
    run, found, [note] = starting_weights.open_weights(asked)
    assert run.from_weight == str(home / checkpoint.name_of(4)) and run.from_weight in note
    run, tokenizer, config, _ = starting_weights.tokenizer_and_model(run, found)
    assert run.tokenizer == str(out / "whole" / "tokenizer") and config.vocab_size == tokenizer.vocab_size
    assert alike(starting_weights.load(run, config, found), load_file(weight_files.find(out / "whole")[0]))


def test_a_checkpoint_that_was_moved_brings_its_tokenizer(out, tmp_path, capsys):
    moved = shutil.copytree(out / "bf16_2" / "checkpoints" / STEP, tmp_path / "moved")
    assert opened(moved).tokenizer == moved / "tokenizer"
    assert chat.main(["--weight", str(moved), *GREEDY]) == 0
    # As an earlier release wrote it.
    shutil.rmtree(moved / "tokenizer")
    older = altered(moved, tmp_path / "older", lambda manifest: manifest.update(files={
        name: facts for name, facts in manifest["files"].items() if not name.startswith("tokenizer/")}))
    capsys.readouterr()
    assert chat.main(["--weight", str(older), *GREEDY]) == 2
    assert "no tokenizer beside the weights: name one with --tokenizer" in capsys.readouterr().err
    assert chat.main(["--weight", str(older), "--tokenizer", str(out / "bf16_2" / "tokenizer"), *GREEDY]) == 0


def test_what_is_not_there_or_not_whole_is_one_line(out, tmp_path):
    home = out / "bf16_1" / "checkpoints"
    with pytest.raises(ValueError, match=f"step_00000009: no such checkpoint; in .* there is {STEP}$"):
        opened(home / "step_00000009")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds none"):
        opened(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="holds no .safetensors file; its run goes on, .* names its newest"):
        weight_files.find(tmp_path)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(ValueError, match="newest checkpoint, .*/best its best weights so far$"):
        weight_files.find(tmp_path)
    torn = shutil.copytree(home / STEP, tmp_path / "torn")
    file = next((torn / "state").glob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="was altered: its SHA-256 is not the manifest's"):
        opened(torn)


@pytest.mark.parametrize("change, said", [
    (lambda manifest: manifest["layout"].update(ranks=1), "does not hold the whole of model.embed_tokens.weight"),
    (lambda manifest: manifest["identity"].update({"model.hidden_size": 64}), "it does not hold the whole of"),
    (lambda manifest: manifest.pop("layout"), "holds no MiniMind as this program writes them .KeyError: 'layout'"),
    (lambda manifest: manifest["identity"].update({"LoRA": "rank 2"}), "an earlier release wrote it")])
def test_a_manifest_that_says_what_is_not_so_is_one_line(out, tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as caught:
        opened(altered(out / "bf16_1" / "checkpoints" / STEP, tmp_path / "altered", change))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_deleted_while_it_is_read_is_named_and_the_newest_is_looked_for_again(out, tmp_path, monkeypatch):
    home = tmp_path / "run" / "checkpoints"
    home.mkdir(parents=True)
    read_weights = weights.reading.read_weights

    def deleted_meanwhile(path, *args, **kwargs):
        if path.name == STEP:
            # What retention does, a newer one being there.
            shutil.copytree(out / "bf16_2" / "checkpoints" / STEP, home / "step_00000003")
            checkpoint.retain(home / "step_00000003", keep=1)
        return read_weights(path, *args, **kwargs)

    monkeypatch.setattr(weights.reading, "read_weights", deleted_meanwhile)
    for named in (home / STEP, home):
        shutil.rmtree(home)
        shutil.copytree(out / "bf16_2" / "checkpoints" / STEP, home / STEP)
        if named == home:
            assert opened(named).path == home / "step_00000003"
        else:
            with pytest.raises(ValueError, match=f"{STEP} was deleted while it was read: its run goes on"):
                opened(named)
