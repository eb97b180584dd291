"""What a process keeps of what it frees: all, where a large model trains on a CPU, until a checkpoint is written."""

import platform
import subprocess
import sys

import pytest

from minimind_ds.distributed import malloc
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to")
# A quarter of a GiB.
CODE = """
import psutil, torch
from minimind_ds.distributed import malloc
malloc.keep({parameters})
x = torch.ones(2**26)
held = psutil.Process().memory_info().rss
del x
{then}
print((held - psutil.Process().memory_info().rss) / 2**28)
"""


@pytest.mark.parametrize("parameters, then, tuned, given_back", [
    (malloc.KEPT_FROM, "", {}, 0.0), (malloc.KEPT_FROM, "malloc.trim()", {}, 1.0), (malloc.KEPT_FROM - 1, "", {}, 1.0),
    (malloc.KEPT_FROM, "", {"MALLOC_ARENA_MAX": "8"}, 1.0)], ids=["kept", "trimmed", "small", "the user's"])
def test_what_is_freed_stays_or_goes(parameters, then, tuned, given_back):
    done = subprocess.run([sys.executable, "-c", CODE.format(parameters=parameters, then=then)], cwd=ROOT, text=True,
                          env=environment(**tuned), capture_output=True, check=True)
    assert float(done.stdout) == pytest.approx(given_back, abs=0.2)
