"""A validated conversation -> token ids and labels that are right by construction.

One renderer writes MiniMind's chat format as pieces, for training and for chat prompts alike.  Each piece is either a
control token or text, and says whether the assistant wrote it; labels follow from that and from nothing else
(law 1 of docs/ARCHITECTURE.md).  Ids and labels equal those of MiniMind's own SFTDataset wherever the data does not
spell control tokens and lets every answer be learnt.  Where it does spell them:

- system, user and tool text, tool definitions, names and arguments of calls: text stays text;
- the assistant's own content and reasoning: <think>, </think>, <tool_call> and </tool_call> become the control tokens,
  as in MiniMind, because a model has to learn to write them and its earlier answers come back in that form when a
  chat goes on.  They end no turn and open none.  Anything else, <|im_end|> above all, stays text.

With a tokenizer that lacks one of these four or the tool_response pair (MiniMind2's), it is written as text.

    python -c "import minimind_ds.data.sample as s; print(s.render(s.parse_messages([dict(role='user', content='Hi')],
        for_training=False), add_generation_prompt=True))"
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import (
    Conversation,
    Message,
    marker_pattern,
    only_last,
    parse_conversation,
    parse_messages,
)
from minimind_ds.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# Part of the key of anything that keeps samples: raise it when ids or labels of the same record change.
RENDERING = 5
# What became of a record: kept whole, cut at max_len, too long and dropped, left without a single label, or too long
# and kept whole as several samples (pieces_of).
FATES = ("whole", "cut", "dropped", "unlabelled", "split")
POLICIES = {"conversations": ("cut", "drop"), "text": ("split", "cut", "drop")}
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_ASSISTANT_MARKERS = re.compile("(</?think>|</?tool_call>)")

TOOLS_BEFORE = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_AFTER = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
               " XML tags:\n", '\n{"name": <function-name>, "arguments": <args-json-object>}\n')
SYSTEM_PROMPTS = (
    "You are MiniMind, a small language model that tries to be useful.",
    "You are a careful assistant. Answer what is asked, and answer it correctly.",
    "You are a friendly assistant who keeps answers clear and short.",
    "Help the user as well as you can, and say so when you do not know.",
    "You are a knowledgeable assistant.",
    "你是 MiniMind，一个乐于助人的小语言模型。",
    "你是一位细心的助手，请准确回答用户的问题。",
    "你是一位友好的助手，回答要简洁明了。",
    "请尽你所能帮助用户，不知道时请如实说明。",
    "你是一位知识丰富的助手。",
)


class Piece(NamedTuple):
    """A stretch of a rendered conversation: a control token's name or plain text, and whether it is to be learnt."""

    text: str
    control: bool
    labelled: bool


@dataclass
class Sample:
    """One training sample.

    input_ids, labels: (T,) int64; labels[i] is the target of input_ids[i] (the token after it), IGNORE where nothing
    is learnt, the last one always.  fate: one of FATES; a dropped sample has T = 0.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    fate: str = "whole"


class Encoded(NamedTuple):
    """A Sample as plain lists, for building many; labels are already shifted.

    lost, lost_labelled: tokens that were cut off or dropped, and how many of them the record would have had learnt.
    """

    ids: list[int]
    labels: list[int]
    fate: str
    lost: int = 0
    lost_labelled: int = 0


@dataclass(frozen=True)
class Augment:
    """MiniMind's two random touches: a system prompt for conversations with neither one nor tools, and no empty think
    blocks.  A function of (seed, epoch, index) alone, so any rank makes the same choice.

    learn: "all" assistant turns, or the "last" of each conversation.  text_markers: control tokens spelled in a
    pretraining text stay "literal" text, or become "control" tokens.
    """

    seed: int
    epoch: int
    system_ratio: float = 0.2
    drop_empty_think: float = 0.8
    learn: str = "all"
    text_markers: str = "literal"

    def choose(self, conversation: Conversation, index: int) -> tuple[Conversation, bool]:
        """The conversation, perhaps with a system prompt, and whether its empty think blocks are left out."""
        dice = random.Random(f"{self.seed}:{self.epoch}:{index}")
        system, which, think = dice.random(), dice.randrange(len(SYSTEM_PROMPTS)), dice.random()
        if system < self.system_ratio and not conversation.tools and conversation.messages[0].role != "system":
            opening = Message("system", SYSTEM_PROMPTS[which])
            conversation = replace(conversation, messages=(opening, *conversation.messages))
        return conversation, think < self.drop_empty_think


def build_sample(record: dict | Conversation, tok: Tokenizer, max_len: int, *, policy: str = "cut",
                 augment: Augment | None = None, index: int = 0) -> Sample:
    """Tokenise and label one conversation record.

    Args:
        max_len: most tokens of a sample.
        policy: what happens to a longer one: "cut" keeps its first max_len tokens, "drop" leaves it out.
        augment, index: random touches (none by default) for the record at this place in the data set.

    Raises:
        ValueError: a bad record (what is wrong, without file and line), policy or max_len.
    """
    return _as_sample(build_samples([record], tok, max_len, policy=policy, augment=augment, indices=[index])[0])


def build_text_sample(text: str, tok: Tokenizer, max_len: int, *, policy: str = "cut") -> Sample:
    """Pretraining sample: bos, text, eos, every token predicted from those before it; "cut" keeps bos and eos.

    Raises:
        ValueError: bad policy or max_len.
    """
    if policy == "split":
        raise UserError("the policy 'split' makes several samples of a text: build_samples and pieces_of")
    return _as_sample(build_samples([text], tok, max_len, policy=policy)[0])


def build_samples(items: Iterable[dict | Conversation | str], tok: Tokenizer, max_len: int, *, policy: str = "cut",
                  augment: Augment | None = None, indices: Iterable[int] | None = None,
                  encode_batch: Callable[[list[str]], list[list[int]]] | None = None) -> list[Encoded]:
    """build_sample for conversations and build_text_sample for strings, with one call into the tokenizer library.

    Meant for chunks of some thousand items; each distinct text is tokenised once.  Item i of the result is item i of
    the input.  The policy "split", for texts only, keeps a long one whole for pieces_of to take apart.

    Args:
        indices: the items' places in the data set, for `augment`; counted from 0 if there are none.
        encode_batch: does the work of tok.encode_batch.

    Raises:
        ValueError: as build_sample.
    """
    if policy not in ("cut", "drop", "split"):
        raise UserError(f"policy is {policy!r}; it must be 'cut', 'drop' or, for texts, 'split'")
    if max_len < 2:
        raise UserError(f"max_len is {max_len}; a sample needs at least 2 tokens")
    missing = {token for token in MARKERS if token not in tok.specials}
    rendered: list[list[Piece] | str] = []
    place: dict[str, int] = {}
    markers = marker_pattern(tok.specials) if augment is not None and augment.text_markers == "control" else None
    spelled: dict[str, list[str]] = {}
    for index, item in zip(itertools.count() if indices is None else indices, items):
        if isinstance(item, str):
            rendered.append(item)
            # Text and control tokens by turns.
            spelled[item] = markers.split(item) if markers else [item]
            for text in spelled[item][::2]:
                place.setdefault(text, len(place))
            continue
        pieces = _pieces(item, augment, index)
        pieces = _write_out(pieces, missing) if missing else pieces
        rendered.append(pieces)
        for text, control, _ in pieces:
            if not control and text not in place:
                place[text] = len(place)
    texts = dict(zip(place, (encode_batch or tok.encode_batch)(list(place))))
    controls = {token: [i] for token, i in tok.specials.items()}
    bos, eos = [tok.bos_id], [tok.eos_id]
    text_ids = {item: texts[item] if len(parts) == 1 else
                [i for n, part in enumerate(parts) for i in (controls[part] if n % 2 else texts[part])]
                for item, parts in spelled.items()}
    return [_text(text_ids[item], bos, eos, max_len, policy) if isinstance(item, str)
            else _conversation(item, texts, controls, max_len, policy) for item in rendered]


def prompt_ids(messages: Sequence[dict], tok: Tokenizer, tools: object = None,
               open_thinking: bool = False) -> list[int]:
    """The ids of a chat so far, ready for the assistant to go on.

    Args:
        messages: role/content turns, as in training data; none of them has to be the assistant's.
        tools: a list of tool objects, or that list as JSON text.
        open_thinking: leave the think block open for the model to fill.

    Raises:
        ValueError: what is wrong with the messages.
    """
    conversation = parse_messages(list(messages), tools, for_training=False)
    pieces = render(conversation, add_generation_prompt=True, open_thinking=open_thinking)
    pieces = _write_out(pieces, {token for token in MARKERS if token not in tok.specials})
    return [i for text, control, _ in pieces for i in ([tok.special_id(text)] if control else tok.encode(text))]


def render(conversation: Conversation, *, add_generation_prompt: bool = False, open_thinking: bool = False,
           drop_empty_think: bool = False) -> list[Piece]:
    """MiniMind's chat format, piece by piece; the pieces' texts joined are the text of its chat template.

    Text on both sides of a label change is two pieces, so labels never depend on how tokens merge.
    """
    messages = conversation.messages
    pieces: list[Piece] = []
    if conversation.tools:
        pieces += _tools_turn(messages[0], conversation.tools)
    elif messages[0].role == "system":
        pieces += _turn("system", messages[0].content)
    for i, message in enumerate(messages):
        if message.role == "user" or (message.role == "system" and i):
            pieces += _turn(message.role, message.content)
        elif message.role == "assistant":
            turn = _assistant_turn(message, drop_empty_think)
            pieces += turn if message.learn else [piece._replace(labelled=False) for piece in turn]
        elif message.role == "tool":
            first = i == 0 or messages[i - 1].role != "tool"
            last = i == len(messages) - 1 or messages[i + 1].role != "tool"
            pieces += [_control("<|im_start|>"), _text_piece("user\n")] if first else [_text_piece("\n")]
            pieces += [_control("<tool_response>"), _text_piece(f"\n{message.content}\n"),
                       _control("</tool_response>")]
            pieces += [_control("<|im_end|>"), _text_piece("\n")] if last else []
    if add_generation_prompt:
        pieces += [_control("<|im_start|>"), _text_piece("assistant\n"), _control("<think>")]
        pieces += [_text_piece("\n")] if open_thinking else [_text_piece("\n\n"), _control("</think>"),
                                                             _text_piece("\n\n")]
    return pieces


def _control(token: str, labelled: bool = False) -> Piece:
    return Piece(token, True, labelled)


def _text_piece(text: str, labelled: bool = False) -> Piece:
    return Piece(text, False, labelled)


_START, _END = _control("<|im_start|>"), _control("<|im_end|>")
_NEWLINE = _text_piece("\n")
_ANSWER = _text_piece("assistant\n")
_THINK, _THOUGHT = _control("<think>", True), _control("</think>", True)
_CALL, _CALLED = _control("<tool_call>", True), _control("</tool_call>", True)
_STOP, _STOP_NEWLINE = _control("<|im_end|>", True), _text_piece("\n", True)


def _turn(role: str, content: str) -> tuple[Piece, ...]:
    return _START, _text_piece(f"{role}\n{content}"), _END, _NEWLINE


def _tools_turn(first: Message, tools: Sequence[str]) -> list[Piece]:
    system = first.content + "\n\n" if first.role == "system" else ""
    listed = "".join("\n" + tool for tool in tools)
    within, tags, example = TOOLS_AFTER
    call, called = _control("<tool_call>"), _control("</tool_call>")
    return [_START, _text_piece(f"system\n{system}{TOOLS_BEFORE}{listed}{within}"), call, called, _text_piece(tags),
            call, _text_piece(example), called, _END, _NEWLINE]


def _assistant_turn(message: Message, drop_empty_think: bool) -> list[Piece]:
    content, thought = message.content, message.reasoning
    if thought is None:
        thought = ""
        if "</think>" in content:
            before, content = content.split("</think>")[0], content.split("</think>")[-1].lstrip("\n")
            thought = before.rstrip("\n").split("<think>")[-1].lstrip("\n")
    thought = thought.strip("\n")
    # Everything the assistant writes, as alternating text and control pieces; neighbouring text is one string.
    pieces = [_START, _ANSWER]
    if thought or not drop_empty_think:
        pieces.append(_THINK)
        pieces += _own_text(f"\n{thought}\n")
        pieces.append(_THOUGHT)
        answer = "\n\n" + content.lstrip("\n")
    else:
        answer = content.lstrip("\n")
    between = "\n" if content else ""
    for number, call in enumerate(message.tool_calls):
        answer += between if number == 0 else "\n"
        pieces += _own_text(answer)
        pieces += (_CALL, _text_piece(f'\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n', True), _CALLED)
        answer = ""
    pieces += _own_text(answer)
    pieces += (_STOP, _STOP_NEWLINE)
    return pieces


def _own_text(text: str) -> list[Piece]:
    """The assistant's text, with the markers it writes itself as control tokens."""
    if "<t" not in text and "</t" not in text:
        return [Piece(text, False, True)] if text else []
    parts = _ASSISTANT_MARKERS.split(text)
    return [Piece(part, bool(i % 2), True) for i, part in enumerate(parts) if part]


def _write_out(pieces: list[Piece], missing: set[str]) -> list[Piece]:
    """Control tokens the tokenizer lacks as text, joined with the text around them."""
    if not missing:
        return pieces
    pieces = [piece._replace(control=False) if piece.text in missing else piece for piece in pieces]
    joined: list[Piece] = []
    for (control, labelled), run in itertools.groupby(pieces, lambda piece: (piece.control, piece.labelled)):
        stretch = list(run)
        joined += stretch if control else [Piece("".join(piece.text for piece in stretch), False, labelled)]
    return joined


def _pieces(item: dict | Conversation, augment: Augment | None, index: int) -> list[Piece]:
    conversation = item if isinstance(item, Conversation) else parse_conversation(item)
    drop = False
    if augment is not None:
        conversation, drop = augment.choose(conversation, index)
        if augment.learn == "last":
            conversation = only_last(conversation)
    return render(conversation, drop_empty_think=drop)


def _conversation(pieces: list[Piece], texts: dict, controls: dict, max_len: int, policy: str) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for text, control, labelled in pieces:
        part = controls[text] if control else texts[text]
        ids += part
        labels += part if labelled else [IGNORE] * len(part)
    fate, lost, lost_labelled = "whole", 0, 0
    if len(ids) > max_len:
        if policy == "split":
            raise UserError("the policy 'split' is for texts: a conversation's turns belong together")
        fate, kept = ("dropped", 0) if policy == "drop" else ("cut", max_len)
        lost, lost_labelled = len(ids) - kept, len(ids) - kept - labels[kept:].count(IGNORE)
        del ids[kept:], labels[kept:]
        if fate == "dropped":
            return Encoded([], [], fate, lost, lost_labelled)
    # From here on labels[i] is the target of ids[i].
    del labels[0]
    labels.append(IGNORE)
    if labels.count(IGNORE) == len(labels):
        fate = "unlabelled"
    return Encoded(ids, labels, fate, lost, lost_labelled)


def _text(text_ids: list[int], bos: list[int], eos: list[int], max_len: int, policy: str) -> Encoded:
    lost = max(0, len(text_ids) - (max_len - 2))
    if lost and policy == "drop":
        # The first token is never a label.
        return Encoded([], [], "dropped", len(text_ids) + 2, len(text_ids) + 1)
    if lost and policy == "split":
        ids = bos + text_ids + eos
        return Encoded(ids, ids[1:] + [IGNORE], "split")
    ids = bos + text_ids[:max_len - 2] + eos
    return Encoded(ids, ids[1:] + [IGNORE], "cut" if lost else "whole", lost, lost)


def pieces_of(encoded: Encoded, max_len: int) -> list[Encoded]:
    """The samples of a text of the fate "split": of max_len tokens each, but for the last; others stay as they are.

    Each piece after the first begins with the token that ended the one before, as context: together they learn every
    token of the text but its first, each once.
    """
    if encoded.fate != "split":
        return [encoded]
    ids = encoded.ids
    parts = [ids[start:start + max_len] for start in range(0, len(ids) - 1, max_len - 1)]
    return [Encoded(part, part[1:] + [IGNORE], "split") for part in parts]


def _as_sample(encoded: Encoded) -> Sample:
    # Late: processes that tokenise do without it, 4 s and 200 MB each.
    import torch

    return Sample(torch.tensor(encoded.ids, dtype=torch.int64), torch.tensor(encoded.labels, dtype=torch.int64),
                  encoded.fate)
