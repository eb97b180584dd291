"""What a record means: every key that says what is shown or learnt is honoured or refused, in every shape.

    python -m pytest tests/data/test_shapes.py
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import notes, parse_conversation, parse_text, read_records
from minimind_ds.data.sample import Augment, build_sample, render
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenizer import load_tokenizer

TOOL = {"name": "clock", "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}}}
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}
ASK, ANSWER = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "Noon."}


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


def text(record: dict) -> str:
    return "".join(piece.text for piece in render(parse_conversation(record)))


def learnt(record: dict, tok, **augment) -> str:
    """The words that earn labels."""
    touched = Augment(0, 0, 0.0, 0.0, **augment) if augment else None
    labels = build_sample(record, tok, 999, augment=touched).labels.tolist()
    return tok.decode(label for label in labels if label != IGNORE).replace("<think>\n\n</think>\n\n", "")


def turns(*fields: dict) -> dict:
    return {"messages": [ASK, *({**ANSWER, **more} for more in fields)]}


EQUAL = {
    "prompt and completion as text": ({"prompt": "Time?", "completion": "Noon."}, [ASK, ANSWER]),
    "prompt and completion as turns": ({"prompt": [ASK], "completion": [ANSWER]}, [ASK, ANSWER]),
    "prompt as turns, completion as text": ({"prompt": [ASK], "completion": "Noon."}, [ASK, ANSWER]),
    "query and response": ({"query": "Time?", "response": "Noon.", "history": [["a", "b"]]},
                           [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ASK, ANSWER]),
    "names of speakers": ({"messages": [{"role": "developer", "content": "S"}, {"role": "human", "content": "Time?"},
                                        {"from": "model", "value": "Noon."}, {"role": "ipython", "content": "1"},
                                        {"role": "gpt", "content": "Noon."}]},
                          [{"role": "system", "content": "S"}, ASK, ANSWER, {"role": "tool", "content": "1"}, ANSWER]),
    "a system prompt of the record": ({"system": "S", "messages": [ASK, ANSWER]},
                                      [{"role": "system", "content": "S"}, ASK, ANSWER]),
    "nulls": ({"conversations": None, "system": None, "tools": None, "images": None, "label": None,
               "messages": [{**ASK, "name": None, "tool_calls": None, "weight": None},
                            {**ANSWER, "tool_calls": None, "reasoning": None}]}, [ASK, ANSWER]),
    "text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Ti"}, {"text": "me?"}]},
                                 {"role": "assistant", "content": [{"type": "text", "text": "Noon."}]}]},
                   [ASK, ANSWER]),
    "Alpaca without an instruction": ({"instruction": "", "input": "Time?", "output": "Noon."}, [ASK, ANSWER]),
    "Alpaca without an input": ({"instruction": "Time?", "input": "", "output": "Noon."}, [ASK, ANSWER]),
    "Alpaca's reasoning": ({"instruction": "Time?", "output": "Noon.", "reasoning": "hm"},
                           [ASK, {**ANSWER, "reasoning_content": "hm"}]),
    "thinking": (turns({"thinking": "hm"}), [ASK, {**ANSWER, "reasoning_content": "hm"}]),
    "reasoning alone": (turns({"content": None, "reasoning": "hm"}),
                        [ASK, {"role": "assistant", "content": "", "reasoning_content": "hm"}]),
    "function_call": (turns({"function_call": CALL}), [ASK, {**ANSWER, "tool_calls": [CALL]}]),
    "function_call, null content": (turns({"content": None, "function_call": json.dumps(CALL)}),
                                    [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    "function_call as a speaker": ({"messages": [ASK, {"role": "function_call", "content": json.dumps(CALL)}]},
                                   [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    "calls of text": (turns({"tool_calls": [json.dumps(CALL)]}), [ASK, {**ANSWER, "tool_calls": [CALL]}]),
    "a tool's object": ({"messages": [ASK, ANSWER, {"role": "function", "content": {"t": "12:05"}}, ANSWER]},
                        [ASK, ANSWER, {"role": "tool", "content": '{"t": "12:05"}'}, ANSWER]),
    "a tool's list": ({"messages": [ASK, ANSWER, {"role": "tool", "content": [{"type": "hour"}]}, ANSWER]},
                      [ASK, ANSWER, {"role": "tool", "content": '[{"type": "hour"}]'}, ANSWER]),
    "one wrapper": ({"messages": [ASK, ANSWER, {"role": "tool", "content": "<tool_response>\nx\n</tool_response>\n"},
                                  ANSWER]}, [ASK, ANSWER, {"role": "tool", "content": "x"}, ANSWER]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_each_spelling_reads_as_the_plain_one(name):
    record, plain = EQUAL[name]
    assert text(record) == text({"conversations": plain})


@pytest.mark.parametrize("record", [
    {"messages": [ASK, ANSWER]}, {"conversations": [ASK, ANSWER]}, {"instruction": "Time?", "output": "Noon."},
    {"conversations": [{"from": "human", "value": "Time?"}, {"from": "gpt", "value": "Noon."}]},
    {"prompt": "Time?", "completion": "Noon."}, {"prompt": [ASK], "completion": [ANSWER]},
    {"query": "Time?", "response": "Noon."}])
def test_tools_stand_in_the_prompt_of_every_shape_under_either_name(record):
    want = text({"conversations": [{"role": "system", "content": "", "tools": [TOOL]}, ASK, ANSWER]})
    assert json.dumps(TOOL) in want
    # A system turn of its own with nothing in it adds two line ends.
    want = want.replace("system\n\n\n# Tools", "system\n# Tools")
    for given in ([TOOL], json.dumps([TOOL])):
        for key in ("tools", "functions"):
            assert text({**record, key: given}) == want


@pytest.mark.parametrize("no, yes", [({"weight": 0}, {"weight": 1}), ({"train": False}, {"train": True}),
                                     ({"training": 0.0}, {"training": 1.0}), ({"loss": False}, {"loss": True}),
                                     ({"loss": 0, "weight": 0}, {"train": True, "weight": 1})])
def test_only_turns_that_may_be_learnt_earn_labels(no, yes, tok):
    wrong, right = {"content": "Midnight."}, {"content": "Noon."}
    record = turns({**wrong, **no}, {**right, **yes}, {**wrong, **no}, right)
    assert learnt(record, tok) == "Noon.<|im_end|>\nNoon.<|im_end|>\n"
    # The tokens are the same: only labels differ.
    free = turns(wrong, right, wrong, right)
    assert build_sample(record, tok, 999).input_ids.tolist() == build_sample(free, tok, 999).input_ids.tolist()
    assert build_sample(turns({**right, **no}), tok, 999).fate == "unlabelled"
    sharegpt = {"conversations": [{"from": "human", "value": "Time?", **no}, {"from": "gpt", "value": "Dusk.", **no},
                                  {"from": "gpt", "value": "Noon.", **yes}]}
    assert learnt(sharegpt, tok) == "Noon.<|im_end|>\n"


def test_the_prompt_of_prompt_and_completion_is_context(tok):
    record = {"prompt": [ASK, ANSWER, ASK], "completion": [{**ANSWER, "content": "One."}], "system": "S"}
    assert learnt(record, tok) == "One.<|im_end|>\n"
    record["prompt"][1] = {**ANSWER, "weight": 1}
    with pytest.raises(UserError, match=r"turn 2 \(assistant\): weight asks to learn a turn of the prompt"):
        parse_conversation(record)


def test_the_last_answer_alone_is_learnt_if_asked_for(tok):
    record = turns({"content": "One."}, {"content": "Two."})
    record["messages"] += [ASK]
    assert learnt(record, tok, learn="last") == "Two.<|im_end|>\n"
    assert learnt(record, tok, learn="all") == learnt(record, tok) == "One.<|im_end|>\nTwo.<|im_end|>\n"
    silent = turns({"content": "One."}, {"content": "Two.", "weight": 0})
    assert learnt(silent, tok, learn="last") == ""


BAD = {
    "turn 2 (assistant): weight is 0.5; it must be 0 or 1": turns({"weight": 0.5}),
    "turn 2 (assistant): train is 'yes'; it must be": turns({"train": "yes"}),
    "turn 3 (assistant): loss is 2; it must be": turns({}, {"loss": 2}),
    "turn 2 (assistant): 'weight' and 'train' differ": turns({"weight": 1, "train": False}),
    "turn 1 (user): train asks to learn a turn of the user": {"messages": [{**ASK, "train": True}, ANSWER]},
    "turn 2 (assistant): 'train_detail' is not supported": turns({"train_detail": [{"begin_offset": 0}]}),
    "turn 2 (assistant): 'reasoning_content' and 'thinking' differ":
        turns({"reasoning_content": "a", "thinking": "b"}),
    "turn 2 (assistant): 'tool_calls' and 'function_call' differ":
        turns({"tool_calls": [CALL], "function_call": CALL}),
    "turn 2 (assistant): 'content' and 'value' differ": turns({"value": "x"}),
    "turn 1 (user): 'thinking' belongs to an assistant turn": {"messages": [{**ASK, "thinking": "x"}, ANSWER]},
    "arguments of tool call 'f' is not valid JSON": turns({"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}),
    "arguments of tool call 'f' is not valid JSON: Expecting":
        turns({"function_call": {"name": "f", "arguments": ""}}),
    "tool call 'f' has no arguments": turns({"tool_calls": [{"function": {"name": "f", "arguments": None}}]}),
    "turn 2 (assistant): content holds no call": {"messages": [ASK, {"role": "function_call", "content": ""}]},
    "'tools' and 'functions' differ": {**turns({}), "tools": [TOOL], "functions": [CALL]},
    "weight of the whole record is 0.5; it must be": {**turns({}), "weight": 0.5},
    "train of the whole record is False: nothing of it may be learnt": {**turns({}), "train": False},
    "'reasoning' belongs to an assistant turn, not to the whole record": {**turns({}), "reasoning": "hm"},
    "it holds 'label', as records for KTO do": {"prompt": "a", "completion": "b", "label": False},
    "it holds 'label', as": {"messages": [ASK, ANSWER], "label": True},
    "it holds 'kto_tag', as records for KTO": {"instruction": "a", "output": "b", "kto_tag": True},
    "it holds 'chosen', as records for preference training (DPO)": {"conversations": [ASK, ANSWER], "chosen": ANSWER},
    "as records for preference training (DPO) do; this": {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
    "it holds 'images', which is not supported": {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER],
                                                  "images": ["a.png"]},
    "it holds 'mask', which": {**turns({}), "mask": "User"},
    "both the record and its first turn give a system prompt": {
        "system": "S", "messages": [{"role": "developer", "content": "T"}, ASK, ANSWER]},
    "completion is empty; it must be a string or turns": {"prompt": [ASK], "completion": []},
    "completion is an object; it must": {"prompt": "x", "completion": {"role": "assistant"}},
    "there is no assistant turn": {"prompt": "x", "completion": [ASK]},
}


@pytest.mark.parametrize("why", BAD)
def test_a_key_that_cannot_be_carried_out_is_refused_by_name(why):
    with pytest.raises(UserError) as caught:
        parse_conversation(BAD[why])
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_looks_like_it_is_let_through(tok):
    for key, value in (("label", "greeting"), ("label", 3), ("images", []), ("image", ""), ("weight", 1),
                       ("loss", True)):
        assert text({**turns({}), key: value}) == text(turns({}))
    assert "<image>" in text({"messages": [{"role": "user", "content": "<image> is a tag"}, ANSWER]})
    # A label beside plain text is the text's, and nobody's preference.
    assert parse_text({"text": "a", "label": 1, "messages": None}) == "a"
    with pytest.raises(UserError, match="it holds 'images'"):
        parse_text({"text": "<image> a", "images": ["x"]})
    with pytest.raises(UserError, match=r"weight of the whole record is 0\.5"):
        parse_text({"text": "a", "weight": 0.5})


def test_results_of_tools_stand_in_the_order_of_the_calls_that_they_name():
    def call(*ids):
        return {"role": "assistant", "content": None, "tool_calls": [{"id": i, "function": CALL} for i in ids]}

    def result(i, **more):
        return {"role": "tool", "content": f"r{i}", **more}

    def named(i):
        return result(i, tool_call_id=i)

    def results(*between):
        messages = parse_conversation({"messages": [ASK, *between, ANSWER]}).messages
        return [message.content for message in messages if message.role == "tool"]

    assert results(call("a", "b", "c"), named("c"), named("a"), named("b")) == ["ra", "rb", "rc"]
    assert results(call(1), call(2), named(2), named(1), ANSWER, call(2, 1), named(1), named(2)) == [
        "r1", "r2", "r2", "r1"]
    # A call that nobody answered; and where one of them has no id, nobody knows more than the order.
    assert results(call("a", "b"), named("b")) == ["rb"]
    assert results(call("a", "b"), named("b"), result("a")) == results(call("a", None), named("b"), named("a")) == [
        "rb", "ra"]
    # Ids of a file that gives the same to all.
    assert results(call("a", "a"), {**named("a"), "content": "2"}, {**named("a"), "content": "1"}) == ["2", "1"]
    for between, said in (([call("a", "b"), named("b"), named("b")], "turn 4 .tool.: tool_call_id 'b' is named by"),
                          ([call("a"), named("x")], "turn 3 .tool.: tool_call_id 'x' names no call .* are 'a'"),
                          ([{**ASK, "tool_call_id": "a"}], "turn 2 .user.: 'tool_call_id' belongs to a tool turn")):
        with pytest.raises(UserError, match=said):
            results(*between)


def test_keys_without_a_meaning_are_counted_by_name(tmp_path):
    path = tmp_path / "data.jsonl"
    record = {"messages": [ASK, {**ANSWER, "name": "x"}, {"role": "tool", "content": "", "tool_call_id": "1"}, ANSWER]}
    records = [{**record, "id": 1, "prompt": "Time?"}, {**record, "id": 2, "source": None}, {**record, "skill": "a"},
               {"instruction": "a", "output": "b", "text": "c", "\u00e9\n": 1}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    reader = read_records(path, "conversations")
    for _ in range(2):
        assert len(list(reader)) == 4
        assert reader.ignored_keys == Counter({"turn.name": 3, "id": 2, "prompt": 1, "text": 1,
                                               r"\xe9\n": 1})
    assert reader.shapes == {"messages": 3, "alpaca": 1}
    # A hostile file cannot make the list long.
    path.write_text("\n".join(json.dumps({**record, str(i) * 99: 1}) for i in range(300)), encoding="utf-8")
    list(reader)
    assert len(reader.ignored_keys) < 110 and max(map(len, reader.ignored_keys)) < 50
    assert reader.ignored_keys["(others)"] == 190


def test_control_tokens_spelled_in_text_are_counted_and_read_as_asked(tok, tmp_path):
    path = tmp_path / "data.jsonl"
    spelled = "<|im_start|>The sea.<|im_end|> <|im_start|>Snow.<|im_end|> <think>"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (spelled, "plain < text", spelled)))
    stores = {markers: open_or_build(path, tok, kind="text", max_seq_len=99, cache_dir=tmp_path / "cache",
                                     options={"text_markers": markers}) for markers in ("literal", "control")}
    special = tok.special_id
    start, end, think = map(special, ("<|im_start|>", "<|im_end|>", "<think>"))
    sea, snow, space = map(tok.encode, ("The sea.", "Snow.", " "))
    want = {"literal": tok.encode(spelled),
            "control": [start, *sea, end, *space, start, *snow, end, *space, think]}
    for markers, store in stores.items():
        assert store[0].input_ids.tolist() == store[2].input_ids.tolist() == [tok.bos_id, *want[markers], tok.eos_id]
        assert store[0].labels.tolist() == [*want[markers], tok.eos_id, IGNORE]
        assert store[1].input_ids.tolist() == [tok.bos_id, *tok.encode("plain < text"), tok.eos_id]
        [line] = notes(store.stats, markers)
        assert line.startswith("pretraining text spells control tokens 10 times: <|im_end|> (4), <|im_start|> (4), "
                               "<think> (2); they are ") and "--text_markers control" in line
    assert stores["literal"].content != stores["control"].content


def test_a_store_knows_what_is_learnt_and_what_was_passed_over(tok, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**turns({"content": "One.", "name": "x"}, {"content": "Two."}), "id": 7}))
    found = {}
    for learn in ("all", "last"):
        store = open_or_build(path, tok, kind="conversations", max_seq_len=99, cache_dir=tmp_path / "cache",
                              options={"learn": learn})
        found[learn] = tok.decode(label for label in store[0].labels.tolist() if label != IGNORE)
        [line] = notes(store.stats)
        assert line.startswith("keys of the data that mean nothing here") and line.endswith(": id (1), turn.name (1)")
    assert found["last"] in found["all"] and "One." not in found["last"] and "One." in found["all"]


def test_all_shapes_may_stand_in_one_file_but_text_and_conversations_may_not(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"messages": [ASK, ANSWER]}, {"conversations": [{"from": "human", "value": "Time?"},
                                                               {"from": "gpt", "value": "Noon."}]},
               {"prompt": "Time?", "completion": "Noon."}, {"instruction": "Time?", "output": "Noon."}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    reader = read_records(path, "conversations")
    assert len({item for _, item in reader}) == 1 and len(reader.shapes) == 4
    path.write_text("\n".join(map(json.dumps, [*records, {"text": "x"}])), encoding="utf-8")
    with pytest.raises(UserError, match="line 5: the record holds 'text', which is for pretraining"):
        list(read_records(path, "conversations"))
