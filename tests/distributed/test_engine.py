"""The process that engine.start makes: what of it is not DeepSpeed's or torch's."""

import platform
import subprocess
import sys

import pytest

from minimind_ds.distributed import engine
from tests.conftest import ROOT, environment


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to")
@pytest.mark.parametrize("parameters, tuned, given_back", [
    (engine.KEPT_FROM, {}, 0.0), (engine.KEPT_FROM - 1, {}, 1.0), (engine.KEPT_FROM, {"MALLOC_ARENA_MAX": "8"}, 1.0)])
def test_memory_that_a_step_of_a_large_model_frees_stays_unless_the_user_tunes_malloc(parameters, tuned, given_back):
    code = f"""
import psutil, torch
from minimind_ds.distributed import engine
engine.keep_memory({parameters})
x = torch.ones(2**26)
held = psutil.Process().memory_info().rss
del x
print((held - psutil.Process().memory_info().rss) / 2**28)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(**tuned), capture_output=True,
                          text=True, check=True)
    assert float(done.stdout) == pytest.approx(given_back, abs=0.1)
