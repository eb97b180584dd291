"""What people's files hold besides plain turns is honoured, refused in one line, or named; nothing is learnt wrongly.

    python -m pytest tests/data/test_front_door.py
"""

import importlib.util
import json
import os
from collections import Counter

import pytest

from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import parse_run_config
from minimind_ds.data import files, sources
from minimind_ds.data.conversation import DataError, notes, read_records
from minimind_ds.data.json_text import parse
from minimind_ds.data.shapes import parse_conversation
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenise import Encoder
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.inference import score
from minimind_ds.training.prepare import open_data

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
ASK, ANSWER = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "Noon."}
CALL, TOOL = {"name": "clock", "arguments": {"city": "Oslo"}}, {"name": "clock"}
TEXT = {"type": "text", "text": "Noon."}


def answered(**fields) -> dict:
    return {"messages": [ASK, {**ANSWER, **fields}]}


BAD = {
    **{f"turn 2 (assistant): '{key}' seems to say what is learnt, and is not understood": answered(**{key: value})
       for key, value in (("trainable", False), ("lossMask", [0, 1]), ("Weight", 0), ("loss_weight", 0.5),
                          ("train_on_input", "false"), ("mask-prompt", True))},
    "'sample_weights' seems to say what is learnt": {**answered(), "sample_weights": [1, 0]},
    "'rejected_messages' seems to tell better answers from worse": {**answered(), "rejected_messages": [ASK]},
    "'non_preferred_output' seems to tell better": {**answered(), "non_preferred_output": [ANSWER]},
    "'labels' seems to mark answers as good or bad": {**answered(), "labels": [True, False]},
    "turn 2 (assistant): 'label' seems to mark answers": answered(label=0),
    "'image_path' is not supported: the model reads text only": {**answered(), "image_path": "a.png"},
    "a part's 'image' is not supported": answered(content=[{**TEXT, "image": "a.png"}]),
    "'tool_calls' belongs to an assistant turn": {**answered(), "tool_calls": [CALL]},
    "arguments of tool call 'clock' are a number, not an object": answered(tool_calls=[{**CALL, "arguments": "5"}]),
    "arguments of tool call 'clock' are a boolean": answered(tool_calls=[{**CALL, "arguments": True}]),
    "tool call 'clock' has no arguments; where it takes none, write {}": answered(tool_calls=[TOOL]),
    "a tool call has no name": answered(tool_calls=[{**CALL, "name": ""}]),
    **{f"'{key}' is not supported: a turn is learnt as a whole": answered(**{key: value}) for key, value in
       (("mask", False), ("loss_mask", 0), ("loss_scale", 0.0), ("assistant_masks", [0]), ("train_detail", 0))},
    **{f"has a part with '{key}', which is not supported": answered(content=[TEXT, {**TEXT, key: value}])
       for key, value in (("weight", 0), ("train", False), ("loss_mask", 0))},
    "content is missing or null": answered(content=None, tool_calls="[]"),
    "turn 2 (assistant): content is missing": answered(content=None, function_call="[]"),
    "value holds no call": {"conversations": [ASK, {"from": "function_call", "value": "[]"}]},
    "arguments of tool call 'clock' are JSON text within JSON text":
        answered(tool_calls=[{"name": "clock", "arguments": json.dumps(json.dumps({"city": "Oslo"}))}]),
    "'arguments' and 'parameters' differ": answered(tool_calls=[{**CALL, "parameters": {"city": "Rome"}}]),
    "the record and its system turn list different tools": {
        "messages": [{"role": "system", "content": "", "tools": [TOOL]}, ASK, ANSWER], "tools": [CALL]},
    "history stands beside a prompt that is turns": {"prompt": [ASK], "completion": [ANSWER], "history": [["a", "b"]]},
}


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_carried_out_is_refused(why):
    with pytest.raises(UserError) as caught:
        parse_conversation(BAD[why])
    assert why in str(caught.value)


@pytest.mark.parametrize("label", [True, 0, 1.0, 0.0, "true", "False", "0", " 1.0"])
def test_a_label_of_true_or_false_is_preference_data_however_it_is_spelled(label):
    with pytest.raises(UserError, match="it holds 'label', as records for KTO do"):
        parse_conversation({**answered(), "label": label})


def test_what_means_nothing_is_named_wherever_it_stands():
    ignored = Counter()
    record = answered(content=[{**TEXT, "cache_control": {}}], tool_calls=[
        {"id": "1", "type": "function", "function": {**CALL, "strict": True}}, {**CALL, "note": "x"}])
    parse_conversation({**record, "label": "greeting"}, ignored)
    assert ignored == {"part.cache_control": 1, "call.strict": 1, "call.note": 1, "label": 1}
    ignored.clear()
    parse_conversation({"prompt": "a", "completion": "b", "history": [["c", "d"]], "label": ""}, ignored)
    assert not ignored
    # Alike by name only: words, classes and counts.
    meant = {"train_split": "a", "labels": ["maths", 3], "image_count": 2, "video_files": 0, "preferred_tone": "dry",
             "label_names": "x", "masked": "", "trainer": 1}
    parse_conversation({**answered(), **meant}, ignored)
    assert ignored == dict.fromkeys(meant, 1)


def test_calls_are_read_under_llamas_name_and_beside_empty_ones():
    want = parse_conversation(answered(tool_calls=[CALL]))
    assert want == parse_conversation(answered(tool_calls=[{"name": "clock", "parameters": CALL["arguments"]}]))
    assert parse_conversation({"messages": [{**ASK, "tool_calls": "[]"}, ANSWER]}) == parse_conversation(answered())


def test_what_is_shown_and_called_is_read_under_other_trainers_names():
    want = parse_conversation({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                                            {"role": "tool", "content": "12"}, ANSWER], "system": "Be brief."})
    called = [{"role": "tool_call", "content": json.dumps(CALL)}, {"role": "assistant", "tool_call": CALL},
              {"role": "assistant", "content": "", "function_calls": [CALL]}]
    for call in called:
        turns = [ASK, call, {"role": "tool_response", "content": "12"}, ANSWER]
        assert parse_conversation({"messages": turns, "system_prompt": "Be brief.", "function_call": "auto"}) == want
    asked = parse_conversation({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]})
    assert parse_conversation({"instruction": "Time?", "output": "", "tool_calls": [CALL]}) == asked
    listed = parse_conversation({"messages": [{"role": "system", "tools": [TOOL]}, ASK, ANSWER]})
    assert listed.messages[0].content == "" and listed.tools == (json.dumps(TOOL),)


def test_what_a_tool_found_stays_whole():
    found = [{"text": "a", "id": 5}, {"text": "b", "id": 6}]
    turn = {"role": "tool", "content": found}
    assert parse_conversation({"messages": [ASK, ANSWER, turn]}).messages[2].content == json.dumps(found)
    turn["content"] = [{"type": "text", "text": "a"}, {"text": "b"}]
    assert parse_conversation({"messages": [ASK, ANSWER, turn]}).messages[2].content == "ab"


def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, '
                    '{"role": "assistant", "content": "b", "weight": 0, "weight": 1}]}')
    with pytest.raises(DataError, match="line 1: .*the key 'weight' stands twice in one object"):
        list(read_records(path, "conversations"))
    with pytest.raises(UserError, match="the key 'a' stands twice"):
        parse('[{"b": {"a": 1, "a": 1}}]', "it")


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_wide_text_is_told_without_a_byte_order_mark(encoding, tmp_path):
    path = tmp_path / "data.jsonl"
    for text in ('{"text": "a"}', "\n\n[\n]", '"x"'):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=f"is {encoding[:6]} text, not data: iconv -f {encoding} -t UTF-8"):
            read_records(path, "text")
    path.write_bytes(bytes(100))
    with pytest.raises(DataError, match="begins with zero bytes, not data"):
        read_records(path, "text")


@needs_pyarrow
def test_columns_that_python_cannot_hold_are_no_obstacle(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    far = {"us": pa.array([2**62], pa.timestamp("us")), "zone": pa.array([1], pa.timestamp("ns", tz="Mars/Base")),
           "day": pa.array([2**30], pa.date32()), "none": pa.array([None], pa.date64()),
           "time": pa.array([1], pa.time32("s")), "span": pa.array([2**62], pa.duration("us"))}
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"], **far}), path)
    reader = read_records(path, "conversations")
    assert len(list(reader)) == 1 and reader.ignored_keys == {name: 1 for name in far if name != "none"}
    pyarrow.parquet.write_table(pa.table({"text": ["a"], "at": pa.array([[2**62]], pa.list_(pa.timestamp("us")))}),
                                path)
    with pytest.raises(DataError, match="data.parquet holds what cannot be read, after record 0: "):
        list(read_records(path, "text"))
    pyarrow.parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(DataError, match="two columns of one name"):
        list(read_records(path, "text"))


@needs_pyarrow
def test_arguments_in_a_map_are_an_object(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    call = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    path = tmp_path / "data.parquet"

    def arguments(*pairs):
        turns = [ASK, {"role": "assistant", "tool_calls": [{"name": "clock", "arguments": list(pairs)}]}]
        pyarrow.parquet.write_table(pa.table({"messages": pa.array([turns], pa.list_(turn))}), path)
        [(_, conversation)] = read_records(path, "conversations")
        return conversation.messages[1].tool_calls[0].arguments
    assert arguments(("city", "Oslo")) == '{"city": "Oslo"}' and arguments() == "{}"
    with pytest.raises(DataError, match="holds what cannot be read"):
        arguments(("city", "Oslo"), ("city", "Rome"))


@needs_pyarrow
def test_a_torn_arrow_file_is_an_error_and_not_a_crash(tmp_path):
    import pyarrow as pa

    table = pa.table({"text": ["a", "bc"]})
    path = tmp_path / "data.arrow"
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    at = content.index(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    # Where the second text ends: far behind the end of the file, before the first one's end.
    for end in (b"\xff\xff\xff\x7f", b"\0\0\0\0"):
        path.write_bytes(content[:at + 8] + end + content[at + 12:])
        with pytest.raises(DataError, match="data.arrow (is damaged|cannot be read)"):
            list(read_records(path, "text"))


def test_answers_and_texts_without_a_word_are_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    silent = [answered(content=""), answered(content=" ", weight=0), answered(content="", tool_calls=[CALL]),
              answered(content="", thinking="hm"), {"instruction": "a", "output": " "}, answered()]
    for kind, records, n in (("conversations", silent, 2), ("text", [{"text": ""}, {"text": "\n"}, {"text": "a"}], 2)):
        path.write_text("\n".join(map(json.dumps, records)))
        list(reader := read_records(path, kind))
        [line] = notes(reader.counts())
        assert line == f"texts, or answers to be learnt, that hold not one word: {n}; they teach to stop at once"


# Files


def test_folders_tell_what_they_pass_over_and_links_back_end(tmp_path):
    for name in ("a.jsonl", "b.csv", "sub/c.jsonl.zst", "sub/d.jsonl", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("up", "again", "sub/upper"):
        (tmp_path / name).symlink_to(tmp_path)
    assert [source.path.name for source in files.expand(str(tmp_path))] == ["a.jsonl", "d.jsonl"]
    [line] = files.passed_over([{"path": str(tmp_path), "share": 2}, str(tmp_path / "a.jsonl")])
    assert f"the folder {tmp_path} holds 2 files that are not read" in line and line.endswith(": b.csv, c.jsonl.zst")
    with pytest.raises(DataError, match=r"matches no file; in a pattern, \[\[\] stands for \["):
        files.expand(f"{tmp_path}/[x]/*.jsonl")
    with pytest.raises(DataError, match="a data path is empty"):
        files.expand([""])


def test_a_run_says_what_it_never_sees_and_what_it_sees_twice(tmp_path):
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "copy", "few")}
    for name, path in names.items():
        with open(path, "w") as file:
            file.writelines(json.dumps(answered(content=f"{name != 'few'} {n}")) + "\n" for n in range(9))
    (tmp_path / "run.yaml").write_text(f"data_path: [{names['a']}, {{path: {names['few']}, share: 1e-2}}]\n"
                                       f"eval_path: {names['copy']}\ncache_dir: {tmp_path / 'cache'}\n")
    run = parse_run_config(["--config", str(tmp_path / "run.yaml")], "sft", {})
    never, twice = sources.notes(*open_data("conversations", run, load_tokenizer(None)))
    assert never == f"{names['few']} is never seen: a share of 0.01 of its 9 samples is none in 2 epochs"
    assert twice == (f"{names['copy']} holds the same samples as {names['a']}: held-out data that is trained on says "
                     "nothing of unseen data")


def test_paths_of_flags_are_expanded_and_never_lost(tmp_path, capsys):
    def parsed(*words):
        return parse_run_config(list(words), "sft", {})
    home = os.path.expanduser("~")
    run = parsed("--data_path=~/a.jsonl", "--save_dir=~/run", "--from_weight=~/weights")
    assert (run.data_path, run.save_dir, run.from_weight) == tuple(
        os.path.join(home, name) for name in ("a.jsonl", "run", "weights"))
    assert parsed("--data_path", "~/a", "b").data_path == [os.path.join(home, "a"), "b"]
    for program, words in ((parsed, ["--data_path", "a", "--data_path", "b"]),
                           (parsed, ["--train_file=a", "--train_file", "b"]),
                           (lambda *said: program_flags.score().parse_args(said), ["--data_path=a", "--data_path=b"])):
        with pytest.raises(SystemExit):
            program(*words)
        assert "--data_path is given twice; name all after one, separated by spaces" in capsys.readouterr().err
    for flag in ("--data_path", "--cache_dir", "--save_dir"):
        with pytest.raises(UserError, match=f"{flag} is empty: name a path, or leave it out"):
            parsed(flag, "")


@pytest.mark.parametrize("change", ["deleted", "longer", "emptied"])
def test_a_file_that_changes_while_it_is_read_is_named(change, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(answered(content=f"{n}")) + "\n" for n in range(9)))

    def encode_after_change(self, raws, first_index, encode=Encoder.__call__):
        if change == "deleted":
            path.unlink()
        else:
            path.write_text(path.read_text() + "\n" if change == "longer" else "")
        return encode(self, raws, first_index)
    monkeypatch.setattr(Encoder, "__call__", encode_after_change)
    with pytest.raises(DataError, match="data.jsonl changed while it was being read; start again"):
        open_or_build(path, load_tokenizer(None), kind="conversations", max_seq_len=64, cache_dir=tmp_path / "cache")
    assert all(left.name.endswith(".lock") for left in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "{}", None])
def test_a_cache_of_anything_is_built_again(content, tmp_path, capfd):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(answered()))

    def opened():
        return open_or_build(path, load_tokenizer(None), kind="conversations", max_seq_len=64, cache_dir=tmp_path)
    store = opened()
    meta = store.folder / "meta.json"
    meta.unlink()
    meta.mkdir() if content is None else meta.write_text(content)
    assert opened().content == store.content and "is damaged; building it again" in capfd.readouterr().err


def test_an_answer_that_may_not_be_learnt_is_not_what_score_expects(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(answered()) + "\n" + json.dumps(answered(weight=0)))
    with pytest.raises(DataError, match="line 2: the last answer is marked as one not to be learnt"):
        score.read_questions(path)
    assert [question.expected for question in score.read_questions(path, limit=1)] == ["Noon."]
