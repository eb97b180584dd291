"""chat.py and score.py find the weights that MiniMind's eval_llm.py would, by the same flags.

    python -m pytest tests/inference/test_arguments.py
"""

import dataclasses

import pytest
import torch

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate, load_tokenizer
from minimind_ds.config import program_flags
from minimind_ds.convert import minimind, weight_files
from minimind_ds.inference import arguments
from minimind_ds.inference import chat as chat_program
from minimind_ds.inference.chat import load_model

CONFIG = ModelConfig(hidden_size=32, num_hidden_layers=2)
SIZES = ["--hidden_size", "32", "--num_hidden_layers", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """MiniMind's folders: out/ with its weights, model/ with its tokenizer; beside them a run folder of ours."""
    home = tmp_path_factory.mktemp("minimind")
    tok = load_tokenizer()
    tok.save(home / "model")
    tok.save(home / "run" / "tokenizer")
    (home / "out").mkdir()
    torch.manual_seed(5)
    state = {name: (8 * tensor if tensor.dim() > 1 else tensor).half() for name, tensor in minimind.fresh(CONFIG)}
    for name in ("full_sft_32", "pretrain_32"):
        torch.save(minimind.to_minimind(state, CONFIG), home / "out" / f"{name}.pth")
    weight_files.save_safetensors(home / "run" / "sft_32.safetensors", state, CONFIG)
    return home


@pytest.fixture
def chat(home, monkeypatch, capsys):
    """chat(*flags) -> (exit code, stdout, stderr), started beside MiniMind's folders."""
    monkeypatch.chdir(home)

    def run(*flags):
        greedy = ["--dtype", "fp32", "--temperature", "0", "--max_new_tokens", "6", "--prompt", "hot?"]
        code = chat_program.main([*greedy, *flags])
        return code, *capsys.readouterr()

    return run


def test_eval_llm_s_flags_say_what_ours_do(chat):
    ours = chat("--weight", "run", "--open_thinking", "--history", "1")
    theirs = chat("--load_from", "model", "--weight", "full_sft", "--save_dir", "out", *SIZES, "--use_moe", "0",
                  "--lora_weight", "None", "--open_thinking", "1", "--historys", "2", "--show_speed", "0")
    assert ours[0] == theirs[0] == 0 and ours[1] == theirs[1] and ours[1].startswith("<think>")
    assert "tokens/s]" in ours[2] and theirs[2] == "--weight full_sft: out/full_sft_32.pth\n"
    # A path and a tokenizer, without --load_from.
    assert chat("--weight", "out/full_sft_32.pth", *SIZES, "--tokenizer", "model", "--open_thinking")[1] == ours[1]


def test_pretrained_weights_of_a_bare_name_continue_plain_text(chat):
    plain = chat("--weight", "run", "--raw")
    theirs = chat("--load_from", "model", "--weight", "pretrain", *SIZES)
    assert theirs[0] == 0 and theirs[1] == plain[1] and "(--raw)" in theirs[2]


def test_inference_rope_scaling_is_minimind_s_yarn(home, chat):
    assert chat("--weight", "run", "--inference_rope_scaling")[0] == 0
    ids = torch.arange(3, 99)
    run = str(home / "run")
    plain, scaled = (load_model(run, dtype=torch.float32, inference_rope_scaling=on)[0](ids[None]).logits[0]
                     for on in (False, True))
    ours = MiniMindForCausalLM(dataclasses.replace(CONFIG, inference_rope_scaling=True), kernels="reference")
    ours.load_weights(weight_files.load_weights(run, CONFIG))
    batch = collate([[Sample(ids, torch.full_like(ids, -100))]], len(ids))
    torch.testing.assert_close(scaled, ours.eval()(batch, return_logits=True).logits[0], rtol=1e-4, atol=1e-4)
    assert (plain - scaled).abs().max() > 1e-2


@pytest.mark.parametrize("flags, said", [
    ([], "--weight is missing"),
    (["--weight", "out/full_sft_32.pth", "--tokenizer", "model"], "name --preset, or --hidden_size"),
    (["--weight", "out/full_sft_32.pth", *SIZES], "name one with --tokenizer"),
    (["--weight", "full_sft"], "no full_sft_768.safetensors or full_sft_768.pth in out; there is out/full_sft_32.pth"),
    (["--weight", "dpo", *SIZES], "no dpo_32.safetensors or dpo_32.pth in out; name a path"),
    (["--weight", "out/full_sft_32.pth", "--preset", "debug", "--tokenizer", "model"], "does not fit the model"),
    (["--weight", "run", "--hidden_size", "64"], "its hidden_size is 32, with --hidden_size it would be 64"),
    (["--weight", "run", "--preset", "debug"], "its hidden_size is 32, with --preset debug it would be 256"),
    (["--weight", "run", "--lora_weight", "lora_medical"], "lora_medical_32.pth or lora_medical_lora_32"),
    (["--load_from", "nowhere"], "--load_from nowhere: no such folder"),
    (["--weight", "run", "--historys", "3"], "--historys is 3; it must be an even number"),
    (["--weight", "run", "--historys", "2", "--history", "1"], "give one"),
    (["--weight", "run", "--temperature", "inf"], "--temperature is inf"),
])
def test_what_cannot_be_is_one_line(chat, flags, said):
    code, _, err = chat(*flags)
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_hugging_face_folder_is_loaded_whole_and_score_takes_the_same_flags(home, monkeypatch):
    monkeypatch.chdir(home)
    p = program_flags.chat()
    (home / "hf").mkdir(exist_ok=True)
    (home / "hf" / "config.json").touch()
    assert program_flags.load_from(p.parse_args(["--load_from", "hf"])) == ("hf", None)
    with pytest.raises(ValueError, match="both name weights: give one"):
        program_flags.load_from(p.parse_args(["--load_from", "hf", "--weight", "full_sft"]))
    assert program_flags.load_from(p.parse_args(["--load_from", "model"])) == ("full_sft", "model")
    args = program_flags.score().parse_args(["--load_from", "model", *SIZES, "--data_path", "x.jsonl"])
    chosen = arguments.choose(args).arguments
    assert (chosen["weight"], chosen["tokenizer"]) == ("out/full_sft_32.pth", "model")
