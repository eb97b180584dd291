"""Files told by their content: the same records from any container, in bounded memory, and one line for what is none.

    python -m pytest tests/data/test_readers.py
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from decimal import Decimal

import pytest

from minimind_ds.data import arrow, json_text, readers
from minimind_ds.data.conversation import DataError, file_kind, read_records
from tests.conftest import ROOT, environment
from tests.waiting import HANG_S

RECORDS = [{"conversations": [{"role": "user", "content": f"q {i} \u4f60\n{{[\"\\"},
                              {"role": "assistant", "content": f"a {i}"}]} for i in range(3)]
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def items(path, **options):
    return list(read_records(path, "conversations", **options))


def pretty(record) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False)


FORMS = {
    "JSON lines": "\n".join(map(json.dumps, RECORDS)),
    "JSON lines, blank lines first": "\n\n \n" + "\n".join(map(json.dumps, RECORDS)),
    "a JSON array on one line": json.dumps(RECORDS),
    "a JSON array, pretty": pretty(RECORDS),
    "a JSON array, pretty, in Windows' way": "\ufeff\r\n" + pretty(RECORDS).replace("\n", "\r\n") + "\r\n",
    "a JSON array, a record a line": "[" + ",\n".join(map(json.dumps, RECORDS)) + "]",
    "JSON objects, pretty": "\n".join(map(pretty, RECORDS)),
    "JSON objects on one line": "".join(map(json.dumps, RECORDS)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", FORMS)
def test_every_container_of_text_gives_the_same_records(form, packed, tmp_path, monkeypatch):
    path = tmp_path / "named_wrongly.parquet"
    content = FORMS[form].encode()
    path.write_bytes(gzip.compress(content[:99]) + gzip.compress(content[99:]) if packed else content)
    want = [readers.parse(json.dumps(record), "") for record in RECORDS]
    for size in (1 << 20, 7):
        # However little is read at a time.
        monkeypatch.setattr(readers, "READ_BYTES", size)
        reader = read_records(path, "conversations")
        found = list(reader)
        assert [conversation.messages[0].content for _, conversation in found] == [
            record["conversations"][0]["content"] for record in want]
        first = 4 if "blank" in form else 1
        assert [number for number, _ in found] == list(range(first, first + 3))
        assert reader.form == form.split(",")[0].replace(" on one line", "") + " in gzip" * packed
    assert file_kind(path) == "conversations"


@pytest.mark.parametrize("content, why", [
    (pretty([*RECORDS, {"conversations": []}]), r"record 4 \(line 38\): the conversation is empty"),
    (json.dumps([*RECORDS, 12]), r"record 4 \(line 1\): it is a number, not a JSON object"),
    (json.dumps(RECORDS)[:-1], r"record 3 \(line 1\): the array does not end after it; is the file cut off\?"),
    (json.dumps(RECORDS)[:-9], r"record 3 \(line 1\): the file ends inside it; is it cut off\?"),
    (json.dumps(RECORDS)[:-6], r"record 3 \(line 1\): the file ends inside it"),
    (json.dumps(RECORDS) + "{}", r"record 3 \(line 1\): something follows after the array's end"),
    (json.dumps(RECORDS)[:-1] + ",]", r"record 4 \(line 1\): it is not valid JSON: Expecting value"),
    (json.dumps(RECORDS)[:-1] + " {}]", r"record 3 \(line 1\): the array goes on with '{' after it, not with a comma"),
    ("[" + '{"a":' * 100_000, r"record 1 \(line 1\): it is nested too deeply"),
    ("[" * 100_000, r"record 1 \(line 1\): it is nested too deeply"),
    ("[NaN]", r"record 1 \(line 1\): it is not valid JSON: NaN is no JSON number"),
    ("[" + "1" * 5000 + "]", r"record 1 \(line 1\): it is not valid JSON"),
    ("[]", "holds no record"), ("[", r"record 1 \(line 1\): the file ends inside it"),
    ("\n".join(map(pretty, RECORDS)) + "\n{\n  'a'  ", r"record 4 \(line 37\): it is not valid JSON: .*, line 38"),
    (b"[" + json.dumps(RECORDS[0]).encode() + b', "\xc4\xe3"]', "what follows is not UTF-8; it may be GBK: iconv"),
])
def test_what_is_wrong_inside_an_array_is_named_with_its_record(content, why, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=why) as caught:
        items(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_bad_record_of_an_array_can_be_skipped_and_a_broken_array_cannot(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RECORDS[0], {"x": 1}, RECORDS[1]]), encoding="utf-8")
    reader = read_records(path, "conversations", "skip")
    assert [number for number, _ in reader] == [1, 3]
    assert reader.first_skipped.startswith(f"{path} record 2 (line 1): none of the keys")
    path.write_text(json.dumps(RECORDS)[:-1], encoding="utf-8")
    with pytest.raises(DataError, match="is the file cut off"):
        items(path, on_bad_record="skip")


def test_numbers_of_an_array_count_records_those_of_lines_lines(tmp_path):
    for name, text in (("a.json", pretty(RECORDS)), ("b.jsonl", FORMS["JSON lines"])):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [readers.unit_of(tmp_path / name) for name in ("a.json", "b.jsonl", "gone")] == ["record", "line", "record"]


def test_a_broken_first_line_leaves_json_lines_what_they_are(tmp_path):
    path = tmp_path / "data.jsonl"
    rest = "\n" + "\n".join(map(json.dumps, RECORDS))
    for first in ('{"conversations": [', '{"a": 1}}', '{"a": NaN}', "{'a': 1}", "hello", '{"a": 1} x'):
        path.write_text(first + rest, encoding="utf-8")
        with pytest.raises(DataError, match="line 1: the line is not valid JSON"):
            items(path)
        assert [number for number, _ in items(path, on_bad_record="skip")] == [2, 3, 4]


def tar_of(content: bytes) -> bytes:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", content)
    return out.getvalue()


LINE = json.dumps(RECORDS[0]).encode()
NO_DATA = {
    "UTF-16 with a mark": (LINE.decode().encode("utf-16"), "is UTF-16 text, not data: iconv -f UTF-16 -t UTF-8"),
    "UTF-16, other end first": (b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "is UTF-16 text"),
    "UTF-16 without one": (LINE.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-32": (LINE.decode().encode("utf-32"), "is UTF-32 text, not data: iconv -f UTF-32"),
    "GBK": ('{"text": "\u4f60\u597d\u4e16\u754c"}'.encode("gbk"),
            "line 1: it is not UTF-8 (byte 11 of the line); it may be GBK: iconv -f GB18030"),
    "Latin-1": ('{"text": "caf\u00e9"}'.encode("latin-1"), "line 1: it is not UTF-8 (byte 14 of the line); iconv -f"),
    "zip": (zip_of(LINE), "is a zip archive, not data: unzip it first"),
    "tar": (tar_of(LINE), "is a tar archive, not data: unpack it first"),
    "tar.gz": (gzip.compress(tar_of(LINE)), "is a tar archive in gzip"),
    "xz": (b"\xfd7zXZ\x00\x00", "is xz-compressed, not data: unpack it with xz -d"),
    "bzip2": (b"BZh91AY", "is bzip2-compressed"), "zstd": (b"\x28\xb5\x2f\xfd\x00", "is zstd-compressed"),
    "PDF": (b"%PDF-1.7\n", "is a PDF, not data: take its text out"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
    "web page": (b"<!DOCTYPE html>\n<html>", "is a web page"), "pickle": (b"\x80\x04\x95", "is a pickle"),
    "gzip in gzip": (gzip.compress(gzip.compress(LINE)), "is a binary file in gzip: gunzip it first"),
    "gzip of nothing": (gzip.compress(b""), "is empty inside gzip"),
    "gzip, cut": (gzip.compress(LINE * 9)[:-12], "is damaged or cut off"),
    "gzip, altered": (gzip.compress(LINE)[:-8] + b"\0" * 8, "is damaged or cut off"),
    "Parquet, cut": (b"PAR1" + b"\0" * 40, "pyarrow" if needs_pyarrow.args[0] else "is damaged, after record 0"),
    "Arrow, cut": (b"ARROW1\0\0" + b"\0" * 9, "pyarrow" if needs_pyarrow.args[0] else "is damaged, after record 0"),
}


@pytest.mark.parametrize("name", NO_DATA)
def test_what_is_no_data_is_named_with_what_to_do(name, tmp_path):
    content, why = NO_DATA[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path, "text"))
    assert str(caught.value).startswith(str(path)) and why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named_at_once(tmp_path):
    pipe, sock, loop = tmp_path / "pipe", tmp_path / "sock", tmp_path / "loop"
    os.mkfifo(pipe)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(sock))
    loop.symlink_to(loop)
    for path, why in [(pipe, "is a pipe, not a file"), (sock, "is a socket, not a file"), (loop, "cannot be read: "),
                      ("/dev/zero", "is a device, not a file"), ("/dev/null", "is a device"),
                      (tmp_path, "is a folder, not a file of records"),
                      (tmp_path / "a\0b", "cannot be read: .*embedded null"),
                      (tmp_path / ("x" * 300), "cannot be read: File name too long")]:
        for open_it in (lambda path: read_records(path, "text"), file_kind):
            with pytest.raises(DataError, match=why) as caught:
                open_it(path)
            assert len(str(caught.value)) < 500
    server.close()


def test_a_long_array_is_streamed(tmp_path):
    path = tmp_path / "data.json"
    record = json.dumps({"text": "word " * 20_000}, indent=1)
    with path.open("w") as file:
        file.write("[" + ",\n".join([record] * 1500) + "]")
    assert path.stat().st_size > 150e6
    code = ("import resource, sys; from minimind_ds.data.conversation import read_records\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "n = sum(1 for _ in read_records(sys.argv[1], 'text'))\n"
            "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, env=environment(), capture_output=True,
                         text=True, check=True, timeout=HANG_S)
    records, grown_kib = map(int, run.stdout.split())
    assert records == 1500 and grown_kib < 40 << 10


def test_a_record_beyond_the_limit_ends_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "READ_BYTES", 1 << 16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "x" * (3 << 20)}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"record 2 \(line 1\): the record is longer than 1 MiB"):
        list(read_records(path, "text", "skip"))
    assert json_text.MAX_LINE_BYTES == 64 << 20


def columns(tmp_path):
    """Records as columns make them, where each object has all the keys of any."""
    import pyarrow

    rows = [{"messages": [{"role": "user", "content": "q", "tool_calls": None, "weight": None},
                          {"role": "assistant", "content": None, "weight": 0,
                           "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": None}}]},
                          {"role": "assistant", "content": "a", "tool_calls": None, "weight": 1}],
             "tools": [{"name": "f", "parameters": {"x": None, "y": "z"}}], "prompt": None, "text": None},
            {"messages": None, "tools": None, "prompt": None, "text": "t"}]
    return rows, pyarrow.Table.from_pylist(rows)


@needs_pyarrow
@pytest.mark.parametrize("form", ["Parquet", "Feather", "Arrow stream", "datasets"])
def test_columns_give_the_records_they_were_made_of(form, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    monkeypatch.setattr(arrow, "ROWS", 3)
    rows, table = columns(tmp_path)
    table = pyarrow.concat_tables([table] * 5)
    path = tmp_path / "data.jsonl"
    if form == "Parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4, compression="zstd")
    elif form == "Feather":
        pyarrow.feather.write_feather(table, path, chunksize=4)
    elif form == "Arrow stream":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 4)
    else:
        # The files of datasets.Dataset.save_to_disk, in the order that its state names.
        path = tmp_path / "saved"
        path.mkdir()
        for name, part in (("b.arrow", table[:6]), ("a.arrow", table[6:])):
            with pyarrow.ipc.new_stream(path / name, table.schema) as writer:
                writer.write_table(part)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "b.arrow"},
                                                                     {"filename": "../saved/a.arrow"}]}))
    reader = read_records(path, "conversations", "skip")
    found = list(reader)
    assert [number for number, _ in found] == [1, 3, 5, 7, 9] and reader.skipped == 5
    assert reader.first_skipped == f"{path} record 2: the record holds 'text', which is for pretraining; a " \
                                   "conversation is needed"
    conversation = found[0][1]
    assert conversation.tools == ('{"name": "f", "parameters": {"y": "z"}}',)
    assert conversation.messages[1].tool_calls[0].arguments == '{"a": 1}' and not conversation.messages[1].learn
    assert conversation.messages[2].learn and len(set(item for _, item in found)) == 1
    assert not reader.ignored_keys


@needs_pyarrow
def test_a_folder_of_datasets_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds the splits 'train', 'test': name one, for example .*/train"):
        read_records(tmp_path, "text")
    for damaged in ("{", "[]", '{"splits": 3}', '{"splits": []}'):
        (tmp_path / "dataset_dict.json").write_text(damaged)
        with pytest.raises(DataError, match="its state.json is damaged"):
            read_records(tmp_path, "text")
    (tmp_path / "dataset_dict.json").unlink()
    for state, why in (({"_data_files": [{"filename": "none.arrow"}]}, "none.arrow does not exist"),
                       ({"_data_files": [{"filename": ""}]}, "its state.json is damaged"),
                       ({"_data_files": [{"filename": ".."}]}, "its state.json is damaged"),
                       ({"_data_files": [{"filename": "a.arrow"}], "_format_columns": "text"}, "is damaged"),
                       ({"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]},
                        "has a choice of its rows .* flatten_indices")):
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match=why):
            read_records(tmp_path, "text")


@needs_pyarrow
def test_a_data_set_shows_the_columns_that_it_was_saved_with(tmp_path):
    import pyarrow

    table = pyarrow.table({"text": ["hidden"], "messages": [RECORDS[0]["conversations"]]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for more, shown in (({}, ["messages", "text"]), ({"_format_columns": ["text"]}, ["text"]),
                        ({"_format_columns": ["text"], "_output_all_columns": True}, ["messages", "text"])):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}], **more}))
        assert [sorted(record) for _, _, record in readers.open_source(tmp_path)] == [shown]


@needs_pyarrow
def test_what_only_columns_have_counts_as_what_json_has_in_its_place(tmp_path):
    import pyarrow

    columns = {"bytes": (pyarrow.array([b"1", b"\xff"]), ["1", "\udcff"]),
               "decimal": (pyarrow.array([Decimal("1.00"), Decimal("0.50")]), [1, 0.5]),
               "interval": (pyarrow.array([pyarrow.MonthDayNano([1, 2, 3])] * 2), None),
               "list": (pyarrow.array([[Decimal(0)], [None]]), [[0], [None]])}
    for name, (column, expected) in columns.items():
        path = tmp_path / f"{name}.arrow"
        table = pyarrow.table({"text": ["a", "b"], name: column})
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        found = [record[name] for _, _, record in pickle.loads(pickle.dumps(list(readers.open_source(path))))]
        assert found == expected if expected else all(type(value) is str for value in found)
        if name in ("bytes", "decimal", "list"):
            # An answer marked as bad is not learnt because a table spells the mark in its own way.
            table = pyarrow.table({"messages": [RECORDS[0]["conversations"]], "labels": column[:1]})
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
            with pytest.raises(DataError, match="record 1: 'labels' seems to mark answers as good or bad"):
                list(read_records(path, "conversations"))


@needs_pyarrow
def test_a_decimal_that_python_cannot_have_is_named(tmp_path):
    import pyarrow

    one = pyarrow.py_buffer((1).to_bytes(16, "little"))
    table = pyarrow.table({"text": ["a"], "weight": pyarrow.Array.from_buffers(pyarrow.decimal128(5, 10**9), 1,
                                                                               [None, one])})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="holds what cannot be read, after record 0: .*decimal"):
        list(read_records(tmp_path / "a.arrow", "text"))


@needs_pyarrow
def test_a_record_of_columns_is_as_long_as_a_line_may_be(tmp_path, monkeypatch):
    import pyarrow

    monkeypatch.setattr(arrow, "MAX_LINE_BYTES", 1 << 20)
    # A value that stands in the file once, and in each of its rows.
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0, 1, 0], ["a", "x" * (1 << 20)])})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="a.arrow record 2 is longer than 1 MiB"):
        list(read_records(tmp_path / "a.arrow", "text"))


def test_without_pyarrow_columns_are_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "chat.bin"
    for content, form in ((b"PAR1....", "Parquet"), (b"ARROW1\0\0", "Arrow"), (b"\xff\xff\xff\xff\0", "Arrow")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"is {form}, which is read with pyarrow: pip install -e '.\[parquet\]'"):
            read_records(path, "text")
