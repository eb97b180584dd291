"""A run asked to stop writes a checkpoint, says so by its exit code and goes on bit for bit; crash loops end."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys

import pytest

from minimind_ds.data.journal import Part
from minimind_ds.resilience import restarts
from minimind_ds.resilience.signals import SAME_REQUEST_SECONDS, STOPPED, Stopped, StopRequest
from tests.checkpoint.test_resume import STEPS, Run, curve, weights
from tests.conftest import ROOT, cache_dir, deepspeed_command, environment, free_port, rank_environment
from tests.waiting import HANG_S, until


def wait_for(run: Run, step: int) -> None:
    until(lambda: run.reached(step), f"step {step}", run.ranks, run.folder.with_suffix(".log"))


def newest(folder) -> int:
    return int(max((folder / "checkpoints").glob("step_*")).name.removeprefix("step_"))


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_rest_is_bit_for_bit(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    # However late a busy machine lets us look, there are steps left.
    steps = 4 * STEPS
    start = functools.partial(Run, cache=tmp_path, stage=2, max_steps=steps)
    start(whole).finish()
    began = 0
    for number, rank in ((signal.SIGHUP, 1), (signal.SIGUSR1, 0)):
        run, step = start(folder), began + 2
        wait_for(run, step)
        run.ranks[rank].send_signal(number)
        assert [p.wait(timeout=HANG_S) for p in run.ranks] == [STOPPED, STOPPED]
        # The checkpoint is that of the last step taken, and none was taken after it.
        assert step <= newest(folder) == curve(folder)[-1][0] < steps
        said = folder.with_suffix(".log").read_text()
        assert number.name in said and f"the checkpoint of step {newest(folder)} is written" in said
        # Stopping is not failing.
        record = restarts.read(folder)
        assert record["from"] == began and not record["running"] and record["failures"] == []
        began = newest(folder)

    # The second SIGTERM ends a rank at once, although it waits in a collective for one that hangs.
    run = start(folder)
    wait_for(run, newest(folder) + 1)
    run.ranks[1].send_signal(signal.SIGSTOP)
    log, before = folder.with_suffix(".log"), folder.with_suffix(".log").read_text().count("SIGTERM: a checkpoint")
    run.ranks[0].send_signal(signal.SIGTERM)
    # From when it is received on, for some seconds, a second one is the same request.
    until(lambda: log.read_text().count("SIGTERM: a checkpoint") > before, "the first SIGTERM", run.ranks, log)
    with pytest.raises(subprocess.TimeoutExpired):
        run.ranks[0].wait(timeout=SAME_REQUEST_SECONDS + 0.5)
    run.ranks[0].send_signal(signal.SIGTERM)
    assert run.ranks[0].wait(timeout=HANG_S) == 128 + signal.SIGTERM
    run.ranks[1].kill()
    run.ranks[1].wait()

    start(folder).finish()
    assert curve(folder) == curve(whole) and weights(folder) == weights(whole)
    assert not (folder / "attempts.json").exists()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_closed_terminal_stops_a_run_but_not_under_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: stop.asked, "a signal")
        assert stop.asked == ("SIGUSR1" if ignored else "SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_after_ctrl_c_is_no_second_request():
    """As `ssh host deepspeed …` has it: at Ctrl-C the launcher ends, and with it the terminal's session."""
    code = """
import os, signal, time
from minimind_ds.resilience.signals import SAME_REQUEST_SECONDS, StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    while stop.first is None:
        time.sleep(0.01)
    stop.first -= 2 * SAME_REQUEST_SECONDS
    os.kill(os.getpid(), signal.SIGHUP)
print(stop.asked)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n"), done


@pytest.mark.by_exec("Ctrl-C reaches the launcher's whole process group")
def test_ctrl_c_under_the_launcher_writes_a_checkpoint(tmp_path):
    """The terminal's Ctrl-C reaches launcher and ranks; the launcher passes it on to the ranks once more."""
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}\n")
    log = (tmp_path / "log").open("w+")
    command = deepspeed_command(2, "launch/sft.py", "--config", str(config), "--deepspeed", "ds_configs/zero2.json",
                                "--save_dir", str(folder), "--cache_dir", cache_dir(), "--max_steps", "2000",
                                "--max_seq_len", "96", "--pack_len", "96", "--epochs", "1000")
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, "three steps", [launcher],
          tmp_path / "log")
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=HANG_S) != 0
    until(lambda: any((folder / "checkpoints").glob("step_*")), "a checkpoint", log=tmp_path / "log")
    assert newest(folder) == curve(folder)[-1][0], (tmp_path / "log").read_text()[-3000:]


class Crash:
    """Attempts of a run whose process fails at given steps, as files only."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.patch, self.restart = folder, monkeypatch, -1

    def start(self, after: int, fails_at: int | None, error: Exception | None = None) -> None:
        """One automatic restart after the checkpoint of step `after`; `error` None: killed."""
        self.restart += 1
        self.patch.setenv("SLURM_RESTART_COUNT", str(self.restart))
        restarts.begin(self.folder, after)
        steps = "".join(json.dumps({"step": s}) + "\n" for s in range(1, fails_at))
        (self.folder / "metrics.jsonl").write_text(steps + '{"step": ')
        if error is not None:
            restarts.Attempt(self.folder, 0).__exit__(type(error), error, None)


def test_the_same_step_failing_three_times_ends_automatic_restarts_with_its_reason(tmp_path, monkeypatch):
    job = Crash(tmp_path, monkeypatch)
    job.start(0, 12)
    job.start(10, 14, RuntimeError("bad row"))
    job.start(10, 12, Stopped(12))
    # A stop in between is no failure, and progress does not hide the loop.
    job.start(12, 14)
    job.start(12, 14, RuntimeError("bad row"))
    with pytest.raises(ValueError, match="failed 3 times at step 14, .*RuntimeError: bad row"):
        job.start(12, 15)
    with pytest.raises(ValueError, match="failed 3 times at step 14"):
        job.start(12, 15)


@pytest.mark.parametrize("stopped, code, outcome", [(Stopped(12), 75, "stopped"), (Stopped(12, planned=5), 0, "done")])
def test_a_planned_stop_is_not_started_again_by_itself(tmp_path, monkeypatch, stopped, code, outcome):
    monkeypatch.setenv("MINIMIND_DS_OUTCOME", str(tmp_path / "outcome"))
    job = Crash(tmp_path, monkeypatch)
    job.start(0, 12, stopped)
    assert stopped.code == code and (tmp_path / "outcome").read_text() == f"{outcome}\n"
    # Nor is it a failure.
    assert not restarts.read(tmp_path)["running"] and restarts.read(tmp_path)["failures"] == []
    # Started by hand it is tried again, and from then on counted anew.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    assert restarts.begin(tmp_path, 12) == []
    assert restarts.read(tmp_path)["running"] and restarts.read(tmp_path)["failures"] == []


def test_a_restarted_job_knows_its_own_checkpoints_from_those_of_others(tmp_path, monkeypatch):
    def wrote(step: int) -> None:
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"job": restarts.job_facts()}))
        # By its manifest, whatever another machine's clock says.
        os.utime(folder, (9_999_999_999 - step,) * 2)

    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    wrote(5)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not restarts.has_own_checkpoint(tmp_path)
    wrote(9)
    assert restarts.has_own_checkpoint(tmp_path)
    assert restarts.whose(tmp_path / "checkpoints" / "step_00000009") == {"id": "7", "attempt": 1}
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not restarts.has_own_checkpoint(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert not restarts.has_own_checkpoint(tmp_path)


def test_torchrun_does_not_start_again_what_was_asked_to_stop(tmp_path, monkeypatch):
    def attempt(number: int, run: str = "a") -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

    attempt(0)
    restarts.refuse_after_stop(tmp_path)
    restarts.begin(tmp_path, 0)
    restarts.Attempt(tmp_path, 0).__exit__(Stopped, Stopped(12), None)
    for number in (1, 2):
        attempt(number)
        with pytest.raises(Stopped, match="it stays stopped; the checkpoint of step 12") as error:
            restarts.refuse_after_stop(tmp_path)
        # As rank 0 sends it to the others.
        sent = pickle.loads(pickle.dumps(error.value))
        assert (sent.code, sent.step, str(sent)) == (STOPPED, 12, str(error.value))
    # Another torchrun goes on, and is started again after a failure.
    attempt(1, "b")
    restarts.refuse_after_stop(tmp_path)
    attempt(0)
    restarts.refuse_after_stop(tmp_path)
    restarts.begin(tmp_path, 12)
    attempt(1)
    restarts.refuse_after_stop(tmp_path)


def test_before_the_training_one_rank_of_a_machine_says_that_it_ends():
    code = "from minimind_ds.resilience.signals import Preparing; Preparing.end('SIGTERM')"
    said = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(LOCAL_RANK=rank), text=True,
                           capture_output=True) for rank in ("0", "1")]
    assert [done.returncode for done in said] == [STOPPED, STOPPED]
    assert said[0].stderr.startswith("SIGTERM: ends at once, before any step; ") and said[1].stderr == ""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_keeps_what_is_tokenised_and_ends_with_75(tmp_path, number):
    """Two thousand records make a chunk; the signal comes when the first is in the cache."""
    data, cache, outcome = tmp_path / "data.jsonl", tmp_path / "cache", tmp_path / "outcome"
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    data.write_text(f"{json.dumps({'conversations': said})}\n" * 60_000)
    words = ["launch/sft.py", "--deepspeed", "zero2", "--preset", "debug", "--data_path", str(data), "--cache_dir",
             str(cache), "--save_dir", str(tmp_path / "run"), "--num_workers", "0"]
    log = tmp_path / "log"
    run = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(MINIMIND_DS_OUTCOME=str(outcome)),
                           stdout=log.open("w"), stderr=subprocess.STDOUT)
    until(outcome.exists, "the first chunk", [run], log)
    run.send_signal(number)
    assert run.wait(timeout=HANG_S) == STOPPED, log.read_text()
    assert f"{number.name}: ends at once, before any step; what is tokenised is kept" in log.read_text()
    assert "Traceback" not in log.read_text() and outcome.read_text() == "tokenised\n"
    [part] = cache.glob(".*.part")
    assert Part(part).stats["records"] >= 2000 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ten_failures_without_a_new_checkpoint_end_automatic_restarts(tmp_path, monkeypatch):
    job = Crash(tmp_path, monkeypatch)
    for i in range(10):
        job.start(10, 12 + i % 3)
    with pytest.raises(ValueError, match="failed 10 times after the checkpoint of step 10.*killed"):
        job.start(10, 15)
    job = Crash(tmp_path, monkeypatch)
    for i in range(30):
        job.start(10 * (i // 5), 12 + i)


def test_the_program_refuses_a_crash_loop_with_one_line_and_code_2(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    failure = {"from": 0, "at": 1, "error": None}
    (folder / "attempts.json").write_text(json.dumps({"job": None, "began": 0, "running": True, "from": 0,
                                                      "failures": [failure] * 2, "error": "OSError: full"}))
    outcome = tmp_path / "outcome"
    port, words = free_port(), ["launch/sft.py", "--deepspeed", "ds_configs/zero2.json", "--preset", "debug",
                                "--save_dir", str(folder), "--cache_dir", cache_dir()]
    extra = {"SLURM_RESTART_COUNT": "2", "MINIMIND_DS_OUTCOME": str(outcome)}
    ranks = [subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                              env=rank_environment(rank, 2, port, **extra)) for rank in range(2)]
    ended = [p.communicate(timeout=HANG_S)[1] for p in ranks]
    said = [line for err in ended for line in err.splitlines() if line.startswith("error: ")]
    # With their process group open, and never by an abort.
    assert [p.returncode for p in ranks] == [2, 2] and len(said) == 1 and "OSError: full" in said[0], ended
    assert not outcome.exists() or outcome.read_text() == "tokenised\n"
