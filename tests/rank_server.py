"""A process that has torch, DeepSpeed and transformers loaded and forks Python programs for a test process.

    test process --(Unix socket: words, environment, stdio)--> server --fork--> middle --fork--> program

The test process adopts the program when the middle one ends, so that its Popen has a child of its own; those of
multiprocessing's forkserver are the server's.  DeepSpeed's launchers that start so fork their ranks.  Programs end
without taking modules apart.  All of a server's hash strings alike: `pytest --exec` has them differ.
"""

import atexit
import ctypes
import gc
import importlib.util
import io
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types

import starts

PRELOAD = ("deepspeed", "transformers", "psutil", "safetensors.torch", "tokenizers", "sentencepiece", "yaml",
           "deepspeed.runtime.zero.stage3", "deepspeed.launcher.multinode_runner", "triton", "torch._dynamo",
           "deepspeed.runtime.zero.muon.muon_optimizer")
THREADS = "threads do not survive a fork"
PATH, SET_BY_LIBRARIES, INTERRUPT = sys.path[1:], {}, []


def serve(connection: socket.socket) -> None:
    """Forks a program for each request, until the test process has ended."""
    given = dict(os.environ)
    for name in filter(importlib.util.find_spec, PRELOAD):
        importlib.import_module(name)
    # Programs find what an interpreter finds.
    del sys.modules["starts"]
    starts.BASE.update(os.environ)
    SET_BY_LIBRARIES.update(os.environ.items() - given.items())
    INTERRUPT.append(signal.signal(signal.SIGINT, signal.SIG_IGN))
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, THREADS
    while True:
        request, stdio, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not request:
            return
        wait, go = os.pipe()
        middle = os.fork()
        if middle == 0:
            if os.fork():
                os._exit(0)
            # Until the test process is the parent.
            os.read(wait, 1)
            connection.send(str(os.getpid()).encode())
            become(json.loads(request), stdio)
        os.waitpid(middle, 0)
        os.write(go, b".")
        for fd in (wait, go, *stdio):
            os.close(fd)


class RankPopen(starts.Popen):
    """What a launcher that was forked starts its ranks by."""

    @staticmethod
    def fork(request: dict, stdio: list[int]) -> int:
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError(THREADS)
        print(end="", flush=True)
        return os.fork() or become(request, stdio)


def become(request: dict, stdio: list[int]) -> None:
    """Makes a forked process what exec would have made it, runs its program and ends; does not return."""
    words, unbuffered = request["words"], request["unbuffered"]
    if request["session"]:
        os.setsid()
    for own, fd in enumerate(stdio):
        os.dup2(fd, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    for number in signal.valid_signals():
        if number == signal.SIGINT or callable(signal.getsignal(number)):
            signal.signal(number, INTERRUPT[0] if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update({**SET_BY_LIBRARIES, **request["env"]})
    tempfile.tempdir = None
    for name, own in (("stdout", 1), ("stderr", 2)) if unbuffered else ():
        stream = io.TextIOWrapper(io.FileIO(own, "w", closefd=False), "utf-8", getattr(sys, name).errors,
                                  write_through=True)
        vars(sys).update({name: stream, f"__{name}__": stream})
    # Python seeds its own, and a launcher has raised DeepSpeed's level of logging.
    sys.modules["deepspeed.utils.logging"].set_log_level_from_string("warning")
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    show([sys.executable, *["-u"] * unbuffered, *words])
    code = 1
    try:
        execute(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    # What the interpreter does in the end, but for taking all modules apart: half a second, for which a test that is
    # about it starts by exec.
    threading._shutdown()
    atexit._run_exitfuncs()
    print(end="", flush=True)
    print(end="", file=sys.stderr, flush=True)
    os._exit(code)


def show(words: list[str]) -> None:
    """Writes a program's words, as one text, where /proc has those of the server; an end other than 0 says so."""
    begin, end = map(int, pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    text = os.fsencode(" ".join(words))[:end - begin - 2]
    ctypes.memmove(begin, text.ljust(end - begin - 1, b"\0") + b".", end - begin)


def execute(words: list[str]) -> None:
    """What the interpreter does with the words of its command."""
    launcher = words[0] == starts.DEEPSPEED or words[1:2] == ["deepspeed.launcher.launch"]
    subprocess.Popen = RankPopen if launcher else starts.exec_popen
    sys.path[:] = PATH
    sys.path_importer_cache.clear()
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.realpath(words[0]))]
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
