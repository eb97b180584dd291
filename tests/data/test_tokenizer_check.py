"""A tokenizer of others is trusted only where text goes through it unchanged and becomes no control token.

tests/fuzz/corpus.py has more that is refused.
"""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from minimind_ds.config.errors import UserError
from minimind_ds.data import tokenizer_check
from minimind_ds.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from minimind_ds.data.tokenizer_check import check_text, repeats_repeated
from tests.fuzz.tokenizer_targets import TEXT, small


def folder_of(path, **changes):
    spec, config = json.loads(json.dumps(small()))
    spec["model"] |= {key: changes.pop(key) for key in list(changes) if key in spec["model"]}
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps({**spec, **changes}))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(autouse=True)
def nothing_is_checked_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_text_that_becomes_a_control_token_is_named(tmp_path):
    tok = HuggingFaceTokenizer(folder_of(tmp_path / "t"))
    tok.specials["<|x|>"] = tok.encode("q")[0]
    with pytest.raises(UserError, match="makes a control token of the text 'q'"):
        check_text(tok, stretches=False)


def test_a_text_that_is_lost_is_named_with_what_comes_back(tmp_path):
    letters = {piece: i for piece, i in small()[0]["model"]["vocab"].items() if piece not in ("a", "cl")}
    with pytest.raises(UserError, match="changes the text it encodes: 'a' comes back as ''"):
        load_tokenizer(folder_of(tmp_path / "t", vocab=letters, merges=[]))


def test_what_was_checked_once_is_not_checked_again(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "t")
    load_tokenizer(folder)
    checked = []
    monkeypatch.setattr(tokenizer_check, "check_texts", lambda *_: checked.append(1))
    load_tokenizer(folder)
    assert not checked
    load_tokenizer(folder_of(tmp_path / "other", merges=[["T", "h"], ["c", "l"], ["Th", "e"]]))
    assert checked


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_whose_export_would_have_other_ids_is_refused_before_it_is_trained_on(kind, tmp_path):
    path = tmp_path / "own.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "the other theory, then there", "a cloth clothes the closest"] * 9),
        model_prefix=str(path.with_suffix("")), model_type=kind, vocab_size=330, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        remove_extra_whitespaces=False, control_symbols=["<|im_start|>", "<|im_end|>"])
    if kind == "bpe":
        load_tokenizer(path).save_hf(tmp_path / "exported")
        return
    with pytest.raises(UserError, match="is no BPE that can be exported: .* has other ids by `tokenizers`; train it"):
        load_tokenizer(path)


def test_dropout_does_not_reach_the_ids(tmp_path):
    with_dropout, without = (load_tokenizer(folder_of(tmp_path / name, dropout=rate)) for name,
                             rate in (("a", 0.9), ("b", None)))
    assert {tuple(with_dropout.encode(TEXT)) for _ in range(20)} == {tuple(without.encode(TEXT))}
    with_dropout.save_hf(tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "tokenizer.json").read_text())["model"]["dropout"] is None


def added(content: str, i: int, **flags) -> dict:
    return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=True) | flags


@pytest.mark.parametrize("content", [" ", "\n", "two", "<|im_start|>assist"])
def test_an_added_token_that_cuts_a_chat_otherwise_than_training_is_refused(content, tmp_path):
    spec, _ = small()
    free = 1 + max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])])
    folder = folder_of(tmp_path / "t", added_tokens=[*spec["added_tokens"], added(content, free)])
    with pytest.raises(UserError, match="its added tokens or its post-processor make other ids of '<|im_start|>"):
        load_tokenizer(folder)


def test_an_exported_folder_names_no_code_and_no_token_that_training_did_not_know(tmp_path):
    spec, _ = small()
    folder = folder_of(tmp_path / "t", added_tokens=[token | {"lstrip": True, "rstrip": True}
                                                     for token in spec["added_tokens"]])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    strange = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}, "tokenizer_class": "BertTokenizer",
               "additional_special_tokens": ["the"], "extra_special_tokens": {"x": "the"},
               "added_tokens_decoder": {"9000": added("wo l", 9000)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | strange))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["the"]}))
    tok = load_tokenizer(folder)
    tok.save_hf(tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["tokenizer.json",
                                                                               "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    said = "user\nthe two  lines \n of the world\n"
    assert theirs(f"<|im_start|>{said}<|im_end|>\n ", add_special_tokens=False)["input_ids"] == [
        tok.special_id("<|im_start|>"), *tok.encode(said), tok.special_id("<|im_end|>"), *tok.encode("\n ")]


def test_patterns_of_known_tokenizers_repeat_nothing_that_repeats():
    of_qwen = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    known = [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\p{N}{1,3}",
             r"[一-龥぀-ゟ゠-ヿ]+", of_qwen]
    assert not any(map(repeats_repeated, known))
    assert all(map(repeats_repeated, ["(a+)+$", "(?:x*y)*", "((a{2,}))+", "(a|b+)*", r"(?=(\s+)+x)"]))
