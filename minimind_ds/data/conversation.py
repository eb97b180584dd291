"""One JSONL line -> a validated Conversation (or a text), whatever of five common shapes the file is in.

Data files are written by others.  Everything that could go wrong later goes wrong here, with the file, the line and
the reason, so that rendering and tokenising never fail half-way through a data set.

    python -c "import minimind_ds.data.conversation as c; print(c.file_kind('examples/sft_train.jsonl'))"
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_ds.config.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
# Who speaks in ShareGPT's `from`; function_call is an assistant turn that holds nothing but a call.
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool",
                  "function": "tool", "function_response": "tool", "observation": "tool",
                  "function_call": "function_call"}
MAX_LINE_BYTES = 64 << 20


class DataError(UserError):
    """A data file that cannot be used; the message names the file, the line counted from 1, and what is wrong."""


@dataclass(frozen=True)
class ToolCall:
    """A call the assistant makes; `arguments` is the JSON text as it will be rendered."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn.  `reasoning` None means the record gives none, so a </think> in `content` is taken apart."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Validated turns; `tools` holds the JSON text of each tool as it will be rendered."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


def parse_conversation(record: dict) -> Conversation:
    """Validate a training record of any conversation shape (see record_shape).

    Raises:
        ValueError: what is wrong with it, without file or line; any message is one line.
    """
    shape = record_shape(record)
    if shape == "text":
        raise UserError("the record holds 'text', which is for pretraining; a conversation is needed")
    try:
        return _PARSERS[shape](record)
    except RecursionError:
        raise UserError("it is nested too deeply") from None


def record_shape(record: dict) -> str:
    """"conversations", "sharegpt", "messages", "alpaca" or "text", told by the record's keys.

    Raises:
        ValueError: none of them.
    """
    if not isinstance(record, dict):
        raise UserError(f"it is {_kind(record)}, not a JSON object")
    if "conversations" in record:
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "conversations"
    for key, shape in (("messages", "messages"), ("instruction", "alpaca"), ("text", "text")):
        if key in record:
            return shape
    keys = ", ".join(ascii(key[:40]) for key in list(record)[:5]) or "none"
    raise UserError("none of the keys 'conversations', 'messages', 'instruction', 'text' is there "
                     f"(keys found: {keys})")


def parse_messages(turns: list, tools: Any = None, *, for_training: bool = True) -> Conversation:
    """Validate role/content turns; `tools` is a list of tool objects, or that list as JSON text.

    Tools may also stand on a system turn, as in MiniMind's data; the last ones given count.

    Args:
        for_training: ask for at least one assistant turn; a chat prompt has none yet.

    Raises:
        ValueError: what is wrong.
    """
    if not isinstance(turns, list):
        raise UserError(f"the turns are {_kind(turns)}, not a list")
    if not turns:
        raise UserError("the conversation is empty")
    messages = []
    tool_texts = _tools(tools)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} is {_kind(turn)}, not an object")
        message = _message(turn, number)
        if turn.get("tools"):
            if message.role != "system":
                raise UserError(f"turn {number}: 'tools' belongs to a system turn, not to {message.role!r}")
            tool_texts = _tools(turn["tools"])
        messages.append(message)
    if for_training and not any(message.role == "assistant" for message in messages):
        raise UserError("there is no assistant turn to learn from")
    return Conversation(tuple(messages), tool_texts)


def parse_text(record: dict) -> str:
    """The text of a pretraining record.

    Raises:
        ValueError: it holds no string 'text', or one that is not valid Unicode.
    """
    shape = record_shape(record)
    if shape != "text":
        raise UserError(f"a {shape!r} record is for fine-tuning; pretraining needs a 'text'")
    return _string(record["text"], "text")


def _message(turn: dict, number: int) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        raise UserError(f"role {_quoted(role)} is not one of {', '.join(ROLES)}")
    content, reasoning, calls = turn.get("content"), turn.get("reasoning_content"), turn.get("tool_calls")
    if (calls or reasoning) and role != "assistant":
        key = "tool_calls" if calls else "reasoning_content"
        raise UserError(f"turn {number}: {key!r} belongs to an assistant turn, not to {role!r}")
    # OpenAI's format has null here when the answer is nothing but calls.
    if content is None and calls:
        content = ""
    where = f"turn {number} ({role}): "
    content = _string(content, where + "content")
    reasoning = None if reasoning is None else _string(reasoning, where + "reasoning_content")
    return Message(role, content, reasoning, _tool_calls(calls, where) if calls else ())


def _tool_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    parsed = []
    for call in _json_list(calls, where + "tool_calls"):
        if isinstance(call, dict):
            call = call.get("function") or call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{where}a tool call has no name")
        if "arguments" not in call:
            raise UserError(f"{where}tool call {call['name'][:40]!a} has no arguments")
        arguments = call["arguments"]
        text = arguments if isinstance(arguments, str) else _json_text(arguments, where + "arguments")
        parsed.append(ToolCall(_string(call["name"], where + "tool call name"), _string(text, where + "arguments")))
    return tuple(parsed)


def _tools(tools: Any) -> tuple[str, ...]:
    if not tools:
        return ()
    parsed = _json_list(tools, "tools")
    if not all(isinstance(tool, dict) for tool in parsed):
        raise UserError("tools is not a list of objects")
    return tuple(_string(_json_text(tool, "tools"), "tools") for tool in parsed)


def _from_sharegpt(record: dict) -> Conversation:
    turns = record["conversations"]
    parsed = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} is {_kind(turn)}, not an object")
        speaker = turn.get("from")
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise UserError(f"from {_quoted(speaker)} is not one of {', '.join(SHAREGPT_ROLES)}")
        value = turn.get("value")
        if role == "function_call":
            call = _json(_string(value, f"turn {number} (function_call): value"), f"turn {number}: value")
            calls = call if isinstance(call, list) else [call]
            parsed.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            parsed.append({"role": role, "content": value, "tools": turn.get("tools")})
    return parse_messages(parsed, record.get("tools"))


def _from_alpaca(record: dict) -> Conversation:
    turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is not a list of [question, answer] pairs")
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = _string(record["instruction"], "instruction")
    if record.get("input"):
        question += "\n" + _string(record["input"], "input")
    answer = _string(record.get("output"), "output")
    return parse_messages([*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


_PARSERS: dict[str, Callable[[dict], Conversation]] = {
    "conversations": lambda record: parse_messages(record["conversations"], record.get("tools")),
    "messages": lambda record: parse_messages(record["messages"], record.get("tools")),
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
}


class Records:
    """Iterate (line number, Conversation or text) over a JSONL file; made by read_records.

    Attributes: shape (of the file's records, known after the first), read and skipped (counts, complete at the end of
    an iteration), first_skipped (the message of the first bad record, or ""), position (bytes read, about).
    """

    def __init__(self, path: Path, kind: str, skip: bool):
        self.path, self.kind, self.skip = path, kind, skip
        self.shape, self.read, self.skipped, self.first_skipped, self.position = "", 0, 0, "", 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.shape, self.read, self.skipped, self.first_skipped, self.position = "", 0, 0, "", 0
        for number, line in _lines(self.path):
            self.position += len(line)
            try:
                item = self._parse(line)
            except UserError as err:
                self._bad(number, err)
                continue
            self.read += 1
            yield number, item
        if not self.read:
            why = f": all {self.skipped} are bad; {self.first_skipped}" if self.skipped else ""
            raise DataError(f"{self.path} holds no record{why}")

    def _parse(self, line: bytes) -> Any:
        record = decode_line(line)
        shape = record_shape(record)
        item = parse_text(record) if self.kind == "text" else parse_conversation(record)
        self.shape = self.shape or shape
        if shape != self.shape:
            raise UserError(f"a {shape!r} record in a file that began with {self.shape!r}")
        return item

    def _bad(self, number: int, err: ValueError) -> None:
        message = f"{self.path} line {number}: {err}"
        if not self.skip:
            raise DataError(message) from None
        self.skipped += 1
        self.first_skipped = self.first_skipped or message


def read_records(path: str | Path, kind: str, on_bad_record: str = "stop") -> Records:
    """Open a JSONL file for reading; blank lines and a byte order mark are passed over.

    Args:
        kind: "conversations" yields Conversation objects, "text" yields strings.
        on_bad_record: "stop" raises at the first bad record, "skip" counts it and goes on.

    Raises:
        DataError: no such file, a folder, unreadable, empty; while iterating: a bad record, or no good one.
    """
    if kind not in ("conversations", "text"):
        raise UserError(f"kind is {kind!r}; it must be 'conversations' or 'text'")
    if on_bad_record not in ("stop", "skip"):
        raise UserError(f"on_bad_record is {on_bad_record!r}; it must be 'stop' or 'skip'")
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a JSONL file")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError(f"{path} is empty")
    except OSError as err:
        raise DataError(f"{path} cannot be read: {err.strerror}") from None
    return Records(path, kind, on_bad_record == "skip")


def file_kind(path: str | Path) -> str:
    """"text" or "conversations", by the file's first record.

    Raises:
        DataError: as read_records; the first record is of no known shape.
    """
    read_records(path, "text")
    for number, line in _lines(Path(path)):
        try:
            return "text" if record_shape(decode_line(line)) == "text" else "conversations"
        except UserError as err:
            raise DataError(f"{path} line {number}: {err}") from None
    raise DataError(f"{path} holds no record")


def decode_line(line: bytes) -> Any:
    """One JSONL line as a Python value.

    Raises:
        ValueError: too long, not UTF-8, not JSON, numbers JSON does not have, or nested too deeply.
    """
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return _json(line.decode("utf-8"), "the line")
    except UnicodeDecodeError as err:
        raise UserError(f"it is not UTF-8 (byte {err.start + 1} of the line)") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, from 1; of one that is too long only the first bytes, one more than allowed."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_such_number, parse_float=_finite)
    except RecursionError:
        raise UserError(f"{what} is nested too deeply") from None
    except json.JSONDecodeError as err:
        raise UserError(f"{what} is not valid JSON: {err.msg} (column {err.pos + 1})") from None
    # Python refuses to read integers of more than 4300 digits.
    except ValueError as err:
        raise UserError(f"{what} is not valid JSON: {err}") from None


def _no_such_number(name: str) -> float:
    raise UserError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"number {text[:20]} is too large")
    return value


def _json_list(value: Any, what: str) -> list:
    if isinstance(value, str):
        value = _json(value, what) or []
    if not isinstance(value, list):
        raise UserError(f"{what} is {_kind(value)}, not a list")
    return value


def _json_text(value: Any, what: str) -> str:
    # The way transformers' chat templates write JSON: spaces after separators, non-ASCII kept.
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise UserError(f"{what} is not JSON: {err}") from None


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {_kind(value)}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as err:
            raise UserError(f"{what} is not valid Unicode (lone surrogate at character {err.start + 1})") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number",
             float: "a number"}
    return names.get(type(value), type(value).__name__)


def _quoted(value: Any) -> str:
    """For a message of one line, however long or hostile the value."""
    return ascii(value[:40]) if isinstance(value, str) else _kind(value)
