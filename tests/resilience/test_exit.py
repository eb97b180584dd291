"""A run that is over ends with its exit code on every rank, however late one of them is."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.ends import flags_for

pytestmark = pytest.mark.by_exec("the interpreter's own end")


def test_a_rank_that_ends_while_rank_0_stands_still_does_not_abort(tmp_path, deepspeed):
    done = deepspeed(2, "tests/distributed/ranks/late_end.py", *flags_for(tmp_path / "late"), check=False)
    # Where notes are still taken, the interpreter ends inside the store: -6, and so the launcher's 250.
    assert "notes are no longer taken" in done.stdout and done.returncode == 0, (done.stdout, done.stderr[-5000:])
    assert (tmp_path / "late" / "run" / "DONE").exists()


# A run of the whole suite keeps the machine busy by itself.
@pytest.mark.parametrize("ends, busy", [(1, 0), pytest.param(100, 6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [[], pytest.param(["--stop"], marks=pytest.mark.slow)], ids=["finished", "stopped"])
def test_every_end_on_a_busy_machine_is_in_order(ends, busy, how):
    command = [sys.executable, "-m", "tests.ends", str(ends), "--busy", str(busy), *how]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{75 if how else 0}: {2 * ends}\n" in done.stdout, done.stdout + done.stderr
