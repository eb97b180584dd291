"""The fenced commands of the guides: each is read by the program that it starts, and run in the nearest form that two
CPU cores allow, page by page, in order, as a paste.  Of both READMEs: test_readme.py; jobs of SLURM: tests/slurm.

    python -m pytest -q --slow tests/programs/test_guides.py
"""

import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from minimind_ds.config.run import parse_run_config
from minimind_ds.convert import export
from minimind_ds.data import files
from minimind_ds.programs import NEVER, PROGRAMS
from tests.conftest import ROOT, environment, free_port
from tests.programs.test_readme import FILE_OF, READMES, check_flags, commands, given

PAGES = ("docs/GUIDE_zh.md", "docs/FROM_MINIMIND.md", "docs/SERVE.md", "docs/CLUSTERS.md", "docs/BENCHMARK.md",
         "docs/DATA.md", "docs/PLAN_AND_VERIFY.md", "launch/slurm/README.md", "ds_configs/README.md")
RUN = ("docs/CLUSTERS.md", "docs/BENCHMARK.md", "docs/PLAN_AND_VERIFY.md")
# Programs that are not ours, with the forms of theirs that start one of ours.
STARTERS = ("python", "deepspeed", "torchrun", "srun", "minimind-ds")
FOREIGN = ("vllm", "curl", "git", "cp", "llama-server")
# sbatch's own options in the guides.
OF_SBATCH = re.compile(r"--(nodes|account|partition|time|array)=\S+")
SMALL = ["--preset", "debug", "--max_seq_len", "64", "--pack_len", "128"]
DATA = ["--data_path", "my.jsonl"]
# A program's flags that leave least to do; --compare has rows of its own.
LESS = {"sft": [*SMALL, "--max_steps", "2"], "verify": [*SMALL, "--tokens", "200"],
        "benchmark": ["--preset", "debug", "--warm_up", "1", "--steps", "1"]}


def fences(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def ours(words):
    """-> (name, what stands before it, its flags) of a command that starts a program of ours, or None."""
    at = next((i for i, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)), None)
    if at is None:
        return (words[1], words[:1], words[2:]) if words[0] == "minimind-ds" else None
    file = words[at].removeprefix("launch/").removesuffix(".py")
    return next((name for name, of in FILE_OF.items() if of == file), file), words[:at], words[at + 1:]


def flags(words):
    """What the page leaves open, left out."""
    return [word for word in words if word not in ("…", "[any flag]")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_read_by_the_program_that_it_starts(page, capsys):
    for words in commands(page):
        while "=" in words[0] and "bash" not in words:
            words = words[1:]
        if (found := ours(words)) is not None:
            name, before, rest = found
            assert before[0] in STARTERS, words
            assert before[0] in ("python", "minimind-ds") or PROGRAMS[name].launcher != NEVER, words
            check_flags(name, flags(rest))
        elif words[:2] == ["python", "-m"]:
            done = subprocess.run([*words[:3], "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0 and not {w for w in words[3:] if w.startswith("--")} - set(done.stdout.split())
        else:
            slurm = [i for i, word in enumerate(words) if word.startswith("launch/slurm/")]
            assert slurm or words[0] in (*FOREIGN, "sbatch") or words[1] == "to_gguf.py", words


@pytest.mark.parametrize("page", READMES)
def test_what_installs_is_a_script_that_parses_and_the_build_that_the_constraints_name(page):
    others = [words for words in commands(page) if ours(words) is None]
    scripts = [words[1] for words in others if words[0] == "bash"]
    assert scripts == ["launch/quickstart.sh", "launch/test.sh"]
    assert all(subprocess.run(["bash", "-n", ROOT / script]).returncode == 0 for script in scripts)
    [wanted] = [words[2] for words in others if words[1] == "install"]
    assert wanted in (ROOT / "constraints.txt").read_text().splitlines()
    assert [words[0] for words in others] == ["bash", "bash", "source", "python3", ".venv/bin/pip"]


@pytest.mark.parametrize("page", ["launch/slurm/README.md", "docs/GUIDE_zh.md"])
def test_every_job_is_a_script_and_flags_of_its_training(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```(?:bash|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
              if "launch/slurm/" in block]
    jobs = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(jobs) >= 2
    for words in jobs:
        variables = dict(word.split("=", 1) for word in words[:words.index("bash")]) if "bash" in words else {}
        at = next(i for i, word in enumerate(words) if word.startswith("launch/slurm/"))
        assert subprocess.run(["bash", "-n", ROOT / words[at]]).returncode == 0
        before, after = words[len(variables):at], words[at + 1:]
        if variables:
            folder, *options = after
            assert before == ["bash"] and set(variables) == {"PRETRAIN", "SFT", "FLAGS"}
            script = (ROOT / words[at]).read_text()
            assert all(f"${{{name}" in script or f"${name}" in script for name in variables), variables
            for name in ("PRETRAIN", "SFT"):
                read(name.lower(), [*variables[name].split(), *variables["FLAGS"].split(), "--save_dir", folder])
        else:
            options = before[1:]
            assert before[0] == "sbatch"
            read("sft", [word.replace("%a", "1") for word in after])
        assert all(OF_SBATCH.fullmatch(option) for option in options), options


def read(program, words):
    """The flags of a training whose data lies on a cluster."""
    return parse_run_config(words, program, {"save_weight": program})


@pytest.mark.parametrize("page", ["docs/DATA.md", "docs/GUIDE_zh.md"])
def test_the_sources_with_shares_are_taken(page, tmp_path, monkeypatch):
    [block] = fences(page, "yaml")
    (tmp_path / "maths").mkdir()
    for name in ("chat.jsonl", "maths/a.jsonl", "web.parquet"):
        (tmp_path / name).write_text("x")
    (tmp_path / "run.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    sources = files.expand(read("sft", ["--config", "run.yaml"]).data_path)
    assert [source.share for source in sources] == [1, 2, 0.5] and yaml.safe_load(block).keys() == {"data_path"}


def test_what_others_serve_has_the_export_s_settings():
    page = (ROOT / "docs/SERVE.md").read_text(encoding="utf-8")
    [body] = re.findall(r"-d '(.*?)'$", page, re.MULTILINE | re.DOTALL)
    assert json.loads(body)["messages"] and json.loads(body)["chat_template_kwargs"] == {"open_thinking": True}
    [modelfile] = re.findall(r"^```\n(FROM .*?)^```", page, re.MULTILINE | re.DOTALL)
    told = dict(re.findall(r"^PARAMETER (\w+) (.+)$", modelfile, re.MULTILINE))
    assert {name: float(told[name]) for name in ("temperature", "top_p", "top_k")} == {
        name: export.SAMPLING[name] for name in ("temperature", "top_p", "top_k")}
    assert float(told["repeat_penalty"]) == export.SAMPLING["repetition_penalty"] and told["stop"] == '"<|im_end|>"'
    for block in fences("docs/SERVE.md", "python"):
        compile(block, "docs/SERVE.md", "exec")


def nearest(words):
    """A command as the paste runs it: on two ranks of this machine at most, a tiny model, few steps; None: left out,
    since it needs what no test machine has (vLLM, llama.cpp, a SLURM, tests/slurm) or was read only."""
    found = ours(words)
    if found is None:
        return words if words[0] == "cp" else None
    name, before, rest = found
    if before[0] == "deepspeed":
        before = ["deepspeed", "--master_port", str(free_port()), *(["--num_gpus", "2"] if "2" in before else [])]
    if before[0] == "srun":
        before = ["python"]
    if before[0] == "torchrun":
        before = ["torchrun", "--nproc_per_node", "2", *near_rendezvous(before)]
    rest, less = [word for word in flags(rest) if word != "--sensitivity"], LESS.get(name, [])
    if name == "benchmark":
        less = [] if "--report" in rest else [*less, *DATA, *near_sweep(rest)]
    elif name in ("sft", "verify") and "--data_path" not in rest:
        less = [*less, *DATA]
    if name == "sft" and "--deepspeed" not in rest:
        less = [*less, "--deepspeed", "ds_configs/zero2.json"]
    less = drop(less, "--preset") if "--config" in rest else less
    rest = drop(rest, "--preset") if "--preset" in less else rest
    return [*before, f"launch/{FILE_OF.get(name, name)}.py", *rest, *less]


def near_rendezvous(before):
    """torchrun's own flags for one machine in place of two."""
    port = free_port()
    if "c10d" in before:
        return ["--nnodes", "1", "--rdzv_backend", "c10d", "--rdzv_id", "run1", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return ["--standalone"] if "--standalone" in before else [
        "--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(port)]


def near_sweep(rest):
    """A cell of a sweep, or rows that a comparison can fill."""
    if "--compare" not in rest:
        return ["--rows", "128x1x1", *([] if "--deepspeed" in rest else ["--deepspeed", "ds_configs/zero0.json"])]
    files = [] if given(rest, "--compare")[0] in ("padded", "moe") else ["--deepspeed", "ds_configs/zero0.json"]
    return ["--max_seq_len", "64", "--pack_len", "128", *files,
            *(["--dtypes", "fp32"] if "padded" in rest else ["--dtype", "fp32"])]


def drop(words, flag):
    """Without a flag and its value."""
    at = words.index(flag) if flag in words else len(words)
    return [*words[:at], *words[at + 2:]]


@pytest.fixture
def checkout(tmp_path):
    for name in ("launch", "minimind_ds", "ds_configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = (ROOT / "examples/sft_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "my.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    shutil.copy(ROOT / "ds_configs/zero1.json", tmp_path / "my.json")
    (tmp_path / "tiny.yaml").write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2, "
                                        "num_attention_heads: 4, num_key_value_heads: 2}\n")
    return tmp_path


def run(folder, paste):
    """All of a paste, which ends at the first failure."""
    script = "\n".join(["set -ex", *map(shlex.join, paste)]).replace("/shared/", f"{folder}/shared/")
    env = environment(PYTHONPATH=str(folder), XDG_CACHE_HOME=str(folder / "cache"), OMP_NUM_THREADS="1")
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert sum(line.startswith("+ ") for line in done.stderr.splitlines()) == len(paste)


@pytest.mark.slow
@pytest.mark.parametrize("page", [*RUN, "docs/GUIDE_zh.md"])
def test_the_commands_run_in_order_as_a_paste(checkout, page):
    # The guide in Chinese has many of the others' commands.
    elsewhere = [words for other in RUN if page not in RUN for words in commands(other)]
    paste = [shorter for words in commands(page) if words not in elsewhere and (shorter := nearest(words))]
    assert paste
    # Runs that the page takes to be there.
    before = [trained(name) for name in ("runs/sft", "runs/lora") if any(["launch/report.py", name] == words[1:3] or
              words[2:4] == ["runs/sft", name] for words in paste)]
    run(checkout, [*before, *paste])


def trained(folder):
    return ["python", "launch/sft.py", "--deepspeed", "zero0", *LESS["sft"], *DATA, "--save_dir", folder]


@pytest.mark.slow
def test_the_page_on_serving_runs_as_far_as_transformers(checkout):
    paste = [shorter for words in commands("docs/SERVE.md") if (shorter := nearest(words))]
    transformers, to_gguf = fences("docs/SERVE.md", "python")
    assert [words[1:2] for words in paste] == [["launch/export.py"], ["runs/sft/tokenizer/tokenizer.model"]]
    run(checkout, [trained("runs/sft"), *paste, ["python", "-c", transformers]])
    assert (checkout / "hf_folder/tokenizer.model").exists() and "convert_hf_to_gguf.main()" in to_gguf
