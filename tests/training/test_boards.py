"""A training outlives what goes wrong at Weights & Biases or in TensorBoard's files, and asks nobody for a key.

    python -m pytest tests/training/test_boards.py
"""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import types

import pytest

from minimind_ds.config.errors import UserError
from minimind_ds.training.boards import Boards
from tests.conftest import ROOT, environment
from tests.waiting import HANG_S

BEGIN = """
import pathlib, sys, types
from minimind_ds.config.errors import report_bugs
from minimind_ds.training.boards import Boards

report_bugs()
run = types.SimpleNamespace(use_wandb=True, use_tensorboard=False, wandb_project="p")
boards = Boards(pathlib.Path(sys.argv[1]), run, step=int(sys.argv[2]), resolved={}, say=print)
boards.write({"loss": 1.0}, 1)
boards.close()
print("trained")
"""


def begin(folder, step, **variables):
    """The program above, on a terminal."""
    ours, theirs = pty.openpty()
    keep = {name: value for name, value in environment().items() if not name.startswith("WANDB")}
    try:
        return subprocess.run([sys.executable, "-c", BEGIN, folder, str(step)], cwd=ROOT, stdin=theirs, text=True,
                              capture_output=True, timeout=HANG_S, env={**keep, "HOME": str(folder), **variables})
    finally:
        os.close(ours)
        os.close(theirs)


def test_wandb_that_cannot_begin_ends_a_new_run_in_one_line_and_a_resumed_one_goes_on(tmp_path):
    pytest.importorskip("wandb")
    for variables, why in (({}, "No API key"), ({"WANDB_MODE": "bogus"}, "bogus"),
                           ({"WANDB_API_KEY": "x"}, "invalid")):
        new = begin(tmp_path, 0, **variables)
        said = [line for line in new.stderr.splitlines() if line.startswith("error: ")]
        assert new.returncode == 2 and len(said) == 1 and "Traceback" not in new.stderr, new.stderr
        assert "Weights & Biases cannot be begun: " in said[0] and why in said[0] and "WANDB_MODE=offline" in said[0]
    resumed = begin(tmp_path, 7, WANDB_MODE="bogus")
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr
    first, last = resumed.stdout.splitlines()
    assert first.startswith("Weights & Biases is given up for this start: ") and last == "trained"
    assert begin(tmp_path, 0, WANDB_MODE="offline").returncode == 0 and list(tmp_path.glob("wandb/offline-run-*"))


def test_a_training_goes_on_when_wandb_s_own_process_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, said = types.SimpleNamespace(use_wandb=True, use_tensorboard=False, wandb_project="p"), []
    boards = Boards(tmp_path, run, step=0, resolved={}, say=said.append)
    for children in pathlib.Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            if b"wandb-core" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT)
    for step in range(1, 1000):
        boards.write({"loss": 1.0}, step)
    boards.close()
    assert len(said) == 1 and said[0].startswith("Weights & Biases is given up for this start: ")


def test_tensorboard_s_folder_that_cannot_be_written(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    run, said = types.SimpleNamespace(use_wandb=False, use_tensorboard=True), []
    with pytest.raises(UserError, match="TensorBoard cannot be begun: .*; look at the folder tensorboard of the run"):
        Boards(tmp_path, run, step=0, resolved={}, say=said.append)
    boards = Boards(tmp_path, run, step=3, resolved={}, say=said.append)
    boards.write({"loss": 1.0}, 4)
    boards.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard is given up for this start: ")
