"""Text <-> token ids, from a Hugging Face tokenizer folder or a SentencePiece .model, and the training of the latter.

The one promise beyond speed: `encode` takes what people typed, and nothing typed ever becomes a control token
(law 1 of docs/ARCHITECTURE.md).  Control tokens are ids asked for by name, `special_id("<|im_end|>")`, and only the
chat renderer asks.  A tokenizer folder is data: tokenizer.json is read by the `tokenizers` library, no code and no
chat template from the folder is run here.

    python -c "from minimind_ds import load_tokenizer as l; t = l(); print(t.name, t.encode('Hello 你好'))"
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.data import hf_folder
from minimind_ds.data.tokenizer_check import (
    META_SPACE,
    PROBE,
    check_chat_format,
    check_export,
    check_parts,
    check_text,
    control_ids,
    is_byte_level,
    library,
    rust_tokenizer,
    without_added_tokens,
)
from minimind_ds.io import write_file
from minimind_ds.paths import ASSETS

# MiniMind's added tokens, in id order: the id of a token is its place here.  Those from <tool_call> on are visible
# text to Hugging Face ("special": false), so decode(skip_special=True) keeps them.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>",
    "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    "<|buffer1|>", "<|buffer2|>", "<|buffer3|>", "<|buffer4|>", "<|buffer5|>", "<|buffer6|>", "<|buffer7|>",
    "<|buffer8|>", "<|buffer9|>",
)
VISIBLE_TOKENS = frozenset(SPECIAL_TOKENS[SPECIAL_TOKENS.index("<tool_call>"):])
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# The character itself has to travel as its three UTF-8 bytes.
META_BYTES = META_SPACE.encode("utf-8")
# A tokenizer.json of 256,000 pieces has some 20 MiB.
MOST_BYTES = 256 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")


class Tokenizer(ABC):
    """What every tokenizer offers; `load_tokenizer` makes one.

    Attributes: vocab_size (ids are below it), bos_id, eos_id, pad_id, name (for people), fingerprint (sha256 hex of
    everything that decides the ids: a cache key), specials (control token -> id), own_template (the chat template of
    the folder it was loaded from, which is never run; None where there is none).
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    name: str
    fingerprint: str
    specials: dict[str, int]
    own_template: object = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of plain text; never a control token, whatever the text looks like.

        Raises:
            ValueError: a lone surrogate, which is not valid Unicode.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on the library's parallel path."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of the ids; `skip_special` leaves out the control tokens that are not part of an answer."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what this tokenizer was loaded from into `folder`; load_tokenizer(folder) gives it back."""

    @abstractmethod
    def save_hf(self, folder: str | Path) -> None:
        """Write a folder that transformers.AutoTokenizer loads (no remote code), with MiniMind's chat template."""

    @abstractmethod
    def piece(self, i: int) -> str | None:
        """What the vocabulary calls an id below vocab_size; None where it has none of that number."""

    @abstractmethod
    def rules(self) -> str:
        """All that decides the ids of plain text, alike for a SentencePiece model and its export."""

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer or a text: <|im_end|>, which conversations are trained to end with, and eos."""
        return list(dict.fromkeys((self.special_id("<|im_end|>"), self.eos_id)))

    def special_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
            ValueError: this tokenizer has no such control token.
        """
        if token not in self.specials:
            raise UserError(f"tokenizer {self.name} has no control token {shown(token)}")
        return self.specials[token]

    def _hf_config(self, added_tokens: list[dict]) -> dict:
        token = {i: name for name, i in self.specials.items()}
        added = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added_tokens}
        return dict(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False, add_eos_token=False,
                    bos_token=token[self.bos_id], eos_token=token[self.eos_id], pad_token=token[self.pad_id],
                    unk_token=token[self.pad_id], clean_up_tokenization_spaces=False, model_max_length=131072,
                    added_tokens_decoder=added, chat_template=hf_folder.exported_template(self.own_template))

    def __len__(self) -> int:
        return self.vocab_size


class HuggingFaceTokenizer(Tokenizer):
    """A folder with tokenizer.json (BPE) and tokenizer_config.json.

    Text goes through a twin whose added tokens are taken out, so no text can spell one: the library's own
    `encode_special_tokens` covers only those marked special, which MiniMind's <think> is not.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.name = str(folder)
        self._files = {name: untrusted.read_bytes(folder / name, MOST_BYTES) for name in TOKENIZER_FILES
                       if (folder / name).is_file()}
        spec = hf_folder.json_object(self._files["tokenizer.json"], folder / "tokenizer.json")
        config = folder / "tokenizer_config.json"
        self._config = hf_folder.json_object(self._files.get(config.name, b"{}"), config)
        try:
            self.specials = control_ids(spec)
            twin = without_added_tokens(spec, self.specials)
            check_parts(spec)
            plain = hf_folder.as_trained(spec)
        except UserError as err:
            raise UserError(f"{folder}/tokenizer.json: {err}") from None
        except (KeyError, TypeError, AttributeError) as err:
            raise UserError(f"{folder}/tokenizer.json is not a tokenizer: {type(err).__name__}: "
                            f"{first_line(err)}") from None
        self._exported = self._files["tokenizer.json"] if plain == spec else json.dumps(plain).encode()
        self._full = rust_tokenizer(self._exported.decode(), folder, self.specials)
        self._plain, self.is_byte_level = rust_tokenizer(json.dumps(twin), folder, {}), is_byte_level(twin)
        for token in CHAT_TOKENS:
            self.special_id(token)
        # transformers prefers the file to the entry.
        file = self._files.get("chat_template.jinja", b"")
        self.own_template = file.decode("utf-8", "replace") or self._config.get("chat_template")
        self.bos_id = self._configured_id("bos_token", "<|im_start|>")
        self.eos_id = self._configured_id("eos_token", "<|im_end|>")
        self.pad_id = self._configured_id("pad_token", "<|endoftext|>", "<|im_end|>")
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        for role in ("bos", "eos", "pad"):
            if getattr(self, f"{role}_id") not in self.specials.values():
                raise UserError(f"{folder}/tokenizer_config.json: {role}_token is "
                                f"{shown(self.piece(getattr(self, f'{role}_id')))}, a piece of text, no added token")
        check_chat_format(self, self._full)
        roles = f"{self.bos_id},{self.eos_id},{self.pad_id}"
        self.fingerprint = hashlib.sha256(self._files["tokenizer.json"] + roles.encode()).hexdigest()

    def _configured_id(self, key: str, *otherwise: str) -> int:
        """The id of the token the config names under `key`; if it names none, of the first of `otherwise` there is."""
        token = self._config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            token = next((t for t in otherwise if t in self.specials), otherwise[0])
        if not isinstance(token, str) or any("\ud800" <= c <= "\udfff" for c in token):
            raise UserError(f"{self.name}/tokenizer_config.json: {key} is {shown(token)}, not a token")
        found = self._full.token_to_id(token)
        if found is None:
            raise UserError(f"{self.name}/tokenizer_config.json: {key} {shown(token)} is not in the vocabulary")
        return found

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            with library(f"{self.name} cannot encode a text"):
                return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            # The library says only "must be str" about a lone surrogate; Python's encoder says what and where.
            for text in texts:
                text.encode("utf-8")
            raise

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        with library(f"{self.name} cannot decode ids"):
            return self._full.decode(_checked(ids, self.vocab_size), skip_special_tokens=skip_special)

    def piece(self, i: int) -> str | None:
        return self._full.id_to_token(i)

    def rules(self) -> str:
        return hf_folder.rules(json.loads(self._plain.to_str()))

    def save(self, folder: str | Path) -> None:
        _write_files(folder, self._files)

    def save_hf(self, folder: str | Path) -> None:
        """Its tokenizer.json; of its other files, which may name code and more tokens, at most the chat template."""
        config = self._hf_config(json.loads(self._exported)["added_tokens"])
        _write_files(folder, {"tokenizer.json": self._exported, "tokenizer_config.json": _json_bytes(config)})


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model whose control symbols carry MiniMind's names; decode(encode(text)) == text, always.

    SentencePiece itself loses one character, U+2581, which it uses for the space: here it is encoded as its UTF-8
    bytes.  Ids become text byte by byte (byte pieces are bytes), so an answer may be cut anywhere.
    """

    def __init__(self, model: bytes, name: str):
        self.name = name
        self._model = model
        # The library takes no bytes for "load nothing now".
        if not model:
            raise UserError(f"{name} is empty")
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = sp.vocab_size()
            ids = range(self.vocab_size)
            self._pieces = [sp.id_to_piece(i) for i in ids]
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{name} is not a SentencePiece model") from None
        self.specials = {self._pieces[i]: i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
        for token in CHAT_TOKENS:
            self.special_id(token)
        self.bos_id, self.eos_id = (self.special_id(token) for token in CHAT_TOKENS)
        self.pad_id = self.specials.get("<|endoftext|>", self.eos_id)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._bytes = [self._piece_bytes(i) for i in ids]
        self._skipped = {i for token, i in self.specials.items() if token not in VISIBLE_TOKENS}
        self._meta_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in META_BYTES]
        if not all(map(sp.is_byte, self._meta_ids)) or self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(f"{name} changes the text it encodes; train it with byte fallback, identity "
                             "normalisation and no dummy prefix (launch/train_tokenizer.py does)")

    def _piece_bytes(self, i: int) -> bytes:
        if self._sp.is_byte(i):
            return bytes([int(self._pieces[i][3:5], 16)])
        return self._pieces[i].replace(META_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        # As bytes, so that a lone surrogate is Python's UnicodeEncodeError, a ValueError that says where.
        first, *rest = text.encode("utf-8").split(META_BYTES)
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._meta_ids
            ids += self._sp.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(META_SPACE in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._sp.encode([text.encode("utf-8") for text in texts])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        ids = _checked(ids, self.vocab_size)
        if skip_special:
            ids = [i for i in ids if i not in self._skipped]
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def piece(self, i: int) -> str:
        return self._pieces[i]

    def rules(self) -> str:
        twin = json.dumps(without_added_tokens(self._hf_spec(), self.specials))
        return hf_folder.rules(json.loads(rust_tokenizer(twin, Path(self.name), {}).to_str()))

    def _hf_spec(self) -> dict:
        added = hf_folder.added_tokens(self.specials, VISIBLE_TOKENS)
        spec = hf_folder.sentencepiece_spec(self._sp, self._pieces, added, META_SPACE)
        check_export(self, spec)
        return spec

    def save(self, folder: str | Path) -> None:
        _write_files(folder, {"tokenizer.model": self._model})

    def save_hf(self, folder: str | Path) -> None:
        """The same ids as `tokenizers` BPE with byte fallback.  Exceptions: there U+2581 becomes a space, and added
        tokens typed in a text become control tokens, as with every Hugging Face tokenizer."""
        spec = self._hf_spec()
        _write_files(folder, {"tokenizer.json": _json_bytes(spec),
                              "tokenizer_config.json": _json_bytes(self._hf_config(spec["added_tokens"]))})


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Load a Hugging Face tokenizer folder, a SentencePiece .model (or a folder with tokenizer.model), or the default.

    Args:
        path: None is the tokenizer that ships with the project.

    Raises:
        ValueError: nothing there, malformed, or without MiniMind's chat tokens; the message names the path.
    """
    path = ASSETS / "tokenizer.model" if path is None else Path(path)
    try:
        if (path / "tokenizer.json").is_file():
            tok = HuggingFaceTokenizer(path)
            check_text(tok, stretches=not tok.is_byte_level)
            return tok
        if (path / "tokenizer.model").is_file():
            path = path / "tokenizer.model"
        if path.is_file():
            name = "embedded" if path == ASSETS / "tokenizer.model" else str(path)
            tok = SentencePieceTokenizer(untrusted.read_bytes(path, MOST_BYTES), name)
            if name != "embedded":
                check_text(tok)
            return tok
    except OSError as err:
        raise UserError(f"tokenizer {path} cannot be read: {err.strerror}") from None
    what = "has neither tokenizer.json nor tokenizer.model" if path.is_dir() else "does not exist"
    raise UserError(f"tokenizer {path} {what}")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 6400, out: str | Path) -> Tokenizer:
    """Train a SentencePiece BPE with byte fallback and MiniMind's control tokens, and write it to `out`.

    Nothing is normalised, digits stand alone, and so does every newline: the chat format puts newlines around each
    text, and text must tokenise the same whatever stands before it.  The same texts give the same bytes.

    Raises:
        ValueError: no text, too little of it for vocab_size, or vocab_size too small for it; nothing is written.
    """
    # A generator over single lines: newlines are pieces of their own, and SentencePiece is made for short sentences.
    lines = (line for text in texts for line in text.replace(META_SPACE, "").split("\n") if line)
    first = next(lines, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    fixed = len(SPECIAL_TOKENS) + 256 + 1
    if vocab_size <= fixed:
        raise UserError(f"vocab_size is {vocab_size}; control tokens, bytes and newline alone take {fixed}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, unk_piece=SPECIAL_TOKENS[0],
            bos_piece=SPECIAL_TOKENS[1], eos_piece=SPECIAL_TOKENS[2], control_symbols=list(SPECIAL_TOKENS[3:]),
            user_defined_symbols=["\n"], max_sentence_length=1 << 30, shuffle_input_sentence=False, num_threads=1,
            minloglevel=2)
    except RuntimeError as err:
        most, least = re.search(r"<= (\d+)$", str(err).rstrip(". \n")), re.search(r"\d+ vs (\d+)", str(err))
        if most:
            why = f"too little text for a vocabulary of {vocab_size} pieces: at most {most[1]} can be learnt from it"
        elif least:
            why = f"vocab_size is {vocab_size}; the characters of this text alone take {least[1]} pieces"
        else:
            why = f"the tokenizer cannot be trained: {' '.join(str(err).split())}"
        raise UserError(why) from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), name=str(out))
    _write_files(Path(out).parent, {Path(out).name: model.getvalue()})
    return tokenizer


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {i} is not in [0, {vocab_size})")
    return ids


def _write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
