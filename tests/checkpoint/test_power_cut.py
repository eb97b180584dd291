"""Whatever call a `kill -9` or a power cut comes after, what lies on the disk is a run that goes on; law 7, all of it.

    python -m pytest tests/checkpoint/test_power_cut.py
"""

import collections
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest

from minimind_ds import checkpoint
from minimind_ds.resilience import restarts
from minimind_ds.training import metrics
from tests.conftest import ROOT, environment, free_port
from tests.faults import power_cut
from tests.faults.power_cut import Disk, Folder
from tests.waiting import HANG_S, until

STEPS, EVERY, KILLED_AFTER = 9, 2, 5
RUN, WEIGHTS = "runs/sft", "sft_16.safetensors"
MODEL = "preset: debug\nmodel: {hidden_size: 16, num_hidden_layers: 1, intermediate_size: 32}\n"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """-> (the run's folder, the calls of its starts): two ranks, killed once amidst the training, started again."""
    if why := power_cut.missing():
        (pytest.fail if os.environ.get("MINIMIND_DS_NEEDS_ALL") else pytest.skip)(why)
    home = tmp_path_factory.mktemp("power")
    (home / "run.yaml").write_text(MODEL)
    folder, starts = home / "disk" / RUN, []
    folder.parents[1].mkdir()
    for start in range(2):
        rank = shlex.join([
            sys.executable, "launch/sft.py", "--config", str(home / "run.yaml"), "--deepspeed",
            "ds_configs/zero2.json", "--save_dir", str(folder), "--cache_dir", str(home), "--dtype", "fp32",
            "--max_steps", str(STEPS), "--save_interval", str(EVERY), "--max_seq_len", "96", "--pack_len", "96"])
        both = f"RANK=1 LOCAL_RANK=1 {rank} & RANK=0 LOCAL_RANK=0 {rank} && wait $!"
        running = subprocess.Popen(
            power_cut.recorded(home / f"{start}.log", ["sh", "-c", both]), cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=environment(TORCHELASTIC_RESTART_COUNT=str(start), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())))
        if start == 0:
            until(lambda: restarts.last_step(folder) >= KILLED_AFTER, f"step {KILLED_AFTER}", [running])
            os.killpg(running.pid, signal.SIGKILL)
        said = running.communicate(timeout=HANG_S)[0]
        assert running.returncode == (0 if start else -signal.SIGKILL), said[-5000:]
        starts.append(list(power_cut.calls(home / f"{start}.log", home / "disk")))
    return folder, starts


@pytest.fixture
def lying(tmp_path):
    return Lying(tmp_path)


class Lying:
    """States of a disk, laid out in a folder one after another; what two have in common is written once."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.now = folder, {}

    def lay(self, state: dict[str, bytes | None]) -> None:
        for path in sorted(self.now.keys() - state.keys(), reverse=True):
            place = self.folder / path
            place.rmdir() if place.is_dir() else place.unlink()
        for path, data in state.items():
            if data is None:
                (self.folder / path).mkdir(exist_ok=True)
            elif self.now.get(path) is not data:
                (self.folder / path).write_bytes(data)
        self.now = dict(state)


def wrong(lying: Lying, acknowledged: int, final: dict[str, bytes]) -> str | None:
    """What a start would stumble over in the run folder that lies there; None: it goes on as promised.

    Args:
        acknowledged: the step of the newest checkpoint that the training has gone on from, sure of it.
        final: the files of the finished run.
    """
    run = lying.folder / RUN
    try:
        path, manifest, _ = checkpoint.find("auto", run)
    except ValueError as error:
        return str(error)
    step = manifest["step"] if path else 0
    if step < acknowledged:
        return f"the newest whole checkpoint is of step {step} instead of {acknowledged}"
    for name in ("run.yaml", "ds_config.json"):
        if (run / name).exists() and (run / name).read_bytes() != final[f"{RUN}/{name}"]:
            return f"{name} is torn"
    for name in ("DONE", "attempts.json"):
        try:
            json.loads((run / name).read_text() if (run / name).exists() else "{}")
        except ValueError:
            return f"{name} is torn"
    latest = run / "checkpoints" / "latest"
    if latest.exists() and not re.fullmatch(r"step_\d{8}\n", latest.read_text()):
        return "latest is torn"
    if (run / "DONE").exists():
        torn = [name for name in (WEIGHTS, "metrics.jsonl") if not (run / name).exists()
                or (run / name).read_bytes() != final[f"{RUN}/{name}"]]
        return f"finished, but for {torn}" if torn else None
    lines, copy = [], lying.folder / "metrics"
    if (run / "metrics.jsonl").exists():
        copy.write_bytes((run / "metrics.jsonl").read_bytes())
        metrics.keep_until(copy, step)
        lines = [json.loads(line)["step"] for line in copy.read_text().splitlines() if "loss" in json.loads(line)]
    return None if lines == list(range(1, step + 1)) else f"the lines of steps {lines} and a checkpoint of step {step}"


def stumbles(starts: list[list[tuple]], root: pathlib.Path, lying: Lying, kinds, seed: int) -> collections.Counter:
    """What is wrong after a power cut behind any of the calls, and how often; 'fine' counts the rest.

    Args:
        starts: the calls of each start of the run.
        kinds: what to leave, as Disk.left takes it.
        seed: for what chance leaves, and for which writes are looked behind: of those in a row, one in ten.
    """
    disk, draw, found, seen = Disk(root), random.Random(seed), collections.Counter(), set()
    final, acknowledged = whole(starts, root).left("all", draw), 0
    for calls in starts:
        writing = 0
        for call in calls:
            disk.apply(call)
            if call[0] == "mkdir" and (place := re.search(r"/\.writing_step_(\d+)$", call[1])):
                # The one before it is finished.
                acknowledged, writing = max(acknowledged, writing), int(place[1])
            last = call is starts[-1][-1]
            if call[0] in ("write", "seek") and not last and draw.random() < 0.9:
                continue
            for kind in kinds:
                state = disk.left(kind, draw)
                key = (acknowledged, last, *((path, data and hash(data)) for path, data in state.items()))
                if key not in seen:
                    seen.add(key)
                    lying.lay(state)
                    unknown = last and f"{RUN}/DONE" not in state
                    found["not known to be finished" if unknown else wrong(lying, acknowledged, final) or "fine"] += 1
    return found


def whole(starts: list[list[tuple]], root: pathlib.Path) -> Disk:
    disk = Disk(root)
    for call in itertools.chain(*starts):
        disk.apply(call)
    return disk


def test_replayed_calls_make_the_files_that_are_there(log):
    folder, starts = log
    disk = whole(starts, folder.parents[1])
    left = disk.left("all", random.Random(0))
    assert left.keys() == {path.relative_to(disk.root).as_posix() for path in disk.root.rglob("*")}
    assert all((disk.root / path).read_bytes() == data for path, data in left.items() if data is not None)
    assert {call[0] for call in starts[0]} >= {"open", "write", "fsync", "rename", "mkdir", "remove"}


def test_a_kill_after_any_call_leaves_a_run_that_goes_on(log, lying):
    folder, starts = log
    found = stumbles(starts, folder.parents[1], lying, ["all"], 0)
    assert set(found) == {"fine"} and found["fine"] > 100, found


def test_a_power_cut_after_any_call_leaves_a_run_that_goes_on(log, lying):
    folder, starts = log
    found = stumbles(starts, folder.parents[1], lying, ["none", "folders", "some", "some"], 1)
    assert set(found) == {"fine"} and found["fine"] > 200, found


@pytest.mark.parametrize("what", ["files", "folders"])
def test_without_its_fsyncs_a_run_would_not_survive_all_of_them(log, lying, what):
    folder, starts = log
    disk, kept = Disk(folder.parents[1]), [[], []]
    for calls, left in zip(starts, kept):
        for call in calls:
            disk.apply(call)
            if call[0] != "fsync" or isinstance(disk.at(call[1]), Folder) != (what == "folders"):
                left.append(call)
    found = stumbles(kept, folder.parents[1], lying, ["none", "folders"], 2)
    assert len(found) > 1, found
