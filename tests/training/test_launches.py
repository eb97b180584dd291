"""An optimizer step starts few kernels and makes the host wait once: what a step costs a GPU beside its arithmetic.

A small step is bound by the time in which the CPU launches it, and the update by all of it, since nothing else is left
for the GPU to do meanwhile.  DeepSpeed's own update of MiniMind-3 at stage 0, and its check of every gradient at
stages 1 and 2, make 2,345 and 1,414 launches, with 94 and 5 waits.

    python -m pytest -s tests/training/test_launches.py
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

pytest.importorskip("triton")

STEP, UPDATE = {"dense": 800, "moe": 1000}, 60
FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


def counted(out, model: str, stage: int, keys: dict | None = None) -> tuple[dict, dict]:
    """-> launches by phase, waits by phase."""
    command = [sys.executable, "-m", "tests.training.launches", str(out), model, str(stage), json.dumps(keys or {})]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    launches, waits = ({phase: sum(names.values()) for phase, names in found[kind].items()}
                       for kind in ("launches", "waits"))
    print(f"\n{model}, stage {stage}: launches {launches}, {sum(launches.values())} in all; waits {found['waits']}")
    return launches, waits


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_step_is_few_launches_and_one_wait(model, stage, tmp_path):
    launches, waits = counted(tmp_path, model, stage)
    # So that a count which sees nothing does not pass.
    assert launches["forward"] > 100 and launches["backward"] > 200 and launches["update"] >= 10
    assert launches["update"] <= UPDATE and sum(launches.values()) <= STEP[model]
    assert waits == {"update": 1}


def test_an_update_at_stage_3_waits_for_its_norm_alone(tmp_path):
    launches, waits = counted(tmp_path, "dense", 3)
    # DeepSpeed brings a number to the GPU there, and others while it learns the order of the layers.
    assert launches["update"] <= 250 and waits["update"] == 2


def test_a_check_of_every_gradient_is_made_where_the_file_asks_for_it(tmp_path):
    launches, waits = counted(tmp_path, "dense", 1, {"bf16": {"enabled": True, "check_grad_overflow": True}})
    assert launches["update"] > 1000 and waits == {"update": 2}


def test_deepspeeds_fused_adam_at_stage_0_checks_its_norm_only(tmp_path):
    launches, waits = counted(tmp_path, "dense", 0, FUSED)
    assert launches["update"] <= 600 and sum(waits.values()) <= 3
