"""What a tokenizer that others made must keep to before it is trusted with anybody's text.

Text goes through it unchanged, and no text becomes a control token.  That takes every character there is and every
piece of the vocabulary through it, a second or two: once for each tokenizer, and remembered by its fingerprint.

    python -c "from minimind_ds import load_tokenizer as l; from minimind_ds.data.tokenizer_check import *; check_text(l())"
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator

import sentencepiece
import tokenizers

from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.io import write_file
from minimind_ds.paths import cache_folder

# SentencePiece writes a space as this character; exported folders cannot tell the two apart.
META_SPACE = "\u2581"
# What a text may hold that no single character shows: ends, runs of spaces, letters that combine.
PROBE = " two  spaces\n\n\ttab 12\u00a0\ufb01\uff21 e\u0301 \u4f60\u597d \U0001f600\x00 "
# Characters that go through at a time, and texts in one call.
STRETCH, BATCH = 128, 512
# Raise it with what the check asks for.
VERSION = 1


@contextlib.contextmanager
def library(what: str) -> Iterator[None]:
    """Around the tokenizer library's calls: what it raises, Exception itself and Rust's panics, is a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, TypeError):
        raise
    except BaseException as error:
        if not (type(error) is Exception or type(error).__name__ == "PanicException"):
            raise
        raise UserError(f"{what}: {first_line(error)}") from None


def control_ids(spec: dict) -> dict[str, int]:
    """The added tokens of a tokenizer.json and their ids.

    Raises:
        ValueError: an id that is no id, twice there, or that of a piece of text.
        KeyError, TypeError, AttributeError: it is no tokenizer.json.
    """
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    vocab = spec["model"]["vocab"]
    for what, ids in (("added token", added), ("piece", vocab)):
        odd = next((name for name, i in ids.items() if type(i) is not int or not 0 <= i < 1 << 22), None)
        if odd is not None:
            raise UserError(f"{what} {shown(odd)} has the id {shown(ids[odd])}; ids are whole numbers from 0")
    # An added token may stand among the pieces, too, as the same.
    by_id = {i: name for name, i in vocab.items() if name not in added}
    for name, i in added.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"added token {shown(name)} is no text")
        if i in by_id:
            raise UserError(f"added token {shown(name)} has the id {i} of the piece {shown(by_id[i])}: text would "
                            "become a control token")
        if vocab.get(name, i) != i:
            raise UserError(f"added token {shown(name)} has the id {i}, and {vocab[name]} in the vocabulary")
    twice = [i for i, count in Counter(added.values()).items() if count > 1]
    if twice:
        names = [shown(name) for name, i in added.items() if i == twice[0]]
        raise UserError(f"added tokens {', '.join(names[:3])} all have the id {twice[0]}")
    size, largest = len(by_id) + len(added), max([*by_id, *added.values()], default=0)
    if largest > 2 * size + 1024:
        raise UserError(f"its largest id is {largest} and it has {size} tokens: the model would have rows for ids that "
                        "mean nothing")
    return added


def without_added_tokens(spec: dict, added: dict[str, int]) -> dict:
    """tokenizer.json with no added token, neither to be matched nor to be spelled by merges; not padded or cut, and the
    same for the same text."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise UserError(f"the model is {shown(model.get('type'))}; only 'BPE' is supported")
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in model["merges"]}
    spelled = sorted(merged & added.keys())
    if spelled:
        raise UserError(f"plain text can spell the added token {shown(spelled[0])}; it would not be safe to train on")
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    return {**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None,
            "model": {**model, "vocab": vocab, "unk_token": None, "dropout": None}}


def check_text(tok) -> None:
    """Raises UserError, with an example, where text comes back changed, or as a control token.

    Canonical equivalents (NFC) and U+2581 for a space may be confused.
    """
    what = f"{VERSION} {tokenizers.__version__} {sentencepiece.__version__} {unicodedata.unidata_version} "
    note = cache_folder() / "tokenizers" / hashlib.sha256(f"{what}{tok.fingerprint}".encode()).hexdigest()[:40]
    if note.exists():
        return
    letters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    stretches = ["".join(letters[at:at + STRETCH]) for at in range(0, len(letters), STRETCH)]
    # A piece that is no whole character decodes to U+FFFD.
    pieces = [text for i in range(tok.vocab_size) if "\ufffd" not in (text := tok.decode([i]))]
    words = ["".join(pieces[at:at + STRETCH]) for at in range(0, len(pieces), STRETCH)]
    check_texts(tok, [PROBE, *tok.specials, *pieces[:BATCH], *words, *stretches])
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, f"{tok.name}\n".encode("utf-8", "replace"))


def check_texts(tok, texts: list[str]) -> None:
    control = set(tok.specials.values())
    for at in range(0, len(texts), BATCH):
        batch = texts[at:at + BATCH]
        for text, ids in zip(batch, tok.encode_batch(batch)):
            if control.isdisjoint(ids) and alike(back := tok.decode(ids), text):
                continue
            if len(text) > 1 and text != PROBE:
                # The shortest part of it that shows it.
                half = len(text) // 2
                check_texts(tok, [text[:half], text[half:]])
            if not control.isdisjoint(ids):
                raise UserError(f"{tok.name} makes a control token of the text {shown(text)}; it would not be safe to "
                                "train on")
            raise UserError(f"{tok.name} changes the text it encodes: {shown(text)} comes back as {shown(back)}; train "
                            "it byte by byte (byte level, or byte fallback), without normalisation, prefix or dropout")


def alike(back: str, text: str) -> bool:
    return back == text or canonical(back) == canonical(text)


def canonical(text: str) -> str:
    return unicodedata.normalize("NFD", text.replace(META_SPACE, " "))
