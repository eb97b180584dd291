"""What was trained is what speaks (DESIGN law 10): a folder's own end token and template do not get in between."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minimind_ds import load_tokenizer
from minimind_ds.convert import export, weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.data.hf_folder import chat_template
from minimind_ds.inference import chat, score
from tests.inference.test_score import knowing

pytestmark = pytest.mark.numeric

QUESTION = [{"role": "user", "content": "Say it."}]
ANSWER = "It, and no more."
# As a base model without a chat ships it: another end token, no begin token, a template that adds words.
BASE = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template":
        "<|im_start|>system\nYou are Robin.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    load_tokenizer().save_hf(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | BASE))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run folder of a model that knows its one answer by heart."""
    folder, tok = tmp_path_factory.mktemp("run"), load_tokenizer(base)
    model = knowing(tok, [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}])
    tok.save(folder / "tokenizer")
    weight_files.save_safetensors(folder / weight_files.file_name("sft", model.config), model.state_dict(),
                                  model.config, Vocabulary.of(tok).to_json())
    return folder


def test_chat_and_score_stop_where_the_answer_ends_whatever_the_folder_s_end_token_is(run, tmp_path):
    model, tok = chat.load_model(str(run))
    assert tok.eos_id == tok.special_id("<|endoftext|>") and tok.stop_ids == [2, 0]
    talk = chat.Chat(model, tok, chat.Sampling(temperature=0, max_new_tokens=40))
    written = []
    stream = talk.ask(QUESTION[0]["content"], written.append)
    assert stream.ids[-1] == 2 and "".join(written) == stream.text == ANSWER
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}))
    assert score.score(model, tok, score.read_questions(path))["exact_match"] == 1.0
    # The folder's own end token ends an answer, too.
    stream = chat.Stream(tok, written.append)
    stream.put(torch.tensor([[1]]))
    for i in (*tok.encode("x"), tok.eos_id):
        stream.put(torch.tensor([i]))
    assert stream.text == "x"



def test_score_takes_files_and_folders_with_a_line_for_each_and_one_for_all(run, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for name, answers in (("a.jsonl", [ANSWER, ANSWER]), ("more/b.jsonl", [ANSWER, "no"]), ("more/c.jsonl", ["no"])):
        (tmp_path / name).write_text("\n".join(json.dumps(
            {"messages": [*QUESTION, {"role": "assistant", "content": answer}]}) for answer in answers))
    assert score.main(["--weight", str(run), "--json", "--data_path", str(tmp_path / "a.json*"),
                       str(tmp_path / "more")]) == 0
    *lines, as_json = capsys.readouterr().out.splitlines()
    assert lines == ["a: exact match 100.0 % (2/2)", "b: exact match 50.0 % (1/2)", "c: exact match 0.0 % (0/1)",
                     "exact match 60.0 % (3/5)"]
    assert [row["correct"] for row in json.loads(as_json)["sources"]] == [2, 1, 0]
    assert score.main(["--weight", str(run), "--data_path", str(tmp_path / "*.txt")]) == 2
    assert "matches no file" in capsys.readouterr().err


def test_an_exported_folder_stops_and_asks_as_the_run_does(run, tmp_path):
    out = tmp_path / "hf"
    export.run(str(run), "hf", out, dtype=None, preset=None, tokenizer=None, overwrite=False)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == chat_template()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 0]
    theirs, drawn = GenerationConfig.from_pretrained(out), chat.Sampling()
    assert theirs.eos_token_id == [2, 0] and theirs.do_sample
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        assert getattr(theirs, name) == getattr(drawn, name), name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids["input_ids"].shape[1]:]
    assert tokenizer.decode(said, skip_special_tokens=True) == ANSWER and said[-1] == 2
    # Several end tokens are read back, and the export of an export is the same.
    again = tmp_path / "again"
    export.run(str(out), "hf", again, dtype=None, preset=None, tokenizer=None, overwrite=False)
    files = [path for path in out.iterdir() if path.suffix != ".safetensors"]
    assert len(files) == 4 and all((again / path.name).read_bytes() == path.read_bytes() for path in files)


def test_rows_beyond_the_tokenizer_are_not_drawn_from_an_export(base, tmp_path):
    tok = load_tokenizer(base)
    assert export.generation(tok, tok.vocab_size + 2)["suppress_tokens"] == [tok.vocab_size, tok.vocab_size + 1]
    assert "suppress_tokens" not in export.generation(tok, tok.vocab_size)
