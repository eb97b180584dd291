"""The sample data: it is what its program writes, its answers are right, and nothing held out was ever seen.

    python -m pytest tests/test_examples.py
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from minimind_ds import build_sample, load_tokenizer
from minimind_ds.data.conversation import read_records
from minimind_ds.score import read_questions
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


def load_program():
    spec = importlib.util.spec_from_file_location("make_sample_data", EXAMPLES / "make_sample_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sample_data"] = module
    spec.loader.exec_module(module)
    return module


make = load_program()


def lines(name):
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return [record["conversations"] for record in lines("sft_train.jsonl")]


@pytest.fixture(scope="module")
def held():
    return lines("sft_heldout.jsonl")


def prompts(turns):
    """Every prompt of a conversation: what stands before each of the assistant's turns."""
    return [json.dumps(turns[:i], ensure_ascii=False) for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def users(turns):
    return [turn["content"] for turn in turns if turn["role"] == "user"]


def test_the_files_are_what_the_program_writes(tmp_path):
    done = subprocess.run([sys.executable, "examples/make_sample_data.py", "--check"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    stale = subprocess.run([sys.executable, "examples/make_sample_data.py", "--check", "--out", tmp_path], cwd=ROOT,
                           text=True, capture_output=True)
    assert stale.returncode == 1 and "pretrain.jsonl" in stale.stderr


def test_another_seed_writes_other_data_of_the_same_kind(tmp_path):
    subprocess.run([sys.executable, "examples/make_sample_data.py", "--seed", "7", "--out", tmp_path], cwd=ROOT,
                   check=True, capture_output=True)
    for name in ("pretrain.jsonl", "sft_train.jsonl", "sft_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() != (EXAMPLES / name).read_bytes()
    list(read_records(tmp_path / "sft_train.jsonl", "conversations"))


def test_files_are_small_and_read_as_training_reads_them(train, held):
    sizes = [path.stat().st_size for path in EXAMPLES.glob("*.jsonl")]
    assert max(sizes) < 1_000_000 and sum(sizes) < 2_000_000
    assert len(train) > 2500 and 200 < len(held) < 400
    tok = load_tokenizer()
    longest = 0
    for name, kind in (("pretrain.jsonl", "text"), ("sft_train.jsonl", "conversations")):
        for _, item in read_records(EXAMPLES / name, kind):
            longest = max(longest, len(tok.encode(item)) + 2 if kind == "text"
                          else len(build_sample(item, tok, 4096).input_ids))
    # The quickstart's --max_seq_len.
    assert longest <= 128
    assert len(read_questions(EXAMPLES / "sft_heldout.jsonl")) == len(held)


def test_both_languages_several_turns_and_system_prompts_are_there(train):
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in users(turns)[-1]) for turns in train)
    assert 0.3 < chinese / len(train) < 0.7
    assert sum(len(users(turns)) > 1 for turns in train) > 500
    assert sum(turns[0]["role"] == "system" for turns in train) > 300


def test_no_held_out_prompt_was_ever_trained_on(train, held):
    trained = {prompt for turns in train for prompt in prompts(turns)}
    assert not [record for record in held if prompts(record["conversations"])[-1] in trained]
    assert len({prompts(record["conversations"])[-1] for record in held}) == len(held)


def test_no_held_out_question_stands_in_training_or_pretraining_text(train, held):
    asked = {question for turns in train for question in users(turns)}
    text = "\n".join(record["text"] for record in lines("pretrain.jsonl"))
    # What these ask for is in the turns before, so their last words ("And snow?", "Who am I?") are no secret.
    alone = [record for record in held if record["skill"] not in ("follow-up", "told a name", "own name")]
    assert len(alone) > 150
    for record in alone:
        question = users(record["conversations"])[-1]
        assert question not in asked and question not in text, question


def skills_of(question):
    """The skills whose question this is, read off the phrasings."""
    return {skill for skill in make.PHRASINGS if skill not in make.DRAWN for way in (0, 1)
            for fact in make.facts(skill) for phrasing in make.PHRASINGS[skill][way]
            if question == phrasing.format(x=fact[way][0], y=fact[way][1])}


def test_a_held_out_follow_up_was_never_asked_after_a_question_of_its_skill(train, held):
    follow_ups = [record["conversations"] for record in held if record["skill"] == "follow-up"]
    short = {users(turns)[1] for turns in follow_ups}
    seen = {(skill, users(turns)[1]) for turns in train if len(users(turns)) == 2 and users(turns)[1] in short
            for skill in skills_of(users(turns)[0])}
    assert follow_ups and not [turns for turns in follow_ups for skill in skills_of(users(turns)[0])
                               if (skill, users(turns)[1]) in seen]


def test_answers_that_can_be_worked_out_from_the_question_are_right(train, held):
    """By another way than the generator's: from the text alone."""
    right = {r"(\d+) \+ (\d+)": lambda a, b: a + b, r"(\d+) - (\d+)": lambda a, b: a - b,
             r"(?:number after|后一个数.*：) ?(\d+)": lambda n: n + 1}
    checked = 0
    for turns in (*train, *(record["conversations"] for record in held)):
        for question, answer in zip(turns, turns[1:]):
            for pattern, work_out in right.items():
                if question["role"] == "user" and (found := re.search(pattern, question["content"])):
                    assert re.search(r"\d+", answer["content"])[0] == str(work_out(*map(int, found.groups())))
                    checked += 1
    assert checked > 500


def test_every_fact_that_is_asked_for_is_taught_in_another_phrasing(train, held):
    """Held out is a way to ask for a fact, not the fact."""
    taught = {question for turns in train for question in users(turns)}
    checked = 0
    for record in held:
        question, skill = users(record["conversations"])[-1], record["skill"]
        if skill not in make.PHRASINGS or skill in make.DRAWN:
            continue
        fact, way = next((fact, way) for way in (0, 1) for fact in make.facts(skill)
                         if question in ways_to_ask(skill, fact, way))
        assert taught & {*ways_to_ask(skill, fact, way)} - {question}, question
        checked += 1
    assert checked > 80


def ways_to_ask(skill, fact, way):
    return [phrasing.format(x=fact[way][0], y=fact[way][1]) for phrasing in make.PHRASINGS[skill][way]]
