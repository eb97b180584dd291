"""The test files that compare on a GPU, as one group of checks.  Nothing here loads torch.

    bash launch/gpu_check.sh OUT_DIR --parts correctness/tests
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
import xml.etree.ElementTree

from minimind_ds.bench.supervise import Group, write

TESTS = ("tests/kernels/test_triton_attention.py", "tests/kernels/test_triton_rope.py",
         "tests/kernels/test_triton_moe.py",
         "tests/kernels/test_triton_model.py", "tests/kernels/test_deepspeed_ops.py")


def group(part: str, name: str, file: pathlib.Path, cuda: bool) -> Group:
    """The group; without a GPU its record, and nothing to start."""
    report = file.with_suffix(".xml")
    if cuda:
        return Group(part, name, file, pytest_command(report), functools.partial(tests_record, report))
    write(file, {"records": [{"op": "tests", "contender": "pytest", "ours": True, "status": "absent",
                              "reason": "no GPU: python -m pytest tests/ runs them in the interpreter"}]})
    return Group(part, name, file, ())


def pytest_command(report: pathlib.Path) -> tuple[str, ...]:
    many = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_a_gpu", *many,
            f"--junitxml={report}", *TESTS)


def tests_record(report: pathlib.Path, returncode: int | None) -> dict:
    """What pytest's report says.  No test run at all is a failure: there is a GPU."""
    record = {"op": "tests", "contender": "pytest", "ours": True, "files": list(TESTS)}
    if not report.exists():
        return {**record, "status": "failed", "reason": f"pytest ended with {returncode} and left no report"}
    found = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    skipped = {f"{t.get('name')}: {t.find('skipped').get('message')}" for t in found if t.find("skipped") is not None}
    failed = {t.get("name"): (t.find("failure") if t.find("failure") is not None else t.find("error")).get("message")
              for t in found if t.find("failure") is not None or t.find("error") is not None}
    passed = len(found) - len(skipped) - len(failed)
    right = returncode == 0 and passed and not failed
    return {**record, "status": "right" if right else "failed", "passed": passed, "failed": failed,
            "skipped": sorted(skipped), "exit": returncode}
