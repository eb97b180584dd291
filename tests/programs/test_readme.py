"""The commands of both READMEs and of the guides that go on from them: they name what there is, and run as one paste.

    python -m pytest -q --slow tests/programs/test_readme.py
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from minimind_ds.programs import ASKED, NEVER, PROGRAMS
from tests.conftest import ROOT, environment, free_port
from tests.waiting import HANG_S

READMES = ("README.md", "README_zh.md")
GUIDES = ("docs/FROM_MINIMIND.md", "docs/GUIDE_zh.md")
# What launch/quickstart.sh leaves.
QUICKSTART = (".venv", "out/quickstart/pretrain", "out/quickstart/sft")
# Programs that hand flags which they do not know to the trainer.
PASS_ON = {"plan", "verify", "benchmark", "tokenize"}
FILE_OF = {"tokenize": "tokenize_data"}
LAUNCHER = {"--num_gpus", "--include", "--exclude", "--hostfile", "--master_port", "--log_level"}
MAKES = ("--save_dir", "--out", "--cache_dir")


def commands(page):
    """Each command of a page's bash blocks, as words; `a && b` is two."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in joined(block):
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1:]


def joined(block):
    """A block's lines, each as long as its quotes and backslashes say."""
    line = ""
    for part in block.replace("\\\n", " ").splitlines():
        line += part
        try:
            shlex.split(line, comments=True)
        except ValueError:
            line += "\n"
            continue
        yield line
        line = ""
    assert not line, line


def program_of(words):
    """-> (name, its flags) of a command that starts one of ours, or None."""
    if words[0] == "minimind-ds":
        return words[1], words[2:]
    script = next((i for i, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)), None)
    if script is None:
        return None
    name = words[script].removeprefix("launch/").removesuffix(".py")
    name = next((program for program, file in FILE_OF.items() if file == name), name)
    # What stands before the program is the launcher's.
    before = words[1:script]
    assert words[0] == "deepspeed" or (words[0] == "python" and not before), words
    assert {word for word in before if word.startswith("-")} <= LAUNCHER, words
    assert words[0] == "python" or PROGRAMS[name].launcher != NEVER, words
    return name, words[script + 1:]


def given(words, flag):
    """The values of a flag."""
    if flag not in words:
        return []
    after = words[words.index(flag) + 1:]
    return after[:next((i for i, word in enumerate(after) if word.startswith("--")), len(after))]


def check_flags(name, words):
    assert name in PROGRAMS, name
    _, rest = PROGRAMS[name].flags().parse_known_args(words)
    if rest:
        assert name in PASS_ON, (name, rest)
        # Ends the process, and with it the test, at a flag that nobody knows.
        PROGRAMS["sft"].flags().parse_args(rest)


@pytest.mark.parametrize("page", READMES + GUIDES)
def test_every_command_names_programs_flags_and_files_that_there_are(page):
    made, runs, found = set(QUICKSTART), [], list(commands(page))
    if page in GUIDES:
        made |= {path for words in commands("README.md") for flag in MAKES for path in given(words, flag)}
    assert found
    for words in found:
        program = program_of(words)
        if program is not None:
            check_flags(*program)
        else:
            assert words[0] in ("bash", "source", "pip", "python3", ".venv/bin/pip"), words
        new = [path for flag in MAKES for path in given(words, flag)]
        for word in words[1:]:
            if re.search(r"^\.?\w[\w.-]*(/[\w.-]+)+$|\.(py|sh|json|jsonl|yaml|txt)$", word) and word not in new:
                exists = (ROOT / word).exists() or any(word == path or word.startswith(path + "/") for path in made)
                assert exists, (page, word, shlex.join(words))
        if program is not None and program[0] in ("sft", "pretrain"):
            runs += given(words, "--save_dir") or [f"out/{program[0]}"]
        made |= set(new)
    # A second run in a folder goes on with the first, or is refused.
    assert len(runs) == len(set(runs))
    assert runs or page in GUIDES


@pytest.mark.parametrize("page", READMES)
def test_the_python_example_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run([sys.executable, "-c", blocks[0]], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, timeout=HANG_S)
    assert done.returncode == 0 and re.fullmatch(r"16 samples in \d+ rows, \d\.\d\d nats a label\n", done.stdout), done


def nearest(words):
    """A command as the paste runs it: shorter, and without what installs or needs an hour; None: left out."""
    program = program_of(words)
    if program is None:
        return None
    name, _ = program
    if words[0] == "deepspeed" or (words[0] == "minimind-ds" and PROGRAMS[name].launcher != NEVER):
        words = [words[0], "--master_port", str(free_port()), *words[1:]] if words[0] == "deepspeed" else words
    if name in ("sft", "pretrain"):
        words = [*words, "--max_steps", "2"]
    if name == "score":
        words = [*words, "--limit", "4"]
    if name == "benchmark":
        words = [*("debug" if word == "minimind-3" else word for word in words), "--warm_up", "1", "--steps", "1",
                 "--dtypes", "fp32", "--max_seq_len", "128", "--pack_len", "256"]
    assert PROGRAMS[name].launcher in (NEVER, ASKED) or words[0] != "python", words
    return words


@pytest.mark.slow
def test_the_commands_run_in_order_as_a_paste(tmp_path):
    for name in ("launch", "minimind_ds", "ds_configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    paste = [["deepspeed", "--master_port", str(free_port()), f"launch/{name}.py", "--config",
              "examples/quickstart.yaml", "--save_dir", f"out/quickstart/{name}", "--max_steps", "2", *more]
             for name, more in (("pretrain", []), ("sft", ["--from_weight", "out/quickstart/pretrain"]))]
    for page in ("README.md", "docs/FROM_MINIMIND.md"):
        paste += [shorter for words in commands(page) if (shorter := nearest(words))]
    script = "\n".join(["set -ex", *map(shlex.join, paste)])
    env = environment(PYTHONPATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    ran = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert len(ran) == len(paste) and (tmp_path / "out" / "hf_folder" / "config.json").exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["cache", "ds_configs", "examples", "launch", "minimind_ds", "out"])
