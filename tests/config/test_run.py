"""The command line and the run YAML become one frozen object."""

import dataclasses

import pytest

from minimind_ds.config.run import parse_run_config
from tests.conftest import ROOT


def parsed(tmp_path, text, *flags):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse_run_config(["--config", str(path), *flags], "sft", {"save_weight": "sft"})


def test_yaml_gives_any_flag_and_changes_the_model(tmp_path):
    run = parsed(tmp_path, "preset: debug\nlearning_rate: 1e-4\npacking: false\nmodel:\n  hidden_size: 64\n")
    assert run.learning_rate == 1e-4 and run.packing is False and run.save_weight == "sft"
    config = run.model_config(6400)
    assert config.hidden_size == 64 and config.head_dim == 16 and config.intermediate_size == 256


def test_the_resolved_yaml_reads_back_as_the_same_run_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = parsed(tmp_path, "preset: debug\nepochs: 3\nmodel: {num_hidden_layers: 2}\nfrom_weight: base.pth\n"
                           "data_path: [a.jsonl, {path: b/*.gz, share: 2}]\n", "--seed", "7")
    text = run.to_yaml()
    monkeypatch.chdir("/")
    again = parsed(tmp_path, text)
    assert again.data_path == [f"{tmp_path}/a.jsonl", {"path": f"{tmp_path}/b/*.gz", "share": 2}]
    assert (again.from_weight, again.save_dir) == (f"{tmp_path}/base.pth", f"{tmp_path}/out")
    same = dict(given={}, data_path=None, from_weight="w", save_dir="out")
    assert again.to_yaml() == text and dataclasses.replace(again, **same) == dataclasses.replace(run, **same)


def test_a_config_that_somebody_wrote_is_not_replaced_by_the_run_s_own(tmp_path):
    with pytest.raises(ValueError, match="run.yaml is a file that the run itself writes: its comments would be lost"):
        parsed(tmp_path, f"save_dir: {tmp_path}  # mine\n")
    # The run's own loses nothing.
    parsed(tmp_path, parsed(tmp_path, f"save_dir: {tmp_path}\n").to_yaml())


def test_one_file_may_be_named_in_two_ways_in_two_places(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = parsed(tmp_path, "deepspeed: zero2\n", "--deepspeed", "ds_configs/zero2.json")
    assert run.deepspeed.endswith("zero2.json")


def test_a_tilde_is_the_home_folder_wherever_a_path_may_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    run = parsed(tmp_path, "data_path: [~/a.jsonl, {path: ~/b, share: 2}]\nfrom_weight: ~/w\n", "--save_dir=~/out")
    assert run.data_path == ["/home/x/a.jsonl", {"path": "/home/x/b", "share": 2}]
    assert (run.from_weight, run.save_dir) == ("/home/x/w", "/home/x/out")


@pytest.mark.parametrize("text, expected", [
    ("learnig_rate: 1\n", "unknown key 'learnig_rate'"),
    ("epochs: many\n", "epochs is 'many'; it must be float"),
    ("epochs: true\n", "epochs is True; it must be float"),
    ("dtype: fp8\n", "choose from bf16, fp16, fp32"),
    ("preset: huge\n", "choose from minimind-3"),
    ("save_weight: a/b\n", "save_weight in .* is 'a/b'; it must be a plain file name"),
    ("save_weight: ..\n", "it must be a plain file name"),
    ("a: [1\n", "line 2: not valid YAML"),
    ("- 1\n", "holds a list, not `key: value` lines"),
    ("batch_size: 0\n", "batch_size in .*run.yaml is 0; it must be at least 1"),
    ("hang_minutes: 1.0e-9\n", "hang_minutes in .*run.yaml is 1e-09; it must be at least 0.01"),
    ("pack_len: 100\nmax_seq_len: 200\n", "raise pack_len or lower max_seq_len"),
    ("model: 3\n", "model is not a block"),
])
def test_what_is_wrong_in_the_yaml_is_named(tmp_path, text, expected):
    with pytest.raises(ValueError, match=expected):
        parsed(tmp_path, text)


def test_a_value_given_twice_names_both_places(tmp_path):
    with pytest.raises(ValueError, match="epochs is 2 on the command line and 3 in .*run.yaml: give it once: "
                                         "leave --epochs out, or change or delete that line of the file$"):
        parsed(tmp_path, "epochs: 3\n", "--epochs", "2")
    assert parsed(tmp_path, "epochs: 3\n", "--epochs", "3").epochs == 3


def test_an_unknown_field_of_the_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown model configuration key 'hiden_size'"):
        parsed(tmp_path, "preset: debug\nmodel: {hiden_size: 64}\n").model_config(6400)


def test_unknown_flags_end_the_program_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_run_config(["--learnig_rate", "1"], "sft", {})
    assert leaving.value.code == 2 and capsys.readouterr().err.count("\n") == 1
