"""Readers of data: records in every container and shape, and the paths that name them."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import pathlib
import random

from minimind_ds.data.conversation import Parser, file_kind, notes, read_records
from minimind_ds.data.files import expand, passed_over
from minimind_ds.data.tokenise import Encoder, batches
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.inference.score import read_questions, said
from tests.fuzz import mutate
from tests.fuzz.harness import Target

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo", "at": [1, 2.5, True, None]}}}
TOOL = {"type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
RECORDS = [
    {"conversations": [{"role": "system", "content": "Be brief.", "tools": json.dumps([TOOL])},
                       {"role": "user", "content": "Time?"},
                       {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                       {"role": "tool", "content": "12"},
                       {"role": "assistant", "content": "Noon.", "reasoning_content": "12 is noon."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                  {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "content": "ok"},
                  {"role": "assistant", "content": "<think>\nx\n</think>\n\nDone.", "weight": 1}], "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.", "train": True}],
     "system": "s", "tools": "[]"},
    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]},
    {"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": "2"}]},
    {"query": "q", "response": "r", "history": [["a", "b"], ["c", "d"]]},
    {"text": "The sea is <|im_end|> wide."},
]
KEYS = ("conversations", "messages", "role", "content", "from", "value", "tools", "tool_calls", "function_call",
        "functions", "function", "name",
        "arguments", "reasoning", "reasoning_content", "thinking", "weight", "train", "loss", "learn", "system",
        "history", "instruction", "input",
        "output", "prompt", "completion", "query", "response", "text", "type", "label", "images", "chosen", "skill")


@functools.cache
def tokenizer():
    return load_tokenizer(None)


def record(draw: random.Random):
    found = draw.choice(RECORDS)
    return mutate.altered(draw, found, KEYS) if draw.random() < 0.8 else found


def draw_lines(draw: random.Random) -> tuple[bytes, str, str]:
    lines = [mutate.json_bytes(draw, record(draw)) for _ in range(draw.choice((1, 1, 2, 4)))]
    content = draw.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\r")).join(lines)
    if draw.random() < 0.03:
        content = content.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32", "utf-16-be", "gb18030",
                                                                         "utf-7")), "replace")
    return content, draw.choice(("conversations", "conversations", "text")), draw.choice(("stop", "skip"))


def read_lines(case: tuple[bytes, str, str], folder: pathlib.Path, name: str = "data.jsonl") -> None:
    """As training reads a file: records, ids and labels, what the start says; no control token but the renderer's."""
    content, kind, on_bad_record = case
    path, tok = folder / name, tokenizer()
    path.write_bytes(content)
    records = read_records(path, kind, on_bad_record, tok.specials)
    encode = Encoder(tok, 256, "cut", None, Parser(kind, tok.specials), skip=True)
    chunks = [encode(batch.raws, batch.first_index) for batch in batches(records.source)]
    assert all(0 < n <= 256 for chunk in chunks for n in chunk.lengths)
    assert all(number >= 1 for number, _ in records)
    assert sum(chunk.counts["records"] for chunk in chunks) == records.read
    assert sum(chunk.counts["skipped"] for chunk in chunks) == records.skipped
    notes(records.counts())
    file_kind(path)


def draw_container(draw: random.Random) -> tuple[bytes, str, str]:
    """JSON arrays and objects, and gzip of any."""
    records = [record(draw) for _ in range(draw.choice((0, 1, 2, 3)))]
    if draw.random() < 0.5:
        content = mutate.json_bytes(draw, records, indent=draw.choice((None, 1)))
    else:
        content = draw.choice((b"\n", b"", b" ")).join(mutate.json_bytes(draw, one, indent=2) for one in records)
    if draw.random() < 0.4:
        content = gzip.compress(content * draw.choice((1, 1, 1, 50)), draw.choice((0, 6)), mtime=0)
        content = mutate.chewed(draw, content) if draw.random() < 0.5 else content + draw.choice((b"", content,
                                                                                                  b"junk"))
    return content, draw.choice(("conversations", "text")), draw.choice(("stop", "skip"))


@functools.cache
def columns() -> dict[str, list[bytes]]:
    """Parquet and Arrow files of all shapes, whole."""
    import pyarrow
    import pyarrow.parquet

    tables = [pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, None]}), pyarrow.Table.from_pylist([
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "when": 5}] * 3)]
    found = {"parquet": [], "arrow": []}
    for table in tables:
        for compression in ("none", "snappy", "zstd"):
            pyarrow.parquet.write_table(table, out := io.BytesIO(), compression=compression)
            found["parquet"].append(out.getvalue())
        for new in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
            with new(out := io.BytesIO(), table.schema) as writer:
                writer.write_table(table)
            found["arrow"].append(out.getvalue())
    return found


def draw_columns(draw: random.Random) -> tuple[bytes, str, str]:
    content = draw.choice(columns()[draw.choice(("parquet", "arrow"))])
    return (mutate.chewed(draw, content) if draw.random() < 0.95 else content, draw.choice(("conversations", "text")),
            draw.choice(("stop", "skip")))


def draw_paths(draw: random.Random) -> list:
    """What --data_path may hold, in a folder with a file, a pipe, links and a folder of datasets."""
    def one():
        name = draw.choice(("data.jsonl", "sub", "pipe", "loop", "dangling", "saved", "splits", "*.jsonl", "**", "[",
                            "none", "", mutate.text(draw)))
        path = draw.choice((name, f"@/{name}", f"@/{name}", f"@/sub/../{name}"))
        return path if draw.random() < 0.7 else {"path": path, "share": draw.choice((1, 0.5, 2, 1000))}
    state = mutate.json_bytes(draw,
                              mutate.altered(draw,
                                             {"_data_files": [{"filename": "data-0.arrow"},
                                                              {"filename": "../data.jsonl"}]}))
    splits = mutate.json_bytes(draw, mutate.altered(draw, {"splits": ["train", "test"]}))
    return [[one() for _ in range(draw.choice((1, 1, 2, 3)))], state, splits]


def read_paths(case: list, folder: pathlib.Path) -> None:
    given, state, splits = case
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    for name, content in (("sub/inner.jsonl", b'{"text": "b"}\n'), ("saved/state.json", state),
                          ("splits/dataset_dict.json", splits),
                          ("saved/data-0.arrow", columns()["arrow"][1])):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    given = [{**one, "path": one["path"].replace("@", str(folder))} if isinstance(one, dict)
             else one.replace("@", str(folder)) for one in given]
    # Not the whole disk: what a glob from / or .. finds takes longer than anything else here.
    given = [one for one in given if str(folder) in str(one) or "*" not in str(one)]
    before = os.getcwd()
    os.chdir(folder)
    try:
        for source in expand(given):
            if source.path.resolve().is_relative_to(folder) or not source.path.exists():
                list(read_records(source.path, "text", "skip"))
        passed_over(given)
    finally:
        os.chdir(before)


def read_scored(case: tuple[bytes, str, str], folder: pathlib.Path) -> None:
    """As score.py reads questions and answers."""
    path = folder / "questions.jsonl"
    path.write_bytes(case[0])
    for question in read_questions(path, 5):
        question.ids(tokenizer())
        said(question.expected)


TARGETS = [
    Target("lines", draw_lines, read_lines, 6, (tokenizer,)),
    Target("containers", draw_container, read_lines, 4, (tokenizer,)),
    Target("columns", draw_columns, read_lines, 0.7, (tokenizer, columns)),
    Target("data paths", draw_paths, read_paths, 0.5, (columns,)),
    Target("questions", draw_lines, read_scored, 5, (tokenizer,)),
]
