"""Ranks whose launcher is killed stop with a checkpoint, and outlive the shell that started it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from minimind_ds.resilience import launchers
from minimind_ds.resilience.signals import StopRequest
from tests.checkpoint.test_resume import curve
from tests.conftest import ROOT, deepspeed_command, environment, free_port
from tests.ends import flags_for
from tests.resilience.test_signals import newest
from tests.waiting import HANG_S, until

PYTHON = "/opt/venv/bin/python3.11"


@pytest.mark.parametrize("words, module", [
    ([PYTHON, "/opt/venv/bin/deepspeed", "--num_gpus", "2", "launch/sft.py"], "deepspeed.launcher.runner"),
    ([PYTHON, "-m", "minimind_ds.distributed.launcher", "launch/sft.py"], "minimind_ds.distributed.launcher"),
    ([PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], "deepspeed.launcher.launch"),
    ([f"{PYTHON} -u -m deepspeed.launcher.launch --world_info=e30="], "deepspeed.launcher.launch"),
    ([PYTHON, "/opt/venv/bin/torchrun", "--standalone"], "torch.distributed.run"),
    ([PYTHON, "-m", "torch.distributed.run"], "torch.distributed.run"),
    (["bash", "-c", "deepspeed launch/sft.py"], None),
    (["bash", "/usr/bin/deepspeed"], None),
    ([PYTHON, "-u", "launch/sft.py", "--deepspeed", "zero2"], None),
    ([PYTHON, "-m", "pytest", "deepspeed"], None),
    ([PYTHON], None), ([], None),
])
def test_a_launcher_is_known_by_its_command_line(words, module):
    assert launchers.runs(words) == module


def start(tmp_path, command: list[str], log) -> subprocess.Popen:
    flags = flags_for(tmp_path, 100_000)
    return subprocess.Popen([*command, "launch/sft.py", *flags, "--epochs", "1000"], cwd=ROOT, env=environment(),
                            stdout=log.open("w"), stderr=subprocess.STDOUT)


@pytest.mark.parametrize("whom, number, code", [
    # The first of the two ends at once; the second, hearing of ranks that ended with 75, says so to nobody.
    ("first", signal.SIGTERM, -signal.SIGTERM),
    # "if result.returncode > 0": DeepSpeed's first process ends with 0 where its second was killed.
    pytest.param("second", signal.SIGKILL, 0, marks=pytest.mark.slow),
    pytest.param("first", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    # It passes the signal on to its ranks, waits for them up to 30 s, and ends with 1.
    pytest.param("second", signal.SIGTERM, 1, marks=pytest.mark.slow),
])
def test_ranks_whose_launcher_is_killed_stop_with_a_checkpoint(tmp_path, whom, number, code):
    log, folder = tmp_path / "log", tmp_path / "run"
    first = start(tmp_path, deepspeed_command(2)[:5], log)
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, "three steps", [first], log)
    [second] = psutil.Process(first.pid).children()
    ranks = second.children()
    assert len(ranks) == 2
    (first if whom == "first" else second).send_signal(number)
    assert first.wait(timeout=HANG_S) == code
    # Not this process's children: they are waited for by their files.
    until(lambda: all(launchers.Launcher(rank, "").gone() for rank in ranks), "the ranks' end", log=log)
    said = log.read_text()
    assert newest(folder) == curve(folder)[-1][0] and f"the checkpoint of step {newest(folder)} is written" in said
    if (whom, number) != ("second", signal.SIGTERM):
        name = "DeepSpeed's launcher" if whom == "first" else "DeepSpeed's launcher of this machine"
        assert f"{name} (process " in said and "is gone: a checkpoint after this step" in said


def test_a_run_in_the_background_outlives_its_shell(tmp_path):
    """The shell is killed, and the launcher has another parent from then on; nobody is asked to stop."""
    code = ("import sys, time; from minimind_ds.resilience import launchers, signals; signals.LOOK_S = 0.05\n"
            "with signals.StopRequest() as stop:\n"
            " print(len(launchers.above()), flush=True); sys.stdin.read(); time.sleep(0.5); print(stop.asked)")
    shell = subprocess.Popen(["bash", "-c", f'{sys.executable} -c "$0" & wait', code], cwd=ROOT, env=environment(),
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # Tests may themselves run under a launcher.
    assert shell.stdout.readline() == f"{len(launchers.above())}\n"
    shell.kill()
    shell.stdin.close()
    assert shell.stdout.read() == "None\n"


def test_a_launcher_that_goes_asks_to_stop_once(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    launcher = launchers.Launcher(psutil.Process(child.pid), "torch.distributed.run")
    monkeypatch.setattr(launchers, "above", lambda: [launcher])
    assert not launcher.gone()
    with StopRequest() as stop:
        child.stdin.close()
        # A zombie: nobody has asked for its exit code yet.
        until(lambda: stop.asked, "the end of the launcher")
    assert stop.asked == f"torchrun (process {child.pid}) is gone"
    child.wait()
    assert launcher.gone()


@pytest.mark.parametrize("flags, visible, reaches", [
    (["--include", "localhost:1,3"], None, "1,3"),
    pytest.param(["--exclude", "localhost:0"], None, "1,2,3", marks=pytest.mark.slow),
    # All of them, in DeepSpeed's own order.
    ([], "2,0", "0,2")])
def test_devices_that_are_named_reach_the_ranks_and_no_others(tmp_path, flags, visible, reaches):
    """Of four: DeepSpeed takes LOCAL_SIZE for their number where there is no GPU."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.path.insert(0, os.getcwd())\n"
                       "from minimind_ds.distributed.world import read_world\nw = read_world()\n"
                       "at = w.rank, w.size, w.local_rank, w.local_size, os.environ['CUDA_VISIBLE_DEVICES']\n"
                       # In one piece.
                       "os.write(1, ' '.join(map(str, ('here', *at))).encode() + b'\\n')")
    extra = {"LOCAL_SIZE": "4", **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
    words = [deepspeed_command(1)[0], *flags, "--master_port", str(free_port()), str(program)]
    done = subprocess.run(words, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=HANG_S)
    ranks = len(reaches.split(","))
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("here")) == [
        f"here {rank} {ranks} {rank} {ranks} {reaches}" for rank in range(ranks)], done.stdout + done.stderr


WAITS = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[-1])
signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), out.with_name("saved").touch(), sys.exit(75)))
out.touch()
while True:
    signal.pause()
"""


@pytest.mark.slow
def test_at_ctrl_c_the_command_s_launcher_waits_for_the_ranks_without_a_traceback(tmp_path):
    (tmp_path / "rank.py").write_text(WAITS)
    log, there = tmp_path / "log", tmp_path / "there"
    command = [sys.executable, "-m", "minimind_ds.distributed.launcher", "--log_level", "warning", "--num_gpus", "1"]
    process = subprocess.Popen([*command, str(tmp_path / "rank.py"), str(there)], env=environment(), cwd=ROOT,
                               stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    until(there.exists, "the rank", [process], log)
    # DeepSpeed's second process hears signals a moment after it has started its ranks.
    [second] = psutil.Process(process.pid).children()
    until(lambda: caught(second.pid, signal.SIGINT), "the launcher's handler", [process], log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(HANG_S) == 130 and (tmp_path / "saved").exists()
    assert "Traceback" not in log.read_text(), log.read_text()


def caught(pid: int, number: int) -> bool:
    line = next(line for line in open(f"/proc/{pid}/status") if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
