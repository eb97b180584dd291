"""Flags as MiniMind and Hugging Face spell them: understood in their meaning, or refused with ours."""

import re

import pytest

from minimind_ds import programs
from minimind_ds.config import spellings
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.run import FLAGS, NUMBERS, parse_run_config

OURS = {f.name for f in FLAGS}


def parsed(*flags, program="sft"):
    return parse_run_config(list(flags), program, {"save_weight": program})


def refused(capsys, *flags):
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as leaving:
        parsed(*flags)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_the_table_leads_to_flags_and_hides_none():
    assert set(spellings.SAME.values()) <= OURS and set(spellings.VALUES) <= OURS
    others = [*spellings.SAME, *spellings.HINTS, *spellings.SHAPE]
    assert len(set(others)) == len(others) and not OURS & set(others)


def test_a_guess_knows_the_program_s_own_flags_and_the_training_s(capsys):
    for flag, meant in (("--warmup", "--warm_up"), ("--leraning_rate", "--learning_rate")):
        with pytest.raises(SystemExit):
            programs.check_flags("benchmark", [flag, "1"])
        assert f"unrecognized arguments: {flag} 1; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_help_names_values_shortly(name, capsys):
    with pytest.raises(SystemExit):
        programs.check_flags(name, ["--help"])
    told = re.findall(r"^ +--(\w+) \[?([A-Z_]+)", capsys.readouterr().out, re.MULTILINE)
    # Those that take hardly a flag of their own.
    assert told or name in ("report", "tokenize")
    assert not [flag for flag, value in told if value == flag.upper() and len(value) > 6]


def test_minimind_s_own_command_lines_parse_and_mean_the_same():
    sft = parsed(*"""--save_dir ../out --save_weight full_sft --epochs 2 --batch_size 16 --learning_rate 1e-5 --dtype
        bfloat16 --num_workers 8 --accumulation_steps 1 --grad_clip 1.0 --log_interval 100 --save_interval 1000
        --hidden_size 768 --num_hidden_layers 8 --max_seq_len 768 --use_moe 0 --data_path ../dataset/sft_t2t_mini.jsonl
        --from_weight pretrain --from_resume 1 --use_wandb --wandb_project MiniMind-Full-SFT --use_compile 1
        --seed 42""".split())
    assert (sft.dtype, sft.from_resume, sft.compile, sft.use_wandb, sft.num_workers) == ("bf16", "auto", True, True, 8)
    assert (sft.preset, sft.model, sft.save_weight, sft.learning_rate) == ("minimind-3", {}, "full_sft", 1e-5)
    moe = parsed(*"--use_moe 1 --dtype float16 --from_resume 0 --use_compile 0".split(), program="pretrain")
    assert (moe.preset, moe.dtype, moe.from_resume, moe.compile) == ("minimind-3-moe", "fp16", "0", False)
    assert parsed("--dtype", "float32").dtype == "fp32"


def test_other_trainers_spellings_are_understood_and_named_in_messages():
    run = parsed("--gradient_accumulation_steps", "4", "--per-device-train-batch-size", "2", "--output_dir", "runs/a",
                 "--num_train_epochs=3", "--weight-decay", "0.1", "--max_grad_norm", "0.5", "--learning-rate", "2e-4",
                 "--train_data", "a-b.jsonl", "--logging_steps", "5")
    assert (run.accumulation_steps, run.batch_size, run.save_dir, run.epochs) == (4, 2, "runs/a", 3)
    assert (run.weight_decay, run.grad_clip, run.learning_rate, run.data_path) == (0.1, 0.5, 2e-4, "a-b.jsonl")
    assert run.place("epochs") == "--num_train_epochs" and run.place("learning_rate") == "--learning-rate"
    with pytest.raises(ValueError, match="^--num-train-epochs is 0; it must be above 0, "):
        parsed("--num-train-epochs", "0")
    with pytest.raises(ValueError, match="--epochs and --num_epochs are one flag"):
        parsed("--epochs", "2", "--num_epochs", "2")


@pytest.mark.parametrize("flag, said", [
    ("--learnig_rate", "did you mean --learning_rate?"), ("--acumulation-steps", "did you mean --accumulation_steps?"),
    ("--num_train_epoch", "did you mean --epochs?"), ("--device", "DeepSpeed's launcher gives each rank its device"),
    ("--lora_name", "--lora_rank 16 .* --save_weight"), ("--bf16", "--dtype bf16"), ("--max_length", "--pack_len"),
    ("--lr-scheduler-type", "--lr_schedule"), ("--resume_from_checkpoint", "--from_resume auto"),
    ("--dataset", "--data_path")])
def test_an_unknown_flag_is_answered_with_ours(capsys, flag, said):
    err = refused(capsys, flag, "x")
    assert f"unrecognized arguments: {flag.replace('-', '_').replace('__', '--')} x; " in err
    assert re.search(said, err), err


def test_help_lists_the_other_spellings_and_starts_nothing(capsys):
    with pytest.raises(SystemExit) as leaving:
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0 and "--num_train_epochs (epochs)" in said and "--hidden_size" in said


@pytest.mark.parametrize("flags, preset, changed", [
    (["--hidden_size", "768", "--num_hidden_layers", "8"], "minimind-3", {}),
    (["--num_hidden_layers", "16"], "minimind-3", {"num_hidden_layers": 16}),
    (["--hidden_size", "512", "--use_moe", "1"], "minimind-3-moe", {"hidden_size": 512}),
    (["--hidden_size", "256", "--use_moe", "0", "--preset", "debug"], "debug", {})])
def test_minimind_s_sizes_are_its_own_model(flags, preset, changed):
    run = parsed(*flags)
    assert run.preset == preset and run.model == changed
    expected = PRESETS["debug"] if preset == "debug" else ModelConfig(use_moe="moe" in preset, **changed)
    assert run.model_config(6400) == expected


def test_a_size_has_one_owner(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: debug\nmodel: {hidden_size: 64}\n")
    assert parsed("--config", str(path), "--hidden_size", "64").model == {"hidden_size": 64}
    for flags, said in [(["--hidden_size", "128"], "hidden_size is 128 .* and 64 in model in .*run.yaml"),
                        (["--use_moe", "1"], "use_moe is True .* and False in preset debug .preset in .*run.yaml")]:
        with pytest.raises(ValueError, match=said + ".*: give it once"):
            parsed("--config", str(path), *flags)
    with pytest.raises(ValueError, match="and 768 in preset minimind-3 .--preset.: give it once"):
        parsed("--preset", "minimind-3", "--hidden_size", "512")


@pytest.mark.parametrize("text, said", [
    ("learnig_rate: 1\n", "unknown key 'learnig_rate'; did you mean learning_rate[?]"),
    ("bf16: true\n", "unknown key 'bf16'; write --dtype bf16"),
    ("hidden_size: 64\n", "hidden_size belongs in the block `model:`"),
    ("lr: .nan\n", "learning_rate in .*run.yaml is nan; it must be a finite number"),
    ("epochs: 1\nnum_train_epochs: 1\n", "num_train_epochs is epochs, which stands there too"),
    ("from_resume: maybe\ndtype: fp8\n", "choose from bf16")])
def test_a_yaml_knows_the_same_spellings(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text("num-train-epochs: 3\ndtype: bfloat16\nfrom_resume: 1\noutput_dir: a\n")
    run = parsed("--config", str(path))
    assert (run.epochs, run.dtype, run.from_resume, run.save_dir) == (3, "bf16", "auto", "a")
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        parsed("--config", str(path))


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_finite_number_or_too_large_is_refused_in_a_true_sentence(name, capsys):
    kind = next(f for f in FLAGS if f.name == name)
    if "float" in kind.type:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(ValueError, match=f"^--{name} is {value}; it must be a finite number$"):
                parsed(f"--{name}={value}")
        with pytest.raises(ValueError, match=rf"^--{name} is 1e\+30; it must be below 9.2e\+18$"):
            parsed(f"--{name}=1e30")
    else:
        refused(capsys, f"--{name}=nan")
        with pytest.raises(ValueError, match=f"^--{name} is 1000.*; it must be below 9.2e.18$"):
            parsed(f"--{name}=1{'0' * 400}")


@pytest.mark.parametrize("program, flags, rate", [
    ("pretrain", [], 5e-4), ("pretrain", ["--from_weight", "w.pth"], 5e-4), ("sft", [], 5e-4),
    ("sft", ["--from_weight", "w.pth"], 1e-5), ("sft", ["--from_weight", "w.pth", "--lora_rank", "8"], 1e-4),
    ("sft", ["--from_weight", "w.pth", "--learning_rate", "0"], 0.0)])
def test_the_default_learning_rate_goes_by_what_is_trained(program, flags, rate):
    run = parsed(*flags, program=program)
    assert run.learning_rate == rate and ("learning_rate" in run.given) == ("--learning_rate" in flags)
