"""Readers that are shell: the host file of multi_node.sh, and the variables that batch scripts take."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import subprocess

from minimind_ds.config.errors import UserError
from minimind_ds.paths import ROOT
from tests.fuzz import mutate
from tests.fuzz.harness import Target

HOSTS = ("node1", "node-2.cluster", "-oProxyCommand=touch${IFS}owned", "$(touch${IFS}owned)", "`touch${IFS}owned`",
         "a;touch${IFS}owned", "a@b", "*", "a,b",
         "node1:22", "%n", "'", '"', "\\", "#", "\r")
SLOTS = ("slots=1", "slots=8", "slots=0", "slots=-1", "slots=a[$(touch${IFS}owned)]", "slots=1 x",
         "slots=99999999999999999999", "slots=1\r", "", "8")
NUMBERS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK",
           "SLURM_JOB_NUM_NODES",
           "MASTER_PORT", "NODE_WAIT")
WORDS = ("FLAGS", "PREFLIGHT_FLAGS", "MODULES", "LOG_DIR")
# ssh runs the words for the other machine in a shell here.
TOOLS = {"ssh": """while [ "$1" != -- ]; do shift; done
[[ $2 =~ ^[A-Za-z0-9] ]] || touch owned
exec bash -c "${*:3}"
""", "pdsh": ":", "deepspeed": ":"}
# What the scripts do with their variables.
USE = """source "$home/launch/slurm/common.sh"
words_of FLAGS a; words_of PREFLIGHT_FLAGS b; words_of MODULES c
take_preflight "${a[@]}"
module() { :; }; module load "${c[@]}"
: $((10000 + 2 * (SLURM_JOB_ID % 11000))) $((${MASTER_PORT:-1} + 1)) $((SECONDS + ${NODE_WAIT:-600}))
: $((${SLURM_RESTART_COUNT:-0} + 1)) "$logs"
"""


def run(words: list[str], folder: pathlib.Path, **variables: str) -> None:
    """Raises UserError where the script ends with 2 and one line."""
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **variables}
    done = subprocess.run(words, cwd=folder, env={name: value.replace("\0", "") for name, value in env.items()},
                          capture_output=True, text=True,
                          errors="replace", stdin=subprocess.DEVNULL)
    assert not (folder / "owned").exists(), "a text was run"
    if done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1:
        raise UserError(done.stderr[7:-1])
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr[-300:])


def draw_hosts(draw: random.Random) -> tuple[bytes, list[str]]:
    def one() -> str:
        host = draw.choice((*HOSTS[:2] * 4, *HOSTS, mutate.text(draw)))
        return f"{host}{draw.choice((' ', ' ', chr(9)))}{draw.choice((*SLOTS[:2] * 5, *SLOTS))}"

    lines = [one() for _ in range(draw.choice((1, 1, 2, 3)))]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    flags = [mutate.text(draw).replace("\0", "").encode("utf-8", "replace").decode()
             for _ in range(draw.choice((0, 2)))]
    return mutate.chewed(draw, content) if draw.random() < 0.3 else content, flags


def read_hosts(case: tuple[bytes, list[str]], folder: pathlib.Path) -> None:
    content, flags = case
    for name, script in TOOLS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "hosts").write_bytes(content)
    # Without a .venv, whose programs the script would take.
    shutil.copytree(ROOT / "launch", folder / "launch", dirs_exist_ok=True)
    run(["bash", str(folder / "launch/multi_node.sh"), "hosts", "sft", *flags], folder)


def draw_batch(draw: random.Random) -> dict[str, str]:
    odd = {name: draw.choice((str(draw.choice(mutate.NUMBERS[:10])), "a[$(touch owned)]", mutate.text(draw)))
           for name in draw.sample(
        NUMBERS, draw.choice((0, 1, 2)))}
    return {"SLURM_JOB_ID": "7", **odd, **{name: mutate.text(draw) for name in draw.sample(WORDS, draw.choice((1,
                                                                                                               2)))}}


def read_batch(case: dict[str, str], folder: pathlib.Path) -> None:
    variables = {name: value.encode("utf-8", "replace").decode() for name, value in case.items()}
    run(["bash", "-c", USE], folder, home=str(ROOT), **variables)


TARGETS = [
    Target("host file", draw_hosts, read_hosts, 0.02),
    Target("batch variables", draw_batch, read_batch, 0.04),
]
