"""A program that is forked finds what one that is exec'd finds, and ends as it ends."""

import json
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from tests import starts
from tests.conftest import ROOT, environment

FACTS = """
import json, os, random, signal, sys, threading
import deepspeed, numpy, torch, transformers
print("to stderr", file=sys.stderr)
handlers = {n: str(signal.getsignal(n)).split(" at ")[0] for n in sorted(signal.valid_signals()) if n not in (9, 19)}
print(json.dumps({"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ), "path": sys.path,
                  "name": __name__, "session": os.getsid(0) == os.getpid(), "parent": os.getppid(),
                  "stdin": sys.stdin.read(), "descriptors": sorted(os.listdir("/proc/self/fd"))[:3],
                  "handlers": handlers, "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
                  "threads": threading.active_count(),
                  "ours": sorted(n for n in sys.modules if n.split(".")[0] in ("tests", "starts", "minimind_ds")),
                  "drawn": [*torch.rand(4).tolist(), *numpy.random.rand(4), random.random()],
                  "buffered": type(sys.stdout.buffer).__name__}))
"""
# A program: its exit code.
ENDS = {"import sys; sys.exit(7)": 7, "import sys; sys.exit('a line')": 1, "import sys; sys.exit()": 0, "1 / 0": 1,
        "import os; os._exit(9)": 9, "import os; os.kill(os.getpid(), 9)": -9, "raise KeyboardInterrupt": -2,
        "import atexit; atexit.register(print, 'at the end')": 0,
        "import threading; threading.Timer(0.2, print, ['of a thread']).start()": 0,
        "import ctypes, atexit; atexit.register(ctypes.CDLL(None).abort)": -6}
by_fork = pytest.mark.skipif("MINIMIND_DS_EXEC" in os.environ, reason="programs started by fork")


def both(monkeypatch, command: list, **options) -> list[subprocess.CompletedProcess]:
    """[of the forked program, of the exec'd one]; and that they were."""
    before = starts.STARTS["fork"]
    forked = subprocess.run(command, capture_output=True, text=True, timeout=200, **options)
    assert starts.STARTS["fork"] == before + 1
    monkeypatch.setattr(starts, "MARKED", ["the other of a pair"])
    execed = subprocess.run(command, capture_output=True, text=True, timeout=200, **options)
    assert starts.STARTS["fork"] == before + 1
    monkeypatch.setattr(starts, "MARKED", [])
    return [forked, execed]


@by_fork
@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_forked_program_finds_what_an_exec_d_one_finds(tmp_path, monkeypatch, unbuffered):
    (tmp_path / "given").write_text("by stdin")
    (tmp_path / "facts.py").write_text(FACTS)
    found = []
    for start_new_session in (True, False) if not unbuffered else (True,):
        with (tmp_path / "given").open() as given:
            forked, execed = both(monkeypatch, [sys.executable, *unbuffered, "facts.py", "a b", "--c"], cwd=tmp_path,
                                  env=environment(RANK="3"), start_new_session=start_new_session, stdin=given)
        assert forked.returncode == execed.returncode == 0, forked.stderr + execed.stderr
        assert "to stderr" in forked.stderr and "to stderr" not in forked.stdout
        a, b = (json.loads(done.stdout.splitlines()[-1]) for done in (forked, execed))
        # The same open file: the second reads on where the first has ended.
        assert (a.pop("stdin"), b.pop("stdin")) == ("by stdin", "")
        assert not set(a.pop("drawn")) & set(b.pop("drawn"))
        assert a == b and a["parent"] == os.getpid() and a["session"] == start_new_session
        found.append(a)
    assert found[0]["environment"]["RANK"] == "3" and found[0]["argv"] == ["facts.py", "a b", "--c"]


@by_fork
@pytest.mark.parametrize("program", ENDS)
def test_a_forked_program_ends_as_an_exec_d_one_ends(monkeypatch, program):
    forked, execed = both(monkeypatch, [sys.executable, "-c", program], env=environment())
    assert forked.returncode == execed.returncode == ENDS[program]
    assert forked.stdout == execed.stdout
    assert forked.stderr.splitlines()[-1:] == execed.stderr.splitlines()[-1:]


@by_fork
def test_a_forked_program_is_found_by_its_words_and_killed_with_its_session(tmp_path):
    command = [sys.executable, "-u", "-c", "import time; print(end='.'); time.sleep(600)", f"--in={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, start_new_session=True) as run:
        # Not a line: it is written at once.
        assert run.stdout.read(1) == b"."
        assert f"--in={tmp_path}" in psutil.Process(run.pid).cmdline() and run.poll() is None
        assert psutil.Process(run.pid) in psutil.Process().children()
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(timeout=60) == -signal.SIGTERM


@by_fork
def test_threads_may_start_programs_at_once():
    codes = {}

    def start(code: int) -> None:
        command = [sys.executable, "-c", f"import sys; sys.exit({code})"]
        codes[code] = subprocess.run(command, env=environment()).returncode

    threads = [threading.Thread(target=start, args=(code,)) for code in range(3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {code: code for code in range(3, 7)}


@pytest.mark.parametrize("why, extra, flags", [
    ("other values of OMP_NUM_THREADS", {"OMP_NUM_THREADS": "17"}, []),
    ("other values of LD_PRELOAD", {"LD_PRELOAD": ""}, []),
    ("other values of PYTHONHASHSEED", {"PYTHONHASHSEED": "5"}, []),
    ("options of Popen or of the interpreter", {}, ["-I"])])
def test_what_is_read_when_a_process_starts_is_a_reason_to_exec(why, extra, flags):
    why = "--exec" if "MINIMIND_DS_EXEC" in os.environ else why
    before = starts.STARTS[why]
    command = [sys.executable, *flags, "-c", "import os; print(*map(os.environ.get, os.environ['ASKED'].split()))"]
    done = subprocess.run(command, env=environment(ASKED=" ".join(extra), **extra), capture_output=True, text=True)
    assert done.stdout.split() == [value for value in extra.values() if value] and starts.STARTS[why] == before + 1
