"""Processes that tokenise: one that is killed ends the build in one line, whenever that is.

    python -m pytest tests/data/test_workers.py
"""

import subprocess
import sys

import pytest

from minimind_ds.data import tokenise
from minimind_ds.data.tokenise import Encoder
from minimind_ds.data.tokenizer import load_tokenizer
from tests.conftest import ROOT, environment
from tests.data.test_store import talk, write_lines
from tests.waiting import HANG_S

KILLING = """
import os, pathlib, signal, sys, threading, time
from minimind_ds.config.errors import report_bugs
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenizer import load_tokenizer

report_bugs()
data, cache, later = *sys.argv[1:3], float(sys.argv[3])
children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")


def kill():
    while True:
        for child in children.read_text().split():
            # Not this program's own, which another child has for a moment, too.
            if pathlib.Path(f"/proc/{child}/cmdline").read_bytes().endswith(b"--multiprocessing-fork\\0"):
                time.sleep(later)
                return os.kill(int(child), signal.SIGKILL)


tok = load_tokenizer(None)
threading.Thread(target=kill).start()
open_or_build(data, tok, kind="conversations", max_seq_len=64, cache_dir=cache, workers=3)
"""


@pytest.mark.parametrize("later", [0, 0.5])
def test_a_worker_that_is_killed_while_it_starts_is_not_waited_for(later, tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", (talk(i % 100) for i in range(60_000)))
    outcome = subprocess.run([sys.executable, "-c", KILLING, path, tmp_path / "cache", str(later)], cwd=ROOT,
                             env=environment(), capture_output=True, text=True, timeout=HANG_S)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1, outcome.stderr
    assert "a process that tokenised was killed" in outcome.stderr


def test_what_a_worker_cannot_do_is_raised_here_with_where_it_was():
    with tokenise.worker_pipes(1) as (pipe,):
        pipe.send(Encoder(load_tokenizer(None), 64, "cut", None, None))
        pipe.send(([b"{}"], 0))
        answer = pipe.recv()
    assert type(answer) is RuntimeError and str(answer).startswith("AttributeError: 'NoneType' object has no")
    assert "in __call__" in str(answer)
