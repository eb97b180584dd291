"""The workarounds for DeepSpeed and torch: each is listed with its reason, and goes when upstream needs it no longer.

A fault that the installed release no longer has is reported as a warning; the test fails once no supported release
has it.
"""

import inspect
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


@pytest.mark.parametrize("module, names", [
    ("deepspeed.sequence.layer", ["_SeqAllToAll"]),
    ("deepspeed.module_inject.auto_ep_layer", ["AutoEPMoELayer", "_AllToAllV"]),
    ("deepspeed.utils.groups", ["_get_expert_parallel_group", "_create_expert_and_data_parallel"]),
])
def test_what_is_reached_into_is_there(module, names):
    reached = __import__(module, fromlist=names)
    assert not [name for name in names if not hasattr(reached, name)]
