"""Tokenizer folders: what decides the ids in one, and what an exported one tells transformers: the chat template, a
SentencePiece model as `tokenizers` BPE.

    python -c "from minimind_ds.data.hf_folder import chat_template as t; print(t())"
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import sentencepiece

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.paths import ASSETS

# A tokenizer.json of 256,000 pieces has a few million values.
MOST_VALUES = 1 << 24
# Templates of others that render what ours does, as tests show: that of MiniMind-3's own tokenizer folder.
SAME_TEMPLATES = frozenset({"97c6a9ef3f8d35044f435bb7773f1af160a7328ab6e8d2e9d67702941320a711"})


def chat_template() -> str:
    """MiniMind's chat format as the Jinja template that exported folders carry; `data.sample.render` is its twin."""
    return (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")


def exported_template(own: object) -> str:
    """The template of an exported folder: ours, which renders what was trained on, or the folder's own if it is known
    to do the same.  A folder's template is never run to find out."""
    known = isinstance(own, str) and hashlib.sha256(own.encode("utf-8", "replace")).hexdigest() in SAME_TEMPLATES
    return own if known else chat_template()


def template_notes(name: str, own: object) -> list[str]:
    """A line for the start of a run whose tokenizer folder says something else than the run trains."""
    if own is None or own == exported_template(own):
        return []
    return [f"{name} has a chat template of its own; trained, and exported in its place, is MiniMind's"]


def json_object(content: bytes, path: Path) -> dict:
    try:
        return untrusted.json_object(content.decode("utf-8"), str(path), MOST_VALUES)
    except UnicodeDecodeError as err:
        raise UserError(f"{path} is not UTF-8 (byte {err.start + 1})") from None


def rules(spec: dict) -> str:
    """All of a tokenizer.json, as the library writes it, that decides the ids of plain text: JSON of one spelling."""
    def told(value: Any) -> Any:
        if isinstance(value, dict):
            # What is off or absent is left out, since releases of the library differ in what they write.
            return {key: told(part) for key, part in value.items() if part is not None and part is not False}
        return [told(part) for part in value] if isinstance(value, list) else value

    return json.dumps({key: told(spec.get(key)) for key in ("normalizer", "pre_tokenizer", "model")}, sort_keys=True)


def as_trained(spec: dict) -> dict:
    """A tokenizer.json without what training leaves out: dropout, cutting, padding, added tokens that take what is
    beside them."""
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {**spec, "truncation": None, "padding": None, "model": {**spec["model"], "dropout": None},
            "added_tokens": [{**token, **off} for token in spec.get("added_tokens") or []]}


def added_tokens(specials: dict[str, int], visible: frozenset[str]) -> list[dict]:
    """The control tokens as tokenizer.json lists them; the visible ones are not special."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return [dict(id=i, content=token, **flags, special=token not in visible)
            for token, i in sorted(specials.items(), key=lambda item: item[1])]


def sentencepiece_spec(sp: sentencepiece.SentencePieceProcessor, pieces: list[str], added: list[dict],
                       space: str) -> dict:
    """tokenizer.json of a SentencePiece BPE with byte fallback: the same ids, but where a text holds `space`."""
    # SentencePiece joins the neighbours whose joint piece has the best score, however it came about: every way
    # to spell a piece with two others becomes a merge, in the order of the scores.
    vocab = {piece: i for i, piece in enumerate(pieces)}
    control = {token["content"] for token in added}
    normal = {piece: i for piece, i in vocab.items() if piece not in control and not sp.is_byte(i)}
    merges = []
    for piece in sorted(normal, key=lambda piece: (-sp.get_score(normal[piece]), normal[piece])):
        splits = [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in normal and pair[1] in normal]
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=True, ignore_merges=False, vocab=vocab, merges=merges)
    decoders = [dict(type="Replace", pattern={"String": space}, content=" "), dict(type="ByteFallback"),
                dict(type="Fuse")]
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                normalizer=dict(type="Replace", pattern={"String": " "}, content=space), pre_tokenizer=None,
                post_processor=None, decoder=dict(type="Sequence", decoders=decoders), model=model)
