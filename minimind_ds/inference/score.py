"""Exact match: how many held-out questions a model answers word for word, overall and by skill.

The last assistant turn of each record is the expected answer, everything before it the prompt.  Answers are greedy,
so the same weights always score the same.  What is said counts, however it is spelled: calls are compared as JSON, and
the model thinks first where the record does, with its thoughts counted apart.

    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.config.precision import DTYPES
from minimind_ds.data.conversation import Conversation, DataError, read_records
from minimind_ds.data.files import expand, passed_over
from minimind_ds.data.sample import prompt_ids, render
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.inference import arguments
from minimind_ds.inference.chat import Sampling, device_of, load_model, visible
from minimind_ds.terminal import count

# Room beyond the expected answer's tokens: the stop token, and enough to see that an answer goes on.
SLACK = 4
# Thoughts and calls may be spelled at more length than the expected ones.
LONGER = 2
OPEN_THINK = "<think>\n"
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def main(argv: list[str]) -> int:
    """The whole of launch/score.py.  Returns the exit code."""
    args = program_flags.score().parse_args(argv)
    try:
        for name, least in (("limit", 0), ("batch_size", 1), ("show_wrong", 0)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
        chosen = arguments.choose(args)
        sources = expand(args.data_path)
        questions = [read_questions(source.path, args.limit) for source in sources]
        model, tok = load_model(**chosen.arguments, dtype=DTYPES.get(args.dtype), device=device_of(args))
        for note in (*chosen.notes, *passed_over(args.data_path)):
            print(note, file=sys.stderr)
        asked = [q for of_source in questions for q in of_source]
        print(f"answering {count(len(asked), 'question')} …", file=sys.stderr, flush=True)
        result = score(model, tok, asked, batch_size=args.batch_size)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    answers, right = result.pop("answers"), result.pop("right")
    result["sources"], scored = [], iter(right)
    for source, of_source in zip(sources, questions):
        tally = [next(scored) for _ in of_source]
        result["sources"].append({"name": source.name, "path": str(source.path), "correct": sum(tally),
                                  "total": len(tally), "exact_match": sum(tally) / len(tally)})
    pairs = [(q, a) for q, a, good in zip(itertools.chain(*questions), answers, right) if not good]
    for question, answer in pairs[:args.show_wrong]:
        print(f"{question.prompt.messages[-1].content!r}: expected {question.expected!r}, got {answer!r}")
    print(report(result))
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


class Said(NamedTuple):
    """An answer taken apart: thoughts, words, and calls as JSON of one spelling (the text, where it is no JSON)."""

    thought: str
    words: str
    calls: tuple[str, ...]


def said(text: str) -> Said:
    """An answer as the chat format writes it, taken apart; white space around its parts does not count."""
    before, closed, words = text.rpartition("</think>")
    if not closed and text.lstrip().startswith("<think>"):
        before, words = text, ""
    thought = before.rpartition("<think>")[2].strip()
    return Said(thought, CALL.sub("", words).strip(), tuple(map(one_spelling, CALL.findall(words))))


def one_spelling(call: str) -> str:
    try:
        value = json.loads(call, parse_float=_number)
        # OpenAI's format holds the arguments as JSON text.
        if isinstance(value, dict) and isinstance(value.get("arguments"), str):
            value["arguments"] = json.loads(value["arguments"], parse_float=_number)
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return call.strip()


def _number(text: str) -> float:
    """1.0 is 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Question:
    """One record: the conversation up to the answer, the answer as the model is to write it, and the record's "skill"
    ("" if it names none)."""

    prompt: Conversation
    expected: str
    skill: str

    def ids(self, tok: Tokenizer) -> list[int]:
        """The prompt's ids, ready for the assistant to go on; the think block is open if thoughts are expected."""
        turns = []
        for message in self.prompt.messages:
            turn = {"role": message.role, "content": message.content, "reasoning_content": message.reasoning}
            if message.tool_calls:
                turn["tool_calls"] = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
            turns.append(turn)
        return prompt_ids(turns, tok, tools=f"[{', '.join(self.prompt.tools)}]" if self.prompt.tools else None,
                          open_thinking=self.thinks)

    @property
    def thinks(self) -> bool:
        return bool(said(self.expected).thought)


def read_questions(path: str | Path, limit: int = 0) -> list[Question]:
    """The first `limit` records of a conversation file (0: all).

    Raises:
        DataError: what read_records refuses, or a record that does not end with an answer of the assistant's that
            may be learnt.
    """
    questions, records = [], read_records(path, "conversations")
    for number, conversation in records:
        last = conversation.messages[-1]
        if last.role != "assistant" or len(conversation.messages) < 2:
            raise DataError(f"{records.source.place(number)}: the last turn is not an assistant's answer to anything")
        if not last.learn:
            raise DataError(f"{records.source.place(number)}: the last answer is marked as one not to be learnt "
                            "(weight, train or loss), so it is not the right one; leave the record out")
        prompt = replace(conversation, messages=conversation.messages[:-1])
        # Between the header and the stop token with its newline; an empty think block is not said.
        written = "".join(piece.text for piece in render(Conversation((last,)), drop_empty_think=True)[2:-2])
        questions.append(Question(prompt, written, str(records.record.get("skill") or "")))
        if len(questions) == limit:
            break
    return questions


def greedy(model: PreTrainedModel, tok: Tokenizer, prompts: Sequence[list[int]], *, max_new_tokens: Sequence[int],
           batch_size: int = 64, openings: Sequence[str] = ()) -> list[str]:
    """Greedy answers to many prompts, in their order.

    Prompts of like length go together, padded on the left.

    Args:
        prompts: token ids, as prompt_ids gives them.
        max_new_tokens: the most tokens of each answer; a batch takes its largest.
        openings: how each answer begins in its prompt; nothing by default.

    Raises:
        ValueError: a prompt and its answer that are longer than the model's longest text.
    """
    assert len(prompts) == len(max_new_tokens)
    longest = model.config.max_position_embeddings
    for number, (ids, room) in enumerate(zip(prompts, max_new_tokens), 1):
        if len(ids) + room > longest:
            raise UserError(f"prompt {number} takes {len(ids)} tokens and its answer {room}; the model holds "
                             f"{longest}")
    answers, stops = [""] * len(prompts), tok.stop_ids
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids_BT = torch.tensor([[tok.pad_id] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        real_BT = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        sampling = Sampling(temperature=0, max_new_tokens=max(max_new_tokens[i] for i in chosen))
        with torch.inference_mode():
            out_BT = model.generate(input_ids=ids_BT.to(model.device), attention_mask=real_BT.to(model.device),
                                    generation_config=sampling.generation_config(tok, model.config.vocab_size))
        for i, ids in zip(chosen, out_BT[:, width:].tolist()):
            ids = list(itertools.takewhile(lambda token: token not in stops, ids))
            opening = openings[i] if openings else ""
            answers[i] = visible(opening + tok.decode(ids, skip_special=True), final=True)
    return answers


def score(model: PreTrainedModel, tok: Tokenizer, questions: Sequence[Question], *, batch_size: int = 64) -> dict:
    """exact_match (0 to 1), correct, total, seconds, by_skill ({skill: [correct, total]}), thoughts (word for word
    right, of those expected), and answers and right (is it?), in order.

    An answer is right if its words and its calls are; thoughts do not decide.
    """
    began = time.perf_counter()
    prompts = [question.ids(tok) for question in questions]
    wanted = [said(question.expected) for question in questions]
    need = [len(tok.encode(question.expected)) + SLACK for question in questions]
    left = [model.config.max_position_embeddings - len(ids) for ids in prompts]
    room = [max(tokens, min(LONGER * tokens, most)) if want.thought or want.calls else tokens
            for tokens, most, want in zip(need, left, wanted)]
    answers = greedy(model, tok, prompts, max_new_tokens=room, batch_size=batch_size,
                     openings=[OPEN_THINK * question.thinks for question in questions])
    by_skill: dict[str, list[int]] = {}
    right, thoughts = [], [0, 0]
    for question, want, got in zip(questions, wanted, map(said, answers)):
        right.append((got.words, got.calls) == (want.words, want.calls))
        tally = by_skill.setdefault(question.skill, [0, 0])
        tally[0] += right[-1]
        tally[1] += 1
        if want.thought:
            thoughts = [thoughts[0] + (got.thought == want.thought), thoughts[1] + 1]
    correct = sum(tally[0] for tally in by_skill.values())
    return {"exact_match": correct / len(questions), "correct": correct, "total": len(questions),
            "seconds": time.perf_counter() - began, "by_skill": dict(sorted(by_skill.items())),
            "thoughts": thoughts, "answers": answers, "right": right}


def report(result: dict) -> str:
    """The result for people: skills, worst first, and files, where there are several, then the score."""
    named = [(name or "(no skill named)", *tally) for name, tally in result["by_skill"].items()]
    named.sort(key=lambda entry: entry[1] / entry[2])
    lines = [f"{right:4d}/{total:<4d} {name}" for name, right, total in named] if len(named) > 1 else []
    right, total = result["thoughts"]
    lines += [f"thoughts word for word as expected, which does not count: {right}/{total}"] if total else []
    sources = result.get("sources", [])
    rows = [*(sources if len(sources) > 1 else []), {"name": "", **result}]
    return "\n".join([*lines, *(f"{row['name']}{': ' * bool(row['name'])}exact match {100 * row['exact_match']:.1f} % "
                                f"({row['correct']}/{row['total']})" for row in rows)])
