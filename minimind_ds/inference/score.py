"""Exact match: how many held-out questions a model answers word for word, overall and by skill.

The last assistant turn of each record is the expected answer, everything before it the prompt.  Answers are greedy,
so the same weights always score the same.

    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minimind_ds.config.errors import UserError
from minimind_ds.data.conversation import Conversation, DataError, read_records
from minimind_ds.data.sample import prompt_ids
from minimind_ds.data.tokenizer import Tokenizer
from minimind_ds.inference.chat import Sampling, visible

# Room beyond the expected answer's tokens: the stop token, and enough to see that an answer goes on.
SLACK = 4


@dataclass(frozen=True)
class Question:
    """One record: the conversation up to the answer, the answer, and the record's "skill" ("" if it names none)."""

    prompt: Conversation
    expected: str
    skill: str

    def ids(self, tok: Tokenizer) -> list[int]:
        """The prompt's token ids, ready for the assistant to go on."""
        turns = []
        for message in self.prompt.messages:
            turn = {"role": message.role, "content": message.content, "reasoning_content": message.reasoning}
            if message.tool_calls:
                turn["tool_calls"] = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
            turns.append(turn)
        return prompt_ids(turns, tok, tools=f"[{', '.join(self.prompt.tools)}]" if self.prompt.tools else None)


def read_questions(path: str | Path, limit: int = 0) -> list[Question]:
    """The first `limit` records of a conversation file (0: all).

    Raises:
        DataError: what read_records refuses, or a record that does not end with the assistant.
    """
    questions = []
    for number, conversation in read_records(path, "conversations"):
        last = conversation.messages[-1]
        if last.role != "assistant" or len(conversation.messages) < 2:
            raise DataError(f"{path} line {number}: the last turn is not an assistant's answer to anything")
        prompt = replace(conversation, messages=conversation.messages[:-1])
        questions.append(Question(prompt, last.content, ""))
        if len(questions) == limit:
            break
    with Path(path).open("rb") as file:
        records = (json.loads(line.removeprefix(b"\xef\xbb\xbf")) for line in file if line.strip())
        return [replace(question, skill=str(record.get("skill", ""))) for question, record in zip(questions, records)]


def greedy(model: PreTrainedModel, tok: Tokenizer, prompts: Sequence[list[int]], *, max_new_tokens: Sequence[int],
           batch_size: int = 64) -> list[str]:
    """Greedy answers to many prompts, in their order.

    Prompts of like length go together, padded on the left.

    Args:
        prompts: token ids, as prompt_ids gives them.
        max_new_tokens: the most tokens of each answer; a batch takes its largest.

    Raises:
        ValueError: a prompt and its answer that are longer than the model's longest text.
    """
    assert len(prompts) == len(max_new_tokens)
    longest = model.config.max_position_embeddings
    for number, (ids, room) in enumerate(zip(prompts, max_new_tokens), 1):
        if len(ids) + room > longest:
            raise UserError(f"prompt {number} takes {len(ids)} tokens and its answer {room}; the model holds "
                             f"{longest}")
    answers = [""] * len(prompts)
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
            ids = ids[:ids.index(tok.eos_id)] if tok.eos_id in ids else ids
            answers[i] = visible(tok.decode(ids, skip_special=True), final=True)
    return answers


def score(model: PreTrainedModel, tok: Tokenizer, questions: Sequence[Question], *, batch_size: int = 64) -> dict:
    """exact_match (0 to 1), correct, total, seconds, by_skill ({skill: [correct, total]}) and answers, in order.

    White space around an answer does not count.
    """
    began = time.perf_counter()
    prompts = [question.ids(tok) for question in questions]
    room = [len(tok.encode(question.expected)) + SLACK for question in questions]
    answers = greedy(model, tok, prompts, max_new_tokens=room, batch_size=batch_size)
    by_skill: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers):
        tally = by_skill.setdefault(question.skill, [0, 0])
        tally[0] += answer.strip() == question.expected.strip()
        tally[1] += 1
    correct = sum(tally[0] for tally in by_skill.values())
    return {"exact_match": correct / len(questions), "correct": correct, "total": len(questions),
            "seconds": time.perf_counter() - began, "by_skill": dict(sorted(by_skill.items())), "answers": answers}


def report(result: dict) -> str:
    """The result for people: skills, worst first where there are several, then the score."""
    named = [(name or "(no skill named)", *tally) for name, tally in result["by_skill"].items()]
    named.sort(key=lambda entry: entry[1] / entry[2])
    lines = [f"{right:4d}/{total:<4d} {name}" for name, right, total in named] if len(named) > 1 else []
    return "\n".join([*lines, f"exact match {100 * result['exact_match']:.1f} % "
                               f"({result['correct']}/{result['total']})"])
