"""Law 8 and the promise to users: every mistake is one clear line, exit code 2, and nothing half-written."""

import json
import os
import pathlib

import pytest

from minimind_ds.config.errors import UserError, one_line
from minimind_ds.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOOD = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def turn(role, content):
    return {"conversations": [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]}


def lines(*records) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


# name: (content of the data file, what the message must say)
DATA = {
    "empty file": (b"", ["data.jsonl", "empty"]),
    "broken JSON on line 3": (lines(GOOD, GOOD, b'{"conversations": [', GOOD), ["data.jsonl", "line 3", "JSON"]),
    "not an object": (lines(GOOD, [1]), ["line 2"]),
    "wrong role": (lines(GOOD, turn("bot", "x")), ["line 2", "role", "'bot'"]),
    "content is not a string": (lines(turn("assistant", 3)), ["line 1", "content"]),
    "no assistant turn": (lines(GOOD, turn("user", "again")), ["line 2", "assistant"]),
    "not UTF-8": (lines(GOOD, b'{"conversations": "\xff\xfe"}'), ["line 2", "UTF-8"]),
    "half a surrogate pair": (lines(GOOD, b'{"conversations": [{"role": "user", "content": "\\ud800"}, '
                                          b'{"role": "assistant", "content": "x"}]}'), ["line 2"]),
    "nested too deeply": (lines(GOOD, b"[" * 100000), ["line 2"]),
    "no labelled token": (lines(turn("assistant", "word " * 5)), ["data.jsonl", "label"]),
}


@pytest.fixture
def sft(tmp_path, monkeypatch, capfd):
    """sft(*flags) -> (exit code, what it wrote on stderr); without a process of its own, since it ends before any."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")

    def run(*flags, deepspeed="ds_configs/zero2.json"):
        code = loop.main("sft", ["--deepspeed", str(ROOT / deepspeed), "--save_dir", str(tmp_path / "run"),
                                  "--cache_dir", str(tmp_path / "cache"), "--preset", "debug", *map(str, flags)])
        return code, capfd.readouterr().err

    return run


def check(code, err, *words):
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err, (word, err)


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_named_with_its_line(sft, tmp_path, name):
    content, words = DATA[name]
    (tmp_path / "data.jsonl").write_bytes(content)
    # The sample without a label loses its answer to truncation.
    extra = ["--max_seq_len", 4, "--pack_len", 16] if name == "no labelled token" else []
    check(*sft("--data_path", tmp_path / "data.jsonl", *extra), *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_missing_file_and_a_folder_are_named(sft, tmp_path):
    check(*sft("--data_path", tmp_path / "none.jsonl"), "none.jsonl")
    check(*sft("--data_path", tmp_path), str(tmp_path))
    check(*sft("--eval_path", tmp_path / "none.jsonl"), "none.jsonl")


def test_bad_records_can_be_skipped_and_are_counted(sft, tmp_path):
    from minimind_ds.data.store import open_or_build
    from minimind_ds.data.tokenizer import load_tokenizer

    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(GOOD, turn("bot", "x"), GOOD, b"{"))
    store = open_or_build(str(path), load_tokenizer(None), kind="conversations", max_seq_len=64, policy="cut",
                          on_bad_record="skip", cache_dir=str(tmp_path / "cache"), options={})
    assert len(store.lengths) == 2 and store.stats["skipped"] == 2


def test_a_sample_longer_than_the_row_is_named(sft):
    check(*sft("--max_seq_len", 512, "--pack_len", 128), "512", "128", "pack_len")


def test_a_step_of_mostly_empty_micro_batches_is_refused(sft, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(lines(GOOD, GOOD, GOOD))
    code, err = sft("--data_path", tmp_path / "data.jsonl", "--accumulation_steps", 100_000)
    check(code, err, "--accumulation_steps is 100,000", "an epoch has 1 rows, 1 micro-batches a rank", "lower it")


def test_a_run_far_beyond_any_memory_is_refused_before_anything_is_built(sft):
    check(*sft("--batch_size", "1024", "--pack_len", "65536", "--max_seq_len", "64"), "1,024 x 65,536 tokens",
          "planner's arithmetic", "--pack_len")


def test_unknown_preset_tokenizer_weights_and_kernels(sft, tmp_path, capfd):
    with pytest.raises(SystemExit) as leaving:
        sft("--preset", "huge")
    assert leaving.value.code == 2
    assert "huge" in capfd.readouterr().err
    check(*sft("--tokenizer", tmp_path / "nothing"), "nothing")
    check(*sft("--from_weight", tmp_path / "nothing.pth"), "nothing.pth")
    check(*sft("--kernels", "warp"), "warp")


def test_weights_of_another_size_are_refused_with_the_first_difference(sft, tmp_path):
    from minimind_ds.config.model import ModelConfig
    from minimind_ds.convert.weight_files import save_safetensors
    from minimind_ds.model.decoder import MiniMindForCausalLM

    other = MiniMindForCausalLM(ModelConfig(hidden_size=64, num_hidden_layers=1))
    save_safetensors(tmp_path / "other_64.safetensors", other.state_dict(), other.config)
    check(*sft("--from_weight", tmp_path / "other_64.safetensors"), "other_64.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "other_64.safetensors").read_bytes()[:1000])
    check(*sft("--from_weight", tmp_path / "torn.safetensors"), "torn.safetensors")


def test_a_pickle_that_runs_code_is_not_run(sft, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Payload()}))
    check(*sft("--from_weight", tmp_path / "evil.pth"), "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_misspelt_key_and_a_clash_in_the_json(sft, tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    check(*sft(deepspeed=tmp_path / "ds.json"), "gradient_cliping", "gradient_clipping")
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    check(*sft("--grad_clip", 1.0, deepspeed=tmp_path / "ds.json"), "--grad_clip", "ds.json", "0.5")
    check(*sft(deepspeed=tmp_path / "absent.json"), "absent.json")


def test_a_run_folder_that_cannot_be_written(sft, tmp_path):
    (tmp_path / "file").write_text("in the way")
    check(*sft("--save_dir", tmp_path / "file" / "run"), "save_dir")
    check(*sft("--save_dir", "/proc/run"), "/proc/run")


def test_a_run_never_writes_over_what_it_reads(sft, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(GOOD))
    for name in ("metrics.jsonl", "starts.json", "last.json"):
        (run / name).write_bytes(lines(GOOD))
        check(*sft("--data_path", run / name), name, "would be lost")
        check(*sft("--data_path", tmp_path / "data" / "a.jsonl", "--eval_path", run / name), name, "would be lost")
        assert (run / name).read_bytes() == lines(GOOD)
    check(*sft("--data_path", f"{run}/*.json*"), "would be lost")
    check(*sft("--data_path", run), "lies in the data folder")
    check(*sft("--data_path", tmp_path), "lies in the data folder")
    check(*sft("--data_path", tmp_path / "data", "--cache_dir", tmp_path / "data" / "cache"), "--cache_dir", "lies in")


def test_starting_weights_in_the_place_of_the_final_ones_are_kept(sft, tmp_path):
    from minimind_ds.config.model import PRESETS
    from minimind_ds.convert.weight_files import save_safetensors
    from minimind_ds.data.tokenizer import load_tokenizer
    from minimind_ds.model.decoder import MiniMindForCausalLM

    run = tmp_path / "run"
    load_tokenizer(None).save(run / "tokenizer")
    save_safetensors(run / "sft_256.safetensors", MiniMindForCausalLM(PRESETS["debug"]).state_dict(), PRESETS["debug"])
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    check(*sft("--data_path", tmp_path / "a.jsonl", "--from_weight", run / "sft_256.safetensors", "--from_resume",
               "none"), "sft_256.safetensors", "would be lost")
    # Nor are another run's best weights, or any that no run in the folder has written.
    check(*sft("--data_path", tmp_path / "a.jsonl"), "sft_256.safetensors is not of a run in this folder")


@pytest.mark.parametrize("name, make", [
    ("tokenizer", lambda path: path.write_text("")), ("tokenizer", lambda path: path.symlink_to(path.parent.parent)),
    ("run.log", lambda path: path.symlink_to(path.parent.parent / "theirs")), ("run.log", os.mkfifo),
    ("checkpoints/latest", lambda path: path.mkdir(parents=True))])
def test_what_lies_in_the_place_of_a_run_s_own_files_is_found_before_it_trains(sft, tmp_path, name, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    check(*sft("--from_resume", "none"), name)


@pytest.mark.parametrize("variable, value", [
    ("MASTER_ADDR", "a b\nc"), ("MASTER_ADDR", "-oProxyCommand=x"), ("MASTER_ADDR", "x" * 5000),
    ("DS_ACCELERATOR", "banana"), ("DS_ACCELERATOR", "mps")])
def test_a_variable_that_a_library_would_stumble_over_is_named(sft, monkeypatch, capfd, variable, value):
    monkeypatch.setenv(variable, value)
    try:
        code, err = sft()
    except UserError as error:
        # The world is read before anything that answers for it; programs.start does.
        code, err = 2, one_line(error) + "\n"
    check(code, err, variable)
    assert len(err) < 300


def test_nothing_to_resume_from(sft, tmp_path, deepspeed):
    done = deepspeed(1, "launch/sft.py", "--deepspeed", "ds_configs/zero0.json", "--preset", "debug", "--from_resume",
                     str(tmp_path / "nowhere"), "--save_dir", str(tmp_path / "run"), "--cache_dir",
                     str(tmp_path / "cache"), check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "nowhere" in said[0], done.stderr
    assert "Traceback" not in done.stderr


def test_the_launcher_passes_on_the_exit_code_and_one_line(deepspeed, tmp_path):
    done = deepspeed(2, "launch/sft.py", "--deepspeed", "ds_configs/zero2.json", "--data_path",
                     str(tmp_path / "none.jsonl"), "--save_dir", str(tmp_path / "run"), check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "none.jsonl" in said[0], done.stderr
    assert "Traceback" not in done.stderr
