"""Our kernels as operators: torch.compile takes a layer whole, and eager code pays for no operator.

What is compiled runs in the interpreter: triton/operator_facts.py.
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

from .triton import hold

pytest.importorskip("triton")


@pytest.mark.numeric
def test_operators_keep_their_facts(request):
    hold("operator", slow=request.config.getoption("--slow"))


def test_eager_code_calls_kernels_at_the_cost_of_a_bare_function():
    """A process of its own, since launches are left out there."""
    program = ("import json; from minimind_ds.bench.kernels import wrapper; wrapper.leave_out_launches(); "
               "print(json.dumps(wrapper.measure()))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        # The measure sees what it is there to see.
        assert found["library_calls_of_library"] >= 20 and found["library_ratio"] > found["eager_ratio"], name
        assert found["eager_calls_of_library"] == 0 and found["eager_ratio"] <= 1.25, (name, found)
