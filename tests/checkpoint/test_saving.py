"""A checkpoint that is written in the background is what was copied, or it is not there; no damage goes unseen."""

import collections
import dataclasses
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import threading
import types

import pytest
import torch
import torch.distributed as dist

from minimind_ds import checkpoint
from minimind_ds.checkpoint.async_save import AsyncSave, facts_of, snapshot
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import RunConfig
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.distributed.world import free_port
from minimind_ds.training import disk
from tests.waiting import HANG_S

Pair = collections.namedtuple("Pair", "left right")


@pytest.fixture(scope="module")
def group():
    store = dist.TCPStore("127.0.0.1", int(free_port()), 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory, deepspeed):
    """The checkpoints of two steps of a real run."""
    out = tmp_path_factory.mktemp("written")
    (out / "run.yaml").write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}\n")
    deepspeed(1, "launch/sft.py", "--config", str(out / "run.yaml"), "--deepspeed", "ds_configs/zero2.json",
              "--save_dir", str(out / "run"), "--cache_dir", str(out), "--dtype", "fp32", "--max_steps", "3",
              "--save_interval", "1", "--max_seq_len", "96", "--pack_len", "96")
    return out / "run"


def test_a_snapshot_is_a_copy_that_keeps_kinds_and_sharing():
    tensor = torch.arange(6.0).view(2, 3)
    state = collections.OrderedDict(a=tensor, b=[tensor, Pair(tensor[0], 3)], c={"d": None, "e": torch.Size((2, 3))})
    state._metadata = {"version": 1}
    copied = snapshot(state)
    tensor.fill_(9)
    assert torch.equal(copied["a"], torch.arange(6.0).view(2, 3)) and copied["b"][0] is copied["a"]
    assert type(copied["b"][1]) is Pair and copied["b"][1].left.tolist() == [0, 1, 2]
    assert copied["c"] == {"d": None, "e": (2, 3)} and copied._metadata == {"version": 1}
    assert copied["b"][1].left.untyped_storage().nbytes() == 12


def commit_to(home: pathlib.Path, step: int):
    aside, final = home / f".writing_{checkpoint.name_of(step)}", home / checkpoint.name_of(step)
    return aside, final, lambda written: checkpoint.commit(aside, final, {"step": step}, written)


def test_nothing_is_in_place_until_everything_is_on_disk(tmp_path, group):
    aside, final, commit = commit_to(tmp_path, 1)
    gate = threading.Event()

    def slowly(path):
        path.write_bytes(b"half")
        gate.wait(HANG_S)
        path.write_bytes(b"whole")

    saving = AsyncSave([(aside / "state" / "a.pt", slowly)], root=aside, commit=commit, what="writing")
    assert not final.exists() and not (tmp_path / "latest").exists()
    gate.set()
    saving.finish()
    manifest, wrong = checkpoint.verify(final)
    assert wrong is None and (final / "state" / "a.pt").read_bytes() == b"whole"
    assert manifest["files"]["state/a.pt"] == facts_of(final / "state" / "a.pt")
    assert (tmp_path / "latest").read_text().strip() == final.name


def test_a_long_run_s_saves_leave_nothing_in_the_store(tmp_path, group):
    keys = []
    for step in range(1, 9):
        aside, _, commit = commit_to(tmp_path, step)
        AsyncSave([(aside / "a.pt", lambda path: path.write_bytes(b"x"))], root=aside, commit=commit, what="").finish()
        keys.append(dist.distributed_c10d._get_default_store().num_keys())
    assert keys[2:] == [keys[2]] * 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, group, number):
    aside, final, commit = commit_to(tmp_path, 1)
    AsyncSave([(aside / "a.pt", lambda path: path.write_bytes(b"good"))], root=aside, commit=commit, what="").finish()

    def fail(path):
        path.write_bytes(b"torn")
        raise OSError(number, "as the disk says")

    aside, second, commit = commit_to(tmp_path, 2)
    saving = AsyncSave([(aside / "a.pt", fail)], root=aside, commit=commit, what=f"writing {second}")
    with pytest.raises(RuntimeError, match="step_00000002 failed on rank 0: OSError.*as the disk says"):
        saving.finish()
    assert not second.exists() and checkpoint.verify(final)[1] is None
    assert (tmp_path / "latest").read_text().strip() == final.name


def test_a_disk_that_fills_up_at_any_byte_of_a_state_is_named(tmp_path):
    state, (soft, hard) = {str(i): torch.rand(20_000 + i) for i in range(3)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in range(100, 240_000, 7919):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                checkpoint.write_state(state, tmp_path / "state.pt")
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoint.write_state(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt").keys() == state.keys()


def test_a_commit_that_fails_is_a_save_that_failed(tmp_path, group):
    aside, final, _ = commit_to(tmp_path, 1)

    def refuse(written):
        raise PermissionError("no rename here")

    with pytest.raises(RuntimeError, match="no rename here"):
        AsyncSave([(aside / "a.pt", lambda path: path.write_bytes(b"x"))], root=aside, commit=refuse, what="").finish()
    assert not final.exists()


@pytest.mark.parametrize("keep, passed_over, stay", [(1, [], [14]), (2, [], [12, 14]), (9, [], [8, 12, 14]),
                                                     (2, [12, 14, 16], [8, 14])])
def test_retention_counts_no_checkpoint_that_was_passed_over(tmp_path, group, keep, passed_over, stay):
    for step in (8, 12, 16, 20, 14):
        aside, final, commit = commit_to(tmp_path, step)
        AsyncSave([(aside / "a.pt", lambda path: path.write_bytes(b"x"))], root=aside, commit=commit, what="").finish()
    (tmp_path / ".writing_step_00000024").mkdir()
    checkpoint.retain(final, keep, list(map(checkpoint.name_of, passed_over)))
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == [checkpoint.name_of(step) for step in stay]
    assert not list(tmp_path.glob(".*")) and checkpoint.verify(final)[1] is None


def test_the_lines_of_the_steps_before_a_checkpoint_are_on_disk_before_it(tmp_path, group, monkeypatch):
    """A power cut must not leave a checkpoint whose steps metrics.jsonl has lost."""
    home, done, fsync, rename = tmp_path / "checkpoints", [], os.fsync, os.rename
    home.mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(str(new)), rename(old, new)))
    aside, final, commit = commit_to(home, 1)
    AsyncSave([(aside / "a.pt", lambda path: path.write_bytes(b"x"))], root=aside, commit=commit, what="").finish()
    assert done.index(str((tmp_path / "metrics.jsonl").resolve())) < done.index(str(final))


def test_a_checkpoint_holds_deepspeed_s_own_programs_and_its_manifest_names_them(written):
    newest = sorted((written / "checkpoints").glob("step_*"))[-1]
    manifest, wrong = checkpoint.verify(newest)
    assert wrong is None and {"zero_to_fp32.py", "zero_to_torch.py"} <= manifest["files"].keys()
    assert all((newest / name).is_file() for name in manifest["files"])


def test_every_truncation_and_every_flipped_bit_is_found_and_the_newest_whole_one_taken(tmp_path, written):
    run = tmp_path / "run"
    shutil.copytree(written, run)
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    older = sorted((run / "checkpoints").glob("step_*"))[-2]
    draw = random.Random(0)
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) >= 4
    damages = [(path, "cut", draw.randrange(path.stat().st_size)) for path in files for _ in range(20)]
    damages += [(draw.choice(files), "flip", draw.randrange(8)) for _ in range(200)]
    for path, kind, where in damages:
        whole = path.read_bytes()
        if kind == "cut":
            path.write_bytes(whole[:where])
        else:
            at = draw.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << where]) + whole[at + 1:])
        manifest, wrong = checkpoint.verify(newest)
        assert wrong is not None and manifest is None, (path, kind, where)
        path.write_bytes(whole)
    assert checkpoint.verify(newest)[1] is None
    files[0].write_bytes(files[0].read_bytes()[:-1])
    path, manifest, complaints = checkpoint.find("auto", run)
    assert path == older and manifest["step"] == 2 and str(newest) in complaints[0]


class Planted:
    """What a pickle may do: make a file when it is opened."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_file_that_the_manifest_does_not_list_is_refused_and_none_runs_code(tmp_path, written):
    run, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(written, run)
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    stranger = newest / "state" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Planted(ran)}, stranger)
    assert "is not in the checkpoint's manifest" in checkpoint.verify(newest)[1]
    with pytest.raises(ValueError, match="refused: it holds more than tensors"):
        deepspeed_compat.load_states(stranger)
    assert not ran.exists()
    stranger.unlink()
    for plant in (lambda: stranger.symlink_to("/etc/passwd"), lambda: os.mkfifo(stranger), lambda: stranger.mkdir()):
        plant()
        assert checkpoint.verify(newest)[1].startswith(str(stranger))
        stranger.rmdir() if stranger.is_dir() else stranger.unlink()
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["../../../passwd"] = facts_of(pathlib.Path("/etc/passwd"))
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "manifest.sha256").write_text(facts_of(newest / "manifest.json")["sha256"] + "\n")
    assert "which is outside of it" in checkpoint.verify(newest)[1]


def test_only_what_this_program_calls_its_checkpoints_is_deleted_and_nothing_through_a_link(tmp_path, written):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(written, run)
    shutil.copytree(written / "checkpoints", elsewhere)
    home = run / "checkpoints"
    (home / "step_99zz").mkdir()
    (home / "step_00000099").symlink_to(elsewhere)
    (home / "notes.txt").write_text("mine")
    checkpoint.clear(run)
    assert sorted(path.name for path in home.iterdir()) == ["notes.txt", "step_00000099", "step_99zz"]
    assert len(list(elsewhere.iterdir())) == len(list((written / "checkpoints").iterdir()))
    shutil.rmtree(home)
    home.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link, and --from_resume none deletes nothing through one"):
        checkpoint.clear(run)


def test_a_disk_that_cannot_hold_a_checkpoint_is_named_before_the_run_starts(written, monkeypatch):
    config = dataclasses.replace(PRESETS["debug"], hidden_size=48, num_hidden_layers=2, head_dim=12,
                                 intermediate_size=None,
                                 moe_intermediate_size=None)
    ds = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    newest = sorted((written / "checkpoints").glob("step_*"))[-1]
    there = sum(path.stat().st_size for path in newest.glob("state/*.pt"))
    least = disk.checkpoint_bytes(ds, "fp32", config, None)
    assert least <= there < least + 100_000
    run = RunConfig(preset="debug", dtype="fp32", save_dir=str(written))
    free = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free[-1]))
    free.append(10 * there)
    assert disk.check(run, ds, config, None) == []
    free.append(3 * there)
    assert "the run may fill it" in disk.check(run, ds, config, None)[0]
    free.append(least)
    with pytest.raises(UserError, match=r"and a checkpoint takes 5\.[0-9] MiB, the final weights"):
        disk.check(run, ds, config, None)
    assert disk.check(run.replace(save_interval=0), ds, config, None) == []
