"""launch/check_kernels.py at its tiny sizes: it runs to its end, says what it found, and a wrong result fails it.

On a GPU the same program takes MiniMind's sizes; what is left for a GPU to show is the device alone.
"""

import json
import subprocess
import sys

import pytest
import torch

from minimind_ds.bench import gpu_tests, kernels, supervise
from minimind_ds.bench.gpu import children, summary
from minimind_ds.bench.kernels import cases, contenders, items, measure, runner
from tests.conftest import ROOT
from tests.waiting import HANG_S

pytest.importorskip("triton")
from minimind_ds.bench.kernels import interpretable  # noqa: E402

NO_INTERPRETER = "it is for machines without a GPU" if torch.cuda.is_available() else interpretable.why_not()
needs_the_interpreter = pytest.mark.skipif(NO_INTERPRETER is not None, reason=f"interpreter: {NO_INTERPRETER}")
CPU = torch.device("cpu")
MACHINE = {"device", "driver", "torch", "triton", "deepspeed", "date", "commit"}


def check_kernels(out, *flags):
    """The program's own document, after the summary on its output was compared with the file."""
    command = [sys.executable, "launch/check_kernels.py", str(out), "--small", "--no_pytest", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    printed = json.loads(done.stdout[done.stdout.index("\n{\n") + 1:])
    assert printed == json.loads((out / "summary.json").read_text()) and printed["ok"]
    name, = printed["parts"]
    document = json.loads((out / f"{name}.json").read_text())
    assert document["ok"] and set(document["machine"]) >= MACHINE
    return document


@needs_the_interpreter
@pytest.mark.parametrize("groups", ["router", *(pytest.param(groups, marks=pytest.mark.slow)
                                                 for groups in ("attention,router", "leaks"))])
def test_correctness_compares_every_kernel_with_fp64_and_finds_no_leak(tmp_path, groups):
    document = check_kernels(tmp_path, "--parts", "correctness", "--groups", groups)
    found = document["results"]
    assert {r["group"] for r in found} == set(groups.split(",")) and all(r["status"] == "right" for r in found)
    if groups == "leaks":
        assert {r["op"] for r in found} == {"attention", "qk_norm_rope", "moe", "router", "model"}
        assert all(r["probe"] and not r["moved"] for r in found)
    else:
        assert {r["dtype"] for r in found} == {"bf16", "fp32"}
        assert all(r["same_bits_twice"] for r in found if r["contender"] == "triton")
        assert all(set(r["errors"]) >= {"out", "dq", "dk", "dv"} for r in found if r["op"] == "attention")


@needs_the_interpreter
def test_timings_stand_beside_their_floor_and_absent_ones_say_why(tmp_path):
    document = check_kernels(tmp_path, "--parts", "timings", "--groups", "moe")
    assert document["rates"]["moe"]["flop_per_s"] > 0 and document["rates"]["moe"]["byte_per_s"] > 0
    by_name = {r["contender"]: r for r in document["results"]}
    assert by_name["deepspeed"]["status"] == "absent" and by_name["deepspeed"]["reason"]
    for name in ("triton", "sdpa", "loop of experts (MiniMind)"):
        for what in ("forward", "forward_backward"):
            timed = by_name[name][what]
            assert timed["ms_q1"] <= timed["ms"] <= timed["ms_q3"] and timed["repeats"] >= 3
            assert timed["of_floor"] == pytest.approx(timed["floor_ms"] / timed["ms"])


@pytest.mark.slow
@needs_the_interpreter
def test_a_model_trains_along_the_same_curve_with_our_kernels(tmp_path):
    document = check_kernels(tmp_path, "--parts", "curve", "--groups", "dense")
    assert {r["dtype"] for r in document["results"]} == {"fp32", "bf16"}
    for r in document["results"]:
        assert r["largest_relative_difference"] <= r["bound"]
        assert "attention = triton" in r["kernels"]["triton"]
        assert all(len(curve) == 4 and curve[-1] < curve[0] for curve in r["curves"].values())


@pytest.fixture
def older_triton_newer_numpy(monkeypatch):
    """A loop's bound is an array of one element, and that is no Python number: triton 3.6 with numpy 2.4."""
    from triton.runtime import interpreter

    stock = interpreter._patch_lang_tensor

    def index(tensor):
        if tensor.handle.data.ndim:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return int(tensor.handle.data)

    def patch(tensor, scope):
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", index)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpretable.why_not.cache_clear()
    yield
    interpretable.why_not.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_parts_that_no_interpreter_can_run_are_left_out_in_a_line(tmp_path, older_triton_newer_numpy):
    agreement, moe = tmp_path / "agreement.json", tmp_path / "moe.json"
    assert children.run("agreement.operations", agreement, small=True, folder=tmp_path) == 0
    assert runner.run_group("correctness", "moe", moe, small=True, without=()) == 0
    records = {file.stem: json.loads(file.read_text())["records"] for file in (agreement, moe)}
    for record, in records.values():
        assert record["status"] == "absent" and "numpy<2.4" in record["reason"]
    line, = summary.left_out(records)
    assert line.startswith("- left out: agreement, moe: ") and "\n" not in line


def spoilt(change):
    """Our attention with its results changed by `change`."""
    def build(case):
        trial = contenders.OPS["attention"]["sdpa"].build(case)
        trial.collect = lambda results: change([x.clone() for x in results])
        return trial

    return contenders.Contender(build, ours=True)


def one_row(results):
    results[1][7] *= 1.5
    return results


def everywhere(results):
    results[3] *= 1.02
    return results


def a_nan(results):
    results[0][-1, 0, 0] = float("nan")
    return results


@pytest.mark.parametrize("change, status", [(list, "right"), (one_row, "wrong"), (everywhere, "wrong"),
                                            (a_nan, "wrong"), (lambda results: results[:-1], "wrong")])
def test_a_wrong_result_is_called_wrong_and_ends_the_program_with_1(tmp_path, change, status):
    size = cases.Size(T=3000, mean=200, longest=600, H=2, HKV=1, D=32)
    record = items.check("sdpa", spoilt(change), cases.attention(size, torch.bfloat16, CPU))
    assert record["status"] == status
    group = supervise.Group("correctness", "attention", tmp_path / "group.json", ())
    supervise.write(group.file, {"records": [record]})
    supervise.write(tmp_path / "correctness.json", kernels.collect("correctness", [group], small=True))
    ended = kernels.summarise(tmp_path, ["correctness"])
    assert ended == (0 if status == "right" else 1)
    assert kernels.summarise(tmp_path, ["correctness", "timings"]) == 1


def test_one_wrong_row_among_many_is_seen_where_the_norm_of_all_passes_it():
    exact = torch.randn(40000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = exact.clone()
    got[123] = -got[123]
    whole, worst = measure.error(got, exact)
    assert whole < 2e-2 and worst > 0.3
    assert not measure.judge([got], [exact], ["x"], bound=2e-2)["right"]


DIES_ONCE = """
import json, os, pathlib, signal, sys
file = pathlib.Path(sys.argv[1])
if not file.exists():
    file.write_text(json.dumps({"records": [{"item": "a", "ours": True, "status": "right"}], "running": "b"}))
    os.kill(os.getpid(), signal.SIGALRM)
found = json.loads(file.read_text())
found["records"].append({"item": "c", "ours": True, "status": "right"})
file.write_text(json.dumps(found))
"""


def test_a_process_that_dies_costs_the_check_it_died_of_and_no_other(tmp_path):
    file = tmp_path / "group.json"
    group = supervise.Group("timings", "moe", file, (sys.executable, "-c", DIES_ONCE, str(file)))
    supervise.supervise([group], 1, HANG_S, cuda=False)
    records = json.loads(file.read_text())["records"]
    assert [(r["item"], r["status"]) for r in records] == [("a", "right"), ("b", "failed"), ("c", "right")]
    assert "clock" in records[1]["reason"] and not supervise.all_right(records)


BREAKS_ONCE = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
if not file.exists():
    file.write_text(json.dumps({"records": [{"item": "a", "ours": True, "status": "failed"}]}))
    sys.exit(3)
found = json.loads(file.read_text())
found["records"].append({"item": "b", "ours": True, "status": "right"})
file.write_text(json.dumps(found))
"""


def test_after_a_fault_of_the_device_a_new_process_goes_on(tmp_path):
    file = tmp_path / "group.json"
    group = supervise.Group("timings", "moe", file, (sys.executable, "-c", BREAKS_ONCE, str(file)))
    supervise.supervise([group], 1, HANG_S, cuda=False)
    assert [(r["item"], r["status"]) for r in json.loads(file.read_text())["records"]] == [
        ("a", "failed"), ("b", "right")]


def test_a_part_whose_time_is_over_is_stopped(tmp_path):
    group = supervise.Group("timings", "moe", tmp_path / "group.json",
                               (sys.executable, "-c", "import time; time.sleep(60)"))
    later = group._replace(file=tmp_path / "later.json")
    supervise.supervise([group, later], 1, 1, cuda=False)
    for file in (group.file, later.file):
        record, = json.loads(file.read_text())["records"]
        assert record["status"] == "stopped" and not supervise.all_right([record])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests run")
@pytest.mark.slow
def test_test_files_that_all_skip_are_no_proof(tmp_path):
    file = tmp_path / "tests.json"
    group = gpu_tests.group("correctness", "tests", file, cuda=True)
    supervise.supervise([group], 1, 120, cuda=False)
    record, = json.loads(file.read_text())["records"]
    assert record["status"] == "failed" and record["passed"] == 0 and any("GPU" in why for why in record["skipped"])
