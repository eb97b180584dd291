"""What a run of the tests says at its end: CPU seconds per file, how programs were started, what was not run."""

import collections
import resource
import textwrap

import pytest

from tests import starts

# What a reason for a skip has in it: (what is missing, the command that runs the tests).
COMMANDS = {
    "GPU": "on a machine with a GPU: bash launch/gpu_check.sh",
    "CUDA": "on a machine with a GPU: bash launch/gpu_check.sh",
    "slurmctld": "as root, on Debian: CI=true bash .ci/run",
    "SLURM": "as root, on Debian: CI=true bash .ci/run",
    "no namespaces": "as root, outside a container: python -m pytest tests/test_slurm.py",
    "strace": "apt-get install --no-install-recommends strace; python -m pytest tests/test_power_cut.py",
    "libaio": "apt-get install libaio-dev; python -m pytest tests/test_zero_files.py",
    "g++": "apt-get install g++; bash launch/test.sh",
    "triton": "pip install triton; bash launch/test.sh",
    "matplotlib": "pip install matplotlib; python -m pytest tests/test_benchmark.py",
    "trl": "pip install trl; python -m pytest tests/test_benchmark.py",
    "folder": "with MiniMind's tokenizer, goldens and data in ../shared: bash launch/test.sh",
}
SLOW = "bash launch/test.sh --slow"


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

    def pytest_sessionfinish(self):
        self.starts.update(starts.STARTS)
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
        text = not_run([report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])], self.slow)
        if text:
            say("\n" + textwrap.fill(text, 110))


def not_run(reasons: list[str], slow: int) -> str:
    """One paragraph: how many tests were not run, for want of what, and the command that runs them."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for reason in reasons:
        reason = reason.removeprefix("Skipped: ")
        command = next((COMMANDS[word] for word in COMMANDS if word in reason), "nothing to install")
        counts[command][reason] += 1
    parts = [f"{sum(found.values())} ({', '.join(found)}): `{command}`" for command, found in counts.items()]
    parts += [f"{slow} marked slow, which take minutes: `{SLOW}`"] if slow else []
    return f"Not run: {len(reasons)} skipped, {slow} deselected. " + "; ".join(parts) + "." if parts else ""
