"""A data file -> validated Conversations (or texts) one by one, whatever holds them and in whatever shape.

Data files are written by others.  Everything that could go wrong later goes wrong here, with the file, the line and
the reason, so that rendering and tokenising never fail half-way through a data set.  readers.py takes files apart,
shapes.py and turns.py say what a record means; docs/DATA.md lists all that is understood.

    python -c "import minimind_ds.data.conversation as c; print(c.file_kind('examples/sft_train.jsonl'))"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import MAX_LINE_BYTES, DataError, decode_line
from minimind_ds.data.readers import RecordFile, open_source
from minimind_ds.data.shapes import parse_conversation, parse_text, record_shape, without_nulls
from minimind_ds.data.turns import Conversation, Message, ToolCall, only_last, parse_messages

__all__ = ["MAX_LINE_BYTES", "Conversation", "DataError", "Message", "Records", "ToolCall", "decode_line", "file_kind",
           "marker_pattern", "notes", "only_last", "parse_conversation", "parse_messages", "parse_text",
           "read_records", "record_shape"]


# Names of counts in a store's statistics begin so.
IGNORED, SPELLED, SILENT, EMPTY = "ignored key ", "spelled ", "answers not to be learnt", "empty"


class Parser:
    """A raw record -> a Conversation or a text, counting what a run says of a file besides its samples.

    Attributes: shapes (records of each), ignored_keys (how often keys stood there that mean nothing, those of turns as
    "turn.name"), spelled (how often pretraining text spells each of the markers), silent (assistant turns that the
    file does not let be learnt), empty (texts, or answers to be learnt, that hold not one word).  record: the raw
    record of the item that was last parsed.
    """

    def __init__(self, kind: str, markers: Iterable[str]):
        self.kind, self.markers = kind, marker_pattern(markers)
        self.record: dict = {}
        self.forget()

    def forget(self) -> None:
        """Counts from nothing again."""
        self.silent = self.empty = 0
        self.shapes, self.ignored_keys, self.spelled = Counter(), Counter(), Counter()

    def parse(self, raw: Any) -> Conversation | str:
        """raw: what readers.RecordFile gives.

        Raises:
            UserError: what is wrong with the record, without file and line.
        """
        self.record = decode_line(raw) if isinstance(raw, bytes) else raw
        if self.kind == "text":
            item = parse_text(self.record, self.ignored_keys, self.shapes)
            self.empty += not item.strip()
            if self.markers is not None:
                self.spelled.update(self.markers.findall(item))
        else:
            item = parse_conversation(self.record, self.ignored_keys, self.shapes)
            self.silent += sum([not message.learn for message in item.messages])
            self.empty += sum([message.learn and message.role == "assistant" and not (
                message.tool_calls or message.content.strip() or message.reasoning) for message in item.messages])
        return item

    def counts(self) -> dict[str, int]:
        """The counts as numbers that can be added up over files (see notes)."""
        return {SILENT: self.silent, EMPTY: self.empty,
                **{IGNORED + name: count for name, count in sorted(self.ignored_keys.items())},
                **{SPELLED + name: count for name, count in sorted(self.spelled.items())}}


class Records(Parser):
    """Iterate (number, Conversation or text) over a data file; made by read_records.

    The number is the line in JSON lines, the record's own from 1 elsewhere.

    Attributes besides the Parser's, complete at the end of an iteration: read and skipped (counts), first_skipped (the
    message of the first bad record, or "").
    """

    def __init__(self, source: RecordFile, kind: str, skip: bool, markers: Iterable[str]):
        super().__init__(kind, markers)
        self.source, self.skip = source, skip
        self.path, self.form = source.path, source.form
        self.read, self.skipped, self.first_skipped = 0, 0, ""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.forget()
        self.read, self.skipped, self.first_skipped = 0, 0, ""
        for number, line, raw in self.source:
            try:
                item = self.parse(raw)
            except UserError as err:
                message = f"{self.source.place(number, line)}: {err}"
                if not self.skip:
                    raise DataError(message) from None
                self.skipped += 1
                self.first_skipped = self.first_skipped or message
                continue
            self.read += 1
            yield number, item
        if not self.read:
            raise no_record(self.path, self.skipped, self.first_skipped)


def no_record(path: Path, skipped: int, first: str) -> DataError:
    """What a file without one good record is refused with; first: the message of its first bad one."""
    return DataError(f"{path} holds no record" + f": all {skipped} are bad; {first}" * (skipped > 0))


def marker_pattern(markers: Iterable[str]) -> re.Pattern | None:
    """Finds control tokens spelled in text, the longest where one begins another; in one group, for re.split."""
    names = sorted(markers, key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def read_records(path: str | Path, kind: str, on_bad_record: str = "stop", markers: Iterable[str] = ()) -> Records:
    """Open a data file for reading; blank lines and a byte order mark are passed over.

    Args:
        kind: "conversations" yields Conversation objects, "text" yields strings.
        on_bad_record: "stop" raises at the first bad record, "skip" counts it and goes on.
        markers: names of control tokens to count in pretraining text.

    Raises:
        DataError: what readers.open_source refuses; while iterating: a bad record, or no good one.
    """
    if kind not in ("conversations", "text"):
        raise UserError(f"kind is {kind!r}; it must be 'conversations' or 'text'")
    if on_bad_record not in ("stop", "skip"):
        raise UserError(f"on_bad_record is {on_bad_record!r}; it must be 'stop' or 'skip'")
    return Records(open_source(path), kind, on_bad_record == "skip", markers)


def notes(stats: dict[str, int], text_markers: str = "literal") -> list[str]:
    """Lines for the start of a run and for verify's report, of the counts in a store's statistics."""
    keys = {name.removeprefix(IGNORED): count for name, count in stats.items() if name.startswith(IGNORED)}
    marks = {name.removeprefix(SPELLED): count for name, count in stats.items() if name.startswith(SPELLED)}
    lines = []
    if keys:
        listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(keys.items(), key=lambda item: -item[1]))
        lines.append(f"keys of the data that mean nothing here, with how often they stand there: {listed}")
    if stats.get(EMPTY):
        lines.append(f"texts, or answers to be learnt, that hold not one word: {stats[EMPTY]:,}; they teach to stop "
                     "at once")
    if marks:
        listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(marks.items(), key=lambda item: -item[1]))
        read = ("they are read as control tokens (--text_markers control)" if text_markers == "control" else
                "they are learnt as letters; --text_markers control reads them as the control tokens themselves")
        lines.append(f"pretraining text spells control tokens {sum(marks.values()):,} times: {listed}; {read}")
    return lines


def file_kind(path: str | Path) -> str:
    """"text" or "conversations", by the file's first record.

    Raises:
        DataError: as read_records; the first record is of no known shape.
    """
    source = open_source(path)
    for number, line, raw in source:
        try:
            record = without_nulls(decode_line(raw) if isinstance(raw, bytes) else raw)
            return "text" if record_shape(record) == "text" else "conversations"
        except UserError as err:
            raise DataError(f"{source.place(number, line)}: {err}") from None
    raise DataError(f"{path} holds no record")
