"""The tests marked `numeric` on other machines, played: one run of pytest in the environment of each.

Instruction sets and threads are what PyTorch, oneDNN and MKL are told.  The default of --dtype and the precision of
activations follow the processor's name and flags: a row that changes those runs in a mount namespace of its own, with
another /proc/cpuinfo, which every rank and program under it reads.

    python -m tests.machines                                           # all rows; the table of CONTRIBUTING.md
    python -m tests.machines --rows older,bf16 tests/kernels/test_kernels.py   # some rows; the rest goes to pytest
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

from tests.conftest import CACHE, ROOT

CPUINFO = pathlib.Path("/proc/cpuinfo")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# name: (variables, how fast bf16 is said to be: None leaves it to the machine).
ROWS = {
    "as it is": ({}, None),
    "older": ({"ATEN_CPU_CAPABILITY": "default", **AVX2}, None),
    "ATen default": ({"ATEN_CPU_CAPABILITY": "default"}, None),
    "ATen AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, None),
    "oneDNN AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, None),
    "MKL AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, None),
    "2 threads": ({"OMP_NUM_THREADS": "2"}, None),
    "bf16": ({}, "fast"),
    "fp32": ({}, "slow"),
}


def cpuinfo(bf16: str) -> str:
    """This machine's /proc/cpuinfo as that of an AMD processor whose bf16 products are "fast" or "slow"."""
    text = re.sub(r"(?m)^(vendor_id\s*:).*", r"\1 AuthenticAMD", CPUINFO.read_text())
    text = re.sub(r"(?m) (amx_bf16|avx512_bf16)\b", "", text)
    return re.sub(r"(?m)^(flags\s*:.*)$", r"\1 avx512_bf16", text) if bf16 == "fast" else text


def played(command: list[str], bf16: str | None, folder: pathlib.Path) -> list[str]:
    """The command under another /proc/cpuinfo; mounting needs root, or a user namespace that has it."""
    if bf16 is None:
        return command
    text = folder / "cpuinfo"
    text.write_text(cpuinfo(bf16))
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    script = 'mount --bind "$0" /proc/cpuinfo && exec "$@"'
    return ["unshare", *as_root, "--mount", "sh", "-c", script, str(text), *command]


def why_not(bf16: str | None) -> str | None:
    """Why this machine cannot play a row; None when it can."""
    if bf16 is None:
        return None
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists():
        return "the flags of processors are those of x86 on Linux"
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(played(["true"], bf16, pathlib.Path(folder)), capture_output=True, text=True)
    return f"no mount namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def run(name: str, words: list[str]) -> dict:
    """One row; -> {"name", "ok", "passed", "failed", "skipped", "minutes", "why_not"}."""
    variables, bf16 = ROWS[name]
    if why := why_not(bf16):
        return {"name": name, "ok": False, "why_not": why}
    print(f"{name}: {variables or ''} {bf16 or ''}", flush=True)
    # torch takes from its cache what it generated for other instructions, which then does not compile.
    cache = CACHE / f"inductor_{name.replace(' ', '_')}"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numeric",
                   f"--junitxml={report}", *words]
        done = subprocess.run(played(command, bf16, pathlib.Path(folder)), cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache),
                                   **variables})
        suite = next(xml.etree.ElementTree.parse(report).iter("testsuite")).attrib if report.exists() else {}
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {"name": name, "ok": done.returncode == 0, "passed": int(suite.get("tests", 0)) - failed - skipped,
            "failed": failed, "skipped": skipped, "minutes": (time.monotonic() - began) / 60}


def table(found: list[dict]) -> str:
    import torch

    lines = [f"On {processor()}, torch {torch.__version__}, Python {platform.python_version()}, "
             f"{datetime.date.today()}:", "", "| machine | what is set | passed | failed | skipped | minutes |",
             "|---|---|---|---|---|---|"]
    for row in found:
        variables, bf16 = ROWS[row["name"]]
        told = [f"`{name}={value}`" for name, value in variables.items()]
        told += [f"bf16 {bf16} by `/proc/cpuinfo`"] * (bf16 is not None)
        figures = ([row["passed"], row["failed"], row["skipped"], f"{row['minutes']:.1f}"] if "passed" in row
                   else [f"not played: {row['why_not']}", "", "", ""])
        lines.append("| " + " | ".join(map(str, [row["name"], ", ".join(told) or "nothing", *figures])) + " |")
    return "\n".join(lines)


def processor() -> str:
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = re.search(r"(?m)^model name\s*:\s*(.*)", text)
    best = next((name for name in ("avx512f", "avx2") if re.search(rf"(?m)^flags.* {name}\b", text)), "no AVX2")
    return f"{found[1] if found else platform.machine()} ({best.upper()})"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"some of: {', '.join(ROWS)}; separated by commas (default: all)")
    args, words = parser.parse_known_args(argv)
    rows = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows {','.join(unknown)}: there are {', '.join(ROWS)}")
    found = [run(name, words or ["tests"]) for name in rows]
    print(table(found))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
