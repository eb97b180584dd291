"""The plan is what runs: bytes of states, saved tensors and peak, counted in real steps on one and two ranks.

The peak is the CPU allocator's own, temporaries of every operation included.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from minimind_ds.config.deepspeed_json import read_json
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.model import memory_model
from minimind_ds.plan.measure import compare
from minimind_ds.training import memory
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.numeric

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96}
MODELS = {"tiny": TINY, "tiny moe": {**TINY, "use_moe": True, "moe_intermediate_size": 96}, "debug": {},
          "debug moe": {"use_moe": True, "moe_intermediate_size": 448}}
# Buckets of the shipped files are larger than these models, and would hide what they hold.
SMALL = {"reduce_bucket_size": 500_000}
SHORT = {"num_hidden_layers": 2}
SHARED_OUT = {**SHORT, **MODELS["debug moe"]}
OTHERS = {"moe_ep": SHARED_OUT, "ulysses": SHORT}
OFFLOADED = {"zero2_offload": SHORT, "zero3_offload": SHORT, "zero3_offload_param": SHORT}
compiler = bool(shutil.which("g++") and shutil.which("ninja"))


def cases_of(out, ranks: int, slow: bool) -> list[dict]:
    cases = []
    for model, fields in MODELS.items():
        if model.startswith("debug") and not slow:
            continue
        for stage in range(4) if slow else (0, 1, 3):
            path = out / f"zero{stage}_{ranks}.json"
            ds = read_json(str(ROOT / "ds_configs" / f"zero{stage}.json"))
            path.write_text(json.dumps({**ds, "zero_optimization": {**ds["zero_optimization"], **SMALL}}))
            # Two micro-batches on one rank, half precision at stage 2.
            flags = ["--deepspeed", str(path), "--dtype", "bf16" if stage == 2 else "fp32", "--pack_len", "256",
                     "--accumulation_steps", "2" if ranks == 1 else "1"]
            cases.append({"name": f"{model} {stage} {ranks}", "model": fields, "flags": flags})
    if ranks == 2:
        for name, fields in {**OTHERS, **(OFFLOADED if compiler else {})}.items():
            flags = ["--deepspeed", f"ds_configs/{name}.json", "--dtype", "fp32", "--pack_len", "256"]
            cases.append({"name": name, "model": fields, "flags": flags})
    return cases


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, deepspeed):
    """{case: [a rank's measurements]}"""
    results = {}
    for ranks in (1, 2) if request.config.getoption("--slow") else (2,):
        out = tmp_path_factory.mktemp(f"plan{ranks}")
        deepspeed(ranks, "tests/distributed/ranks/plan.py", str(out),
                  json.dumps(cases_of(out, ranks, request.config.getoption("--slow"))))
        for rank in range(ranks):
            for name, measured in json.loads((out / f"rank{rank}.json").read_text()).items():
                results.setdefault(name, []).append(measured)
    return results


def check(ranks: list[dict]) -> None:
    off = [compare(rank) for rank in ranks]
    # DeepSpeed pads shares to whole numbers of elements and keeps small tensors of its own, which the plan leaves out.
    for kind in ("parameters", "optimizer", "buckets"):
        assert all(abs(o[kind]) <= 0.05 for o in off), (kind, off)
    # Planned is the rank that holds most; where a parameter lies across two shares, another may hold less.
    assert abs(min(o["gradients"] for o in off)) <= 0.05, off
    # Where experts are shared out, tokens go where the router sends them.
    saved = sum(rank["saved"] for rank in ranks) / sum(rank["planned"]["saved"] for rank in ranks)
    assert abs(saved - 1) <= 0.05, saved
    # Of the fullest rank, too.  Wider than the rest: kernels' scratch, one per thread, is theirs to choose and no part
    # of the plan.
    assert abs(min(o["peak"] for o in off)) <= 0.1, off


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("model", [pytest.param(model, marks=pytest.mark.slow if model.startswith("debug") else ())
                                   for model in MODELS])
def test_the_plan_is_what_a_step_holds(model, stage, ranks, found):
    check(found[f"{model} {stage} {ranks}"])


@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_holds_where_rows_or_experts_are_shared_out(name, found):
    check(found[name])


@pytest.mark.skipif(not compiler, reason="needs g++ and ninja, with which DeepSpeed builds its CPU Adam")
@pytest.mark.parametrize("name", OFFLOADED)
def test_the_plan_holds_where_states_are_offloaded(name, found):
    check(found[name])
    host = found[name][0]["planned"]["states"]["host"]
    assert host["optimizer"] > 0 and (host["parameters"] > 0) == (name == "zero3_offload_param")


def setting(**changes) -> memory_model.Setting:
    values = dict(config=PRESETS["minimind-3"], ds={"zero_optimization": {"stage": 0}}, dtype="bf16", ranks=8,
                  row_len=4096)
    return memory_model.Setting(**{**values, **changes})


def test_the_most_rows_fit_and_one_more_does_not():
    for room in (3e9, 20e9, 80e9):
        s = setting()
        rows = memory_model.most_rows(s, room)
        assert memory_model.peak(replace(s, rows=rows)) <= room < memory_model.peak(replace(s, rows=rows + 1))
    assert memory_model.most_rows(setting(), 1e8) == 0


def test_what_fits_is_silent_what_may_not_is_warned_of_and_what_cannot_is_refused():
    s = setting()
    needed = memory_model.peak(s)
    assert memory.check(s, int(needed) + 1) == []
    assert "it may run out of memory" in memory.check(s, int(needed / 1.9))[0]
    with pytest.raises(UserError, match="1 x 4,096 tokens a micro-batch .* choose smaller sizes, --pack_len or"):
        memory.check(s, int(needed / 2.1))


def test_bytes_sent_are_those_of_the_papers():
    size = sum(part.total for part in memory_model.trained_parts(setting()))
    once = 2 * size * 7 / 8
    # arXiv:1910.02054, section 7: stages 0 to 2 send 2 x the model, stage 3 three times.
    for stage, times in ((0, 2), (1, 2), (2, 2), (3, 3)):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        assert sum(memory_model.sent(setting(ds={"zero_optimization": zero})).values()) == pytest.approx(times * once)
    assert sum(memory_model.sent(setting(ranks=1)).values()) == 0


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "launch/plan.py", *flags], cwd=ROOT, env=environment(), text=True,
                          capture_output=True)


def test_the_program_recommends_a_file_and_says_why():
    roomy = run("--preset", "minimind-3", "--ranks", "8", "--memory", "80", "--dtype", "bf16", "--json")
    plan = json.loads(roomy.stdout.splitlines()[-1])
    assert plan["recommended"]["file"] == "ds_configs/zero0.json" and "sharding does not pay" in roomy.stdout
    assert [plan["plans"][f"zero{stage}"]["stage"] for stage in range(4)] == [0, 1, 2, 3]
    tight = run("--preset", "minimind-3-moe", "--ranks", "2", "--memory", "3", "--dtype", "bf16")
    assert "recommended: ds_configs/zero2_offload.json" in tight.stdout
    wrong = run("--preset", "minimind-3", "--ranks", "0")
    assert wrong.returncode == 2 and wrong.stderr == "error: --ranks is 0; it must be at least 1, at most 1,048,576\n"


@pytest.mark.slow
def test_measure_says_how_far_off_the_plan_is_for_each_file(tmp_path):
    path = tiny_yaml(tmp_path)
    with path.open("a") as file:
        file.write('\ndeepspeed: {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}\n')
    done = run("--config", str(path), "--pack_len", "256", "--max_seq_len", "128", "--dtype", "fp32",
               "--cache_dir", str(tmp_path), "--measure", "--json")
    assert done.returncode == 0, done.stderr
    off = json.loads(done.stdout.splitlines()[-1])["off"]
    assert set(off) == {*(f"zero{stage}" for stage in range(4)), "tiny"}
    assert all(abs(share) <= 0.1 for kinds in off.values() for share in kinds.values()), off


def tiny_yaml(folder):
    path = folder / "tiny.yaml"
    path.write_text("preset: debug\nmodel: " + json.dumps(TINY))
    return path
