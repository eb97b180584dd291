"""Law 1: a token is labelled because the renderer wrote it as the assistant's, and ids and labels equal MiniMind's.

    python -m pytest tests/data/test_labels.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from minimind_ds.data import IGNORE
from minimind_ds.data.conversation import parse_messages, read_records
from minimind_ds.data.sample import (
    SYSTEM_PROMPTS,
    Augment,
    build_sample,
    build_samples,
    build_text_sample,
    prompt_ids,
    render,
)
from minimind_ds.data.tokenizer import SPECIAL_TOKENS, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
ORIGINAL, GOLDEN, DATA = SHARED / "minimind_tokenizer", SHARED / "golden/sft_labels.jsonl", SHARED / "data"
needs_shared = pytest.mark.skipif(not GOLDEN.is_file(), reason="the folder with MiniMind's tokenizer and goldens is "
                                                               "not here")
TOOL = {"name": "add", "description": "\u52a0 <b>&\"'", "parameters": {"a": [1, 2.5, 1e-07, True, None, {}]}}


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="module", params=["embedded", "original"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours and the one transformers makes of its folder: chat templates are run by transformers."""
    from transformers import AutoTokenizer

    if request.param == "original":
        if not ORIGINAL.is_dir():
            pytest.skip("the original tokenizer's folder is not here")
        return load_tokenizer(ORIGINAL), AutoTokenizer.from_pretrained(ORIGINAL, trust_remote_code=False)
    folder = tmp_path_factory.mktemp("hf")
    load_tokenizer().save_hf(folder)
    return load_tokenizer(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def template_text(theirs, turns: list[dict], **options) -> str:
    """What transformers makes of turns whose tools and calls may be JSON text, as they are in MiniMind's files."""
    turns, tools = [dict(turn) for turn in turns], None
    for turn in turns:
        if turn["role"] == "system" and turn.get("tools"):
            tools = turn["tools"] if isinstance(turn["tools"], list) else json.loads(turn["tools"])
        if isinstance(turn.get("tool_calls"), str):
            turn["tool_calls"] = json.loads(turn["tool_calls"])
    return theirs.apply_chat_template(turns, tokenize=False, tools=tools, **options)


def searched_labels(ids: list[int], opening: list[int], closing: list[int]) -> list[int]:
    """MiniMind's labels, shifted, found its way: from each opening to the closing after it, in the ids alone."""
    labels, inside, since = [IGNORE] * len(ids), False, 0
    for i, token in enumerate(ids):
        if inside:
            labels[i] = token
            inside = not (i + 1 - since >= len(closing) and ids[i + 1 - len(closing):i + 1] == closing)
        elif ids[max(0, i + 1 - len(opening)):i + 1] == opening:
            inside, since = True, i + 1
    return labels[1:] + [IGNORE]


def random_turns(dice: random.Random) -> list[dict]:
    """Turns in any order, free of control tokens but for the assistant's own think and tool_call marks."""
    words = ["", "a", " b ", "\n", "\n\nlead", "trail\n\n", "\u4f60\u597d\uff0c", "12 + 3", "\t", "x\n\ny", "<b>",
             "\U0001f600", "assistant\n", "</tools>", "  ", "{}", "\"q\"", "\\n"]
    marks = ["<think>\nhm\n</think>\n\n", "</think>", "<think>", "<tool_call>\n{}\n</tool_call>",
             "<think>\n\n</think>"]

    def text(more=()) -> str:
        return "".join(dice.choice(words + list(more)) for _ in range(dice.randint(0, 5)))

    def call() -> dict:
        arguments = dice.choice([{}, {"x": text()}, {"\u00e9": [1, 2.0, None]}, "{\"raw\":1}", "[]", [], "null"])
        function = {"name": dice.choice(["f", "\u52a0"]), "arguments": arguments}
        return {"type": "function", "function": function} if dice.random() < 0.5 else function

    turns = []
    for _ in range(dice.randint(1, 7)):
        role = dice.choice(["user", "assistant", "assistant", "tool", "tool", "system"])
        turn = {"role": role, "content": text(marks if role == "assistant" else ())}
        if role == "system" and dice.random() < 0.4:
            turn["tools"] = dice.choice([[TOOL], [TOOL, {"type": "function", "function": TOOL}], json.dumps([TOOL])])
        if role == "assistant" and dice.random() < 0.3:
            turn["reasoning_content"] = text(marks)
        if role == "assistant" and dice.random() < 0.4:
            calls = [call() for _ in range(dice.randint(1, 3))]
            turn["tool_calls"] = dice.choice([calls, json.dumps(calls)])
        turns.append(turn)
    return [*turns, {"role": "assistant", "content": text(marks)}]


HAND_WRITTEN = [
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
     "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nhello<|im_end|>\n"),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "q"},
      {"role": "assistant", "content": "\n\na", "reasoning_content": "\nwhy\n"}],
     "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
     "<|im_start|>assistant\n<think>\nwhy\n</think>\n\na<|im_end|>\n"),
    ([{"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}],
     "<|im_start|>assistant\n<think>\nx\n</think>\n\ny<|im_end|>\n"),
    ([{"role": "assistant", "content": "so", "tool_calls": [{"name": "f", "arguments": {"k": "\u4f60"}},
                                                            {"name": "g", "arguments": "{}"}]},
      {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "assistant", "content": ""}],
     '<|im_start|>assistant\n<think>\n\n</think>\n\nso\n<tool_call>\n{"name": "f", "arguments": {"k": "\u4f60"}}\n'
     '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
     "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
     "<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n"),
]


@needs_shared
def test_ids_and_labels_equal_the_goldens_token_for_token():
    tok = load_tokenizer(ORIGINAL)
    lines: dict[str, list[str]] = {}
    goldens = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert {golden["max_length"] for golden in goldens} == {256, 768}
    for golden in goldens:
        name = golden["file"]
        if name not in lines:
            lines[name] = (DATA / name).read_text(encoding="utf-8").split("\n")
        sample = build_sample(json.loads(lines[name][golden["line"]]), tok, golden["max_length"])
        assert sample.input_ids.tolist() == golden["input_ids"]
        assert sample.labels.tolist() == golden["labels"][1:] + [IGNORE]
        assert sample.input_ids.dtype == sample.labels.dtype == torch.int64


@needs_shared
@pytest.mark.parametrize("name", ["sft_gsm8k", "sft_instruct_en_zh", "sft_tools_en_zh"])
def test_every_real_record_equals_the_chat_template_and_searched_labels(name, pair):
    tok, theirs = pair
    path = DATA / f"{name}.jsonl"
    turns = [json.loads(line)["conversations"] for line in path.read_bytes().splitlines()]
    conversations = [conversation for _, conversation in read_records(path, "conversations")]
    # The largest file is regular; a part of it keeps the test short.
    turns, conversations = turns[:2500], conversations[:2500]
    ids = theirs([template_text(theirs, turn) for turn in turns]).input_ids
    opening, closing = (theirs(text).input_ids for text in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    for want, got in zip(ids, build_samples(conversations, tok, 768), strict=True):
        want = want[:768]
        assert (got.ids, got.labels) == (want, searched_labels(want, opening, closing))


def test_random_conversations_equal_the_chat_template_and_searched_labels(pair):
    tok, theirs = pair
    dice = random.Random(3)
    opening, closing = (theirs(text).input_ids for text in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    for number in range(800):
        turns = random_turns(dice)
        text = template_text(theirs, turns)
        conversation = parse_messages(turns)
        assert "".join(piece.text for piece in render(conversation)) == text
        want = theirs(text).input_ids
        max_len = dice.choice([10, 64, 4096])
        sample = build_sample(conversation, tok, max_len)
        assert sample.input_ids.tolist() == want[:max_len], number
        assert sample.labels.tolist() == searched_labels(want[:max_len], opening, closing), number


def test_chat_prompts_equal_the_chat_template(pair):
    tok, theirs = pair
    dice = random.Random(4)
    for _ in range(150):
        turns = random_turns(dice)[:-1]
        for open_thinking in (False, True):
            text = template_text(theirs, turns, add_generation_prompt=True, open_thinking=open_thinking)
            assert prompt_ids(turns, tok, open_thinking=open_thinking) == theirs(text).input_ids


@pytest.mark.parametrize("turns, text", HAND_WRITTEN)
def test_the_chat_format_written_out(turns, text, pair):
    assert "".join(piece.text for piece in render(parse_messages(turns))) == text
    assert template_text(pair[1], turns) == text


def test_policies_and_fates(tok):
    record = {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}]}
    whole = build_sample(record, tok, 999)
    length = len(whole.input_ids)
    answer = whole.labels.tolist().index(next(i for i in whole.labels.tolist() if i != IGNORE))
    assert whole.fate == build_sample(record, tok, length, policy="drop").fate == "whole"
    for max_len in range(2, length):
        cut = build_sample(record, tok, max_len)
        assert torch.equal(cut.input_ids, whole.input_ids[:max_len])
        assert torch.equal(cut.labels[:-1], whole.labels[:max_len - 1]) and cut.labels[-1] == IGNORE
        assert cut.fate == ("cut" if max_len - 1 > answer else "unlabelled")
        dropped = build_sample(record, tok, max_len, policy="drop")
        assert dropped.fate == "dropped" and dropped.input_ids.shape == dropped.labels.shape == (0,)
    for build in (lambda **options: build_sample(record, tok, **options),
                  lambda **options: build_text_sample("a", tok, **options)):
        with pytest.raises(ValueError, match="policy is 'keep'"):
            build(max_len=9, policy="keep")
        with pytest.raises(ValueError, match="max_len is 1"):
            build(max_len=1)


def test_pretraining_text_stands_between_bos_and_eos_and_all_of_it_is_learnt(tok):
    text = "A few words, <|im_end|> among them."
    ids = tok.encode(text)
    sample = build_text_sample(text, tok, 999)
    assert sample.input_ids.tolist() == [tok.bos_id, *ids, tok.eos_id]
    assert sample.labels.tolist() == [*ids, tok.eos_id, IGNORE] and sample.fate == "whole"
    cut = build_text_sample(text, tok, 7)
    assert cut.input_ids.tolist() == [tok.bos_id, *ids[:5], tok.eos_id] and cut.fate == "cut"
    assert cut.labels.tolist() == [*ids[:5], tok.eos_id, IGNORE]
    assert build_text_sample(text, tok, len(ids) + 2, policy="drop").fate == "whole"
    assert build_text_sample(text, tok, len(ids) + 1, policy="drop").fate == "dropped"


@needs_shared
def test_pretraining_samples_equal_minimind_on_real_text():
    from transformers import AutoTokenizer

    tok, theirs = load_tokenizer(ORIGINAL), AutoTokenizer.from_pretrained(ORIGINAL)
    for _, text in list(read_records(DATA / "pretrain_en.jsonl", "text"))[:60]:
        ids = theirs(text, add_special_tokens=False, max_length=510, truncation=True).input_ids
        sample = build_text_sample(text, tok, 512)
        assert sample.input_ids.tolist() == [1, *ids, 2] and sample.labels.tolist() == [*ids, 2, IGNORE]


def test_many_samples_at_once_equal_each_alone(tok):
    dice = random.Random(8)
    items = [dice.choice([parse_messages(random_turns(dice)), {"messages": random_turns(dice)}, "some text", ""])
             for _ in range(300)]
    for policy in ("cut", "drop"):
        for augment in (None, Augment(seed=1, epoch=2)):
            many = build_samples(items, tok, 40, policy=policy, augment=augment, indices=range(17, 17 + len(items)))
            for i, (item, got) in enumerate(zip(items, many, strict=True)):
                alone = (build_text_sample(item, tok, 40, policy=policy) if isinstance(item, str) else
                         build_sample(item, tok, 40, policy=policy, augment=augment, index=17 + i))
                assert (got.ids, got.labels, got.fate) == (
                    alone.input_ids.tolist(), alone.labels.tolist(), alone.fate)
    assert build_samples([], tok, 40) == []


def test_random_touches_depend_on_seed_epoch_and_index_only_and_have_their_ratios():
    plain = parse_messages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])

    def choices(seed: int, epoch: int, **options) -> list:
        return [Augment(seed=seed, epoch=epoch, **options).choose(plain, index) for index in range(2000)]

    chosen = choices(1, 0)
    assert chosen == choices(1, 0) and chosen != choices(1, 1) and chosen != choices(2, 0)
    systems = [conversation.messages[0].content for conversation, _ in chosen
               if conversation.messages[0].role == "system"]
    assert 0.17 < len(systems) / 2000 < 0.23 and set(systems) == set(SYSTEM_PROMPTS)
    assert 0.77 < sum(drop for _, drop in chosen) / 2000 < 0.83
    assert all(choice == (plain, False) for choice in choices(1, 0, system_ratio=0.0, drop_empty_think=0.0))
    tools = parse_messages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [TOOL])
    system = parse_messages([{"role": "system", "content": ""}, *({"role": "assistant", "content": "a"},)])
    always = Augment(seed=1, epoch=0, system_ratio=1.0)
    assert all(always.choose(given, i)[0] is given for given in (tools, system) for i in range(50))


def test_an_empty_think_block_can_be_left_out_and_a_full_one_stays(tok):
    def learnt(augment, **fields) -> str:
        record = {"conversations": [{"role": "user", "content": "<think>\n\n</think>\n\n"},
                                    {"role": "assistant", "content": "  a", **fields}]}
        sample = build_sample(record, tok, 99, augment=augment)
        assert "<think>\n\n</think>\n\n<|im_end|>" in tok.decode(sample.input_ids)
        return tok.decode(i for i in sample.labels.tolist() if i != IGNORE)

    bare = Augment(seed=0, epoch=0, system_ratio=0.0, drop_empty_think=1.0)
    assert learnt(None) == "<think>\n\n</think>\n\n  a<|im_end|>\n"
    # The label starts exactly where the answer does, in the middle of plain text.
    assert learnt(bare) == "  a<|im_end|>\n"
    assert learnt(bare, reasoning_content="hm") == "<think>\nhm\n</think>\n\n  a<|im_end|>\n"


def test_a_tokenizer_without_think_and_tool_tokens_gets_them_as_text(tmp_path):
    tok = load_tokenizer()
    tok.save_hf(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_bytes())
    spec["added_tokens"] = spec["added_tokens"][:3]
    for token in SPECIAL_TOKENS[3:]:
        spec["model"]["vocab"][f"unused {token}"] = spec["model"]["vocab"].pop(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    old = load_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a <tool_call>"}]
    sample = build_sample({"messages": turns}, old, 999)
    text = "".join(piece.text for piece in render(parse_messages(turns)))
    assert old.decode(sample.input_ids) == text
    assert [i for i in sample.input_ids.tolist() if i < 36] == [1, 2, 1, 2]
    # One string, as the library would see it, from the label's start to the control token.
    answer = old.encode("<think>\n\n</think>\n\na <tool_call>")
    assert [i for i in sample.labels.tolist() if i != IGNORE] == [*answer, 2, *old.encode("\n")]
    assert prompt_ids(turns[:1], old)[-len(old.encode("assistant\n<think>\n\n</think>\n\n")):] == old.encode(
        "assistant\n<think>\n\n</think>\n\n")


def test_bad_chat_messages_are_one_clear_error(tok):
    for messages, why in [([], "empty"), ([{"role": "bot", "content": ""}], "role 'bot'"), (["hi"], "not an object"),
                          ([{"role": "user", "content": "\ud800"}], "not valid Unicode")]:
        with pytest.raises(ValueError, match=why):
            prompt_ids(messages, tok)
