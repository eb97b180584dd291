"""launch/gpu_check.sh as on a machine without a network: what is missing is named, a part that hangs costs itself."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from minimind_ds.bench import gpu, supervise
from minimind_ds.bench.gpu import summary
from tests.conftest import ROOT
from tests.waiting import HANG_S

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny sizes are for machines without a GPU")
NAMES = [part.name for part in gpu.PARTS]

# In PYTHONPATH as sitecustomize.py: the processes of one part wait for ever, or lack a package.
HANG = """
import sys, time
if "--child" in sys.argv and sys.argv[sys.argv.index("--child") + 1].startswith("{part}."):
    time.sleep(100_000)
"""
LACKING = """
import sys
sys.modules["hjson"] = None
"""


def check(out, *flags, custom=None):
    env = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    if custom:
        (out.parent / "sitecustomize.py").write_text(custom)
        env["PYTHONPATH"] = str(out.parent)
    command = ["bash", "launch/gpu_check.sh", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_S)


def test_products_are_timed_and_every_file_is_whole(tmp_path):
    done = check(tmp_path / "out", "--parts", "products")
    assert done.returncode == 0, done.stdout[-3000:]
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["ok"] and document["machine"]["torch"] == torch.__version__
    names = {r["item"] for r in document["parts"]["products"]["results"]}
    assert {"q, k, v: forward, apart", "q, k, v: forward, merged", "gate, up: dx, added in the epilogue"} <= names
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text == summary.text(document) and "gate, up: dx, merged" in text and "no GPU" in text
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) <= 8 and all(len(p.parts) == 1 for p in files)


@pytest.mark.slow
def test_training_is_measured_and_profiled(tmp_path):
    done = check(tmp_path / "out", "--parts", "throughput,stages", "--seconds", "600")
    assert done.returncode == 0, done.stdout[-3000:]
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    rates = [r for r in parts["throughput"]["results"] if r["op"] == "throughput"]
    assert len(rates) == 4 and all(r["tokens_per_s"] > 0 for r in rates)
    assert [r["case"].split(" /")[0] for r in parts["stages"]["results"]] == [f"zero{n}" for n in range(4)]
    assert (tmp_path / "out" / "profile_debug.json.gz").stat().st_size > 1000


@pytest.mark.parametrize("part", ["agreement", *(pytest.param(name, marks=pytest.mark.slow)
                                                   for name in NAMES if name not in ("imports", "agreement"))])
def test_a_part_that_hangs_costs_itself_and_the_summary_comes_in_time(tmp_path, part):
    others = [name for name in ("products", "agreement") if name != part][:1]
    done = check(tmp_path / "out", "--parts", ",".join([part, *others]), "--limits", f"{part}=4",
                 custom=HANG.format(part=part))
    assert done.returncode == 1, done.stdout[-3000:]
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    # The test files of a GPU are no process here.
    stopped = [r for r in document["parts"][part]["results"] if r["op"] != "tests"]
    assert stopped and all(r["status"] == "stopped" for r in stopped)
    assert all(r["status"] == "right" for name in others for r in document["parts"][name]["results"])
    assert "**stopped**" in done.stdout


def test_a_part_that_no_time_is_left_for_is_named(tmp_path):
    done = check(tmp_path / "out", "--parts", "products", "--seconds", "6")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done.returncode == 1 and any("not started" in note for note in document["notes"])


def test_a_part_without_time_makes_the_whole_not_right(tmp_path):
    """The other parts' results are right: what was asked for is missing all the same."""
    args = gpu.parse([str(tmp_path), "--seconds", "30", "--parts", "products"])
    # Half a minute is left of it, all of which the first part would take.
    run = gpu.Check(tmp_path, tmp_path, time.monotonic() - 29, args)
    run.groups = [supervise.Group("imports", "imports", tmp_path / "one.json", ())]
    supervise.write(run.groups[0].file, {"records": [{"op": "imports", "ours": True, "status": "right"}]})
    assert run.write()["ok"]
    assert run.run() == 1 and "products: not started, 1 s were left" in run.notes and not run.write()["ok"]


def test_the_test_files_of_a_gpu_are_part_of_it(tmp_path):
    """Without one they are said to be absent, not left out."""
    done = check(tmp_path / "out", "--parts", "correctness/tests")
    record, = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]["correctness"]["results"]
    assert done.returncode == 0 and record["op"] == "tests" and record["status"] == "absent" and record["reason"]


def test_a_missing_package_is_named_with_what_to_do(tmp_path):
    done = check(tmp_path / "out", custom=LACKING)
    assert done.returncode == 2 and "cannot import" in done.stdout and "hjson" in done.stdout
    assert "--make_wheels" in done.stdout and "== agreement" not in done.stdout


@pytest.mark.parametrize("flags, says", [(["--parts", "nonsense"], "no part 'nonsense'"),
                                         (["--limits", "products"], "NAME=SECONDS")])
def test_a_mistake_in_a_flag_is_one_line(tmp_path, flags, says):
    done = check(tmp_path / "out", *flags)
    assert done.returncode == 2 and says in done.stdout
