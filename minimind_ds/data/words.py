"""Encoding with a memory for words: several times as fast as the tokenizer library, and the same ids.

A byte-level BPE tokenizer without a normaliser first cuts text by GPT-2's pattern, in which nothing that begins before
white space goes on behind it, then encodes each part alone.  So text cut before white space can be encoded word by
word, and words repeat.  Tokenizers of any other make, and texts of long words (Chinese), go to the library whole.

    python -m pytest tests/data/test_words.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain

from minimind_ds.data.tokenizer import Tokenizer

# Remembered, about 50 MB.
MOST_WORDS = 200_000
# A word costs the library so many times as much alone as within its text.
ALONE = 6
# Longer ones, on average and alone, do not come again.
MEAN_CHARACTERS, MOST_CHARACTERS = 12, 48
_cut = re.compile(r"\s*\S+|\s+").findall
# White space for Python's pattern and not for the library's.
_SEPARATORS = re.compile("[\x1c-\x1f]")
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def cuts_at_white_space(tok: Tokenizer) -> bool:
    """Whether the tokenizer is one for which a word's ids do not depend on its neighbours."""
    plain = getattr(tok, "_plain", None)
    if plain is None:
        return False
    spec = json.loads(plain.to_str())
    pre_tokenizer, model = spec["pre_tokenizer"] or {}, spec["model"]
    return (spec["normalizer"] is None and {key: pre_tokenizer.get(key) for key in _GPT2} == _GPT2
            and model["type"] == "BPE" and not model.get("dropout"))


class WordCache:
    """encode_batch of a tokenizer, remembering words."""

    def __init__(self, tok: Tokenizer):
        self.tok, self.usable, self.ids = tok, cuts_at_white_space(tok), {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text: what tok.encode_batch(texts) returns."""
        if not self.usable:
            return self.tok.encode_batch(texts)
        cut = [None if _SEPARATORS.search(text) else _cut(text) for text in texts]
        cut = [words if words and len(text) <= MEAN_CHARACTERS * len(words) else None
               for text, words in zip(texts, cut)]
        known, ids, full = self.ids, [], len(self.ids) >= MOST_WORDS
        missing = set(chain.from_iterable(filter(None, cut))) - known.keys()
        if full and len(missing) * ALONE > sum(len(words) for words in cut if words):
            missing = ()
        known.update(zip(missing, self.tok.encode_batch(list(missing))))
        for words in cut:
            try:
                ids.append(None if words is None else list(chain.from_iterable([known[word] for word in words])))
            except KeyError:
                ids.append(None)
        for word in missing:
            if full or len(word) > MOST_CHARACTERS:
                del known[word]
        rest = iter(self.tok.encode_batch([text for text, found in zip(texts, ids) if found is None]))
        return [next(rest) if found is None else found for found in ids]
