"""Shared by all tests: the repository's root, the optional shared folder, and real deepspeed processes."""

import atexit
import base64
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from importlib import metadata

import psutil
import pytest

from tests import closing, starts

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Ranks of one test share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is compiled once serves all later runs of the tests.
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "minimind_ds" / "tests"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TORCH_EXTENSIONS_DIR",
                      str(CACHE / f"{sys.implementation.cache_tag}_torch_{metadata.version('torch')}"))
# First, so that no worker is left with minutes of work when the others have none.
LONGEST = ["test_slurm", "test_edges", "test_layouts", "test_configs", "test_parallel", "test_verify",
           "test_lora_stages", "test_resume", "test_zero_files", "test_triton_moe", "test_faults", "test_reshape",
           "test_planner", "test_benchmark", "test_triton_attention", "test_triton_model", "test_watchdog",
           "test_power_cut", "test_saving"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--exec", action="store_true", help="start all programs by exec, none by fork (tests/starts.py)")
    parser.addoption("--cpu", action="store_true", help="tell the CPU seconds of each test file")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow")
    config.addinivalue_line("markers", "numeric: compares numbers; tests/machines.py plays other machines for it")
    config.addinivalue_line("markers", "by_exec(reason): its programs are started by exec, none by fork")
    config.pluginmanager.register(closing.Closing(config), "closing")
    if config.getoption("--exec"):
        os.environ["MINIMIND_DS_EXEC"] = "1"
    starts.BASE.update(environment())
    subprocess.Popen = starts.Popen


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.pluginmanager.get_plugin("closing").slow = len(slow)
        config.hook.pytest_deselected(items=slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    starts.MARKED[:] = [marker.args[0] for marker in item.iter_markers("by_exec")]


@pytest.fixture(scope="session")
def shared():
    """MiniMind's goldens, tokenizer and real data."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder beside the checkout (MiniMind's goldens, tokenizer and data)")
    return SHARED


@functools.cache
def cache_dir() -> str:
    """A folder for tokenised data that this process's tests share, as long as it lives."""
    folder = tempfile.TemporaryDirectory(prefix="cache_")
    atexit.register(folder.cleanup)
    return folder.name


@pytest.fixture(autouse=True)
def clear_routes(request):
    """A numeric test's own process chooses no expert by rounding; ranks' programs say so themselves."""
    if "numeric" not in request.keywords:
        yield
        return
    from tests.routes import assert_clear, watched_routes

    with watched_routes() as gaps:
        yield
    assert_clear(gaps)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def deepspeed_command(ranks: int, *words: str) -> list[str]:
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", str(ranks), "--master_port", str(free_port()), *words]


def ranks_command(ranks: int, *words: str) -> list[str]:
    """What `deepspeed` starts on each machine once it has looked for a host file, seconds later."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}",
            "--master_addr=127.0.0.1", f"--master_port={free_port()}", *words]


# What makes a process a rank: programs that run inside the tests' own process set these for themselves.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


# Lines that tests read are not wrapped.
WIDE = "10000"


@pytest.fixture(autouse=True)
def unchanged_environment():
    """A test leaves the environment as it found it."""
    before = dict(os.environ)
    os.environ["COLUMNS"] = WIDE
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def environment(**extra: str) -> dict:
    """The environment of a started program: the tests' own, with the venv's ninja and python first."""
    bin_dir = str(pathlib.Path(sys.executable).parent)
    inherited = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    return {**inherited, "PATH": bin_dir + os.pathsep + os.environ["PATH"], "DS_ACCELERATOR": "cpu",
            "COLUMNS": WIDE, **extra}


def rank_environment(rank: int, ranks: int, port: int, **extra: str) -> dict:
    """The environment of a rank that no launcher starts, as torchrun would set it."""
    return environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **extra)


@pytest.fixture(scope="session")
def deepspeed():
    """deepspeed(ranks, program, *flags) runs to its end; returns the finished process, checked unless check=False.

    Users' programs are started as users start them, the tests' own without the first of DeepSpeed's two launchers.
    """

    def run(ranks: int, *words: str, check: bool = True, timeout: float = 1800, **extra: str):
        command = ranks_command if words[0].startswith("tests/") else deepspeed_command
        process = subprocess.Popen(command(ranks, *words), cwd=ROOT, env=environment(**extra), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            # The ranks are sessions of their own, and would outlive the launcher.
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out, err = process.communicate()
            pytest.fail(f"{' '.join(words)} took over {timeout} s\n{out[-4000:]}\n{err[-6000:]}")
        if check and process.returncode:
            pytest.fail(f"{' '.join(words)} ended with {process.returncode}\n{out[-4000:]}\n{err[-6000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
