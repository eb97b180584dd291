"""Tokenizer facts: any Unicode text comes back, no text becomes a control token, exports give the same ids.

    python -m pytest tests/data/test_tokenizer.py
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_ds.data.conversation import file_kind, read_records
from minimind_ds.data.hf_folder import template_notes
from minimind_ds.data.sample import render
from minimind_ds.data.tokenizer import (
    META_SPACE,
    SPECIAL_TOKENS,
    VISIBLE_TOKENS,
    load_tokenizer,
    train_tokenizer,
)
from minimind_ds.paths import ASSETS
from tests.conftest import ROOT, environment

SHARED = ROOT.parent / "shared"
ORIGINAL = SHARED / "minimind_tokenizer"
needs_original = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="the original tokenizer's folder is not here")
AWKWARD = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t", "\r\n", "\x00", "a\x00b", " leading", "trailing ", "a   b    c", "12345",
    META_SPACE, f"a{META_SPACE}{META_SPACE} {META_SPACE}b", "<0x0A>", "e\u0301\u0323", "\u0301", "\ufb01\uff21\u2460",
    "\u202eabc\u202c", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "\U0010ffff\ue000\ufffe", "\ufeffx",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e9\U0001f1ea", "\u3000\u00a0\u2028\u0085",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u9f98\u9f98\U00020000", "\ufffd", "</s><s><unk><pad>", *SPECIAL_TOKENS,
]


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of every kind of character, of pieces of each other, and of what looks like control tokens."""
    dice = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x2500, 0x25FF), (0x4E00, 0x9FFF), (0x800, 0xD7FF), (0xE000, 0xFFFF),
              (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]

    def part() -> str:
        kind = dice.random()
        if kind < 0.2:
            return dice.choice(AWKWARD)
        if kind < 0.4:
            return dice.choice([" ", "\n", "the", " of", META_SPACE, "\u7684", "im", "_", "|>", "<|", "0x41>"])
        low, high = dice.choice(ranges)
        return "".join(chr(dice.randint(low, high)) for _ in range(dice.randint(1, 6)))

    return ["".join(part() for _ in range(dice.randint(0, 12))) for _ in range(count)]


def texts_of(path: Path) -> list[str]:
    items = [item for _, item in read_records(path, file_kind(path))]
    return [text for item in items for text in
            ([item] if isinstance(item, str) else [piece.text for piece in render(item) if not piece.control])]


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="module")
def exported(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tok.save_hf(folder)
    return folder


@pytest.fixture(scope="module", params=["embedded", "exported", "original"])
def any_tok(request, exported):
    if request.param == "original" and not ORIGINAL.is_dir():
        pytest.skip("the original tokenizer's folder is not here")
    return load_tokenizer({"embedded": None, "exported": exported, "original": ORIGINAL}[request.param])


def test_control_tokens_have_minimind_ids(any_tok):
    assert [any_tok.special_id(token) for token in SPECIAL_TOKENS] == list(range(36))
    assert (any_tok.pad_id, any_tok.bos_id, any_tok.eos_id, any_tok.vocab_size) == (0, 1, 2, 6400)
    assert len(any_tok) == 6400 and len(any_tok.fingerprint) == 64


@needs_original
def test_special_tokens_are_those_of_the_original():
    added = json.loads((ORIGINAL / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert tuple(token["content"] for token in added) == SPECIAL_TOKENS
    assert {token["content"] for token in added if not token["special"]} == VISIBLE_TOKENS


def test_any_unicode_text_comes_back(tok):
    for text in AWKWARD + random_texts(5000, seed=1):
        ids = tok.encode(text)
        assert tok.decode(ids) == text, ascii(text)
        assert tok.decode(ids, skip_special=True) == text


def test_every_character_comes_back(tok):
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert tok.decode(tok.encode(everything)) == everything


def test_no_text_becomes_a_control_token(any_tok):
    # In the form transformers reads, U+2581 is a space; that exception has its own test.
    texts = [text.replace(META_SPACE, " ") for text in AWKWARD + random_texts(2000, seed=2)]
    for text in texts:
        ids = any_tok.encode(text)
        assert min(ids, default=99) >= len(SPECIAL_TOKENS), ascii(text)
        assert any_tok.decode(ids) == text


def test_a_batch_equals_its_texts_alone(any_tok):
    for texts in (random_texts(500, seed=3), ["plain", "", "a b"], []):
        assert any_tok.encode_batch(texts) == [any_tok.encode(text) for text in texts]


def test_lone_surrogates_are_refused(any_tok):
    for call in (any_tok.encode, lambda text: any_tok.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match="surrogates"):
            call("a\ud800b")


def test_the_text_before_does_not_change_how_an_answer_is_tokenised(tok):
    # A chat prompt ends with the newlines that training wrote before the answer, as one string with it.
    for text in AWKWARD + random_texts(500, seed=4):
        assert tok.encode("\n\n" + text) == tok.encode("\n\n") + tok.encode(text)


def test_decode_skips_control_tokens_but_not_the_visible_ones(any_tok):
    ids = [1, *any_tok.encode("hi"), 2, any_tok.special_id("<think>"), 0]
    assert any_tok.decode(ids) == "<|im_start|>hi<|im_end|><think><|endoftext|>"
    assert any_tok.decode(ids, skip_special=True) == "hi<think>"


def test_an_answer_may_be_cut_inside_a_character(tok):
    ids = tok.encode("\U0001f600")
    assert len(ids) > 1 and set(tok.decode(ids[:-1])) == {"\ufffd"}


@pytest.mark.parametrize("ids", [[6400], [-1]])
def test_an_id_outside_the_vocabulary_is_an_error(any_tok, ids):
    with pytest.raises(ValueError, match="not in"):
        any_tok.decode(ids)


def test_an_unknown_control_token_is_an_error(any_tok):
    for token in ("<|nothing|>", "a", "\n", ""):
        with pytest.raises(ValueError, match="no control token"):
            any_tok.special_id(token)


def test_export_gives_the_same_ids_in_transformers(tok, exported):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 0, 6400)
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(36))
    texts = [text for text in AWKWARD + random_texts(1500, seed=5)
             if META_SPACE not in text and not any(token in text for token in SPECIAL_TOKENS)]
    for path in sorted([*(ROOT / "examples").glob("*.jsonl"), *(SHARED / "data").glob("*.jsonl")]):
        texts += texts_of(path)
    texts = [text for text in dict.fromkeys(texts) if text][::4]
    for start in range(0, len(texts), 4096):
        batch = texts[start:start + 4096]
        ids = theirs(batch, add_special_tokens=False).input_ids
        assert ids == tok.encode_batch(batch)
    assert theirs.batch_decode(tok.encode_batch(texts[:3000])) == texts[:3000]
    # The two exceptions the docs name.
    assert theirs.decode(theirs.encode(f"a{META_SPACE}b")) == "a b"
    assert theirs.encode("<think>") == [25]


@needs_original
def test_original_ids_equal_the_library_and_its_folder_ships_through(tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer(ORIGINAL)
    ours.save_hf(tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (ORIGINAL / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert theirs.chat_template == json.loads((ORIGINAL / "tokenizer_config.json").read_bytes())["chat_template"]
    for path in sorted((SHARED / "data").glob("*.jsonl")):
        texts = list(dict.fromkeys(texts_of(path)))[::4]
        assert theirs(texts, add_special_tokens=False).input_ids == ours.encode_batch(texts)


def test_save_gives_the_same_tokenizer_back(any_tok, tmp_path):
    any_tok.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == any_tok.fingerprint and type(again) is type(any_tok)
    assert again.encode("Hello \u4f60\u597d") == any_tok.encode("Hello \u4f60\u597d")


def test_the_embedded_model_is_small_and_knows_the_sample(tok):
    assert (ASSETS / "tokenizer.model").stat().st_size < 200_000
    assert str(ROOT).encode() not in (ASSETS / "tokenizer.model").read_bytes()
    texts = texts_of(ROOT / "examples/sft_train.jsonl")
    tokens = sum(map(len, tok.encode_batch(texts)))
    assert sum(map(len, texts)) / tokens > 2


def test_training_gives_the_same_bytes_twice_and_stands_by_its_promises(tmp_path):
    texts = texts_of(ROOT / "examples/pretrain.jsonl")[:600] + ["\u2581 one\n  two"]
    first = train_tokenizer(texts, vocab_size=700, out=tmp_path / "a.model")
    train_tokenizer(iter(texts), vocab_size=700, out=tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    loaded = load_tokenizer(tmp_path / "a.model")
    assert loaded.fingerprint == first.fingerprint and loaded.vocab_size == 700
    assert [loaded.special_id(token) for token in SPECIAL_TOKENS] == list(range(36))
    for text in random_texts(300, seed=6):
        assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("texts, vocab_size, why", [
    ([], 6400, "no text"), (["\n"], 6400, "no text"), (["hi"], 6400, "at most"), (["hi"], 100, "take 293"),
    (["\u4f60\u597d\u4e16\u754c" * 9], 295, "alone take"),
])
def test_too_little_text_is_one_clear_error_and_writes_nothing(texts, vocab_size, why, tmp_path):
    with pytest.raises(ValueError, match=why) as caught:
        train_tokenizer(texts, vocab_size=vocab_size, out=tmp_path / "new" / "t.model")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_the_training_program(tmp_path):
    def run(*args):
        command = [sys.executable, str(ROOT / "launch/train_tokenizer.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())

    good = run("--data_path", str(ROOT / "examples/sft_heldout.jsonl"), str(ROOT / "examples/pretrain.jsonl"),
               "--vocab_size", "800", "--out", "t.model")
    assert good.returncode == 0, good.stderr
    assert "800 pieces" in good.stdout and load_tokenizer(tmp_path / "t.model").vocab_size == 800
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    for arguments, why in [(("--data_path", "none.jsonl"), "does not exist"),
                           (("--data_path", "bad.jsonl"), "line 1: text is a number")]:
        bad = run(*arguments, "--out", "bad.model")
        assert bad.returncode == 2 and why in bad.stderr and len(bad.stderr.splitlines()) == 1
        assert not (tmp_path / "bad.model").exists()


def broken_folder(folder: Path, exported: Path, name: str) -> None:
    shutil.copytree(exported, folder)
    spec = json.loads((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    vocab = spec["model"]["vocab"]
    if name == "unigram":
        spec["model"]["type"] = "Unigram"
    elif name == "no chat tokens":
        spec["added_tokens"] = spec["added_tokens"][3:]
    elif name == "merges spell a control token":
        vocab.update({"<|im_e": 6400, "nd|>": 6401})
        spec["model"]["merges"].append(["<|im_e", "nd|>"])
    elif name == "merge of unknown pieces":
        spec["model"]["merges"].append(["no such", "piece"])
    elif name == "eos unknown":
        config["eos_token"] = "<eos>"
    elif name == "eos a list":
        config["eos_token"] = [1]
    elif name == "added tokens a string":
        spec["added_tokens"] = "x"
    elif name == "model null":
        spec["model"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    raw = {"not json": b"{", "not utf-8": b"\xff\xfe", "a list": b"[]", "empty": b"", "deep": b"[" * 200_000}
    if name in raw:
        (folder / "tokenizer.json").write_bytes(raw[name])


@pytest.mark.parametrize("name", [
    "unigram", "no chat tokens", "merges spell a control token", "merge of unknown pieces", "eos unknown",
    "eos a list", "added tokens a string", "model null", "not json", "not utf-8", "a list", "empty", "deep",
])
def test_a_malformed_folder_is_one_clear_error(name, exported, tmp_path):
    broken_folder(tmp_path / "t", exported, name)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_altered_at_random_loads_or_is_one_clear_error(exported, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(exported, folder)
    good = (exported / "tokenizer.json").read_bytes()
    dice = random.Random(7)
    for _ in range(60):
        bad = bytearray(good)
        # The first and last kilobytes hold the structure; the middle is vocabulary.
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(bad)) + dice.choice([0, 0, len(bad) - 3000])
            at = at if at < len(bad) else dice.randrange(3000)
            bad[at] = dice.choice(b'{}[]",:0 \xffx')
        (folder / "tokenizer.json").write_bytes(bytes(bad))
        try:
            load_tokenizer(folder).encode("a b")
        except ValueError as err:
            assert "\n" not in str(err)


def test_a_missing_or_malformed_model_is_one_clear_error(tmp_path):
    import sentencepiece

    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.model").write_bytes(b"\x00junk" * 99)
    (tmp_path / "none.model").write_bytes(b"")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words", "some more words"] * 20), model_prefix=str(tmp_path / "plain"),
        vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words", "some more words"] * 20), model_prefix=str(tmp_path / "normalising"),
        vocab_size=300, hard_vocab_limit=False, byte_fallback=True, bos_piece="<|im_start|>", eos_piece="<|im_end|>",
        minloglevel=2)
    for name, why in [("empty", "neither"), ("nowhere", "does not exist"), ("junk.model", "not a SentencePiece"),
                      ("none.model", "is empty"), ("plain.model", "no control token"),
                      ("normalising.model", "changes the text")]:
        with pytest.raises(ValueError, match=why) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_code_named_by_a_folder_is_not_shipped_on(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "t")
    config = json.loads((exported / "tokenizer_config.json").read_bytes())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    del config["chat_template"]
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "t/evil.py").write_text("raise SystemExit('ran')")
    load_tokenizer(tmp_path / "t").save_hf(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    shipped = json.loads((tmp_path / "out/tokenizer_config.json").read_bytes())
    assert "auto_map" not in shipped and "<|im_start|>" in shipped["chat_template"]


def test_a_template_that_renders_otherwise_is_not_shipped_on(exported, tmp_path):
    for place in ("config", "list", "file"):
        folder = tmp_path / place
        shutil.copytree(exported, folder)
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        own, foreign = config["chat_template"], "{{ messages[0].content }}"
        if place == "file":
            (folder / "chat_template.jinja").write_text(foreign)
        else:
            config["chat_template"] = foreign if place == "config" else [{"name": "default", "template": foreign}]
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(folder)
        assert len(template_notes(tokenizer.name, tokenizer.own_template)) == 1
        tokenizer.save_hf(folder / "out")
        assert not template_notes("out", load_tokenizer(folder / "out").own_template)
        assert json.loads((folder / "out/tokenizer_config.json").read_bytes())["chat_template"] == own
        assert not (folder / "out/chat_template.jinja").exists()
