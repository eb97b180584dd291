"""One record of any common shape -> a Conversation, or the text of a pretraining record.

    python -c "from minimind_ds.data.shapes import parse_conversation as p; print(p(dict(prompt='1+1?',
        completion='2')))"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import kind_of, quoted, string
from minimind_ds.data.turns import (
    CALL_KEYS,
    LEARN_KEYS,
    MEDIA_KEYS,
    REASONING_KEYS,
    SPAN_KEYS,
    TOOL_KEYS,
    Conversation,
    Message,
    check_unknown,
    empty,
    find,
    is_class,
    parse_messages,
    zero_or_one,
)

# Shape: the keys that tell it, all of them there; the first that fits counts.
SHAPES = {"conversations": ("conversations",), "messages": ("messages",), "alpaca": ("instruction",),
          "prompt": ("prompt", "completion"), "query": ("query", "response"), "text": ("text",)}
PAIRS = "it holds {!r}, as records for preference training (DPO) do; this trains on answers, one a record"
KTO = ("it holds {!r}, as records for KTO do (an answer marked as good or bad), and bad answers would be learnt as "
       "good ones; keep the good ones and leave the key out")
REFUSED = {**dict.fromkeys(("chosen", "rejected", "rejected_response"), PAIRS),
           **dict.fromkeys(("label", "kto_tag"), KTO),
           **dict.fromkeys(MEDIA_KEYS, "it holds {!r}, which is not supported: the model reads text only"),
           **dict.fromkeys(SPAN_KEYS, "it holds {!r}, which is not supported: a turn is learnt as a whole or not at "
                                      "all")}
# Keys that mean something in every conversation; score.py counts by `skill`.
SYSTEM_KEYS = ("system", "system_prompt")
COMMON = frozenset((*SYSTEM_KEYS, "skill", *TOOL_KEYS, *REASONING_KEYS, *CALL_KEYS, *LEARN_KEYS, *REFUSED))
SPECIAL = frozenset((*LEARN_KEYS, *REFUSED))
KNOWN = {"conversations": COMMON | {"conversations"}, "sharegpt": COMMON | {"conversations"},
         "messages": COMMON | {"messages"}, "alpaca": COMMON | {"instruction", "input", "output", "history"},
         "prompt": COMMON | {"prompt", "completion", "history"}, "query": COMMON | {"query", "response", "history"},
         "text": frozenset(("text", *LEARN_KEYS, *MEDIA_KEYS))}


def without_nulls(record: Any) -> Any:
    """The record, a null key being an absent one."""
    if isinstance(record, dict) and None in record.values():
        return {key: value for key, value in record.items() if value is not None}
    return record


def record_shape(record: dict) -> str:
    """A key of KNOWN, told by the record's own keys, of which none is null.

    Raises:
        UserError: no shape fits.
    """
    if not isinstance(record, dict):
        raise UserError(f"it is {kind_of(record)}, not a JSON object")
    shape = next((shape for shape, keys in SHAPES.items()
                  if keys[0] in record and (len(keys) == 1 or keys[1] in record)), None)
    if shape is None:
        # Preference records need not have any of the keys below.
        for key in REFUSED.keys() & record.keys() - {"label"}:
            raise UserError(REFUSED[key].format(key))
        found = ", ".join(ascii(str(key)[:40]) for key in list(record)[:5]) or "none"
        one_of = ", ".join(" and ".join(map(repr, keys)) for keys in SHAPES.values())
        raise UserError(f"none of the keys {one_of} is there (keys found: {found})")
    if shape == "conversations":
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else shape
    return shape


def parse_conversation(record: dict, ignored: Counter | None = None, shapes: Counter | None = None) -> Conversation:
    """Validate a training record of any conversation shape (see record_shape).

    Args:
        ignored: counts the keys of the record and of its turns that mean nothing.
        shapes: counts the records of each shape.

    Raises:
        UserError: what is wrong with it, without file or line; any message is one line.
    """
    record = without_nulls(record)
    shape = record_shape(record)
    if shape == "text":
        raise UserError("the record holds 'text', which is for pretraining; a conversation is needed")
    if SPECIAL & record.keys():
        _refuse(record)
    try:
        conversation = PARSERS[shape](record, ignored)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    if len(record) > 1:
        # What is left of these is a class of the record, which means nothing here.
        check_unknown(record, KNOWN[shape] - {"label"} if record.get("label") else KNOWN[shape], "", ignored)
    if shapes is not None:
        shapes[shape] += 1
    return conversation


def parse_text(record: dict, ignored: Counter | None = None, shapes: Counter | None = None) -> str:
    """The text of a pretraining record; counts as parse_conversation does.

    Raises:
        UserError: it holds no string 'text', or one that is not valid Unicode.
    """
    record = without_nulls(record)
    shape = record_shape(record)
    if shape != "text":
        raise UserError(f"a {shape!r} record is for fine-tuning; pretraining needs a 'text'")
    if len(record) > 1:
        _refuse({key: record[key] for key in KNOWN["text"] & record.keys()})
        check_unknown(record, KNOWN["text"], "", ignored, meant=("learnt",))
    text = string(record["text"], "text")
    if shapes is not None:
        shapes[shape] += 1
    return text


def _refuse(record: dict) -> None:
    """Raises UserError for a key of the whole record that changes what may be learnt, and cannot be carried out."""
    for key in REFUSED.keys() & record.keys():
        value = record[key]
        if not (empty(value) or key == "label" and is_class(value)):
            raise UserError(REFUSED[key].format(key))
    for key in LEARN_KEYS:
        if key in record:
            zero_or_one(record[key], f"{key} of the whole record")
            if not record[key]:
                raise UserError(f"{key} of the whole record is {quoted(record[key])}: nothing of it may be learnt; "
                                "leave it out of the file")


def _turns(record: dict, turns: Any, ignored: Counter | None, context: int = 0) -> Conversation:
    """A conversation of these turns with the record's own system prompt and tools."""
    system_key, system = find(record, SYSTEM_KEYS, "")
    tools = find(record, TOOL_KEYS, "")[1]
    for keys in (REASONING_KEYS, CALL_KEYS):
        key, said = find(record, keys, "")
        # OpenAI's requests say here whether there may be calls.
        if said and said not in ("auto", "none"):
            raise UserError(f"{key!r} belongs to an assistant turn, not to the whole record")
    conversation = parse_messages(turns, tools, context=context, ignored=ignored)
    if not system:
        return conversation
    if conversation.messages[0].role == "system":
        raise UserError("both the record and its first turn give a system prompt; give one of them")
    return replace(conversation, messages=(Message("system", string(system, system_key)), *conversation.messages))


def _from_prompt(record: dict, ignored: Counter | None) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _from_pair(record, "prompt", "completion", ignored)
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    for name, turns in (("prompt", prompt), ("completion", completion)):
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{name} is {'empty' if turns == [] else kind_of(turns)}; it must be a string or turns")
    if record.get("history"):
        raise UserError("history stands beside a prompt that is turns; put its turns there")
    # The prompt is context, as in TRL, whoever speaks in it.
    return _turns(record, [*prompt, *completion], ignored, context=len(prompt))


def _from_pair(record: dict, asked: str, answered: str, ignored: Counter | None) -> Conversation:
    """Alpaca and its kin: one question, one answer, perhaps questions and answers before them."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is not a list of [question, answer] pairs")
    turns = []
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = string(record[asked], asked)
    if asked == "instruction" and record.get("input"):
        question += "\n" * bool(question) + string(record["input"], "input")
    answer = {"role": "assistant", "content": string(record.get(answered), answered)}
    record = dict(record)
    for key in (*REASONING_KEYS, *CALL_KEYS):
        if key in record:
            answer[key] = record.pop(key)
    return _turns(record, [*turns, {"role": "user", "content": question}, answer], ignored)


PARSERS: dict[str, Callable[[dict, Counter | None], Conversation]] = {
    "conversations": lambda record, ignored: _turns(record, record["conversations"], ignored),
    "sharegpt": lambda record, ignored: _turns(record, record["conversations"], ignored),
    "messages": lambda record, ignored: _turns(record, record["messages"], ignored),
    "alpaca": lambda record, ignored: _from_pair(record, "instruction", "output", ignored),
    "query": lambda record, ignored: _from_pair(record, "query", "response", ignored),
    "prompt": _from_prompt,
}
