"""Which tokenizer weights were trained with: told apart by what its ids are, not by the file that holds it."""

import json

import pytest
import torch

from minimind_ds import ModelConfig, load_tokenizer
from minimind_ds.convert import export, minimind, vocabulary, weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.data.tokenizer import train_tokenizer
from minimind_ds.inference import chat

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16)
TEXTS = [f"{word} and {other} are words, and so is {word}{other}" for word in "hot cold up down left right".split()
         for other in "sea salt sun moon star sky".split()]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(TEXTS, vocab_size=330, out=tmp_path_factory.mktemp("tok") / "a.model")


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder")
    tok.save_hf(out)
    return out


def changed(folder, out, change):
    """A copy of a tokenizer folder, its two files as `change` leaves them."""
    out.mkdir()
    spec, config = (json.loads((folder / name).read_bytes()) for name in ("tokenizer.json", "tokenizer_config.json"))
    change(spec, config)
    (out / "tokenizer.json").write_text(json.dumps(spec))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(out)


def add_token(spec, config):
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": size, "content": "<new>"})


def swap(first, second):
    def change(spec, config):
        merges = spec["model"]["merges"]
        merges[first], merges[second] = merges[second], merges[first]
    return change


SAME = {"as it is": lambda spec, config: None, "another end token": lambda spec, config: config.update(
    eos_token="<|endoftext|>"), "one more token": add_token,
    "another order and spelling": lambda spec, config: spec["model"].update(
        vocab=dict(reversed(spec["model"]["vocab"].items())), merges=[
            " ".join(pair) for pair in spec["model"]["merges"]]),
    "nothing that text meets": lambda spec, config: (spec.update(
        post_processor=None, padding=None, version="1.0"), config.update(model_max_length=7, chat_template="x"))}
OTHER = {"other text": lambda spec, config: spec["model"]["vocab"].update(
    zip(list(spec["model"]["vocab"])[-2:], list(spec["model"]["vocab"].values())[:-3:-1])),
    "cuts text into others": lambda spec, config: spec["model"].update(merges=spec["model"]["merges"][:-1]),
    "into others: far merges": swap(1, -1), "into others: near merges": swap(-2, -1),
    "into others: normaliser": lambda spec, config: spec.update(normalizer={"type": "Sequence", "normalizers": [
        spec["normalizer"], {"type": "NFC"}]}),
    "into others: pre-tokenizer": lambda spec, config: spec.update(
        pre_tokenizer={"type": "Digits", "individual_digits": True})}


@pytest.mark.parametrize("name", SAME)
def test_what_gives_the_same_ids_for_the_same_text_is_no_other_tokenizer(name, tok, folder, tmp_path):
    theirs = changed(folder, tmp_path / "t", SAME[name])
    assert theirs.fingerprint != tok.fingerprint and Vocabulary.of(tok).difference(theirs) is None
    back = Vocabulary.of(theirs).difference(tok)
    assert back == ("it has 330 ids instead of 331" if name == "one more token" else None)


@pytest.mark.parametrize("name", OTHER)
def test_another_tokenizer_of_the_same_size_is_told_apart(name, tok, folder, tmp_path):
    theirs = changed(folder, tmp_path / "t", OTHER[name])
    assert theirs.vocab_size == tok.vocab_size and name.split(":")[0] in Vocabulary.of(tok).difference(theirs)


def test_what_earlier_releases_wrote_of_a_tokenizer_is_understood(tok, folder, tmp_path):
    config = ModelConfig(**SIZES, vocab_size=tok.vocab_size)
    now = Vocabulary.of(tok)
    then = {"size": now.size, "pieces": now.pieces, "encoding": vocabulary.probed(tok)}
    weight_files.save_safetensors(tmp_path / "a.safetensors", weights(config), config, json.dumps(then))
    old = vocabulary.recorded(tmp_path / "a.safetensors")
    assert old.difference(tok) is old.difference(load_tokenizer(folder)) is None
    for name in ("other text", "cuts text into others"):
        assert name in old.difference(changed(folder, tmp_path / name, OTHER[name]))


def weights(config):
    torch.manual_seed(0)
    return dict(minimind.fresh(config))


def test_a_file_that_was_moved_still_knows_its_tokenizer(tok, folder, tmp_path):
    config = ModelConfig(**SIZES, vocab_size=tok.vocab_size)
    file = tmp_path / "moved" / "sft_16.safetensors"
    file.parent.mkdir()
    weight_files.save_safetensors(file, weights(config), config, Vocabulary.of(tok).to_json())
    assert vocabulary.recorded(file) == Vocabulary.of(tok)
    assert export.tokenizer_of(file, str(folder)).vocab_size == 330
    other = train_tokenizer([text[::-1] for text in TEXTS], vocab_size=330, out=tmp_path / "other" / "tokenizer.model")
    other.save(file.parent / "tokenizer")
    for speak in (chat.load_model, lambda path: export.run(path, "hf", tmp_path / "out", dtype=None, preset=None,
                                                           tokenizer=None, overwrite=False)):
        with pytest.raises(ValueError, match="weights of another tokenizer than .*: its ids stand for other text"):
            speak(str(file))
    assert not (tmp_path / "out").exists()
    export.export_hf(weights(config), config, tok, tmp_path / "hf", dtype=torch.float32)
    assert vocabulary.recorded(tmp_path / "hf") == Vocabulary.of(tok)


@pytest.mark.parametrize("entry", ["{", "[1]", '{"size": 3}', '{"size": "3", "pieces": "a", "encoding": "b"}',
                                   "[" * 9999])
def test_a_damaged_word_on_the_tokenizer_is_one_line(entry, tmp_path):
    config = ModelConfig(**SIZES, vocab_size=8)
    weight_files.save_safetensors(tmp_path / "a.safetensors", weights(config), config, entry)
    with pytest.raises(ValueError, match="what it says of its tokenizer is damaged") as error:
        vocabulary.recorded(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_and_a_little_seeded_noise(tied):
    config = ModelConfig(**SIZES, vocab_size=300, tie_word_embeddings=tied)
    state = {name: tensor.bfloat16() for name, tensor in weights(config).items()}
    grown = vocabulary.grow(state, 320, seed=1)
    names = [name for name in state if len(grown[name]) != len(state[name])]
    assert names == ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in names:
        old, new = state[name], grown[name]
        assert new.dtype == old.dtype and new.shape == (320, 16) and torch.equal(new[:300], old)
        # The deviation is a hundredth of the old rows' own, 0.02.
        off = new[300:].double() - old.double().mean(0)
        assert 0 < off.abs().max() < 10 * vocabulary.NOISE * 0.02 and len(new[300:].unique(dim=0)) > 1
    minimind.check(grown, ModelConfig(**{**SIZES, "vocab_size": 320}, tie_word_embeddings=tied), "grown")
    again, other = vocabulary.grow(state, 320, seed=1), vocabulary.grow(state, 320, seed=2)
    assert all(torch.equal(grown[name], again[name]) for name in grown)
    assert not torch.equal(grown[names[0]], other[names[0]])
