"""Law 7: a run killed at any moment and started again ends as the run nobody disturbed, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, cache_dir, environment, free_port, rank_environment
from tests.waiting import HANG_S, until

pytestmark = pytest.mark.numeric

MODEL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "dropout": 0.1}
STEPS, EVERY = 18, 4
# What the run is doing when it is killed: having written so many steps, or writing the checkpoint of such a step.
MOMENTS = {"before the first checkpoint": 3, "right after a checkpoint": 4,
           "while writing a checkpoint": "step_00000008", "between checkpoints": 11, "near the end": 17}


class Run:
    """Two ranks of launch/sft.py started as torchrun would start them, killable at once."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path, stage: int, ranks: int = 2, **more):
        self.folder = folder
        config = cache / "run.yaml"
        flags = {"--config": config, "--deepspeed": ROOT / "ds_configs" / f"zero{stage}.json", "--save_dir": folder,
                 "--cache_dir": cache_dir(), "--dtype": "bf16", "--max_steps": STEPS, "--save_interval": EVERY,
                 "--batch_size": 1, "--accumulation_steps": 2, "--max_seq_len": 96, "--pack_len": 96,
                 **{f"--{name}": value for name, value in more.items()}}
        words = [str(w) for pair in flags.items() for w in pair]
        config.write_text("preset: debug\nmodel: " + json.dumps({**MODEL, "use_moe": stage in (1, 3)}))
        port = free_port()
        self.log = folder.with_suffix(".log").open("a")
        self.ranks = [subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "sft.py"), *words], cwd=ROOT, stdout=self.log, stderr=self.log,
            env=rank_environment(rank, ranks, port), start_new_session=True) for rank in range(ranks)]

    def reached(self, moment) -> bool:
        if isinstance(moment, str):
            # Seen too late, it is a moment right after: no less good a time to be killed.
            return any((self.folder / "checkpoints" / f"{stage}{moment}").exists() for stage in (".writing_", ""))
        path = self.folder / "metrics.jsonl"
        return path.exists() and path.read_text().count('"loss"') >= moment

    def kill_at(self, moment) -> None:
        until(lambda: self.reached(moment), f"the moment {moment}", self.ranks, self.folder.with_suffix(".log"))
        for p in self.ranks:
            os.killpg(p.pid, signal.SIGKILL)
        for p in self.ranks:
            p.wait()

    def finish(self) -> None:
        codes = [p.wait(timeout=HANG_S) for p in self.ranks]
        assert codes == [0] * len(codes), self.folder.with_suffix(".log").read_text()[-4000:]


def curve(folder: pathlib.Path) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["aux_loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]


def weights(folder: pathlib.Path) -> dict[str, bytes]:
    """The final weights, bit for bit (the file's header lists its metadata in no fixed order)."""
    return {k: v.numpy().tobytes() for k, v in load_file(next(folder.glob("sft_*.safetensors"))).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(stage): the folder of a run that nobody disturbed."""
    home, folders = tmp_path_factory.mktemp("undisturbed"), {}

    def of(stage: int) -> pathlib.Path:
        if stage not in folders:
            Run(home / f"stage_{stage}", home, stage).finish()
            folders[stage] = home / f"stage_{stage}"
        return folders[stage]
    return of


@pytest.mark.parametrize("stage, moments", [
    (0, ["while writing a checkpoint"]),
    (2, ["before the first checkpoint", "while writing a checkpoint", "near the end"]),
    (3, ["right after a checkpoint"]),
    *[pytest.param(stage, list(MOMENTS), marks=pytest.mark.slow) for stage in range(4)],
])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, undisturbed, stage, moments):
    whole, killed = undisturbed(stage), tmp_path / "killed"
    for moment in moments:
        Run(killed, tmp_path, stage).kill_at(MOMENTS[moment])
    Run(killed, tmp_path, stage).finish()
    assert curve(killed) == curve(whole)
    assert [step for step, *_ in curve(killed)] == list(range(1, STEPS + 1))
    assert weights(killed) == weights(whole)
    if stage == 2:
        # A finished run is left as it is.
        Run(killed, tmp_path, stage).finish()
        assert weights(killed) == weights(whole) and "holds a finished run" in killed.with_suffix(".log").read_text()


def refuse_another(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run of another model does not go on in the folder, nor touch it."""
    before = sorted(p.name for p in folder.rglob("*"))
    other = tmp_path / "other.yaml"
    other.write_text("preset: debug\nmodel: {hidden_size: 64, num_hidden_layers: 2}\n")
    done = subprocess.run([sys.executable, "launch/sft.py", "--config", str(other), "--deepspeed",
                           "ds_configs/zero2.json", "--save_dir", str(folder), "--cache_dir", cache_dir()],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANG_S)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "hidden_size is 48" in said[0], done.stderr
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_another_run_is_refused_and_of_damaged_checkpoints_the_newest_whole_one_is_used(tmp_path, undisturbed):
    whole, hurt = undisturbed(2), tmp_path / "hurt"
    Run(hurt, tmp_path, 2).kill_at(13)
    refuse_another(hurt, tmp_path)
    home = hurt / "checkpoints"
    newest, older = sorted(home.glob("step_*"), reverse=True)[:2]
    file = next(newest.rglob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (home / "latest").write_text("step_00009999\n")
    # As where a signal came: this run writes none after that step.
    between = shutil.copytree(newest, home / f"step_{int(newest.name[5:]) - 1:08}")
    Run(hurt, tmp_path, 2, keep=9).finish()
    # It is no more counted as kept than what comes after the newest.
    assert older.exists() and newest.exists() and not between.exists()
    said = hurt.with_suffix(".log").read_text()
    assert f"{newest.name}" in said and "was altered" in said and f"resuming from {older}" in said
    assert curve(hurt) == curve(whole) and weights(hurt) == weights(whole)
