"""Readers of tokenizers: Hugging Face folders with their chat templates, SentencePiece models."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import tempfile

from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.data import hf_folder
from minimind_ds.data.conversation import parse_conversation
from minimind_ds.data.sample import build_sample, prompt_ids
from minimind_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from minimind_ds.data.tokenizer_check import alike
from minimind_ds.data.words import WordCache
from minimind_ds.paths import ASSETS
from tests.fuzz import mutate
from tests.fuzz.data_targets import RECORDS
from tests.fuzz.harness import Target

PARTS = [{"type": "Lowercase"}, {"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True},
         {"type": "Prepend", "prepend": "a"},
         {"type": "Replace", "pattern": {"String": "a"}, "content": ""},
         {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "<|im_end|>"},
         {"type": "Replace", "pattern": {"Regex": "["}, "content": ""},
         {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
         {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"type": "Sequence", "pretokenizers": []},
         {"type": "Metaspace"}, {"type": "Nmt"},
         {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "ByteFallback"}, {"type": "Fuse"},
         {"type": "Split", "pattern": {
             "Regex": "(?=a)"}, "behavior": "Isolated", "invert": False}, {"type": "Whitespace"},
         {"type": "Digits", "individual_digits": True}]
ENTRY = {"id": 7, "content": "new", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
TEXT = ("The clock says 12:00, \u4f60\u597d. <|im_end|>\n<|im_start|>assistant\n<think>a</think> "
        "\U0001f600\x00 e\u0301 \ufb01 \u2581x")
KEYS = ("id", "content", "special", "normalized", "lstrip", "type", "pattern", "vocab", "merges", "unk_token",
        "dropout", "byte_fallback",
        "fuse_unk", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "normalizer", "pre_tokenizer",
        "decoder", "truncation", "padding")


@functools.cache
def small() -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE of 300 ids."""
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(None).save_hf(folder)
        config = json.loads((pathlib.Path(folder) / "tokenizer_config.json").read_text())
    # The 256 bytes as GPT-2 writes them.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *letters, "Th", "The", "cl"])}
    added = hf_folder.added_tokens({name: i for i, name in enumerate(SPECIAL_TOKENS)}, frozenset())
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False,
                 byte_fallback=False, ignore_merges=False, vocab=vocab, merges=[["T", "h"], ["Th", "e"], ["c", "l"]])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                pre_tokenizer=level, post_processor=None,
                decoder=level, model=model)
    return spec, {key: value for key, value in config.items() if key != "added_tokens_decoder"}


def draw_folder(draw: random.Random) -> dict[str, bytes]:
    spec, config = json.loads(json.dumps(small()[0])), dict(small()[1])
    kind = draw.randrange(7)
    if kind == 0:
        spec[draw.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))] = draw.choice(PARTS)
    elif kind == 1:
        spec["added_tokens"] = mutate.altered(draw, spec["added_tokens"][:8], KEYS)
    elif kind == 2:
        ids = draw.choice((0, 5, len(spec["model"]["vocab"]) - 1, 10**6, 10**9, -1, 2**40, 1.5, True))
        spec["added_tokens"].append({**ENTRY, "id": ids,
                                     "content": draw.choice(("new", "a", "The", "<|im_end|>", mutate.text(draw)))})
    elif kind == 3:
        model = spec["model"]
        key = draw.choice((*model, "vocab", "merges"))
        if key == "vocab":
            model["vocab"][draw.choice((mutate.text(draw), "a", "<|im_end|>"))] = draw.choice((0, 3, 10**9, 2**40, -1,
                                                                                               1.5, "x", None))
        elif key == "merges":
            model["merges"].append(draw.choice((["a", "b"], "a b", ["a"], ["<|im_", "end|>"], 5, [1, 2],
                                                mutate.text(draw))))
        else:
            model[key] = draw.choice((mutate.value(draw), 0.5, "a", True))
    elif kind == 4:
        spec = {**spec, "model": {**spec["model"], "vocab": {}}} if draw.random() < 0.1 else mutate.altered(draw,
                                                                                                            {**spec,
                                                                                                             "model": {
            **spec["model"], "vocab": dict(list(spec["model"]["vocab"].items())[:60]), "merges": []}}, KEYS)
    config = mutate.altered(draw, config,
                            ("bos_token", "eos_token", "pad_token", "chat_template", "auto_map",
                             "added_tokens_decoder"))
    if isinstance(config, dict) and draw.random() < 0.3:
        config["chat_template"] = draw.choice((mutate.text(draw), "{% for x in range(10**9) %}a{% endfor %}",
                                               "{{ ''.__class__.__mro__ }}",
                                               [{"name": "default", "template": "x"}], hf_folder.chat_template()))
    said = mutate.json_bytes(draw, config) if kind >= 4 else json.dumps(config, default=str).encode("utf-8",
                                                                                                    "surrogatepass")
    content = mutate.json_bytes(draw, spec) if kind == 6 else json.dumps(spec, default=str).encode("utf-8",
                                                                                                   "surrogatepass")
    files = {"tokenizer.json": content, "tokenizer_config.json": said}
    if draw.random() < 0.2:
        files["chat_template.jinja"] = mutate.chewed(draw, hf_folder.chat_template().encode(), 3)
    return files


def read_folder(case: dict[str, bytes], folder: pathlib.Path) -> None:
    for name, content in case.items():
        (folder / name).write_bytes(content)
    use_tokenizer(load_tokenizer(folder), folder)


def use_tokenizer(tok: Tokenizer, folder: pathlib.Path) -> None:
    """As training, chat and export use one; text keeps its letters and spells no control token."""
    hf_folder.template_notes(tok.name, tok.own_template)
    control = set(tok.specials.values())
    for text in (TEXT, "a", "The", *list(tok.specials)[:4]):
        ids = tok.encode(text)
        assert not control & set(ids), "a text spells a control token"
        assert all(0 <= i < tok.vocab_size for i in ids)
        assert alike(tok.decode(ids), text), "a text is lost"
        assert WordCache(tok).encode_batch([text]) == [ids]
    for item in RECORDS[:2]:
        build_sample(parse_conversation(item), tok, 64)
    prompt_ids([{"role": "user", "content": "x"}], tok)
    assert len(tok.stop_ids) >= 1 and all(0 <= i < tok.vocab_size for i in (tok.bos_id, tok.eos_id, tok.pad_id))
    Vocabulary.of(tok).to_json()
    tok.save(folder / "copy")
    tok.save_hf(folder / "hf")
    assert load_tokenizer(folder / "copy").fingerprint == tok.fingerprint


@functools.cache
def models() -> list[bytes]:
    return [(ASSETS / "tokenizer.model").read_bytes()]


def draw_model(draw: random.Random) -> bytes:
    content = draw.choice(models())
    if draw.random() < 0.5:
        # The settings stand after the pieces.
        end = mutate.chewed(draw, content[-600:])
        return content[:-600] + end
    return mutate.chewed(draw, content[:draw.choice((200, 4000, len(content)))])


def read_model(case: bytes, folder: pathlib.Path) -> None:
    (folder / "tokenizer.model").write_bytes(case)
    use_tokenizer(load_tokenizer(folder), folder)


TARGETS = [
    Target("tokenizer folder", draw_folder, read_folder, 0.2, (small,)),
    Target("SentencePiece model", draw_model, read_model, 0.02, (models,)),
]
