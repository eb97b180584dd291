"""The sample data: it is what its program writes, its answers are right, and nothing held out was ever seen.

The examples' YAMLs train.

    python -m pytest tests/programs/test_examples.py
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from minimind_ds import build_sample, load_tokenizer, programs
from minimind_ds.config.run import parse_run_config
from minimind_ds.data.conversation import read_records
from minimind_ds.inference.score import read_questions
from tests.conftest import ROOT
from tests.distributed.ranks.examples import ORDER

EXAMPLES = ROOT / "examples"
DATA = [f"examples/{path.name}" for path in EXAMPLES.glob("*.jsonl")]


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


def asked_fact(text):
    """The (fact, language) that a question asks for, read off the frames; None for any other text."""
    return ASKED.get(text)


ASKED = {question.text: (question.fact, question.language) for question in make.all_questions()}


def test_a_held_out_follow_up_was_never_asked_after_a_question_of_its_skill(train, held):
    follow_ups = [record["conversations"] for record in held if record["skill"] == "follow-up"]
    seen = {(asked_fact(users(turns)[0])[0].skill, users(turns)[1]) for turns in train
            if len(users(turns)) == 2 and asked_fact(users(turns)[0])}
    assert len(follow_ups) == 20
    for turns in follow_ups:
        assert (asked_fact(users(turns)[0])[0].skill, users(turns)[1]) not in seen


def test_every_answer_is_the_facts_own_unless_a_system_prompt_rules_the_language(train, held):
    checked = ruled = 0
    for turns in (*train, *(record["conversations"] for record in held)):
        rule = next((i for i in (0, 1) if turns[0]["content"] in make.ANSWER_IN[i]), None)
        for question, answer in zip(turns, turns[1:]):
            if question["role"] == "user" and asked_fact(question["content"]):
                fact, language = asked_fact(question["content"])
                assert answer["content"] == fact.answer[language if rule is None else rule]
                checked, ruled = checked + 1, ruled + (rule not in (None, language))
    assert checked > 3000 and ruled > 100


def test_facts_worked_out_another_way_are_right():
    """Opposites go both ways, days follow each other, translations come back, colours are colours."""
    facts = {(fact.skill, fact.about[i], i): fact.answer[i] for fact in make.all_facts() for i in (0, 1)}
    back = {"opposite": "opposite", "day after": "day before", "to Chinese": "to English"}
    for (skill, about, i), answer in facts.items():
        if skill in back:
            assert facts[back[skill], answer, i] == about
        if skill == "colour":
            assert facts["kind", answer, i] == ("colour", "颜色")[i]


def test_every_fact_and_every_frame_that_is_asked_for_is_taught(train, held):
    """Held out is a frame around a fact, neither the frame nor the fact."""
    taught = [asked_fact(question) for turns in train for question in users(turns) if asked_fact(question)]
    for record in held:
        question = users(record["conversations"])[-1]
        if asked_fact(question):
            assert taught.count(asked_fact(question)) >= 3, question


def test_every_yaml_trains(tmp_path, deepspeed):
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*ORDER, "quickstart"}
    deepspeed(2, "tests/distributed/ranks/examples.py", str(tmp_path))
    for name in ORDER:
        steps = [json.loads(line).get("step") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        # Stopped after one, and gone on with at another stage.
        assert max(step or 0 for step in steps) == (1 if name == "sft" else 2), name
        assert (tmp_path / name / "DONE").exists() == (name != "sft")


@pytest.mark.parametrize("name", [*ORDER, "quickstart"])
def test_a_yaml_begins_with_the_command_that_takes_it_and_finds_its_files(name, monkeypatch):
    comment = [line for line in (EXAMPLES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    command = f"launch/{'pretrain' if name == 'pretrain' else 'sft'}.py --config examples/{name}.yaml"
    assert name == "quickstart" or any(command in line for line in comment)
    monkeypatch.chdir(ROOT)
    words = ["--config", f"examples/{name}.yaml", "--from_weight", "a_bare_name"]
    programs.check_flags("pretrain" if name == "pretrain" else "sft", words, chooses=name == "quickstart")
    run = parse_run_config(words, "sft", {})
    assert run.save_dir.startswith("out") and run.data_path in (None, *DATA)
