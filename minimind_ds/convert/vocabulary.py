"""Whose ids a file of weights was trained on, and rows for ids that it does not have yet.

    python -c "from minimind_ds.convert.vocabulary import recorded; print(recorded('out/sft'))"
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.convert import weight_files
from minimind_ds.data.tokenizer import Tokenizer

# Where safetensors metadata holds a Vocabulary.
KEY = "tokenizer"
# What files of earlier releases say of a tokenizer are the ids of these texts.  Without U+2581, which a SentencePiece
# model and its export to transformers encode differently.
PROBES = (
    "The quick brown fox jumps over the lazy dog, and nobody's surprised; they've seen it 1,234 times (or 56.78).",
    " two  spaces\n\n\ttab\r\nand trailing \n",
    "def area(r: float) -> float:\n    return 3.14159 * r**2  # \u03c0r\u00b2\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u8bf7\u7528\u4e00\u53e5\u8bdd\u4ecb\u7ecd\u4f60\u81ea\u5df1\u3002",
    "Stra\u00dfe, na\u00efve, e\u0301, \ufb01\uff21, \u0645\u0631\u062d\u0628\u0627, "
    "\u3053\u3093\u306b\u3061\u306f, \U0001f600\U0001f469\u200d\U0001f467",
    '{"name": "clock", "arguments": {"city": "Oslo", "at": [1, true]}}', "<|im_start|>user\n<think></think>",
)
# Pieces of a vocabulary that are read as text, at most.
OWN = 10_000
# Deviation of the noise on new rows, as a share of each column's own.
NOISE = 0.01


@dataclass(frozen=True)
class Vocabulary:
    """What decides a tokenizer's ids and what they stand for, whatever file format holds it.

    size: ids are below it.  pieces: SHA-256 of what each id is called.  rules: SHA-256 of how text becomes ids: which
    are control tokens, and all that Tokenizer.rules says.  encoding: in files of earlier releases, instead of rules,
    the hash that `probed` makes.
    """

    size: int
    pieces: str
    rules: str = ""
    encoding: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        size = tokenizer.vocab_size
        return cls(size, pieces_hash(tokenizer, size), rules_hash(tokenizer))

    def difference(self, tokenizer: Tokenizer) -> str | None:
        """Why `tokenizer` is another one; None if it is this one, or this one with further ids after its own."""
        if tokenizer.vocab_size < self.size:
            return f"it has {tokenizer.vocab_size:,} ids instead of {self.size:,}"
        if pieces_hash(tokenizer, self.size) != self.pieces:
            return "its ids stand for other text"
        same = self.rules == rules_hash(tokenizer) if self.rules else self.encoding == probed(tokenizer)
        if tokenizer.vocab_size == self.size and not same:
            return "its ids are the same, but it cuts text into others"
        return None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def pieces_hash(tokenizer: Tokenizer, size: int) -> str:
    return digest([tokenizer.piece(i) for i in range(size)])


def rules_hash(tokenizer: Tokenizer) -> str:
    return digest([sorted(tokenizer.specials.items()), tokenizer.rules()])


def probed(tokenizer: Tokenizer) -> str:
    """A hash of which ids are control tokens, and of the ids of PROBES and of the vocabulary's own pieces."""
    own = "".join(tokenizer.decode([i]) for i in range(0, tokenizer.vocab_size, math.ceil(tokenizer.vocab_size / OWN)))
    return digest([sorted(tokenizer.specials.items()), tokenizer.encode_batch([*PROBES, own])])


def recorded(path: weight_files.Source) -> Vocabulary | None:
    """The vocabulary that a .safetensors file of ours says it was trained with; None where none is named.

    Raises:
        ValueError: no such file, or an entry that is none of ours.
    """
    file = weight_files.find(path)[0]
    text = weight_files.read_metadata(file).get(KEY) if file.suffix == ".safetensors" else None
    if text is None:
        return None
    try:
        found = Vocabulary(**untrusted.json_object(text, "it"))
        if type(found.size) is int and found.size > 0 and isinstance(found.pieces, str):
            return found
    except (TypeError, ValueError, RecursionError):
        pass
    raise UserError(f"{path}: what it says of its tokenizer is damaged: {untrusted.shown(text)}")


def grow(state: dict[str, Tensor], rows: int, *, seed: int) -> dict[str, Tensor]:
    """The same weights with `rows` rows in the embedding, and in the head if it has its own.

    A new row is the mean of the old ones and a little noise, so that a new token is neither likelier nor less likely
    than the others, and no two are alike (Hewitt 2021, "Initializing new word embeddings").

    Args:
        seed: of the noise; the same on all ranks.
    """
    generator, grown = torch.Generator().manual_seed(seed), dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            old = state[name].double()
            noise = torch.randn(rows - len(old), old.shape[1], generator=generator, dtype=old.dtype)
            new = old.mean(0) + NOISE * old.std(0, correction=0) * noise
            grown[name] = torch.cat([state[name], new.to(state[name].dtype)])
    return grown
