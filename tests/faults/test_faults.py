"""Whatever is done to a run from outside, it ends as the run nobody disturbed; docs/RELIABILITY.md has the figures."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.faults.dealing import ALL, ENDS, EVERY, deal, steps_for
from tests.faults.disk import FailingDisk
from tests.waiting import HANG_S


def injected(tmp_path, *words: str, timeout: float) -> dict:
    out = tmp_path / "faults.json"
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--out", str(out), *words], cwd=ROOT, text=True,
                          env=environment(TMPDIR=str(tmp_path)), capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def check(result: dict, faults: int) -> None:
    totals = result["totals"]
    assert totals["injected"] == totals["recovered"] == faults
    assert totals["silently_corrupted"] == totals["hangs"] == totals["manual_steps"] == 0
    assert totals["equal"] and all(run["equal"] for run in result["runs"].values())


def test_a_few_faults_leave_weights_and_curves_as_they_would_have_been(tmp_path):
    check(injected(tmp_path, "--faults", "4", "--seed", "9", "--over", "zero1-moe-experts-rows",
                   timeout=4 * HANG_S), 4)


def test_a_disk_that_fails_before_training_begins_is_one_line_and_not_a_user_s_mistake(tmp_path):
    failing = FailingDisk(tmp_path, tmp_path / "run")
    if failing.why_not:
        pytest.skip(failing.why_not)
    failing.fail("write")
    config = tmp_path / "run.yaml"
    config.write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}\n")
    done = subprocess.run([sys.executable, "launch/sft.py", "--deepspeed", "ds_configs/zero2.json", "--config",
                           str(config), "--save_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path)], cwd=ROOT,
                          env=environment(**failing.environment), capture_output=True, text=True, timeout=HANG_S)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "Input/output error" in said[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hundred_faults_leave_weights_and_curves_as_they_would_have_been(tmp_path):
    check(injected(tmp_path, timeout=7200), 100)


@pytest.mark.parametrize("faults", [1, 12, 100, 1000])
def test_a_deal_has_all_its_faults_in_order_and_at_steps_that_come(faults):
    for seed in range(20):
        hands = deal(faults, seed, ALL, set())
        starts = [start for hand in hands.values() for start in hand]
        assert sum(len(s.during) + bool(s.end) + len(s.between) for s in starts) == faults
        assert hands == deal(faults, seed, ALL, set()) and all(hand[-1].end is None for hand in hands.values())
        for hand in hands.values():
            steps = steps_for(sum(len(s.during) + bool(s.end) + len(s.between) for s in hand))
            at = [step for s in hand for step, _ in [*s.during, *([s.end] if s.end else [])]]
            # A checkpoint is written after the last stop, and a step is taken after the last of all.
            assert at == sorted(at) and all(0 < s.end[0] < steps - EVERY for s in hand if s.end)
            assert not at or at[-1] < steps
        if faults >= 100:
            assert {s.end[1] for s in starts if s.end} == set(ENDS)


def test_a_deal_leaves_out_what_the_machine_cannot_do():
    for hand in deal(100, 0, ALL, {"disk full", "EIO on write"}).values():
        assert not {s.end[1] for s in hand if s.end} & {"disk full", "EIO on write"}
