"""A run that compiles nothing never loads the compiler, and trains as one that has it; Muon still gets it.

Processes of their own, since a compiler that was loaded stays.
"""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.conftest import ROOT, environment
from tests.test_resume import curve, weights

pytestmark = [pytest.mark.by_exec("asserts what is loaded"),
              pytest.mark.skipif(version("deepspeed") == "0.19.7", reason="this DeepSpeed imports it itself")]

RUN = """
import json, sys, torch
from minimind_ds import lazy_compiler
from minimind_ds.train import main
if sys.argv[1] == "loaded":
    import torch._dynamo
before = torch.optim.Adam.step
code = main("sft", sys.argv[2:])
print(json.dumps([code, "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules,
                  before.__code__.co_name, torch.optim.Adam.step is before]))
"""
MUON = """
import sys, torch, deepspeed
from minimind_ds import lazy_compiler
with lazy_compiler.kept_unloaded():
    pass
coordinator = deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator
marked = [torch.optim.Optimizer.zero_grad.__wrapped__, coordinator.reset_step.__wrapped__]
assert all(vars(function)[lazy_compiler.LEFT_ALONE] is function for function in marked)
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
assert "torch._dynamo" not in sys.modules and compiler.compile() is torch.compile
seen = []
# Of a nearly singular matrix five steps do not make an orthogonal one.
torch.manual_seed(0)
torch.compile = lambda function: seen.append(function.__name__) or function
singular = [torch.linalg.svdvals(zeropower_via_newtonschulz5(torch.randn(6, 4), steps=5).float()) for _ in "12"]
assert seen == ["zeropower_via_newtonschulz5"], seen
assert all((values - 1).abs().max() < 0.4 for values in singular), singular
import torch._dynamo
with lazy_compiler.kept_unloaded():
    torch.compiler.disable(print)
assert not any(lazy_compiler.LEFT_ALONE in vars(function) for function in marked)
"""


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_without_torch_compile_never_loads_it_and_gives_the_same_bits(tmp_path, stage):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 1, dropout: 0.1}\n")
    ends = {}
    for name in ("unloaded", "loaded"):
        flags = ["--config", str(yaml), "--deepspeed", f"ds_configs/zero{stage}.json", "--max_steps", "3",
                 "--batch_size", "1", "--max_seq_len", "96", "--pack_len", "96", "--save_interval", "0",
                 "--cache_dir", str(tmp_path), "--save_dir", str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", RUN, name, *flags], cwd=ROOT, env=environment(), text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        ends[name] = json.loads(done.stdout.splitlines()[-1])
    assert ends["unloaded"] == [0, False, False, "_use_grad", False]
    assert ends["loaded"] == [0, True, True, "_use_grad", True]
    assert weights(tmp_path / "unloaded") == weights(tmp_path / "loaded")
    assert curve(tmp_path / "unloaded") == curve(tmp_path / "loaded") != []


def test_muon_is_compiled_when_it_is_called():
    done = subprocess.run([sys.executable, "-c", MUON], cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
