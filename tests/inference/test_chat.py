"""Chat and score: the same prompt as in training, the same tokens as an argmax loop, and only whole characters.

    python -m pytest tests/inference/test_chat.py
"""

import io
import json
import subprocess
import sys

import pytest
import torch

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, build_sample, collate, load_tokenizer
from minimind_ds.convert import weight_files as files
from minimind_ds.data.sample import prompt_ids
from minimind_ds.inference import chat, score
from tests.conftest import ROOT, environment
from tests.waiting import HANG_S

pytestmark = pytest.mark.numeric

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=64, max_position_embeddings=256)
KINDS = {"dense": {}, "moe": dict(use_moe=True, moe_intermediate_size=32, num_experts_per_tok=2),
         "llama": dict(qk_norm=False)}


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


def tiny(tok, **changes):
    """A random model with large weights, so that its answers differ from prompt to prompt."""
    torch.manual_seed(7)
    model = MiniMindForCausalLM(ModelConfig(**TINY, vocab_size=tok.vocab_size, **changes), kernels="reference")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model.eval()


def state_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def run_folder(model, tok, folder):
    folder.mkdir(exist_ok=True)
    tok.save(folder / "tokenizer")
    files.save_safetensors(folder / files.file_name("sft", model.config), state_of(model), model.config)
    return folder


@pytest.fixture(scope="module")
def dense(tok):
    return tiny(tok)


@pytest.fixture(scope="module")
def folder(dense, tok, tmp_path_factory):
    return run_folder(dense, tok, tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def loaded(folder):
    return chat.load_model(str(folder))[0]


@torch.no_grad()
def argmax_loop(model, ids, steps, eos):
    """The plainest decoding: our own model over the whole text again for each token, each ahead by a clear margin."""
    new = []
    while len(new) < steps and eos not in new:
        text = torch.tensor([*ids, *new])
        batch = collate([[Sample(text, torch.full_like(text, -100))]], len(text))
        best = model(batch, return_logits=True).logits[0, -1].topk(2)
        # Rounding moves logits of this size by 1e-5.
        assert best.values[0] - best.values[1] > 1e-2
        new.append(int(best.indices[0]))
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_our_own_models_argmax_token_by_token(tok, tmp_path, kind):
    model = tiny(tok, **KINDS[kind])
    theirs, _ = chat.load_model(str(run_folder(model, tok, tmp_path / "run")))
    ids = prompt_ids([{"role": "user", "content": "你好, which is larger?"}], tok)
    stream = chat.Stream(tok, lambda text: None)
    chat.generate(theirs, tok, ids, chat.Sampling(temperature=0, max_new_tokens=12), stream)
    assert stream.ids == argmax_loop(model, ids, 12, tok.eos_id)


def test_answers_in_a_batch_are_those_given_alone(tok, dense, loaded):
    prompts = [prompt_ids([{"role": "user", "content": text}], tok) for text in ("a", "Opposite of hot?", "你好" * 9)]
    together = score.greedy(loaded, tok, prompts, max_new_tokens=[6, 6, 6], batch_size=2)
    for ids, answer in zip(prompts, together):
        new = argmax_loop(dense, ids, 6, tok.eos_id)
        new = new[:new.index(tok.eos_id)] if tok.eos_id in new else new
        assert answer == chat.visible(tok.decode(new, skip_special=True), final=True)


def test_a_chat_is_rendered_as_its_training_record_would_be(tok, loaded):
    talk = chat.Chat(loaded, tok, chat.Sampling(max_new_tokens=8), system="你是Nova。", history=2)
    talk.turns = [("left out", "x"), ("What is 3 + 4?", "7"), ("And 4 + 4?", "8 <|im_end|>")]
    record = [{"role": "system", "content": "你是Nova。"}]
    for question, answer in talk.turns[1:]:
        record += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    record += [{"role": "user", "content": "<|im_start|>assistant"}, {"role": "assistant", "content": "yes"}]
    ids = talk.prompt("<|im_start|>assistant")
    assert ids == prompt_ids(record[:-1], tok)
    sample = build_sample({"conversations": record}, tok, 256)
    assert ids == sample.input_ids[:len(ids)].tolist()


def test_history_keeps_n_turns_and_zero_keeps_none(tok, loaded):
    talk = chat.Chat(loaded, tok, chat.Sampling(temperature=0, max_new_tokens=3), history=0)
    for question in ("one", "two", "three"):
        talk.ask(question, lambda text: None)
    assert [q for q, _ in talk.turns] == ["one", "two", "three"]
    assert talk.prompt("four") == prompt_ids([{"role": "user", "content": "four"}], tok)
    talk.history = 2
    asked = [m["content"] for m in talk.messages("four", 2) if m["role"] == "user"]
    assert asked == ["two", "three", "four"] and talk.prompt("four") == prompt_ids(talk.messages("four", 2), tok)


def test_the_oldest_turns_make_room_and_a_question_too_long_is_refused(tok, loaded):
    talk = chat.Chat(loaded, tok, chat.Sampling(max_new_tokens=100), history=8)
    talk.turns = [("word " * 40, "yes")] * 6
    assert 100 < len(talk.prompt("hot?")) <= 156
    with pytest.raises(ValueError, match="room for 156"):
        talk.prompt("word " * 400)


def test_characters_of_several_tokens_are_written_whole(tok):
    text = "é 🦙 龘 ok \N{REPLACEMENT CHARACTER}!"
    ids = tok.encode(text)
    assert len(ids) > len(text.split())
    written = []
    stream = chat.Stream(tok, written.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for i in (*ids, tok.eos_id):
        stream.put(torch.tensor([i]))
    stream.end()
    assert "".join(written) == stream.text == text
    assert any("🦙" in part for part in written) and len(written) > 5


def test_a_broken_last_character_still_shows_at_the_end(tok):
    written = []
    stream = chat.Stream(tok, written.append)
    stream.put(torch.tensor([[1]]))
    for i in tok.encode("🦙")[:2]:
        stream.put(torch.tensor([i]))
    assert not written
    stream.end()
    assert "".join(written) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("said, shown", [
    ("<think>\n\n</think>\n\n7", "7"), ("\n</think>\n\n7", "7"), ("7", "7"), ("<think>\nwell\n</think>\n\n7", None),
    ("<thin", None), ("a <think>\n\n</think>", None), ("", ""), ("</think>", "")])
def test_an_empty_think_block_is_hidden_and_nothing_else(opening, said, shown):
    whole = said if said.startswith("<think>") else opening + said
    expected = whole if shown is None else shown
    if opening and shown == said:
        expected = whole
    assert chat.visible(whole, final=True) == expected
    # However it is cut, what is shown only ever grows.
    for cut in range(len(whole)):
        assert expected.startswith(chat.visible(whole[:cut]))


def test_a_stopped_answer_stays_in_the_history(tok, loaded):
    talk = chat.Chat(loaded, tok, chat.Sampling(temperature=0, max_new_tokens=50))
    written = []

    def write(text):
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("hot?", write)
    assert talk.turns[0][0] == "hot?" and talk.turns[0][1].startswith("".join(written[:3]))


def test_conversation_commands(tok, loaded, capsys):
    talk = chat.Chat(loaded, tok, chat.Sampling(temperature=0, max_new_tokens=4))
    lines = iter(["hot?", "", "/clear", "warm?", "/reset", "/help", "/hlep", "cold?", "x " * 400, "/exit", "late?"])

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    chat.converse(talk, read)
    assert [q for q, _ in talk.turns] == ["cold?"]
    out, err = capsys.readouterr()
    assert err.count("tokens/s]") == 3 and "error: the question takes" in err
    # At the start, when asked for, and for a word that is no command.
    assert err.count(chat.COMMANDS) == 3 and err.count("[forgotten]") == 2
    assert out.count("\n") >= 2


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_leaves_the_second_time(tok, loaded, capsys):
    talk = chat.Chat(loaded, tok, chat.Sampling(temperature=0, max_new_tokens=4))
    lines = iter([None, "hot?", None, None, "late?"])

    def read(prompt):
        line = next(lines)
        if line is None:
            raise KeyboardInterrupt
        return line

    chat.converse(talk, read)
    assert [q for q, _ in talk.turns] == ["hot?"] and next(lines) == "late?"
    assert capsys.readouterr().err.count(f"\n{chat.LEAVE}\n") == 2


def test_the_same_seed_draws_the_same_answer(tok, loaded):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        talk = chat.Chat(loaded, tok, chat.Sampling(temperature=1.5, top_k=50, max_new_tokens=12))
        texts.append(talk.ask("hot?", lambda text: None).ids)
    assert texts[0] == texts[1] != texts[2]


def test_ids_beyond_the_tokenizer_are_never_drawn(tok):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(ModelConfig(**TINY, vocab_size=tok.vocab_size + 4096), kernels="reference")
    theirs = chat.as_transformers(state_of(model), model.config, torch.float32)
    stream = chat.Stream(tok, lambda text: None)
    chat.generate(theirs, tok, [1, 5, 6], chat.Sampling(temperature=5.0, max_new_tokens=40), stream)
    assert max(stream.ids) < tok.vocab_size


def test_raw_text_goes_on_after_the_begin_token_alone(tok, dense, loaded):
    talk = chat.Chat(loaded, tok, chat.Sampling(temperature=0, max_new_tokens=6), raw=True)
    text = "<|im_start|>Opposite of hot?"
    ids = [tok.bos_id, *tok.encode(text)]
    assert talk.prompt(text) == ids
    written = []
    stream = talk.ask(text, written.append)
    assert stream.ids == argmax_loop(dense, ids, 6, tok.eos_id) and not talk.turns
    assert "".join(written) == stream.text
    # An empty think block is text like any other.
    written.clear()
    stream = chat.Stream(tok, written.append, raw=True)
    stream.put(torch.tensor([1]))
    for i in (*tok.encode("\n"), tok.special_id("</think>"), *tok.encode(" x")):
        stream.put(torch.tensor([i]))
    stream.end()
    assert "".join(written) == stream.text == "\n</think> x"
    with pytest.raises(ValueError, match="the text takes"):
        talk.prompt("word " * 400)


def program(name, *words, stdin=""):
    return subprocess.run([sys.executable, f"launch/{name}.py", *map(str, words)], cwd=ROOT, env=environment(),
                          input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=HANG_S)


def test_programs_answer_converse_and_score(folder):
    one = program("chat", "--weight", folder, "--prompt", "你好", "--max_new_tokens", 8, "--temperature", 0)
    assert one.returncode == 0 and one.stdout.strip() and "tokens/s]" in one.stderr, one.stderr
    file = next(folder.glob("*.safetensors"))
    several = program("chat", "--weight", file, "--max_new_tokens", 8, "--temperature", 0, stdin="你好\n/exit\n")
    assert several.returncode == 0 and several.stdout == one.stdout, several.stderr
    scored = program("score", "--weight", folder, "--data_path", "examples/sft_heldout.jsonl", "--limit", 5, "--json")
    assert scored.returncode == 0, scored.stderr
    # Through a pipe, too, what takes seconds is said before.
    assert one.stderr.startswith("chat: loading PyTorch and the weights …\n")
    assert scored.stderr.startswith("score: loading PyTorch and the weights …\nanswering 5 questions …\n")
    lines = scored.stdout.splitlines()
    assert json.loads(lines[-1])["total"] == 5 and lines[-2].startswith("exact match ")


def test_a_users_mistakes_are_one_line_each(folder, tok, dense, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    two = run_folder(dense, tok, tmp_path / "two")
    files.save_safetensors(two / "other_32.safetensors", state_of(dense), dense.config)
    bare = run_folder(dense, tok, tmp_path / "bare")
    (bare / "tokenizer" / "tokenizer.model").rename(bare / "moved.model")
    (bare / "tokenizer").rmdir()
    small = tiny(tok)
    small_config = ModelConfig(**TINY, vocab_size=300)
    other = tmp_path / "other"
    tok.save(other / "tokenizer")
    cut = {**state_of(small), "model.embed_tokens.weight": small.model.embed_tokens.weight[:300]}
    files.save_safetensors(other / "sft_32.safetensors", cut, small_config)
    torn = run_folder(dense, tok, tmp_path / "torn")
    weight = torn / "sft_32.safetensors"
    weight.write_bytes(weight.read_bytes()[:1000])
    cases = [(["--weight", tmp_path / "nowhere"], "no such file or folder"), (["--weight", empty], "holds no"),
             (["--weight", two], "several weights"), (["--weight", bare], "no tokenizer"),
             (["--weight", other], "weights of another tokenizer"), (["--weight", torn], "not a readable"),
             (["--weight", folder, "--raw", "--system", "S"], "--system belongs to the chat format"),
             (["--weight", folder, "--temperature", "-1"], "--temperature is -1"),
             (["--weight", folder, "--device", "nonsense"], "--device nonsense"),
             (["--weight", folder, "--max_new_tokens", "8000"], "there is room for 0"), ([], "--weight is missing")]
    for words, complaint in cases:
        assert chat.main([*map(str, words), "--prompt", "hi"]) == 2
        err = capsys.readouterr().err
        assert complaint in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    chat.say("héllo")
    assert screen.buffer.getvalue() == b"h?llo"
