"""The benchmark measures the trainer's own step, keeps what failed with its reason, and starts nothing twice."""

import csv
import json
import subprocess
import sys
import time
import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minimind_ds.bench import throughput
from minimind_ds.bench.throughput import cell, loops, ratios, report, sweep, trace, trl_ratio
from minimind_ds.bench.throughput.watch import PARTS
from minimind_ds.training import build, step
from minimind_ds.training import loop as training_loop
from tests.conftest import ROOT, environment, free_port
from tests.waiting import HANG_S

PROGRAM = str(ROOT / "launch" / "benchmark.py")
# A cell that runs, and one that cannot: triton needs a GPU.
CELLS = {"files": [str(ROOT / "ds_configs" / "zero1.json")], "presets": ["debug"], "rows": ["128"],
         "kernels": ["auto", "triton"], "ranks": [2], "warm_up": 1, "steps": 2}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its failing cell fails for want of a GPU")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, deepspeed):
    """The command as users start it: the launcher's first rank starts the cells, the other leaves."""
    out = tmp_path_factory.mktemp("sweep")
    flags = ["--cache_dir", str(out / "cache"), "--dtype", "fp32"]
    done = deepspeed(2, PROGRAM, "--deepspeed", *CELLS["files"], "--preset", "debug", "--rows", "128", "--kernels",
                     "auto", "triton", "--ranks", "2", "--warm_up", "1", "--steps", "2", "--out", str(out), *flags)
    return out, flags, done.stdout


@pytest.fixture(scope="module")
def cells(swept):
    document = json.loads((swept[0] / "results.json").read_text())
    assert document["schema"] == sweep.SCHEMA
    return document["cells"]


def test_a_cell_that_cannot_run_is_recorded_with_its_reason_and_the_sweep_goes_on(cells, swept):
    by_kernels = {c["cell"]["kernels"]: c for c in cells}
    assert by_kernels["auto"]["status"] == "ok" and by_kernels["auto"]["reason"] is None
    failed = by_kernels["triton"]
    assert failed["status"] == "refused" and "triton" in failed["reason"] and "GPU" in failed["reason"]
    assert failed["reason"] in swept[2]


def test_a_cell_holds_every_figure(cells):
    c = next(c for c in cells if c["status"] == "ok")
    assert c["steps"] == 2 and len(c["step_s_all"]) == 2
    assert c["tokens_per_s_min"] <= c["tokens_per_s"] <= c["tokens_per_s_max"]
    assert c["tokens_per_s_per_device"] == c["tokens_per_s"] / 2
    assert 0 < c["labelled_tokens_per_s"] < c["tokens_per_s"]
    assert 0.9 < c["packing_fill"] <= 1 and c["tokens_per_step"] == pytest.approx(2 * 128 * c["packing_fill"])
    assert set(c["split_s"]) == set(PARTS) and all(c["split_s"][p] > 0 for p in PARTS)
    assert c["mfu"] == pytest.approx(c["tokens_per_s_per_device"] * c["flops_per_token"]
                                     / c["matmul_flops_per_s_per_device"])
    assert c["loss_last"] < c["loss_first"]
    assert c["memory"]["peak_rss"] >= c["memory"]["rss_before_engine"] > 0
    assert {"cpu", "torch", "deepspeed", "date"} <= set(c["machine"])


def test_measured_memory_is_what_the_papers_plan(cells):
    facts = next(c for c in cells if c["status"] == "ok")["memory"]
    # arXiv:1910.02054: fp32 parameters whole; masters and two moments cut over the ranks.
    assert facts["planned"]["parameters"] == 4 * facts["parameters"]
    assert facts["planned"]["optimizer"] == 12 * facts["parameters"] / 2
    for kind in ("parameters", "optimizer"):
        assert facts["held"][kind] == pytest.approx(facts["planned"][kind], rel=0.01)


def test_traffic_is_one_all_reduce_of_the_gradients_and_one_all_gather_of_the_parameters(cells):
    c = next(c for c in cells if c["status"] == "ok")
    whole = 4 * c["memory"]["parameters"]
    assert c["traffic"]["all-reduce"]["bytes"] == pytest.approx(whole, rel=0.01)
    assert c["traffic"]["all-gather"]["bytes"] == pytest.approx(whole / 2, rel=0.01)
    # A ring of two sends 2 (n - 1) / n of what is reduced, and its own share of what is gathered.
    assert c["sent_bytes_per_step"] == pytest.approx(whole + whole / 2, rel=0.01)


def test_cells_with_a_record_are_not_run_again(swept):
    out, flags, _ = swept
    before = (out / "results.json").read_bytes()
    again = sweep.cells_of(**CELLS, flags=flags)
    document = sweep.sweep(again, out, timeout=1, retry=False)
    assert (out / "results.json").read_bytes() == before and len(document["cells"]) == 2
    more = sweep.cells_of(**{**CELLS, "steps": 3}, flags=flags)
    assert {c.key for c in more}.isdisjoint(c.key for c in again)


def test_a_cell_is_named_before_it_runs_and_one_that_takes_too_long_is_ended_and_recorded(swept, tmp_path, capsys):
    one = sweep.cells_of(**{**CELLS, "kernels": ["auto"]}, flags=swept[1])[0]
    record, = sweep.sweep([one], tmp_path, timeout=0.5, retry=False)["cells"]
    assert capsys.readouterr().err == f"[1/1] {one.name} …\n"
    assert record["status"] == "timeout" and "0 s" in record["reason"]
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).returncode == 1


def test_table_and_csv_say_what_the_document_says(swept, cells, monkeypatch):
    out, ok = swept[0], next(c for c in cells if c["status"] == "ok")
    table = (out / "results.md").read_text()
    assert "\n".join(report.narrow(cells)) in swept[2]
    monkeypatch.setenv("COLUMNS", "80")
    *shown, failed = report.narrow(cells)
    assert max(map(len, shown)) <= 80 and f"{ok['tokens_per_s']:,.0f}" in "\n".join(shown) and ": refused: " in failed
    lines = table.strip().splitlines()
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert f"{ok['tokens_per_s']:,.0f}" in table and "**refused**" in table
    with open(out / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["key"] for row in rows] == [c["key"] for c in cells]
    row = next(row for row in rows if row["status"] == "ok")
    assert float(row["tokens_per_s"]) == ok["tokens_per_s"]
    assert float(row["split_s.backward"]) == ok["split_s"]["backward"]


def test_plots_are_drawn_where_matplotlib_is(cells, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install minimind_ds[plot]")
    ok = next(c for c in cells if c["status"] == "ok")
    single = {**ok, "key": "one rank", "cell": {**ok["cell"], "ranks": 1}}
    said = report.write({"schema": 1, "cells": [*cells, single]}, tmp_path)
    for name in ("throughput", "memory", "scaling", "step"):
        path = tmp_path / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 and path.name in said[-1]


def test_without_matplotlib_one_line_says_so(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = report.write({"schema": 1, "cells": cells}, tmp_path)
    assert "matplotlib is not installed" in said[-1] and "\n" not in said[-1]
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results.csv").exists()


def test_what_is_timed_is_the_trainers_own_step():
    for module in (cell, loops, trace):
        assert module.train_step is step.train_step is training_loop.train_step
        assert module.build_engine is build.build_engine


@pytest.mark.parametrize("log, code, status, words", [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 1, "out of memory", "2 GiB"),
    ("RuntimeError: [enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", 1,
     "out of memory", "9 bytes"),
    ("[ERROR] [launch.py:325:sigkill_handler] ['python'] exits with return code = -9", 1, "out of memory", "SIGKILL"),
    ("error: ds.json: unknown key 'zero'", 2, "refused", "unknown key"),
    ("noise\nValueError: shapes differ\nsubprocess.CalledProcessError: it", 1, "failed", "shapes differ"),
    ("", 1, "failed", "exit code 1"), ("half a line", None, "timeout", "after 7 s")])
def test_the_reason_is_read_from_what_a_cell_said(log, code, status, words):
    found, reason = sweep.diagnose(log, code, 7)
    assert found == status and words in reason and "\n" not in reason


def test_each_task_of_an_srun_is_a_rank_of_one_cell(swept, tmp_path):
    # What srun tells its tasks; no launcher in between.
    results, port = tmp_path / "results.json", str(free_port())
    command = [sys.executable, PROGRAM, "--append", str(results), "--deepspeed", CELLS["files"][0], "--preset",
               "debug", "--rows", "128", "--warm_up", "0", "--steps", "1", *swept[1]]
    tasks = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=environment(SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_NTASKS="2",
                                              SLURM_NTASKS_PER_NODE="2", SLURM_STEP_ID="0", MASTER_PORT=port))
             for i in range(2)]
    said = [task.communicate(timeout=HANG_S)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    record, = json.loads(results.read_text())["cells"]
    assert record["status"] == "ok" and record["cell"]["ranks"] == 2 and record["machine"]["nodes"] == 1
    assert sum("tokens/s" in text for text in said) == 1


@pytest.fixture(scope="module")
def compared(tmp_path_factory, swept):
    """--compare plain in a process that counts how often numactl is started in it."""
    out = tmp_path_factory.mktemp("plain")
    files = [str(ROOT / "ds_configs" / f"zero{stage}.json") for stage in (2, 3)]
    argv = ["--compare", "plain", "--deepspeed", *files, "--preset", "debug", "--rows", "128x1x2", "--steps", "3",
            "--out", str(out / "plain.json"), "--save_dir", str(out / "run"), *swept[1]]
    code = f"""
import sys
asked = []
sys.addaudithook(lambda event, args: asked.append(1) if event == "subprocess.Popen" and "numactl" in args[1] else None)
from minimind_ds.bench import throughput
code = throughput.main({argv!r})
print("numactl:", len(asked))
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "plain.json").read_text()), done.stdout


def test_pytorch_alone_trains_as_the_engine_does(compared):
    """The baseline of every ratio: same batches, same weights, and so the same losses."""
    found, said = compared
    for stage in (2, 3):
        facts = found["pairs"][f"zero{stage} / plain"]
        assert facts["largest_loss_difference"] < 1e-5 and facts["rounds"] == 3
        assert facts["ratio_q1"] <= facts["ratio"] <= facts["ratio_q3"]
        assert facts["goal"] == ratios.GOALS[f"zero{stage}"] and f"| zero{stage} / plain |" in said


@pytest.mark.slow
def test_pytorch_alone_trains_in_half_precision_too(tmp_path, swept):
    out = tmp_path / "plain.json"
    subprocess.run([sys.executable, PROGRAM, "--compare", "plain", "--deepspeed", "ds_configs/zero1.json", "--preset",
                    "debug", "--rows", "128x1x1", "--steps", "3", "--dtype", "bf16", "--out", str(out), "--save_dir",
                    str(tmp_path / "run"), *swept[1]], cwd=ROOT, env=environment(), check=True, capture_output=True,
                   timeout=HANG_S)
    found, = json.loads(out.read_text())["pairs"].values()
    # DeepSpeed and PyTorch round gradients to bf16 at other places.
    assert found["rounds"] == 3 and found["largest_loss_difference"] < 2e-3


@pytest.mark.parametrize("needs, words", [({"no_such_trl": ">=1,<2"}, "no_such_trl is not installed; pip install "
                                           "'no_such_trl>=1,<2'"),
                                          ({"numpy": ">=1000"}, "is not one of the tested >=1000; pip install ")])
def test_what_a_comparison_with_trl_lacks_is_one_line(needs, words, capsys, monkeypatch):
    from minimind_ds.bench import throughput

    monkeypatch.setattr(trl_ratio, "NEEDS", needs)
    assert throughput.main(["--compare", "trl", "--preset", "debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --compare trl: ") and words in said and said.count("\n") == 1


def test_the_extra_trl_installs_what_was_tested():
    text = (ROOT / "setup.py").read_text()
    assert f'"trl": [{", ".join(json.dumps(name + tested) for name, tested in trl_ratio.NEEDS.items())}]' in text


def trl_missing() -> str:
    try:
        trl_ratio.require()
        return ""
    except ValueError as error:
        return str(error)


needs_trl = pytest.mark.skipif(bool(trl_missing()), reason=trl_missing())


@needs_trl
def test_trl_trains_on_the_same_rows_as_the_engine_does(tmp_path, deepspeed):
    """Two ranks, two micro-batches of two rows: rows that went to other ranks or steps would give other losses."""
    out = tmp_path / "trl.json"
    done = deepspeed(2, PROGRAM, "--compare", "trl", "--deepspeed", *CELLS["files"], "--preset", "debug", "--rows",
                     "256x2x2", "--max_seq_len", "128", "--steps", "2", "--dtype", "fp32", "--out", str(out),
                     "--cache_dir", str(tmp_path), "--save_dir", str(tmp_path / "run"))
    found = json.loads(out.read_text())
    facts = found["pairs"]["zero1 / trl"]
    assert facts["largest_loss_difference"] < 1e-5 and facts["rounds"] == 2 and found["ranks"] == 2
    assert facts["leak"]["changed_sample"] > 0 and facts["leak"]["others"] == 0
    for who, rate in facts["labelled_tokens_per_s"].items():
        assert 0 < rate < facts["tokens_per_s"][who]
    assert 0.9 < facts["trl_own_packing_fill"] <= 1 and "its packed samples are apart" in done.stdout


@needs_trl
def test_the_leak_probe_sees_samples_that_see_each_other(tmp_path):
    # An attention mask takes from transformers the only sign that samples end within a row.
    flags = ["--deepspeed", *CELLS["files"], "--pack_len", "256", "--max_seq_len", "128", "--dtype", "fp32",
             "--cache_dir", str(tmp_path), "--save_dir", str(tmp_path / "run")]
    code = f"""
import json, torch
from minimind_ds.convert import minimind
from minimind_ds.distributed import engine
from minimind_ds.bench.throughput import cell, trl_loop
from minimind_ds.distributed.world import read_world
world = read_world()
engine.start(world)
for preset in ("debug", "debug-moe"):
    prepared = cell.prepare_cell([*{flags!r}, "--preset", preset], world)
    trainer = trl_loop.build(prepared, dict(minimind.fresh(prepared.model_config)), 1)
    found = [trl_loop.leak(prepared, trainer)]
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (b := collate(rows)) | {{"attention_mask": torch.ones_like(b["input_ids"])}}
    found.append(trl_loop.leak(prepared, trainer))
    trainer.data_collator = collate
    trainer.begin()
    trainer.one_step()
    found.append([type(trainer.model_wrapped).__name__, trainer.args.n_gpu, trainer.model.is_gradient_checkpointing])
    trainer.end()
    print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, name in zip(done.stdout.splitlines()[-2:], ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), strict=True):
        apart, together, plain = json.loads(line)
        assert apart[0] > 0 and apart[1] == 0 and together[1] > 0
        # One rank is not slowed down by what only several need, nor by checkpointing, which TRL turns on.
        assert plain[0] == name and plain[1] <= 1 and plain[2] is False


def test_stage_3_asks_numactl_at_most_once(compared):
    # Unless LOCAL_SIZE is set, DeepSpeed on a CPU starts it at every bucket of gradients.
    assert int(compared[1].split("numactl:")[-1]) <= 1


def test_a_pair_takes_its_ratio_round_by_round(monkeypatch):
    """A machine that slows down between rounds moves no ratio."""
    pace, clock = iter([1, 1, 2, 2, 4, 4]), [0.0]
    monkeypatch.setattr(ratios, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def loop(name, seconds):
        def step():
            clock[0] += seconds * next(pace)
            return 100, 1.0
        return loops.Loop(name, step)

    found = ratios.pair(loop("a", 1.0), loop("b", 2.0), warm_up=0, steps=3, device=torch.device("cpu"),
                        say=lambda text: None)
    assert found["ratio"] == found["ratio_q1"] == found["ratio_q3"] == 0.5 and found["largest_loss_difference"] == 0


def test_gaps_of_a_profile_are_the_time_outside_operators():
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(2):
            with record_function(trace.STEP), record_function("benchmark: forward"):
                (x @ x).sum()
                time.sleep(0.05)
    facts = trace.summarise(found.events(), cuda=False)
    assert 50 <= facts["parts"]["forward"]["gaps_ms"] <= facts["parts"]["forward"]["ms"] <= facts["step_ms"]
    assert facts["host_bound_share"] <= 1 and "aten::mm" in [t["name"] for t in facts["top"]]
    assert trace.overlap(trace.union([(0, 2), (5, 9), (1, 3)]), [(2, 6)]) == 2


def test_a_shipped_file_has_a_bare_name():
    assert throughput.parse(["--deepspeed", "zero1"])[0].deepspeed == CELLS["files"]


@pytest.mark.parametrize("words, complaint", [
    (["--rows", "4096x0"], "--rows"), (["--preset", "huge"], "--preset huge"), (["--ranks", "two"], "--ranks two"),
    (["--deepspeed", "absent.json"], "absent.json")])
def test_a_wrong_flag_is_one_line(words, complaint, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.get(name, "0"))
    assert throughput.main([*words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and said.count("\n") == 1
