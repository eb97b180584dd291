"""The one door for JSON and YAML that others wrote: bounded in size and depth, plain values only, errors of one line.

    python -m pytest tests/config/test_untrusted.py
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

import yaml

from minimind_ds.config.errors import UserError

MOST_BYTES, MOST_LEVELS, MOST_VALUES = 1 << 20, 32, 100_000
# A step's line has some 300 bytes, and a run a few million steps.
MOST_OF_LINES = 8 << 30
MOST_SHOWN = 100
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
         stat.S_IFDIR: "a folder"}


def shown(value: Any) -> str:
    """A value in a message, however long or hostile."""
    kinds = {list: "a list", dict: "an object", type(None): "nothing"}
    text = ascii(value) if isinstance(value, (str, bytes)) else kinds.get(type(value)) or repr(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN - 3] + "..."


def read_bytes(path: str | pathlib.Path, most: int = MOST_BYTES) -> bytes:
    """A regular file of at most `most` bytes.

    Raises:
        UserError: not there, not readable, a pipe, device, socket or folder, or larger.
    """
    with open_file(path, most) as file:
        try:
            # Room for so many bytes is made at once.
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            raise UserError(f"cannot read {shown_path(path)}: {error.strerror}") from None
    if len(content) > most:
        raise too_large(path, most)
    return content


def open_file(path: str | pathlib.Path, most: int) -> BinaryIO:
    """A regular file of at most `most` bytes, opened; the system's errors of reading it are the caller's.

    Raises:
        UserError: as read_bytes.
    """
    name = shown_path(path)
    try:
        # A pipe that nobody writes to would be waited for.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise UserError(f"{name} is a folder, not a file") from None
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        # A NUL byte in it, or half of a surrogate pair.
        raise UserError(f"{name} is no file name") from None
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= most:
        return file
    file.close()
    if stat.S_ISREG(found.st_mode):
        raise too_large(path, most)
    raise UserError(f"{name} is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a regular file")


def too_large(path: str | pathlib.Path, most: int) -> UserError:
    return UserError(f"{shown_path(path)} is larger than {most >> 20 or most / (1 << 20):.3g} MiB, the most that is "
                     "read of it")


def lines(path: str | pathlib.Path) -> Iterator[bytes]:
    """The lines of a JSONL file of ours, without their ends; those longer than any of ours, and none where there is no
    file, are passed over.

    Raises:
        UserError: what lies there is no regular file, or larger than any of ours.
    """
    if not os.path.lexists(path):
        return
    with open_file(path, MOST_OF_LINES) as file:
        whole = True
        while line := file.readline(MOST_BYTES):
            ends = line.endswith(b"\n") or len(line) < MOST_BYTES
            if whole and ends:
                yield line.rstrip(b"\r\n")
            whole = ends


def shown_path(path: str | pathlib.Path) -> str:
    text = str(path)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}"


def read_text(path: str | pathlib.Path, most: int = MOST_BYTES) -> str:
    """As read_bytes, decoded; a byte order mark is passed over.  Raises UserError for what is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown_path(path)} is not UTF-8 (byte {error.start + 1})") from None


def read_json(path: str | pathlib.Path, most: int = MOST_BYTES) -> dict:
    """A file of one JSON object.  Raises UserError."""
    return json_object(read_text(path, most), shown_path(path))


def json_object(text: str, what: str, most_values: int = MOST_VALUES) -> dict:
    """The text of one JSON object, each key once, numbers finite, at most so many values.

    Raises:
        UserError: names `what`, with the line where JSON breaks off.
    """
    def once(pairs):
        twice = [key for key, times in collections.Counter(key for key, _ in pairs).items() if times > 1]
        if twice:
            raise UserError(f"{what}: key {shown(twice[0])} appears twice")
        return dict(pairs)

    def number(text):
        # NaN, Infinity, 1e999.
        if not math.isfinite(float(text)):
            raise UserError(f"{what}: {shown(text)} is not a finite number")
        return float(text)

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{what}: nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        # A number of more digits than Python reads.
        raise UserError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} holds {shown(value)}, not a JSON object")
    check_values(value, what, most_values)
    return value


class Loader(yaml.SafeLoader):
    """Plain values; a key twice in one mapping is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {shown(key.value)} appears twice",
                                                            key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def yaml_mapping(text: str, what: str) -> dict:
    """The text of one YAML mapping; anchors may be used, within bounds.

    Raises:
        UserError: names `what`, with the line where YAML breaks off.
    """
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or "it cannot be parsed").split())[:MOST_SHOWN]
        raise UserError(f"{what}{f' line {mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{what}: nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError, LookupError) as error:
        # A date that is none, a key that cannot be one, `!!bool 7`.
        raise UserError(f"{what}: not valid YAML: {type(error).__name__}: {str(error)[:MOST_SHOWN]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} holds {shown(value)}, not `key: value` lines")
    check_values(value, what, nul=False)
    return value


def check_values(value: Any, what: str, most_values: int = MOST_VALUES, *, nul: bool = True) -> None:
    """Raises UserError for what is nested too deeply, or too much, and for text that is none.

    nul: whether text may hold NUL, as a tokenizer's does and no path can.

    A value that YAML's anchors repeat counts each time; a loop of them is nested without end.
    """
    level, count = [value], 0
    for _ in range(MOST_LEVELS):
        below = []
        for item in level:
            parts = [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else ()
            if isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise UserError(f"{what}: {shown(item)} is no text: it holds half of a surrogate pair")
            if isinstance(item, str) and not nul and "\0" in item:
                raise UserError(f"{what}: {shown(item)} holds a NUL byte")
            count += len(parts)
            if count > most_values:
                raise UserError(f"{what}: more than {most_values} values")
            below += parts
        if not below:
            return
        level = below
    raise UserError(f"{what}: nested too deeply")
