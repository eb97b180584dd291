"""A file -> raw records one by one, whatever holds them; told by its content, never by its name.

JSON lines, a JSON array, JSON objects one after another, each perhaps as gzip; Parquet, Arrow and the folder that
`datasets` saves, with pyarrow.  All are streamed: memory is bounded by a record.  What is none of these is named in
one line that says what to do.

    python -c "from minimind_ds.data.readers import open_source as o; print(o('examples/sft_train.jsonl').form)"
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import importlib.util
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.data import arrow
from minimind_ds.data.json_text import (
    DECODER,
    MAX_LINE_BYTES,
    DataError,
    decode_line,
    other_encoding,
    parse,
    reason,
    why_not,
)

# First bytes: (what such a file is, what to do with it).
CONVERT = "iconv -f {} -t UTF-8 OLD > NEW converts it"
NO_DATA = {
    b"\xff\xfe\x00\x00": ("UTF-32 text", CONVERT.format("UTF-32")),
    b"\x00\x00\xfe\xff": ("UTF-32 text", CONVERT.format("UTF-32")),
    b"\xff\xfe": ("UTF-16 text", CONVERT.format("UTF-16")), b"\xfe\xff": ("UTF-16 text", CONVERT.format("UTF-16")),
    b"PK\x03\x04": ("a zip archive", "unzip it first"),
    b"\xfd7zXZ\x00": ("xz-compressed", "unpack it with xz -d, or compress with gzip"),
    b"BZh": ("bzip2-compressed", "unpack it with bunzip2, or compress with gzip"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it with zstd -d, or compress with gzip"),
    b"\x04\x22\x4d\x18": ("lz4-compressed", "unpack it with lz4 -d, or compress with gzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"), b"Rar!": ("a RAR archive", "unpack it first"),
    b"%PDF": ("a PDF", 'take its text out, as {"text": ...} lines'),
    b"\x89PNG": ("a PNG picture", "the model reads text only"),
    b"\x89HDF": ("an HDF5 file", "write its records as JSON lines"),
    b"\x93NUMPY": ("a NumPy array", "write its records as JSON lines"),
    b"SQLite format 3": ("an SQLite database", "write its records as JSON lines"),
    b"PARE": ("encrypted Parquet", "write it again without encryption"),
    b"FEA1": ("Feather of the old kind", "write it again with pyarrow.feather.write_feather"),
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
                    ("a pickle", "it is not opened, since it may run code; write its records as JSON lines")),
    b"\x7fELF": ("a program", "name a file of records"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull fetches it"),
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"),
                    ("a web page", "was the download refused? Get the file itself")),
}
# Which of the first four bytes are zero in text that begins with two ASCII characters (RFC 4627, section 3).
WIDE = {(0, 1, 1, 1): "UTF-32LE", (1, 1, 1, 0): "UTF-32BE", (0, 1, 0, 1): "UTF-16LE", (1, 0, 1, 0): "UTF-16BE"}
GZIP = b"\x1f\x8b"
HEAD_BYTES, READ_BYTES = 4096, 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
# The longest thing JSON has that is broken off rather than wrong: `-Infinity`, or an escape of two surrogates.
BROKEN_OFF = 16


@dataclass
class RecordFile:
    """An opened file.  Iterating gives (number, line, record): number counts lines from 1 where unit is "line", else
    records; line is 0 where there are none; a record that is bytes is a line still to be decoded.

    file: what is read from, while it is.
    """

    path: Path
    form: str
    unit: str
    read: Callable[[RecordFile], Iterator[tuple[int, int, Any]]]
    file: BinaryIO | None = None
    done: int = 0

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        self.done = 0
        with _readable(self.path):
            yield from self.read(self)

    def count(self, n_bytes: int) -> None:
        """Adds bytes of a file that are read."""
        self.done += n_bytes

    @property
    def position(self) -> int:
        """Approximate number of bytes read so far."""
        return self.done + (self.file.tell() if self.file and not self.file.closed else 0)

    def place(self, number: int, line: int = 0) -> str:
        """Where a record is, for a message."""
        return f"{self.path} {self.unit} {number}" + (f" (line {line})" if line and self.unit == "record" else "")


@functools.cache
def unit_of(path: Path) -> str:
    """What the numbers of a file's records count: "line" or "record"."""
    try:
        return open_source(path).unit
    # It has gone since it was tokenised.
    except DataError:
        return "record"


def open_source(path: str | Path) -> RecordFile:
    """Find out what a file is, and make ready to read it.

    Raises:
        DataError: not there, not readable, not a file, empty, of a kind that holds no records, or pyarrow is missing.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as err:
        why = "does not exist" if isinstance(err, FileNotFoundError) else f"cannot be read: {reason(err)}"
        raise DataError(f"{shown(path)} {why}") from None
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(f"{path} is {what}, not a file: data are read more than once; write them to a file first")
    with _readable(path):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise DataError(f"{path} is empty")
        if not head.startswith(GZIP):
            return _by_content(path, head, "")
        with gzip.open(path) as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise DataError(f"{path} is empty inside gzip")
        return _by_content(path, head, " in gzip")


def _by_content(path: Path, head: bytes, inside: str) -> RecordFile:
    for start, (what, remedy) in NO_DATA.items():
        if head.startswith(start):
            raise DataError(f"{path} is {what}{inside}, not data: {remedy}")
    if wide := WIDE.get(tuple(int(not byte) for byte in head[:4])):
        raise DataError(f"{path} is {wide[:6]} text{inside}, not data: {CONVERT.format(wide)}")
    if not head.strip(b"\0"):
        raise DataError(f"{path} begins with zero bytes{inside}, not data: was it copied whole?")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive{inside}, not data: unpack it first")
    if head.startswith((GZIP, arrow.PARQUET, arrow.ARROW_FILE, arrow.ARROW_STREAM)):
        if inside:
            raise DataError(f"{path} is a binary file in gzip: gunzip it first")
        form = "Parquet" if head.startswith(arrow.PARQUET) else "Arrow"
        if importlib.util.find_spec("pyarrow") is None:
            raise DataError(f"{path} is {form}, which is read with pyarrow: pip install -e '.[parquet]'")
        return RecordFile(path, form, "record", lambda source: arrow.rows([path], source.count))
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    form, scan = "JSON lines", _lines
    if text.startswith(b"["):
        form, scan = "a JSON array", _array
    elif text.startswith(b"{") and _goes_over_lines(path, gzip.open if inside else open):
        form, scan = "JSON objects", _objects

    def read(source: RecordFile):
        with path.open("rb") as source.file:
            with gzip.open(source.file) if inside else contextlib.nullcontext(source.file) as file:
                yield from scan(file, path)
            source.done = source.file.tell()

    return RecordFile(path, form + inside, "line" if scan is _lines else "record", read)


def _goes_over_lines(path: Path, opened: Callable[..., BinaryIO]) -> bool:
    """The first line is no record, but the lines from there on begin with one."""
    with opened(path, "rb") as file:
        for _, _, line in _lines(file, None):
            with contextlib.suppress(UserError):
                decode_line(line)
                return False
            break
    with opened(path, "rb") as file, contextlib.suppress(UserError):
        window = Window(file)
        window.peek()
        return isinstance(window.value(), dict) and window.peek() in ("{", "")
    return False


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system or a compressed file objects to is one line."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise DataError(f"{path} is damaged or cut off: {reason(err)}") from None
    except OSError as err:
        raise DataError(f"{path} cannot be read: {reason(err)}") from None



def shown(path: Path) -> str:
    """A path that may be of any length, for a message."""
    text = str(path)
    return ascii(text[:200])[1:-1] + "..." if len(text) > 200 or "\0" in text else text


def _lines(file: BinaryIO, path: Path | None) -> Iterator[tuple[int, int, bytes]]:
    """Lines that hold something, from 1; of one that is too long only the first bytes, one more than allowed."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, number, line


class Window:
    """The part of a JSON text that is being looked at; grows where a value does not end in it.

    Attributes: text, at (what comes before is done with), line (of `at`, from 1).
    """

    def __init__(self, file: BinaryIO):
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self, size: int = 0) -> bool:
        block = self.file.read(size or READ_BYTES)
        self.ended = not block
        try:
            text = self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError:
            raise UserError(f"what follows is not UTF-8{other_encoding(block)}") from None
        self.text, self.at = self.text[self.at:] + text, 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            self.advance(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def advance(self, to: int):
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def value(self) -> Any:
        """The JSON value that begins at `at`.

        Raises:
            UserError: it is not JSON, or longer than allowed; where the next one begins is not known then.
        """
        size = READ_BYTES
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # A number at the very end may go on.
                if isinstance(value, (dict, list, str)) or end < len(self.text) or self.ended:
                    self.advance(end)
                    return value
            except (RecursionError, ValueError) as err:
                broken_off = isinstance(err, json.JSONDecodeError) and (
                    err.msg.startswith("Unterminated") or err.pos >= len(self.text) - BROKEN_OFF)
                if self.ended and broken_off and (err.msg.startswith("Unt") or err.pos >= len(self.text.rstrip())):
                    raise UserError("the file ends inside it; is it cut off?") from None
                if self.ended or not broken_off:
                    at_line = self.line + self.text.count("\n", self.at, getattr(err, "pos", self.at))
                    why = f"is not valid JSON: {err.msg}, line {at_line}" if hasattr(err, "msg") else why_not(err)
                    raise UserError(f"it {why}") from None
            if len(self.text) - self.at > MAX_LINE_BYTES:
                raise UserError(f"the record is longer than {MAX_LINE_BYTES >> 20} MiB")
            self.more(size)
            size *= 2


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, Any]]:
    window = Window(file)
    number = 0
    with _named(path, window, lambda: number):
        window.peek()
        window.at += 1
        mark = window.peek()
        while mark != "]" or number:
            number += 1
            window.peek()
            line = window.line
            yield number, line, window.value()
            mark = window.peek()
            if mark == "]":
                break
            if mark != ",":
                raise UserError(f"the array goes on with {ascii(mark)} after it, not with a comma or its end" if mark
                                else "the array does not end after it; is the file cut off?")
            window.at += 1
        window.at += 1
        if window.peek():
            raise UserError("something follows after the array's end")


def _objects(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, Any]]:
    window, number = Window(file), 0
    with _named(path, window, lambda: number):
        while window.peek():
            number += 1
            line = window.line
            yield number, line, window.value()


@contextlib.contextmanager
def _named(path: Path, window: Window, number: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except UserError as err:
        # Where the next record begins is not known, so this one cannot be skipped.
        raise DataError(f"{path} record {number()} (line {window.line}): {err}") from None


def _folder(path: Path) -> RecordFile:
    """What `datasets` saved to disk; other folders hold files, each of which is read by itself."""
    files, shown = data_set(path)
    if not files:
        raise DataError(f"{path} is a folder, not a file of records")
    sources = [open_source(file) for file in files]
    if any(source.form != "Arrow" for source in sources):
        raise DataError(f"{path}: not all files that its state.json names are Arrow")
    return RecordFile(path, "datasets", "record", lambda source: arrow.rows(files, source.count, shown))


def data_set(folder: str | Path) -> tuple[list[Path], list[str] | None]:
    """The Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote, in order, none if it is no such folder;
    and the columns that the set shows, None: all.

    Raises:
        DataError: one of several splits, damaged, or with an order of its own for the rows.
    """
    folder = Path(folder)
    with _readable(folder):
        try:
            if (folder / "dataset_dict.json").is_file():
                splits = parse((folder / "dataset_dict.json").read_text("utf-8"), "it")["splits"]
                named = ", ".join(untrusted.shown(split) for split in splits[:5])
                raise DataError(f"{folder} holds the splits {named}: name one, for example "
                                f"{folder}/{untrusted.shown_path(splits[0])}")
            if not (folder / "state.json").is_file():
                return [], None
            state = parse((folder / "state.json").read_text("utf-8"), "it")
            # Names only: a file of this folder is meant, wherever the name points.
            names = [Path(entry["filename"]).name for entry in state["_data_files"]]
            if {"", ".."} & set(names):
                raise KeyError
            # Which rows are chosen, and in which order.
            if state.get("_indices_data_files") or state.get("_indices_files"):
                raise DataError(f"{folder} has a choice of its rows beside them, which is not read: load it with "
                                "datasets, flatten_indices() and save it again")
            columns = None if state.get("_output_all_columns") else state.get("_format_columns")
            if not (columns is None or isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
                raise KeyError
            return [folder / name for name in names], columns
        except DataError:
            raise
        except (UserError, UnicodeDecodeError, KeyError, TypeError, IndexError):
            raise DataError(f"{folder} is no folder that datasets saved: its state.json is damaged") from None
