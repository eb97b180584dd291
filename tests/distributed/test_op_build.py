"""A process that is killed while it compiles an operation holds up nobody; two never compile at once."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from minimind_ds.distributed import torch_compat
from minimind_ds.distributed.torch_compat import BuildLock
from tests.conftest import ROOT, environment

FORK = multiprocessing.get_context("fork")


def hold(path: str, taken, keep: float) -> None:
    lock = BuildLock(path, 0.01)
    lock.try_acquire()
    taken.set()
    time.sleep(keep)
    lock.release()


def started(path, keep: float):
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(str(path), taken, keep))
    process.start()
    assert taken.wait(20)
    return process


def test_a_killed_builder_s_lock_is_taken_at_once(tmp_path):
    path = tmp_path / "lock"
    builder = started(path, 60)
    ours = BuildLock(str(path))
    assert not ours.take() and path.exists()
    builder.kill()
    builder.join()
    # What torch's own waits for.
    assert path.exists() and ours.take()
    ours.release()
    assert not path.exists()


def test_one_at_a_time_whoever_comes_when(tmp_path):
    path, inside, most, lock = tmp_path / "lock", [], [], threading.Lock()

    def build():
        for _ in range(20):
            baton = BuildLock(str(path), 0.001)
            assert baton.try_acquire()
            with lock:
                inside.append(1)
                most.append(len(inside))
            time.sleep(0.002)
            with lock:
                inside.pop()
            baton.release()
    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 160 and max(most) == 1 and not path.exists()


def test_torch_s_own_lock_is_waited_for_but_not_for_ever(tmp_path, monkeypatch, capsys):
    FileBaton = pytest.importorskip("torch.utils.file_baton", reason="this torch has no lock of its own").FileBaton
    path = tmp_path / "lock"
    theirs, ours = FileBaton(str(path)), BuildLock(str(path), 0.01)
    assert theirs.try_acquire() and not ours.take()
    assert not FileBaton(str(path)).try_acquire()
    theirs.release()
    # And theirs waits for ours.
    assert ours.take() and not FileBaton(str(path)).try_acquire()
    ours.release()

    assert theirs.try_acquire()
    monkeypatch.setattr(torch_compat, "TELL_S", 0.05)
    monkeypatch.setattr(torch_compat, "FOREIGN_S", 0.3)
    assert ours.try_acquire()
    said = capsys.readouterr().err
    assert said.count("waiting for another process that compiles") == 1 and str(path) in said
    ours.release()


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP"])
def test_where_files_cannot_be_locked_it_is_as_torch_s_but_for_old_files(tmp_path, monkeypatch, error):
    import errno

    def refuse(*_):
        raise OSError(getattr(errno, error), "no locks here")
    monkeypatch.setattr(torch_compat.fcntl, "flock", refuse)
    path = tmp_path / "lock"
    one, other = BuildLock(str(path)), BuildLock(str(path))
    assert one.take() and not other.take()
    os.utime(path, (time.time() - 2 * torch_compat.FOREIGN_S,) * 2)
    assert other.take()
    other.release()


@pytest.mark.by_exec("asserts what is loaded")
@pytest.mark.parametrize("first", ["", "import torch.utils.cpp_extension; "])
def test_an_engine_s_process_compiles_under_it(first):
    code = (f"{first}from minimind_ds.distributed import engine, torch_compat, world; "
            "engine.start(world.read_world()); "
            "import torch.utils.cpp_extension as c; "
            # torch 2.14 and later lock the file themselves.
            "assert c.FileBaton is torch_compat.BuildLock if hasattr(c, 'FileBaton') else c.FileLock; "
            "from deepspeed.accelerator import get_accelerator; "
            "of = get_accelerator().create_op_builder; "
            "every = [of(f'{name}Builder').cxx_args() for name in ('CPUAdam', 'CPULion', 'CPUAdagrad', 'FusedAdam')]; "
            "assert all('-O3' in args and args[-1] == '-g0' and args.count('-g0') == 1 for args in every), every; "
            "engine.stop()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True, timeout=600)
