"""Turns of a conversation, as people's files spell them -> validated Messages.

Every key of a turn that says who speaks, what is said or whether it may be learnt is honoured or refused; a null is an
absent key; what is left over is counted (docs/DATA.md lists it all).

    python -c "from minimind_ds.data.turns import parse_messages as p; print(p([dict(role='model', value='Hi')]))"
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from minimind_ds.config.errors import UserError
from minimind_ds.data.json_text import dump, kind_of, list_of, parse, quoted, string

# Who speaks; function_call is an assistant turn that holds nothing but calls.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "function": "tool", "function_response": "tool", "tool_response": "tool", "observation": "tool",
         "ipython": "tool", "function_call": "function_call", "tool_call": "function_call",
         "tool_calls": "function_call"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
TOOL_KEYS = ("tools", "functions")
# OpenAI's, Axolotl's and ms-swift's ways to say whether a turn is learnt.
LEARN_KEYS = ("weight", "train", "training", "loss")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
# They choose tokens within a turn, which is not carried out.
SPAN_KEYS = ("train_detail", "training_detail", "mask", "masks", "loss_mask", "loss_scale", "assistant_masks",
             "completion_mask")
PLAIN_KEYS = frozenset(("role", "content"))
TURN_KEYS = frozenset(("role", "from", "content", "value", "tool_call_id", *REASONING_KEYS, *CALL_KEYS, *TOOL_KEYS,
                       *LEARN_KEYS, *MEDIA_KEYS, *SPAN_KEYS))
PART_KEYS = frozenset(("type", "text"))
CALL_PARTS = frozenset(("id", "type", "index", "function", "name", "arguments", "parameters"))
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url")
# Names that nobody agreed on and that say all the same what is learnt, which answer is better, or what is shown.
ALL_LEARNT = "this trains on all answers of a file: keep the good ones and leave the key out"
MEANT = {
    "learnt": (r"(^|_)(loss|masks?|masked|train|trained|training|trainable|learn|learnt|weights?)(_|$)",
               "seems to say what is learnt, and is not understood: a turn's 'weight', 'train' or 'loss' says it, "
               "false or true; rename it, or leave it out"),
    "better": (r"(^|_)(chosen|rejected|desirable|undesirable)(_|$)|preferred_(output|answer|response)|^is_preferred$",
               f"seems to tell better answers from worse ones; {ALL_LEARNT}"),
    "labels": (r"^(kto_)?labels?$", f"seems to mark answers as good or bad; {ALL_LEARNT}"),
    "media": (r"^(image|img|picture|audio|video)s?(_(path|url|file)s?)?$",
              "is not supported: the model reads text only")}
# Distinct names kept of keys that mean nothing; the rest of a hostile file's are counted together.
MOST_NAMES, OTHERS = 100, "(others)"


@dataclass(frozen=True)
class ToolCall:
    """A call the assistant makes; `arguments` is the JSON text as it will be rendered; results name its `id`."""

    name: str
    arguments: str
    id: str = field(default="", compare=False)


@dataclass(frozen=True)
class Message:
    """One turn.  `reasoning` None means the record gives none, so a </think> in `content` is taken apart.

    learn: False for an assistant turn that is context only, because it says so or because of its position.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    learn: bool = True


@dataclass(frozen=True)
class Conversation:
    """Validated turns; `tools` holds the JSON text of each tool as it will be rendered."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


def parse_messages(turns: list, tools: Any = None, *, for_training: bool = True, context: int = 0,
                   ignored: Counter | None = None) -> Conversation:
    """Validate turns; `tools` is a list of tool objects, or that list as JSON text.

    Tools may also stand on system turns, as in MiniMind's data, of which the last count.

    Args:
        for_training: ask for at least one assistant turn; a chat prompt has none yet.
        context: so many turns at the start are not learnt, whoever speaks.
        ignored: counts keys that mean nothing.

    Raises:
        UserError: what is wrong.
    """
    if not isinstance(turns, list):
        raise UserError(f"the turns are {kind_of(turns)}, not a list")
    if not turns:
        raise UserError("the conversation is empty")
    messages = []
    of_record = tool_texts = parse_tools(tools)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} is {kind_of(turn)}, not an object")
        if None in turn.values():
            turn = {key: value for key, value in turn.items() if value is not None}
        message = _message(turn, number, number <= context, ignored)
        if turn.keys() != PLAIN_KEYS:
            if given := find(turn, TOOL_KEYS, f"turn {number}: ")[1]:
                if message.role != "system":
                    raise UserError(f"turn {number}: 'tools' belongs to a system turn, not to {message.role!r}")
                tool_texts = parse_tools(given)
                if of_record and tool_texts != of_record:
                    raise UserError(f"turn {number}: the record and its system turn list different tools; give one of "
                                    "the two")
            check_unknown(turn, TURN_KEYS, "turn.", ignored, f"turn {number} ({message.role}): ")
        messages.append(message)
    if any("tool_call_id" in turn for turn in turns):
        messages = in_call_order(messages, [turn.get("tool_call_id") for turn in turns])
    if for_training and not any(message.role == "assistant" for message in messages):
        raise UserError("there is no assistant turn to learn from")
    return Conversation(tuple(messages), tool_texts)


def in_call_order(messages: list[Message], named: list) -> list[Message]:
    """Results of tools in the order of the calls that they name (`named`: by turn), since the text shows no ids.

    Nothing is moved or looked at where a call, or a result beside it, has no id of its own.

    Raises:
        UserError: an id that is no call's of the turns just before, or that another result has named.
    """
    for number, (message, name) in enumerate(zip(messages, named), 1):
        if not empty(name) and message.role != "tool":
            raise UserError(f"turn {number} ({message.role}): 'tool_call_id' belongs to a tool turn, not to "
                            f"{message.role!r}")
    ordered, start, calls = [], 0, []
    for role, run in itertools.groupby(messages, key=lambda message: message.role):
        run = list(run)
        names, first, start = list(map(_id, named[start:start + len(run)])), start + 1, start + len(run)
        if role == "tool" and calls and all(calls) and all(names) and len(set(calls)) == len(calls):
            place = {call: n for n, call in enumerate(calls)}
            for n, name in enumerate(names):
                if place.get(name) is None:
                    used = "is named by two results" if name in place else (
                        "names no call of the turn before, whose calls are " + ", ".join(map(quoted, calls[:8])))
                    raise UserError(f"turn {first + n} (tool): tool_call_id {quoted(name)} {used}")
                names[n], place[name] = place[name], None
            run = [message for _, message in sorted(zip(names, run), key=lambda pair: pair[0])]
        calls = [call.id for message in run for call in message.tool_calls]
        ordered += run
    return ordered


def only_last(conversation: Conversation) -> Conversation:
    """The conversation with nothing to be learnt but its last assistant turn, and that only if it may be."""
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    messages = tuple(message if i == last or message.role != "assistant" else replace(message, learn=False)
                     for i, message in enumerate(messages))
    return replace(conversation, messages=messages)


def find(holder: dict, keys: tuple[str, ...], where: str) -> tuple[str, Any]:
    """(key, value) of the one of these keys that is given; the first key and None if none is, an empty one last.

    Raises:
        UserError: two of them hold different things.
    """
    given = [key for key in keys if holder.get(key) is not None]
    full = [key for key in given if holder[key] not in ("", [], {})]
    if any(holder[key] != holder[full[0]] for key in full):
        raise UserError(f"{where}{full[0]!r} and {full[1]!r} differ; give one of them")
    key = (full or given or keys)[0]
    return key, holder.get(key)


def check_unknown(holder: dict, known: frozenset, prefix: str, ignored: Counter | None, where: str = "",
                  meant: tuple[str, ...] = tuple(MEANT)) -> None:
    """Add the keys of `holder` that are not known to the tally, by a name that can be printed anywhere.

    Raises:
        UserError: one that means something all the same, by its name (`meant`: keys of MEANT) and its value.
    """
    for key in [key for key in holder if key not in known]:
        name = ascii(str(key)[:40])[1:-1]
        kind = meaning(str(key)[:40])
        if kind in meant and not says_nothing(holder[key], kind):
            raise UserError(f"{where}{name!r} {MEANT[kind][1]}")
        if ignored is not None:
            name = prefix + name
            ignored[name if name in ignored or len(ignored) < MOST_NAMES else OTHERS] += 1


@functools.lru_cache(maxsize=1024)
def meaning(key: str) -> str | None:
    """Which kind of MEANT a key's name is, lossMask like loss_mask."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower().replace("-", "_")
    return next((kind for kind, (pattern, _) in MEANT.items() if re.search(pattern, name)), None)


def says_nothing(value: Any, kind: str) -> bool:
    """Whether the value shows that a key of this kind is something else, or nothing."""
    if empty(value) or kind == "better":
        return empty(value)
    if kind == "media":
        return value in (False, 0)
    # Words name something; classes of a data set are no marks for answers.
    return isinstance(value, str) and is_class(value) or kind == "labels" and (
        all(map(is_class, value)) if isinstance(value, list) else is_class(value))


def is_class(label: Any) -> bool:
    """Whether a label is of another kind than KTO's, true or false: many a data set for other ends has some."""
    if isinstance(label, str):
        return label.strip().lower() not in ("true", "false", "0", "1", "0.0", "1.0")
    return not (isinstance(label, (bool, int, float)) and label in (0, 1))


def _message(turn: dict, number: int, context: bool, ignored: Counter | None) -> Message:
    # Nearly all turns of nearly all files.
    if turn.keys() == PLAIN_KEYS and isinstance(turn["content"], str):
        role = turn["role"]
        if role in ("user", "assistant", "system"):
            return Message(role, string(turn["content"], f"turn {number} ({role}): content"),
                           learn=not (context and role == "assistant"))
    key, speaker = find(turn, ("role", "from"), f"turn {number}: ")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"turn {number}: {key} {quoted(speaker)} is not one of {', '.join(ROLES)}")
    where = f"turn {number} ({'assistant' if role == 'function_call' else role}): "
    for key in (*MEDIA_KEYS, *SPAN_KEYS):
        # A mask of 0 means something, an empty list of pictures does not.
        if not empty(turn.get(key)):
            what = "the model reads text only" if key in MEDIA_KEYS else "a turn is learnt as a whole or not at all"
            raise UserError(f"{where}{key!r} is not supported: {what}")
    content_key, content = find(turn, ("content", "value"), where)
    call_key, calls = find(turn, CALL_KEYS, where)
    if role == "function_call":
        call_key, calls, content = content_key, [content] if isinstance(content, dict) else content, ""
    calls = _calls(calls, where, call_key, ignored) if calls else ()
    if role == "function_call":
        if not calls:
            raise UserError(f"{where}{call_key} holds no call")
        role = "assistant"
    reasoning_key, reasoning = find(turn, REASONING_KEYS, where)
    for key, value in ((call_key, calls), (reasoning_key, reasoning)):
        if value and role != "assistant":
            raise UserError(f"{where}{key!r} belongs to an assistant turn, not to {role!r}")
    if reasoning is not None:
        reasoning = string(reasoning, where + reasoning_key)
    # OpenAI's format has null here when the answer is nothing but calls.
    if content is None and (calls or reasoning or role == "system" and any(turn.get(key) for key in TOOL_KEYS)):
        content = ""
    return Message(role, _content(content, role, where + content_key, ignored), reasoning, calls,
                   _may_be_learnt(turn, role, where, context))


def _content(content: Any, role: str, what: str, ignored: Counter | None) -> str:
    """The text of a turn: a string, text parts joined, or for tools any object as JSON."""
    if isinstance(content, list):
        content = _joined(content, role, what, ignored)
    elif isinstance(content, dict) and role == "tool":
        content = dump(content, what)
    content = string(content, what)
    if role == "tool":
        # The wrapper is written by the renderer, once.
        bare = content.strip()
        if bare.startswith("<tool_response>") and bare.endswith("</tool_response>"):
            content = bare.removeprefix("<tool_response>").removesuffix("</tool_response>")
            content = content.removeprefix("\n").removesuffix("\n")
    return content


def _joined(parts: list, role: str, what: str, ignored: Counter | None) -> str:
    texts, other = [], None
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        # What a tool found may well have a text among other things.
        plain = isinstance(part, dict) and isinstance(part.get("text"), str) and (role != "tool" or len(part) == 1)
        if kind in TEXT_PARTS or (kind is None and plain):
            _check_part(part, what, ignored)
            texts.append(string(part.get("text"), f"{what}: text of a part"))
        else:
            other = quoted(kind) if isinstance(kind, str) else kind_of(part)
            if kind in MEDIA_PARTS:
                raise UserError(f"{what} has a part of type {other}, which is not supported: the model reads text "
                                "only")
    if parts and other is None:
        return "".join(texts)
    # A tool may well answer with a list.
    if role == "tool":
        return dump(parts, what)
    raise UserError(f"{what} is a list, not a string, and {f'has a part of type {other}' if other else 'is empty'}")


def _check_part(part: dict, what: str, ignored: Counter | None) -> None:
    """Counts a text part's keys that mean nothing; raises UserError for one that says what of a turn is learnt."""
    if part.keys() <= PART_KEYS:
        return
    for key in (*LEARN_KEYS, *SPAN_KEYS):
        if not empty(part.get(key)):
            raise UserError(f"{what} has a part with {key!r}, which is not supported: a turn is learnt as a whole or "
                            "not at all")
    check_unknown(part, PART_KEYS, "part.", ignored, f"{what}: a part's ")


def empty(value: Any) -> bool:
    """Whether a key of this value says nothing: null, or nothing inside."""
    return value is None or value in ("", [], {})


def _calls(calls: Any, where: str, key: str, ignored: Counter | None) -> tuple[ToolCall, ...]:
    what = where + key
    if isinstance(calls, str):
        calls = parse(calls, what)
    if key != "tool_calls" and isinstance(calls, dict):
        calls = [calls]
    return tuple(_call(call, where, ignored) for call in list_of(calls, what))


def _call(call: Any, where: str, ignored: Counter | None) -> ToolCall:
    outer = call if isinstance(call, dict) else {}
    call = outer.get("function") or call
    if isinstance(call, str):
        call = parse(call, f"{where}a tool call")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise UserError(f"{where}a tool call has no name")
    check_unknown({**outer, **call}, CALL_PARTS, "call.", ignored, meant=())
    name = string(call["name"], f"{where}tool call name")
    arguments = find(call, ("arguments", "parameters"), f"{where}tool call {name[:40]!a}: ")[1]
    what = f"{where}arguments of tool call {name[:40]!a}"
    if arguments is None:
        raise UserError(f"{where}tool call {name[:40]!a} has no arguments; where it takes none, write {{}}")
    # What is no JSON would be learnt as an answer that no program can read.
    value = parse(arguments, what) if isinstance(arguments, str) else arguments
    if isinstance(value, str):
        raise UserError(f"{what} are JSON text within JSON text; write them as JSON once")
    if isinstance(value, (int, float)):
        raise UserError(f"{what} are {kind_of(value)}, not an object")
    return ToolCall(name, string(arguments if isinstance(arguments, str) else dump(value, what), where + "arguments"),
                    _id(outer.get("id")))


def _id(value: Any) -> str:
    """An id as text; anything but text and whole numbers is none."""
    return str(value) if isinstance(value, (str, int)) else ""


def _may_be_learnt(turn: dict, role: str, where: str, context: bool) -> bool:
    told = [key for key in LEARN_KEYS if key in turn]
    for key in told:
        zero_or_one(turn[key], where + key)
        if turn[key] != turn[told[0]]:
            raise UserError(f"{where}{told[0]!r} and {key!r} differ; give one of them")
    if told and turn[told[0]] and (role != "assistant" or context):
        who = f"a turn of the {role}" if role != "assistant" else "a turn of the prompt"
        raise UserError(f"{where}{told[0]} asks to learn {who}; only the assistant's answers are learnt")
    return role != "assistant" or not (context or told and not turn[told[0]])


def zero_or_one(value: Any, what: str) -> None:
    """Raises UserError unless the value is 0, 1, false or true."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise UserError(f"{what} is {quoted(value)}; it must be 0 or 1, false or true")


def parse_tools(tools: Any) -> tuple[str, ...]:
    """The JSON text of each tool of a list, or of that list as JSON text."""
    if not tools:
        return ()
    parsed = list_of(tools, "tools")
    if not all(isinstance(tool, dict) for tool in parsed):
        raise UserError("tools is not a list of objects")
    return tuple(string(dump(tool, "tools"), "tools") for tool in parsed)
