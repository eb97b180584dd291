"""What a run of the tests says at its end: CPU seconds per file, how programs were started, what was not run.

With MINIMIND_DS_NEEDS_ALL it fails where a test was skipped for want of what .ci/run can install.
"""

import collections
import os
import re
import resource
import textwrap

import pytest

from tests import starts

ALL, BY_APT = "bash launch/test.sh", "apt-get install --no-install-recommends"
# A word in the reason of a skip: (what the test needs, the command that runs it then).
NEEDS = {
    "numpy<2.4": ("a NumPy that Triton's interpreter can use", f"pip install 'numpy<2.4' && {ALL}"),
    **dict.fromkeys(("without a GPU", "with a GPU", "want of a GPU"), ("a machine without a GPU", ALL)),
    "GPU": ("a GPU", "bash launch/gpu_check.sh"),
    "CUDA": ("a GPU", "bash launch/gpu_check.sh"),
    "slurm": ("SLURM, as root", "CI=true bash .ci/run"),
    "SLURM": ("SLURM, as root", "CI=true bash .ci/run"),
    "namespaces": ("the right to make namespaces", "python -m pytest tests/slurm"),
    "no strace here": ("the right to trace processes", "python -m pytest tests/checkpoint/test_power_cut.py"),
    "strace": ("strace", f"{BY_APT} strace && python -m pytest tests/checkpoint/test_power_cut.py"),
    "chromium": ("a browser", f"{BY_APT} chromium && python -m pytest tests/report"),
    "libaio": ("libaio", f"{BY_APT} libaio-dev && python -m pytest tests/distributed/test_zero_files.py"),
    "g++": ("a C++ compiler", f"{BY_APT} g++ && {ALL}"),
    "triton": ("Triton", f"pip install -c constraints.txt triton && {ALL}"),
    "matplotlib": ("matplotlib", "pip install -e .[plot] && python -m pytest tests/bench/test_benchmark.py"),
    "pyarrow": ("pyarrow", "pip install -e .[parquet] && python -m pytest tests/data/test_readers.py"),
    "trl": ("TRL", "pip install -e .[trl] && python -m pytest tests/bench/test_benchmark.py"),
    "fp16": ("a processor with fp16", ALL),
    "folder": ("MiniMind's tokenizer, goldens and data in ../shared", ALL),
    "root may": ("a user other than root", "python -m pytest tests/data/test_store.py"),
}
# .ci/run can install these.
INSTALLED = re.compile("apt-get|pip install|.ci/run")


def cpu_seconds() -> float:
    """Of this process and of those of its children, and theirs, that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Closing:
    """A pytest plugin; with xdist the workers count and their controller tells."""

    def __init__(self, config: pytest.Config):
        self.config, self.cpu, self.starts = config, collections.Counter(), collections.Counter()
        self.slow = 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        before = cpu_seconds()
        yield
        self.cpu[item.path.name] += cpu_seconds() - before

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        self.starts.update(starts.STARTS)
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if "MINIMIND_DS_NEEDS_ALL" in os.environ and terminal and not hasattr(self.config, "workeroutput"):
            if any(INSTALLED.search(need(reason)[1]) for reason in self.skipped(terminal)):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["closing"] = [dict(self.cpu), dict(self.starts), self.slow]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        cpu, counts, slow = getattr(node, "workeroutput", {}).get("closing", ({}, {}, 0))
        self.cpu.update(cpu)
        self.starts.update(counts)
        # All workers collect the same tests.
        self.slow = max(self.slow, slow)

    def pytest_terminal_summary(self, terminalreporter):
        say = terminalreporter.write_line
        if self.config.getoption("--cpu"):
            for name, seconds in self.cpu.most_common():
                say(f"{seconds:8.1f} CPU s  {name}")
            say(f"{self.cpu.total():8.1f} CPU s  in all")
        if self.starts:
            say("programs started by " + "; ".join(
                f"{'fork' if why == 'fork' else f'exec ({why})'}: {n}" for why, n in self.starts.most_common()))
        text = not_run(self.skipped(terminalreporter), self.slow)
        if text:
            say("\n" + textwrap.fill(text, 110))

    def skipped(self, terminalreporter) -> list[str]:
        return [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]


def need(reason: str) -> tuple[str, str]:
    """The reason of a skip -> (what the test needs, the command that runs it then)."""
    return next((NEEDS[word] for word in NEEDS if word in reason), (reason.removeprefix("Skipped: "), ALL))


def not_run(reasons: list[str], slow: int) -> str:
    """One paragraph: how many tests were not run, what they need, and the command that runs them."""
    counts = collections.Counter(map(need, reasons))
    parts = [f"{count} need {what}: `{command}`" for (what, command), count in counts.most_common()]
    parts += [f"{slow} take minutes: `{ALL} --slow`"] if slow else []
    return f"Not run: {len(reasons) + slow} tests. {'; '.join(parts)}." if parts else ""
