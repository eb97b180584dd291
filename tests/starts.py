"""subprocess.Popen for tests: plain Python programs start by fork, from the server in rank_server.py.

A program is exec'd where why_exec gives a reason, and always with `pytest --exec`.
"""

import collections
import ctypes
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

DEEPSPEED = str(pathlib.Path(sys.executable).with_name("deepspeed"))
# Read when Python or a library starts.
AT_START = re.compile(r"(ATEN|CUDA|DS|GLIBC|GOMP|HF|KMP|LANG|LC|LD|MALLOC|MKL|NCCL|OMP|ONEDNN|OPENBLAS|PYTORCH|TORCH|"
                      r"TRANSFORMERS|TRITON)(_.*)?|PYTHON.*|HOME|VIRTUAL_ENV")
LATER = {"CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCH_EXTENSIONS_DIR"}
PLAIN = {"stdin", "stdout", "stderr", "text", "encoding", "errors", "cwd", "env", "start_new_session"}
PR_SET_CHILD_SUBREAPER = 36
prctl = ctypes.CDLL(None).prctl
exec_popen = subprocess.Popen
# The server's environment; why the programs of the present test are exec'd; the server, as [socket, process].
BASE: dict[str, str] = {}
MARKED: list[str] = []
SERVER: list = []
LOCK = threading.Lock()
# How many programs were forked or, by reason, exec'd.
STARTS: collections.Counter = collections.Counter()


def why_exec(words: list[str], env: dict[str, str], options: dict) -> str:
    """Why a program cannot be forked; "": it can."""
    if MARKED or "MINIMIND_DS_EXEC" in env:
        return MARKED[-1] if MARKED else "--exec"
    if options.keys() - PLAIN or not words or words[0].startswith("-") and words[0] not in ("-m", "-c"):
        return "options of Popen or of the interpreter"
    differ = sorted(name for name in env.keys() | BASE.keys() if env.get(name) != BASE.get(name)
                    and AT_START.fullmatch(name) and name not in LATER)
    return "other values of " + ", ".join(differ) if differ else ""


class Popen(exec_popen):
    """subprocess.Popen, by fork where that is possible."""

    def __init__(self, args, **options):
        self.request = None
        if not isinstance(args, (str, os.PathLike)) and args[0] in (sys.executable, DEEPSPEED):
            words = [os.fspath(word) for word in args[args[0] == sys.executable:]]
            words, unbuffered = (words[1:], True) if words[:1] == ["-u"] else (words, False)
            env = dict(options.get("env") or os.environ)
            why = why_exec(words, env, options)
            STARTS[why or "fork"] += 1
            if not why:
                self.request = {"words": words, "unbuffered": unbuffered, "env": env, "session":
                                options.get("start_new_session"), "cwd": os.path.abspath(options.get("cwd") or ".")}
        super().__init__(args, **options)

    def _execute_child(self, *given):
        if self.request is None:
            return super()._execute_child(*given)
        ends = given[10:16]
        self.pid = self.fork(self.request, [own if end == -1 else end
                                            for own, end in enumerate((ends[0], ends[3], ends[5]))])
        self._child_created = True
        self._close_pipe_fds(*ends)

    @staticmethod
    def fork(request: dict, stdio: list[int]) -> int:
        """-> the process id of a program that the server has forked; starts the server if there is none."""
        with LOCK:
            if not SERVER:
                SERVER.extend(server())
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(SERVER[0], [json.dumps(request).encode()], stdio)
                answer = SERVER[0].recv(32)
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise RuntimeError("tests/rank_server.py has ended, for a reason given above; --exec does without it")
        return int(answer)


def server() -> tuple[socket.socket, subprocess.Popen]:
    """A new server, and the socket it listens to."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        program = pathlib.Path(__file__).with_name("rank_server.py")
        # Blanks, so that there is room for the words of a program.
        return ours, exec_popen([sys.executable, program, str(theirs.fileno()), " " * 4096], env=BASE,
                                pass_fds=[theirs.fileno()])
