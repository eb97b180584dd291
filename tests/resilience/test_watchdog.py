"""A rank that hangs or dies ends the run within a bounded time, and the log says which, where and what all did."""

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from minimind_ds.distributed.engine import patience
from minimind_ds.resilience import stragglers
from minimind_ds.resilience.watchdog import HUNG
from minimind_ds.training.spikes import LEAST, MOST_SKIPPED, SpikeDetector, taken_losses
from tests.conftest import ROOT, cache_dir, free_port, rank_environment
from tests.waiting import HANG_S, until

MODEL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96}
# 12 s for what takes 50 ms on an idle machine: on a busy one no step is a hang.
LIMIT = "0.2"


def flags_for(folder: pathlib.Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    config = folder / "run.yaml"
    config.write_text("preset: debug\nmodel: " + json.dumps(MODEL))
    return ["--config", str(config), "--deepspeed", "ds_configs/zero2.json", "--save_dir", str(folder / "run"),
            "--cache_dir", cache_dir(), "--dtype", "fp32", "--batch_size", "1", "--max_seq_len", "96",
            "--pack_len", "96"]


def start(folder: pathlib.Path, *flags: str, ranks: int = 2, log: str = "{rank}.log") -> list[subprocess.Popen]:
    """Ranks of launch/sft.py as torchrun would start them, each with a log of its own."""
    port = free_port()
    command = [sys.executable, "launch/sft.py", *flags_for(folder), *flags]
    return [subprocess.Popen(command, cwd=ROOT, text=True, stdout=(folder / log.format(rank=rank)).open("w"),
                             stderr=subprocess.STDOUT, start_new_session=True,
                             env=rank_environment(rank, ranks, port)) for rank in range(ranks)]


def reach(folder: pathlib.Path, processes: list, steps: int) -> None:
    path = folder / "run" / "metrics.jsonl"
    until(lambda: path.exists() and path.read_text().count('"loss"') >= steps, f"step {steps}", processes,
          folder / "0.log")


def end(processes: list) -> None:
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


@pytest.mark.parametrize("hung", [1, 0])
def test_a_hung_rank_is_named_and_the_waiting_ones_end_with_their_stacks(tmp_path, hung):
    """Rank 0 keeps the notes of all; when it is the one that hangs, it cannot be asked."""
    waiting = 1 - hung
    processes = start(tmp_path / "hung", "--hang_minutes", LIMIT)
    try:
        reach(tmp_path / "hung", processes, 3)
        os.kill(processes[hung].pid, signal.SIGSTOP)
        assert processes[waiting].wait(timeout=HANG_S) == HUNG
    finally:
        end(processes)
    said = (tmp_path / "hung" / f"{waiting}.log").read_text()
    assert f"error: rank {waiting} on" in said
    named = "rank 0, which keeps the ranks' notes, does not answer" if hung == 0 else "rank 1 on"
    assert named in said and (hung == 0 or "' since " in said)
    # Every thread's stack, the main one waiting for the other rank inside the step.
    assert "in train_step" in said and "in run_plan" in said and said.count("Thread 0x") >= 2


def test_ranks_that_hang_after_the_last_step_end_the_run_too_and_all_stacks_are_in_the_log(tmp_path, deepspeed):
    """The launcher ends all ranks when the first has left: by then the others must have written theirs."""
    done = deepspeed(3, "tests/distributed/ranks/hang.py", *flags_for(tmp_path / "end"), "--hang_minutes", LIMIT,
                     "--max_steps", "3", check=False)
    assert done.returncode == HUNG and "has been in 'the final weights'" in done.stderr, done.stderr[-5000:]
    for function in ("full_weights", "sleep", "keep_the_interpreter"):
        assert f"in {function}\n" in done.stderr, done.stderr[-5000:]
    # Rank 2's threads could not write, but a timer of the C library's.
    assert "collectives wait 30 minutes" in done.stderr and "the store waits 30 minutes" in done.stderr
    assert patience(30) > datetime.timedelta(minutes=30)
    assert "Timeout (" in done.stderr and "rank 0 on" in done.stderr and "rank 1 on" in done.stderr


def test_a_rank_that_dies_ends_the_others_soon_and_they_say_where(tmp_path):
    processes = start(tmp_path / "dead")
    try:
        reach(tmp_path / "dead", processes, 3)
        os.kill(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(timeout=HANG_S) not in (0, None)
    finally:
        end(processes)
    said = (tmp_path / "dead" / "0.log").read_text()
    assert "error: rank 0 on" in said and "lost the other ranks in 'step" in said


def test_a_second_run_in_the_same_folder_is_refused_but_the_jobs_own_next_start_waits(tmp_path, monkeypatch):
    """A file server lets go of what a lost node held only after a while."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder, started = tmp_path / "one", []
    try:
        # More epochs than the others take to start.
        started += start(folder, "--save_interval", "0", "--epochs", "1000", ranks=1)
        reach(folder, started, 2)
        started += start(folder, "--log_interval", "7", ranks=1, log="second")
        said = f"is in use by process {started[0].pid} on"
        assert started[1].wait(timeout=HANG_S) == 2
        assert said in (folder / "second").read_text() and "another --save_dir" in (folder / "second").read_text()
        assert started[0].poll() is None
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        started += start(folder, "--max_steps", "3", ranks=1, log="third")
        until(lambda: said in (folder / "third").read_text(), "the wait for the lock", started[2:],
              folder / "third")
        assert "waiting, 180 s at most" in (folder / "third").read_text()
        end(started[:1])
        assert started[2].wait(timeout=HANG_S) == 0
    finally:
        end(started)


def test_a_spike_is_judged_by_the_last_steps_and_too_many_skips_in_a_row_end():
    detector = SpikeDetector(2.0 + 0.01 * (i % 5) for i in range(LEAST - 1))
    assert detector.check(99.0) is None
    detector.record(2.02)
    assert detector.check(2.1) is None and "standard deviations above" in detector.check(2.2)
    assert detector.check(float("nan")) == detector.check(float("inf")) == "is not finite"
    assert all(detector.skip() for _ in range(MOST_SKIPPED)) and not detector.skip()
    detector.record(2.0)
    assert detector.skip()


def test_the_window_after_a_resume_is_that_of_the_steps_taken_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0, "skipped": True}, {"step": 2, "eval_loss": 1.0},
             {"step": 3, "loss": 2.5}, {"step": 4, "loss": 2.4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert taken_losses(path, 3) == [3.0, 2.5] and taken_losses(tmp_path / "none", 3) == []


@pytest.mark.parametrize("times, slow", [([0.1, 0.1, 0.5, 0.1], 2), ([0.1, 0.11, 0.12, 0.1], None), ([0.5], None),
                                         ([0.001, 0.01], None)])
def test_the_slow_rank_is_named(times, slow):
    facts = stragglers.slowest(times, [f"node{i}" for i in range(len(times))])
    assert facts.get("slowest_rank") == slow and (slow is None or facts["slowest_host"] == f"node{slow}")
