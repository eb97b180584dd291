"""Parses untrusted JSON; every error is one printable line.

    python -c "from minimind_ds.data.json_text import parse; print(parse('{\\"a\\": 1}', 'it'))"
"""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from typing import Any

from minimind_ds.config.errors import UserError

MAX_LINE_BYTES = 64 << 20
# Of a record of an array or a column: fewer than what Python sends to another process, in which half a thousand end.
MOST_LEVELS = 100


class DataError(UserError):
    """A data file that cannot be used; the message names the file, the line or record from 1, and what is wrong."""


def decode_line(line: bytes) -> Any:
    """One JSONL line as a Python value.

    Raises:
        UserError: too long, not UTF-8, not JSON, numbers JSON does not have, or nested too deeply.
    """
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return parse(line.decode("utf-8"), "the line")
    except UserError as err:
        if line.startswith(codecs.BOM_UTF8):
            raise UserError("the line begins with a byte order mark, as of a file put behind another: "
                            r"sed 's/^\xef\xbb\xbf//' OLD > NEW takes it out") from None
        plain = line.lstrip()[:1] not in (b"{", b"[", b'"')
        raise UserError(f"{err}" + '; lines are JSON objects, plain text is {"text": "..."}' * plain) from None
    except UnicodeDecodeError as err:
        raise UserError(f"it is not UTF-8 (byte {err.start + 1} of the line){other_encoding(line)}") from None


def other_encoding(line: bytes) -> str:
    """What to do about bytes that are not UTF-8, for the end of a message."""
    try:
        line.decode("gb18030")
        return "; it may be GBK: iconv -f GB18030 -t UTF-8 OLD > NEW converts it"
    except UnicodeDecodeError:
        return "; iconv -f ITS_ENCODING -t UTF-8 OLD > NEW converts it"


def parse(text: str, what: str) -> Any:
    """A whole JSON text as a Python value.  Raises UserError, which names `what`."""
    try:
        return DECODER.decode(text)
    except (RecursionError, ValueError) as err:
        raise UserError(f"{what} {why_not(err)}") from None


def why_not(err: Exception) -> str:
    """What the decoder's exception says of a text, for the end of a sentence."""
    if isinstance(err, RecursionError):
        return "is nested too deeply"
    if isinstance(err, json.JSONDecodeError):
        return f"is not valid JSON: {err.msg} (column {err.pos + 1})"
    # Python refuses to read integers of more than 4300 digits.
    return f"is not valid JSON: {err}"


def reason(err: Exception) -> str:
    return " ".join((getattr(err, "strerror", None) or str(err) or type(err).__name__).split())[:200]


def _no_such_number(name: str) -> float:
    raise UserError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"number {text[:20]} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"the key {quoted(twice)} stands twice in one object")
    return found


DECODER = json.JSONDecoder(parse_constant=_no_such_number, parse_float=_finite, object_pairs_hook=_once)


def dump(value: Any, what: str) -> str:
    """JSON the way transformers' chat templates write it: spaces after separators, non-ASCII kept."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise UserError(f"{what} is not JSON: {err}") from None


def string(value: Any, what: str) -> str:
    """The value, if it is a string of valid Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as err:
            raise UserError(f"{what} is not valid Unicode (lone surrogate at character {err.start + 1})") from None
    return value


def letters(value: Any, levels: int = MOST_LEVELS) -> int:
    """Of all texts of a value, keys among them.  Raises RecursionError where it has more levels than that."""
    if isinstance(value, str):
        return len(value)
    if not levels:
        raise RecursionError("nested too deeply")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(letters(part, levels - 1) for part in parts)


def list_of(value: Any, what: str) -> list:
    """A list, or the JSON text of one; an empty text is an empty list."""
    if isinstance(value, str):
        value = (parse(value, what) if value.strip() else None) or []
    if not isinstance(value, list):
        raise UserError(f"{what} is {kind_of(value)}, not a list")
    return value


def kind_of(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number",
             float: "a number"}
    return names.get(type(value), type(value).__name__)


def quoted(value: Any) -> str:
    """For a message of one line, however long or hostile the value."""
    if isinstance(value, (bool, int, float)):
        return repr(value)[:40]
    return ascii(value[:40]) if isinstance(value, str) else kind_of(value)
