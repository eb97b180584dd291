"""What a tokenizer that others made must keep to before it is trusted with anybody's text.

Text goes through it unchanged, and no text becomes a control token: every piece of the vocabulary is put through it
and, unless its make leaves no doubt, every character there is.  That takes a second or two, once for each tokenizer,
and is remembered by its fingerprint.

    python -m pytest tests/data/test_tokenizer_check.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.io import write_file
from minimind_ds.paths import cache_folder

# Python 3.10 has no re._parser.
sre_parse = getattr(re, "_parser", None) or re.sre_parse

# SentencePiece writes a space as this character; exported folders cannot tell the two apart.
META_SPACE = "\u2581"
# What a text may hold that no single character shows: ends, runs of spaces, letters that combine.
PROBE = " two  spaces\n\n\ttab 12\u00a0\ufb01\uff21 e\u0301 \u4f60\u597d \U0001f600\x00 "
# Normalisers after which a text is still itself, and what SentencePiece's exports have for one; Prepend is caught by
# PROBE where no decoder takes it back.
KEEPING = ("NFC", "NFD", "ByteLevel", "Sequence", "Prepend")
SPACES = {"type": "Replace", "pattern": {"String": " "}}
# From so many on a repeat is one without a limit.
MOST_REPEATS = 1000
# Characters that go through at a time, and texts in one call.
STRETCH, BATCH = 128, 512
# Raise it with what the check asks for.
VERSION = 2


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


def rust_tokenizer(spec: str, folder: Path, added: dict[str, int]) -> tokenizers.Tokenizer:
    """Raises UserError for what the library does not read, or numbers otherwise than `added`."""
    with library(f"{folder}/tokenizer.json is not a tokenizer"):
        found = tokenizers.Tokenizer.from_str(spec)
    for token, i in added.items():
        if (other := found.token_to_id(token)) != i:
            raise UserError(f"{folder}/tokenizer.json: added token {shown(token)} has the id {i}, and to the library "
                            f"{other}")
    return found


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
        raise UserError(f"its largest id is {largest} and it has {size} tokens: the model would have rows for ids "
                        "that mean nothing")
    return added


def without_added_tokens(spec: dict, added: dict[str, int]) -> dict:
    """tokenizer.json with no added token, neither to be matched nor to be spelled by merges; not padded or cut, and
    without dropout."""
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


def check_parts(spec: dict) -> None:
    """Raises UserError for parts of a tokenizer.json that lose text that no probe may hold, or may take for ever."""
    for part in below(spec.get("normalizer")):
        kind, whole = part.get("type"), part == {**SPACES, "content": part.get("content")}
        if kind not in KEEPING and not whole and kind is not None:
            what = " of a pattern" if kind == "Replace" else ""
            raise UserError(f"its normaliser {shown(kind)}{what} changes the text that it is given; only "
                            f"{', '.join(KEEPING)} and {META_SPACE} for a space keep it")
    for part in below([spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]):
        pattern = part.get("Regex")
        if isinstance(pattern, str) and repeats_repeated(pattern):
            raise UserError(f"its pattern {shown(pattern)} repeats what it repeats, and may take for ever on some "
                            "text")
        if part.get("behavior") == "Removed":
            raise UserError(f"its pre-tokeniser {shown(part.get('type'))} removes what it cuts at")


def below(tree: object) -> Iterator[dict]:
    """All objects in a tree of JSON, itself included."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from below(part)


def repeats_repeated(pattern: str) -> bool:
    """Whether something without a limit is repeated without one, as far as Python can read the pattern."""
    def look(parts, inside: bool) -> bool:
        for kind, about in parts:
            here = inside
            if str(kind) in ("MAX_REPEAT", "MIN_REPEAT"):
                here = about[1] > MOST_REPEATS
                if here and inside:
                    return True
                here |= inside
            # What is below stands in tuples and lists, each in a way of its own.
            todo = [about]
            while todo:
                item = todo.pop()
                if isinstance(item, sre_parse.SubPattern):
                    if look(item, here):
                        return True
                elif isinstance(item, (tuple, list)):
                    todo += item
        return False

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return look(sre_parse.parse(re.sub(r"\\[pP]\{\^?\w*\}", "w", pattern)), False)
    except (re.error, OverflowError, RecursionError):
        return False


def is_byte_level(spec: dict) -> bool:
    """Whether a tokenizer.json is GPT-2's kind with a piece for each byte, which by its make changes no text."""
    letters = {chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    letters |= {chr(256 + n) for n in range(256 - len(letters))}
    cut, model = spec.get("pre_tokenizer") or {}, spec["model"]
    off = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk", "ignore_merges")
    return (spec.get("normalizer") is None and cut.get("type") == "ByteLevel" and cut.get("add_prefix_space") is False
            and (spec.get("decoder") or {}).get("type") == "ByteLevel" and not any(map(model.get, off))
            and letters <= model["vocab"].keys())


def check_text(tok, stretches: bool = True) -> None:
    """Raises UserError, with an example, where text comes back changed, or as a control token.

    Canonical equivalents (NFC) and U+2581 for a space may be confused.

    Args:
        stretches: every character there is goes through, besides all pieces of the vocabulary.
    """
    what = f"{VERSION} {tokenizers.__version__} {sentencepiece.__version__} {unicodedata.unidata_version} "
    note = cache_folder() / "tokenizers" / hashlib.sha256(f"{what}{tok.fingerprint}".encode()).hexdigest()[:40]
    if note.exists():
        return
    codes = range(sys.maxunicode + 1) if stretches else range(0x250)
    letters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    characters = ["".join(letters[at:at + STRETCH]) for at in range(0, len(letters), STRETCH)]
    words = piece_texts(tok)
    check_texts(tok, [*tok.specials, *words, *characters, PROBE])
    # A run's end is too late to find that there is no exporting it.
    tok.rules()
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, f"{tok.name}\n".encode("utf-8", "replace"))


def piece_texts(tok) -> list[str]:
    """Texts of all pieces of the vocabulary, the first ones alone."""
    # A piece that is no whole character decodes to U+FFFD.
    pieces = [text for i in range(tok.vocab_size) if "\ufffd" not in (text := tok.decode([i]))]
    return [*pieces[:BATCH], *("".join(pieces[at:at + STRETCH]) for at in range(0, len(pieces), STRETCH))]


def check_export(tok, spec: dict) -> None:
    """Raises UserError where `tokenizers` gives the vocabulary's texts other ids by this tokenizer.json, as where the
    model is none of BPE."""
    twin = rust_tokenizer(json.dumps(without_added_tokens(spec, tok.specials)), Path(tok.name), {})
    texts = piece_texts(tok)
    with library(f"{tok.name} cannot be exported"):
        exported = twin.encode_batch_fast(texts)
    for text, ids, other in zip(texts, tok.encode_batch(texts), exported):
        if ids != other.ids:
            raise UserError(f"{tok.name} is no BPE that can be exported: {shown(text)} has other ids by `tokenizers`; "
                            "train it as launch/train_tokenizer.py does")


def check_chat_format(tok, full: tokenizers.Tokenizer) -> None:
    """Raises UserError where a chat, as `tokenizers` reads it whole in an exported folder, has other ids than it is
    trained on: an added token that holds a space, for example, or begins with another's name."""
    start, end = tok.special_id("<|im_start|>"), tok.special_id("<|im_end|>")
    for role in ("system", "user", "assistant", "tool"):
        said, newline = tok.encode_batch([f"{role}\nA text, of two lines.\nThe other.", "\n"])
        with library(f"{tok.name} cannot encode a chat"):
            text = f"<|im_start|>{tok.decode(said)}<|im_end|>\n"
            whole = full.encode(text, add_special_tokens=False).ids
        if whole != [start, *said, end, *newline]:
            raise UserError(f"{tok.name}: its added tokens or its post-processor make other ids of {shown(text)} than "
                            "training does; take out those that are parts of plain text or begin with another's name")


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
                raise UserError(f"{tok.name} makes a control token of the text {shown(text)}; it would not be safe "
                                "to train on")
            raise UserError(f"{tok.name} changes the text it encodes: {shown(text)} comes back as {shown(back)}; "
                            "train it byte by byte (byte level, or byte fallback), without normalisation or prefix")


def alike(back: str, text: str) -> bool:
    return back == text or canonical(back) == canonical(text)


def canonical(text: str) -> str:
    return unicodedata.normalize("NFD", text.replace(META_SPACE, " "))
