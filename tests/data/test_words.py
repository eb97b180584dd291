"""Words that are remembered are encoded as the tokenizer library encodes them in their text.

    python -m pytest tests/data/test_words.py
"""

import copy
import json
import random

import pytest

from minimind_ds.data import words
from minimind_ds.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from minimind_ds.data.words import WordCache
from minimind_ds.paths import EXAMPLES

# All that GPT-2's pattern tells apart, every kind of white space, and what looks like it.
ALPHABET = list("aZé的。，'’-_.!9٣²Ⅷ \n\t\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"
                "\u200b\ufeff\u180e\u0301😀\x00") + [" ", " ", "\n", "'s", "'re", " the", " of", "  "]


@pytest.fixture(scope="module", params=["embedded", "minimind"])
def tok(request):
    if request.param == "embedded":
        return load_tokenizer(None)
    return load_tokenizer(request.getfixturevalue("shared") / "minimind_tokenizer")


def test_random_text_of_every_kind_of_character_is_encoded_alike(tok, monkeypatch):
    dice = random.Random(0)
    for most in (words.MOST_WORDS, 300):
        monkeypatch.setattr(words, "MOST_WORDS", most)
        cache = WordCache(tok)
        for _ in range(40):
            texts = ["".join(dice.choices(ALPHABET, k=dice.randrange(40))) for _ in range(200)]
            assert cache.encode_batch(texts) == tok.encode_batch(texts)


def test_real_text_is_encoded_alike_and_mostly_from_memory(shared):
    tok = load_tokenizer(shared / "minimind_tokenizer")
    texts = [json.loads(line)["text"] for line in (shared / "data" / "pretrain_en.jsonl").open(encoding="utf-8")]
    cache = WordCache(tok)
    assert cache.usable and cache.encode_batch(texts) == tok.encode_batch(texts)
    asked = []
    cache.tok = copy.copy(tok)
    cache.tok.encode_batch = lambda texts: asked.extend(texts) or tok.encode_batch(texts)
    assert cache.encode_batch(texts) == tok.encode_batch(texts)
    assert sum(map(len, asked)) < 0.05 * sum(map(len, texts))


def test_a_tokenizer_of_another_make_is_left_alone(shared, tmp_path):
    spec = json.loads((shared / "minimind_tokenizer" / "tokenizer.json").read_text())
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {**spec["pre_tokenizer"],
                                                                       "add_prefix_space": True}}):
        for path in (shared / "minimind_tokenizer").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
        assert not WordCache(HuggingFaceTokenizer(tmp_path)).usable
    assert not WordCache(load_tokenizer(None)).usable
    texts = [json.loads(line)["text"] for line in (EXAMPLES / "pretrain.jsonl").open(encoding="utf-8")][:50]
    assert WordCache(load_tokenizer(None)).encode_batch(texts) == load_tokenizer(None).encode_batch(texts)
