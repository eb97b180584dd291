"""A wheel works by itself: the command, its programs and their files, away from any checkout; --help starts nothing.

    python -m pytest tests/programs/test_command.py
"""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from minimind_ds import __version__, programs
from minimind_ds.config.run import FLAGS
from minimind_ds.config.run_flags import FIRST, GROUPS
from minimind_ds.config.spellings import SHAPE
from tests.conftest import ROOT, cache_dir, environment, free_port

DATA = "examples/sft_train.jsonl"
OF_DATA = ["--data_path", DATA]
SHELL = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.sh", "slurm/*.sh", "slurm/*.sbatch")
               for path in (ROOT / "launch").glob(pattern))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy of the checkout and installed into a folder, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = [*(path.name for path in ROOT.glob("*.*") if path.is_file()), "LICENSE"]
    (folder / "checkout").mkdir()
    for name in copied:
        shutil.copy(ROOT / name, folder / "checkout")
    for name in ("minimind_ds", "ds_configs", "examples", "launch"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".."],
                   cwd=folder / "checkout", env=environment(), check=True)
    built, = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "installed", built],
                   env=environment(), check=True)
    return folder / "installed"


@pytest.fixture
def command(wheel, tmp_path):
    """command(*words) runs the installed minimind-ds in an empty folder, checked."""

    def run(*words):
        done = subprocess.run([sys.executable, wheel / "bin" / "minimind-ds", *words], cwd=tmp_path, text=True,
                              env=environment(PYTHONPATH=str(wheel)), capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def test_a_wheel_trains_plans_and_has_its_files(wheel, command, tmp_path):
    assert command("--version").stdout == f"minimind-ds {__version__}\n"
    home = command("--home").stdout.strip()
    assert home == str(wheel / "minimind_ds")
    for name in ("ds_configs", "examples", "launch/slurm"):
        there = {path.name for path in (wheel / "minimind_ds" / name).iterdir()} - {"__pycache__"}
        assert there == {path.name for path in (ROOT / name).iterdir()} - {"__pycache__"}
    # Its examples run where it stands: without launch/ and ds_configs/.
    assert "    minimind-ds sft --num_gpus 2 --deepspeed zero1 --data_path" in command("sft", "--help").stdout
    assert "recommended: ds_configs/zero0.json" in command("plan", "--preset", "debug", "--ranks", "2").stdout
    done = command("sft", "--gpus=1", "--master-port", str(free_port()), "--max_steps", "2", "--preset", "debug",
                   "--pack_len", "768", "--save_interval", "0", "--cache_dir", cache_dir())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert "BokehJS" in (tmp_path / "out" / "report.html").read_text()
    assert lines[-1]["step"] == 2 and (tmp_path / "out" / "sft_256.safetensors").exists()
    said = done.stderr.splitlines()
    assert said[0].startswith("sft: starting DeepSpeed's launcher, with ds_configs/zero1.json")
    assert "sft: loading PyTorch and DeepSpeed …" in said and str(wheel) in done.stdout
    assert json.loads((tmp_path / "out" / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1


def test_the_metadata_is_the_project_s(wheel):
    metadata = (next(wheel.glob("*.dist-info")) / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {__version__}\n" in metadata and "\nLicense: Apache-2.0\n" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_help_loads_no_torch_and_shows_the_docstring(name, capsys):
    code = f"""
import sys
from minimind_ds import programs
try:
    programs.start({name!r}, ["--help"])
finally:
    print("torch" in sys.modules, "numpy" in sys.modules, sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-S", "-c", code, "x"], cwd=ROOT, text=True, capture_output=True,
                          env=environment(COLUMNS="80",
                                          PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, sys.path)])))
    assert done.returncode == 0, done.stderr
    file = "tokenize_data" if name == "tokenize" else name
    first = (ROOT / "launch" / f"{file}.py").read_text().splitlines()[0].removeprefix('"""')
    assert done.stdout.endswith("False False x\n"), done.stdout
    assert " ".join(first.split()) in " ".join(done.stdout.split()), done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout


def test_every_flag_of_a_training_stands_in_one_group_and_twelve_come_first():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted([*(f.name for f in FLAGS), *SHAPE]) and len(GROUPS[FIRST]) == 12


@pytest.mark.parametrize("script", SHELL)
def test_a_shell_script_s_help_is_its_head_and_starts_nothing(script, tmp_path):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "sed").symlink_to(shutil.which("sed"))
    # Nothing else is on the PATH that it could start.
    done = subprocess.run([shutil.which("bash"), ROOT / script, "--help"], cwd=tmp_path, text=True,
                          capture_output=True, env={"PATH": str(bin_dir)})
    lines = (ROOT / script).read_text().splitlines()
    head = lines[lines[0].startswith("#!")].removeprefix("# ")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.splitlines()[0] == head
    assert "SBATCH -" not in done.stdout and "set -" not in done.stdout


@pytest.mark.parametrize("words, said", [
    (["stf"], "has no program stf; did you mean sft?"), (["sft", "--gpus", "two"], "--gpus"),
    (["sft", "--epochs", "many"], "--epochs"), (["score"], "--data_path"), (["chat", "--top_k", "x"], "--top_k"),
    (["sft", "--datapath", "x"], "did you mean --data_path?"), (["chat", "--wieght", "x"], "did you mean --weight?"),
    (["sft", "--max_seq_len", "5000"], "raise pack_len"), (["pretrain", "--data_path", "no.x"], "no.x does not exist"),
    (["sft", "--config", "no.yaml"], "no.yaml"), (["sft", "--lr", "1", "--learning_rate", "1"], "give it once"),
    (["plan", "--presett", "debug"], "did you mean --preset?"), (["verify", "--dtype", "bf"], "--dtype"),
    (["tokenize", "--foo"], "--foo"), (["benchmark", "--steps", "2", "--foo"], "--foo"),
    (["sft", "--deepspeed", "ds_configs/zero1.jsn"], "No such file or directory; shipped ones are "),
    (["sft", "--from_weight", "tests/programms"], "no such file or folder; did you mean tests/programs?"),
    (["sft", f"--data_path={DATA}:2"], "a share stands in a run's YAML"), (["verify"], "--deepspeed is missing"),
    (["chat", "--prompt", "hi"], "--weight is missing"),
    (["score", "--weight", "no/run", *OF_DATA], "no/run: no such file or folder"),
    (["evaluate", "--weight", "full_sft", "--data_path", "no.x"], "no.x does not exist"),
    (["export", "--weight", "no.pth", "--to", "hf", "--out", "x"], "no.pth: no such file or folder"),
    (["chat", "--weight", "full_sft", "--lora", "no/run"], "no/run: no such file or folder"),
    (["plan", "--gpus", "8"], "write --ranks N"), (["chat", "examples"], "did you mean --weight examples?"),
    (["sft", DATA], f"did you mean --data_path {DATA}?")])
def test_a_mistake_ends_before_a_launcher_or_torch(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(programs, "launch", None)
    monkeypatch.setattr(programs.importlib, "import_module", None)
    try:
        code = programs.command(words)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_a_training_without_a_deepspeed_file_ends_before_torch_and_the_command_names_one(name, tmp_path, capsys,
                                                                                       monkeypatch):
    (tmp_path / "none.yaml").write_text("preset: debug\n")
    (tmp_path / "own.yaml").write_text("deepspeed: zero0\n")
    started = []
    monkeypatch.setattr(programs.os, "execv", lambda path, words: started.append(words))
    for yaml, has in (("none.yaml", ["--deepspeed", "zero1"]), ("own.yaml", [])):
        words = ["--config", str(tmp_path / yaml)]
        programs.command([name, *words])
        assert started[-1][started[-1].index(str(ROOT / "launch" / f"{name}.py")) + 1:] == [*has, *words]
    capsys.readouterr()
    # As a rank of any launcher, or alone.
    with pytest.raises(SystemExit) as end:
        programs.check_flags(name, ["--config", str(tmp_path / "none.yaml")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: --deepspeed is missing: name ") and err.count("\n") == 1


@pytest.mark.parametrize("program, text, said", [
    ("sft", "", "is empty"), ("sft", '{"conversations": [}', "line 1: the line is not valid JSON"),
    ("sft", '{"text": "The sea."}', "line 1: "), ("pretrain", '{"conversations": []}', "pretraining needs a 'text'"),
    ("verify", "[1]", "record 1")])
def test_data_whose_first_record_is_none_ends_before_a_launcher_or_torch(program, text, said, tmp_path, capsys,
                                                                        monkeypatch):
    monkeypatch.setattr(programs, "launch", None)
    (tmp_path / "data.jsonl").write_text(text)
    words = [program, "--deepspeed", "zero1", "--data_path", str(tmp_path / "data.jsonl")]
    with pytest.raises(SystemExit) as end:
        programs.command(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"error: {tmp_path}/data.jsonl" in err and said in err and err.count("\n") == 1, err
    # What is to be skipped is counted later.
    if program == "sft":
        programs.check_flags(program, [*words[1:], "--on_bad_record", "skip"])


def test_a_python_without_the_libraries_is_told_where_they_are():
    done = subprocess.run([sys.executable, "-S", "launch/chat.py"], cwd=ROOT, text=True, capture_output=True,
                          env=environment(PYTHONPATH=""))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sys.executable} has no "), done.stderr
    assert "source .venv/bin/activate" in done.stderr and done.stderr.count("\n") == 1


def test_launcher_flags_are_the_launcher_s_and_the_others_keep_their_order():
    words = ["--lr", "1e-3", "--gpus", "8", "--include=localhost:0,1", "--data_path", "a", "b", "--exclude", "c:1"]
    asked = ["--num_gpus", "8", "--include", "localhost:0,1", "--exclude", "c:1"]
    assert programs.launcher_flags(words) == (asked, ["--lr", "1e-3", "--data_path", "a", "b"])


def test_on_a_terminal_a_program_says_first_that_it_loads():
    leader, follower = pty.openpty()
    done = subprocess.run([sys.executable, "launch/export.py", "--to", "hf", "--out", "x"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=follower, env=environment())
    os.close(follower)
    said = os.read(leader, 4096).decode().splitlines()
    os.close(leader)
    assert done.returncode == 2 and said[0] == "export: loading PyTorch …" and said[1].startswith("error: --to hf")


def test_tokenized_beforehand_the_data_is_there_for_the_run(tmp_path, capfd):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data.write_text(json.dumps({"conversations": turns}) + "\n")
    flags = ["--data_path", str(data), "--cache_dir", str(tmp_path / "cache"), "--eval_fraction", "0"]
    assert programs.command(["tokenize", *flags]) == 0
    said = capfd.readouterr().out
    assert "samples: 1, " in said and "rows: 1 of 4096 tokens" in said and str(tmp_path / "cache") in said
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    from minimind_ds.distributed.world import read_world
    from minimind_ds.training.prepare import prepare

    prepare("sft", ["--deepspeed", "zero0", "--preset", "debug", "--save_dir", str(tmp_path / "run"), *flags[:4]],
            read_world())
    assert made and made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert programs.command(["tokenize", "--kind", "text", *flags]) == 2
    assert programs.command(["tokenize", "--kind", "text", "--program", "sft", *flags]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert "data.jsonl" in first and "--program sft reads conversations" in second
