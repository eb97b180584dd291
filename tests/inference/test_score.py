"""Score: whole answers by skill, however thoughts and calls are spelled.

    python -m pytest tests/inference/test_score.py
"""

import json

import pytest
import torch

from minimind_ds import MiniMindForCausalLM, ModelConfig, build_sample, collate, load_tokenizer
from minimind_ds.inference import chat, score

pytestmark = pytest.mark.numeric

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=64, max_position_embeddings=256)


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@torch.no_grad()
def knowing(tok, records):
    """A model that gives these answers: the head of a random one is solved for, so that each right token leads by far.

    Trained weights would hang on a processor's rounding, and with them the answers.
    """
    torch.manual_seed(3)
    config = ModelConfig(**TINY, vocab_size=tok.vocab_size, tie_word_embeddings=False)
    model = MiniMindForCausalLM(config, kernels="reference").double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    batch = collate([[build_sample(record, tok, 128) for record in records]], 256)
    seen = []
    hook = model.model.norm.register_forward_hook(lambda module, inputs, hidden_TC: seen.append(hidden_TC))
    model(batch)
    hook.remove()
    labelled = (batch.labels.flatten() != -100).nonzero().flatten()
    hidden_NC, labels_N = seen[0][labelled], batch.labels.flatten()[labelled]
    wanted_NV = 30 * torch.nn.functional.one_hot(labels_N, tok.vocab_size).double()
    model.lm_head.weight.copy_((torch.linalg.pinv(hidden_NC) @ wanted_NV).T)
    logits_NV = model.float()(batch, return_logits=True).logits.flatten(0, 1)[labelled]
    best = logits_NV.topk(2).values
    # In fp32 too, where rounding moves a logit by less than a hundredth.
    assert torch.equal(logits_NV.argmax(-1), labels_N) and (best[:, 0] - best[:, 1]).min() > 20
    return model


def test_score_counts_whole_answers_by_skill(tok, tmp_path):
    pairs = {"hot?": "cold", "cold?": "hot", "你好": "你好！", "up?": "down and out"}
    records = [{"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "skill": "zh" if question == "你好" else "en"} for question, answer in pairs.items()]
    model = knowing(tok, records)
    records[3]["conversations"][1]["content"] = "down"
    path = tmp_path / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    questions = score.read_questions(path)
    result = score.score(chat.as_transformers(model.state_dict(), model.config, torch.float32), tok, questions)
    assert result["answers"] == list(pairs.values())
    assert (result["correct"], result["total"]) == (3, 4) and result["by_skill"] == {"en": [2, 3], "zh": [1, 1]}
    assert score.report(result).endswith("exact match 75.0 % (3/4)")
    assert len(score.read_questions(path, 2)) == 2


CALL = {"name": "clock", "arguments": {"city": "Oslo", "at": [1, True]}}
THINK_OR_CALL = {
    "think block": {"content": "<think>\ntwo and two\n</think>\n\n4"},
    "reasoning": {"content": "4", "reasoning_content": "two and two"},
    "an empty think block": {"content": "<think>\n\n</think>\n\n4"},
    "a call": {"content": "", "tool_calls": [CALL]},
    "words and two calls": {"content": "Wait.", "tool_calls": [{"name": "f", "arguments": {}},
                                                               {"name": "g", "arguments": "[1]"}]},
    "a call written out": {"content": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
    "thoughts and a call": {"content": "", "tool_calls": [CALL], "reasoning_content": "look"},
}


@pytest.mark.parametrize("name", THINK_OR_CALL)
def test_thoughts_and_calls_known_by_heart_score_all(tok, tmp_path, name):
    prompt = [{"role": "user", "content": "Hm?"}]
    record = {"conversations": [*prompt, {"role": "assistant", **THINK_OR_CALL[name]}]}
    model = knowing(tok, [record])
    theirs = chat.as_transformers(model.state_dict(), model.config, torch.float32)
    path = tmp_path / "held.json"
    others = [{"content": "5"}, {"content": "Wait.", "tool_calls": [{**CALL, "arguments": {"city": "Oslo"}}]}]
    records = [record, *({"conversations": [*prompt, {"role": "assistant", **other}]} for other in others)]
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    right, *wrong = score.read_questions(path)
    result = score.score(theirs, tok, [right])
    thinks = "reasoning_content" in THINK_OR_CALL[name] or name == "think block"
    assert (result["exact_match"], result["right"], result["thoughts"]) == (1.0, [True], [thinks, thinks])
    assert score.score(theirs, tok, wrong)["correct"] == 0


@pytest.mark.parametrize("answer, same", [
    ('<tool_call>{"arguments": {"a": 1.0, "b": "x"}, "name": "f"}</tool_call>', True),
    ('<tool_call>\n{"name":"f","arguments":"{\\"a\\":1,\\"b\\":\\"x\\"}"}\n</tool_call>\n', True),
    ('<think>\n\n</think>\n\n<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}}</tool_call>', True),
    ('<tool_call>{"name": "f", "arguments": {"a": true, "b": "x"}}</tool_call>', False),
    ('<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}}', False),
    ('<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}}</tool_call> So.', False),
    ('<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}</tool_call>', False),
    ('<think>\n<tool_call>{"name": "f", "arguments": {"a": 1, "b": "x"}}</tool_call>', False), ("", False)])
def test_calls_are_compared_as_json(answer, same):
    want = score.said('<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>')
    got = score.said(answer)
    assert ((got.words, got.calls) == (want.words, want.calls)) is same
    assert score.said("<think>\na\n</think>\n\n 4 ") == ("a", "4", ())


@pytest.mark.parametrize("line, complaint", [
    ('{"conversations": [{"role": "user", "content": "a"}]}', "line 1: there is no assistant turn"),
    ('{"conversations": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
     "line 1: the last turn is not"),
    ('{"conversations": 3', "line 1: the line is not valid JSON")])
def test_score_names_the_line_of_a_record_it_cannot_use(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        score.read_questions(path)
