"""The workarounds for DeepSpeed and torch: each is listed with its reason, and goes when upstream needs it no longer.

A fault that the installed release no longer has is reported as a warning; the test fails once no supported release
has it.
"""

import inspect
import json
import pkgutil
import re
import warnings
from importlib.metadata import version

import pytest
from packaging.version import Version

from minimind_ds.distributed import deepspeed_compat, torch_compat
from tests.conftest import ROOT

COMPAT = {"deepspeed": deepspeed_compat, "torch": torch_compat}
ENTRIES = [(package, name) for package, module in COMPAT.items() for name in module.WORKAROUNDS]


def oldest_supported(package: str) -> Version:
    return Version(re.search(rf'"{package}>=([\d.]+)', (ROOT / "setup.py").read_text()).group(1))


@pytest.mark.parametrize("package", COMPAT)
def test_every_reach_has_its_entry_and_every_entry_its_function(package):
    module = COMPAT[package]
    functions = {name for name, value in vars(module).items()
                 if inspect.isfunction(value) and value.__module__ == module.__name__}
    assert functions == set(module.WORKAROUNDS)


@pytest.mark.parametrize("package, name", ENTRIES)
def test_a_workaround_that_no_supported_release_needs_is_gone(package, name):
    entry = COMPAT[package].WORKAROUNDS[name]
    assert entry.mended_in is None or oldest_supported(package) < Version(entry.mended_in), \
        f"{name} can go: {entry.wrong}"


def upstream_mended(name: str, mended: bool) -> None:
    if mended:
        warnings.warn(f"deepspeed_compat.{name} is not needed with DeepSpeed {version('deepspeed')}: note it as "
                      "mended_in", stacklevel=2)


def source_of(module: str, name: str) -> str:
    return inspect.getsource(getattr(__import__(module, fromlist=["_"]), name))


def test_stage_0_still_takes_its_norm_in_the_gradients_precision():
    source = source_of("deepspeed.runtime.engine", "DeepSpeedEngine")
    upstream_mended("clip_gradients", "float64" in source or "double()" in source)


def test_moments_are_still_linked_once():
    source = source_of("deepspeed.runtime.base_optimizer", "ZeROOptimizer") \
        + inspect.getsource(__import__("deepspeed.runtime.zero.stage_1_and_2", fromlist=["_"]))
    upstream_mended("link_moments", "_hp_optimizer_states_linked" not in source)


def test_norms_and_updates_are_still_taken_parameter_by_parameter():
    stage_1_and_2 = source_of("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
    upstream_mended("take_norm_once", "_foreach_norm" in stage_1_and_2)
    unfused = source_of("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
    upstream_mended("update_together", "_foreach" in unfused)


@pytest.mark.numeric
def test_an_update_with_one_wait_is_deepspeeds_own(tmp_path, deepspeed):
    deepspeed(2, "tests/distributed/ranks/updates.py", str(tmp_path))
    found = json.loads((tmp_path / "updates.json").read_text())
    for stage in range(4):
        bad, good = found.pop(f"overflow {stage}")
        assert bad["skipped"] and not bad["moved"] and bad["norm"] is None and bad["loss"] > 0, stage
        assert not good["skipped"] and good["moved"] and good["norm"] > 0, stage
    for name, case in found.items():
        assert case["taken"] == (not name.startswith("fused")), name
        if name in ("bf16 0", "fp16 0"):
            # DeepSpeed's norm is off by 2e-4, so the clipped gradients are; rounding to bf16 makes 8e-4 of it; no
            # clipping would be 2e-2.
            assert case["norms"] == pytest.approx(case["their_norms"], rel=2e-3) and case["apart"] < 5e-3, name
        else:
            assert case["equal"], name
    for name in ("bf16 1", "bf16 2", "bf16 3", "fp16 1", "fp32 1", "experts 1", "experts 3"):
        assert found[name]["norms"] == found[name]["their_norms"], name
    first = {name: case["norms"][0] for name, case in found.items()}
    assert first["bf16 0"] == pytest.approx(first["bf16 1"], rel=1e-6)
    # The loss scale is in none of them.
    assert [first["fp16 0"], first["fused fp16"]] == pytest.approx([first["fp16 1"]] * 2, rel=1e-3)


@pytest.mark.parametrize("module, names", [
    ("deepspeed.sequence.layer", ["_SeqAllToAll"]),
    ("deepspeed.module_inject.auto_ep_layer", ["AutoEPMoELayer", "_AllToAllV"]),
    ("deepspeed.utils.groups", ["_get_expert_parallel_group", "_create_expert_and_data_parallel"]),
    ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
     ["scaled_global_norm", "get_grad_norm_direct", "check_overflow"]),
    ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", ["_get_norm_groups"]),
    ("deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer",
     ["_skip_invalid_grad_norm", "_update_scale", "unscale_and_clip_grads"]),
])
def test_what_is_reached_into_is_there(module, names):
    reached = pkgutil.resolve_name(module)
    assert not [name for name in names if not hasattr(reached, name)]
