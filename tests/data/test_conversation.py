"""Reader facts: five shapes give the same conversation, and every bad line is named with its number and its fault.

    python -m pytest tests/data/test_conversation.py
"""

from __future__ import annotations

import json
import random

import pytest

from minimind_ds.data import conversation as conversation_module
from minimind_ds.data.conversation import DataError, file_kind, parse_conversation, parse_messages, read_records
from minimind_ds.data.sample import render

GOOD = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
CALL = {"name": "add", "arguments": {"a": 1, "\u00e9": "\u4f60"}}
CALL_TEXT = '{"a": 1, "\u00e9": "\u4f60"}'


def write(path, *records) -> None:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")


def rendered(conversation) -> str:
    return "".join(piece.text for piece in render(conversation))


def turn(**fields) -> dict:
    return {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", **fields}]}


def test_all_shapes_give_the_same_conversation():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\nthere"},
             {"role": "assistant", "content": "hello"}]
    shapes = [
        {"conversations": turns},
        {"messages": turns, "id": 7},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi\nthere"},
                           {"from": "gpt", "value": "hello"}]},
        {"system": "Be brief.", "conversations": [{"from": "user", "value": "hi\nthere"},
                                                  {"from": "assistant", "value": "hello"}]},
        {"system": "Be brief.", "instruction": "hi", "input": "there", "output": "hello"},
        {"system": "Be brief.", "instruction": "hi\nthere", "input": "", "output": "hello"},
    ]
    parsed = [parse_conversation(shape) for shape in shapes]
    assert all(conversation == parsed[0] for conversation in parsed) and len(parsed[0].messages) == 3


def test_alpaca_history_comes_before_the_question():
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert [(m.role, m.content) for m in parse_conversation(record).messages] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_calls_and_tools_are_the_same_as_text_object_or_openai_function():
    tool = {"name": "add", "parameters": {"type": "object"}}
    user, answer = {"role": "user", "content": "1+1"}, {"role": "tool", "content": "2"}
    calling = [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"id": "x", "type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": CALL_TEXT}}], "content": None},
    ]
    want = parse_conversation({"conversations": [
        {"role": "system", "content": "", "tools": json.dumps([tool])}, user,
        {"role": "assistant", "content": "", **calling[0]}, answer]})
    assert want.messages[2].tool_calls[0].arguments == CALL_TEXT
    assert want.tools == ('{"name": "add", "parameters": {"type": "object"}}',)
    for call in calling:
        for tools in ([tool], json.dumps([tool])):
            turns = [{"role": "system", "content": ""}, user, {"role": "assistant", "content": "", **call}, answer]
            assert parse_conversation({"messages": turns, "tools": tools}) == want
    sharegpt = {"tools": json.dumps([tool]), "conversations": [
        {"from": "system", "value": ""}, {"from": "human", "value": "1+1"},
        {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "2"}]}
    assert parse_conversation(sharegpt) == want


BAD_RECORDS = {
    "role 'bot' is not one of system, user, assistant, tool": turn(role="bot"),
    "role a list is not one of": turn(role=["assistant"]),
    "role missing or null is not one of": {"messages": [{"content": "x"}]},
    "turn 2 (assistant): content is a number, not a string": turn(content=3),
    "turn 2 (assistant): content is missing or null": turn(content=None),
    "turn 2 (assistant): content is a list, not a string": turn(content=["x"]),
    "turn 2 (assistant): content is a list, not a string, and is empty": turn(content=[]),
    "content has a part of type 'image_url', which is not supported: the model reads text only":
        turn(content=[{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]),
    "turn 2 (assistant): 'images' is not supported": turn(images=["x.png"]),
    "content: text of a part is missing or null": turn(content=[{"type": "text"}]),
    "content is not valid Unicode (lone surrogate at character 2)": turn(content="a\ud800"),
    "reasoning_content is an object": turn(reasoning_content={}),
    "reasoning_content is not valid Unicode": turn(reasoning_content="\udfff"),
    "the conversation is empty": {"conversations": []},
    "the turns are a string, not a list": {"conversations": "hello"},
    "turn 1 is a string, not an object": {"messages": ["hello"]},
    "no assistant turn": {"conversations": GOOD["conversations"][:1]},
    "none of the keys 'conversations', 'messages', 'instruction', 'prompt' and 'completion', 'query' and 'response', "
    "'text' is there (keys found: 'prompt')": {"prompt": "x"},
    "(keys found: none)": {},
    "it is a list, not a JSON object": [GOOD],
    "'text', which is for pretraining": {"text": "x"},
    "tools is not valid JSON": {**GOOD, "tools": "[{"},
    "tools is not a list of objects": {**GOOD, "tools": ["x"]},
    "tools is an object, not a list": {**GOOD, "tools": {"name": "x"}},
    "tools is not valid Unicode": {**GOOD, "tools": '[{"a": "\\ud83d"}]'},
    "tools is not valid JSON: NaN is no JSON number": {**GOOD, "tools": '[{"a": NaN}]'},
    "tools is nested too deeply": {**GOOD, "tools": "[" * 100_000},
    "'tools' belongs to a system turn, not to 'assistant'": turn(tools='[{"name": "x"}]'),
    "tool_calls is not valid JSON": turn(tool_calls="{"),
    "tool_calls is an object, not a list": turn(tool_calls=CALL),
    "a tool call has no name": turn(tool_calls=[{"arguments": {}}]),
    "tool call 'f' has no arguments": turn(tool_calls=[{"name": "f"}]),
    "arguments is not valid Unicode": turn(tool_calls=[{"name": "f", "arguments": {"x": "\ud800"}}]),
    "'tool_calls' belongs to an assistant turn": {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
    "turn 1: from 'robot' is not one of system, user, assistant, tool, developer, human, gpt":
        {"conversations": [{"from": "robot", "value": "x"}]},
    "turn 2 (assistant): content is missing": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]},
    "output is missing or null": {"instruction": "x"},
    "instruction is a number": {"instruction": 3, "output": "x"},
    "history is not a list of": {"instruction": "x", "output": "y", "history": [1]},
}


@pytest.mark.parametrize("why", BAD_RECORDS)
def test_a_bad_record_stops_with_file_line_and_reason_or_is_counted(why, tmp_path):
    path = tmp_path / "data.jsonl"
    bad = BAD_RECORDS[why]
    # A good record of the same shape first, so that the fault itself is what is reported.
    good = GOOD
    if isinstance(bad, dict) and "messages" in bad:
        good = {"messages": GOOD["conversations"]}
    elif isinstance(bad, dict) and "instruction" in bad:
        good = {"instruction": "hi", "output": "hello"}
    write(path, good, b"", bad, good)
    with pytest.raises(DataError) as caught:
        list(read_records(path, "conversations"))
    message = str(caught.value)
    assert message.startswith(f"{path} line 3: ") and why in message and "\n" not in message
    # It can be printed anywhere, whatever the record held.
    message.encode("ascii")
    records = read_records(path, "conversations", "skip")
    assert [number for number, _ in records] == [1, 4]
    assert (records.read, records.skipped, records.first_skipped) == (2, 1, message)


@pytest.mark.parametrize("line, why", [
    (b'{"conversations": [', "not valid JSON"), (b"\xff\xfe{}", "not UTF-8 (byte 1"), (b"[" * 200_000, "too deeply"),
    (b'{"a":' * 100_000, "too deeply"), (b'"x"', "it is a string"), (b"null", "missing or null"),
    (b"1" * 5000, "not valid JSON"), (b'{"x": Infinity}', "Infinity is no JSON number"),
    (b'{"x": 1e999}', "1e999 is too large"), (b"\x00", "not valid JSON"), (b"{'a': 1}", "not valid JSON"),
])
def test_a_line_that_is_no_record_is_named(line, why, tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, GOOD, line)
    with pytest.raises(DataError) as caught:
        list(read_records(path, "conversations"))
    assert str(caught.value).startswith(f"{path} line 2: ") and why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_lines_byte_order_mark_and_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \t\r\n" + line)
    assert [number for number, _ in read_records(path, "conversations")] == [1, 4]
    path.write_bytes(b"\xef\xbb\xbf\n" + line)
    assert [number for number, _ in read_records(path, "conversations")] == [2]


def test_text_and_conversation_files_are_not_taken_for_each_other(tmp_path):
    text, chat = tmp_path / "text.jsonl", tmp_path / "chat.jsonl"
    write(text, {"text": "a"}, {"text": ""})
    write(chat, GOOD)
    assert [item for _, item in read_records(text, "text")] == ["a", ""]
    assert (file_kind(text), file_kind(chat)) == ("text", "conversations")
    with pytest.raises(DataError, match="line 1: .*pretraining"):
        list(read_records(text, "conversations"))
    with pytest.raises(DataError, match="line 1: .*fine-tuning"):
        list(read_records(chat, "text"))
    write(text, {"text": "a"}, {"text": None}, {"text": "\ud800"})
    assert [item for _, item in read_records(text, "text", "skip")] == ["a"]


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b"\n \n")
    write(tmp_path / "bad", {"x": 1}, {"y": 1})
    for name, why in [("nothing", "does not exist"), ("", "is a folder"), ("empty", "is empty")]:
        for open_it in (lambda path: read_records(path, "conversations"), file_kind):
            with pytest.raises(DataError, match=why):
                open_it(tmp_path / name)
    for name, why in [("blank", "holds no record$"), ("bad", "all 2 are bad; .*line 1: none of the keys")]:
        with pytest.raises(DataError, match=why):
            list(read_records(tmp_path / name, "conversations", "skip"))
    with pytest.raises(DataError, match="line 1: none of the keys"):
        file_kind(tmp_path / "bad")
    with pytest.raises(ValueError, match="on_bad_record is 'ignore'"):
        read_records(tmp_path / "bad", "text", "ignore")
    with pytest.raises(ValueError, match="kind is 'chat'"):
        read_records(tmp_path / "bad", "chat")


def test_a_line_beyond_the_limit_is_skipped_whole(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode() + b"\n"
    with path.open("wb") as file:
        file.write(line)
        file.write(b"[" + b" " * (2 * conversation_module.MAX_LINE_BYTES + 5) + b"]\n")
        file.write(line)
    records = read_records(path, "conversations", "skip")
    assert [number for number, _ in records] == [1, 3]
    assert records.first_skipped == f"{path} line 2: the line is longer than 64 MiB"


def test_a_file_altered_at_random_never_breaks_the_reader(tmp_path):
    path = tmp_path / "data.jsonl"
    dice = random.Random(11)
    records = [GOOD, turn(tool_calls=[CALL]), {**GOOD, "tools": [{"name": "x"}]}, turn(reasoning_content="hm")]
    good = b"".join(json.dumps(record, ensure_ascii=dice.random() < 0.5).encode() + b"\n" for record in records)
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(bad))
            bad[at:at + dice.randint(0, 3)] = dice.choice([b"", b'"', b"[", b"{", b"1", b"null", b"\xff", b"\\ud800"])
        path.write_bytes(bytes(bad))
        try:
            reader = read_records(path, "conversations", "skip")
            for _, conversation in reader:
                rendered(conversation).encode("utf-8")
        except DataError as err:
            assert "\n" not in str(err)


def test_chat_turns_need_no_assistant_but_are_checked_all_the_same():
    assert rendered(parse_messages([{"role": "user", "content": "hi"}], for_training=False)) == (
        "<|im_start|>user\nhi<|im_end|>\n")
    with pytest.raises(ValueError, match="role 'bot'"):
        parse_messages([{"role": "bot", "content": "hi"}], for_training=False)
