"""Numbers hold on an older processor, played; python -m tests.machines plays the others, and every numeric test."""

import subprocess
import sys

import pytest

from tests import machines
from tests.conftest import ROOT, environment
from tests.waiting import HANG_S

# What is fast; compiling takes a minute, and its instructions are the compiler's choice.
FAST = [str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in ("kernels", "golden", "isolation", "model")]
FAST += ["-k", "not compiled"]
DEFAULT_DTYPE = """
import torch
from minimind_ds.distributed.world import World
from minimind_ds.training.prepare import choose
from minimind_ds.config.run import RunConfig
print(choose(RunConfig(), World(0, 1, 0, 1, torch.device("cpu")))[0].dtype)
"""


def test_kernels_goldens_and_isolation_hold_without_vector_instructions():
    done = subprocess.run([sys.executable, "-m", "tests.machines", "--rows", "older", *FAST], cwd=ROOT,
                          env=environment(), text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    row = done.stdout.splitlines()[-1].split("|")
    assert row[1].strip() == "older" and int(row[3]) > 100 and int(row[4]) == 0


@pytest.mark.parametrize("bf16, dtype", [("fast", "bf16"), ("slow", "fp32")])
def test_the_default_precision_is_that_of_the_processor_that_is_played(tmp_path, bf16, dtype):
    if why := machines.why_not(bf16):
        pytest.skip(why)
    done = subprocess.run(machines.played([sys.executable, "-c", DEFAULT_DTYPE], bf16, tmp_path), cwd=ROOT,
                          env=environment(), text=True, capture_output=True, timeout=HANG_S)
    assert done.stdout == f"{dtype}\n", done.stderr


def test_a_row_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit) as stop:
        machines.main(["--rows", "abacus"])
    assert stop.value.code == 2 and "older" in capsys.readouterr().err
