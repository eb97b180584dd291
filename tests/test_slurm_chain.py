"""Chains of batch jobs, and the benchmark's batch script, in a real SLURM; test_slurm.py has what may befall a job."""

import json
import re
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.test_slurm import ONE_TASK, Batch, facts, few, shim, two_nodes


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as running:
        yield running


@pytest.fixture(scope="module")
def benchmark(cluster):
    """One round of the benchmark, in a container whose program is a stand-in that only starts what it is given."""
    tools = cluster.home / "container"
    tools.mkdir()
    shim(tools / "apptainer", """[ "$1 $2 $3 $5" = "exec --nv --bind --pwd" ] || exit 9
        echo "inside $7 at $6 with $4"; exec "${@:8}" """)
    path = f"{tools}:{environment()['PATH']}"
    return Batch(cluster, "benchmark", *ONE_TASK, program="benchmark", PATH=path, APPTAINER_IMAGE="x.sif",
                 flags=("--dtypes", "fp32", "--warm_up", "0", "--steps", "1", "--padded_rows", "2"))


@pytest.fixture(scope="module")
def chain(cluster):
    """Pretraining, then fine-tuning of its weights, then an export; submitted all at once.  -> their ids"""
    said = cluster.run(
        "bash", "launch/slurm/chain.sh", str(cluster.home / "chain"), *ONE_TASK, "--cpus-per-task=1",
        f"--output={cluster.home}/chain-%x.out", cwd=ROOT,
        FLAGS=" ".join([*few(cluster), "--max_steps", "3", "--save_interval", "0"]), PYTHON=sys.executable,
        LOG_DIR=str(cluster.home / "chain.logs"), **environment())
    return re.fullmatch(rf"pretraining (\d+), fine-tuning (\d+), export (\d+) into {cluster.home}/chain/hf",
                        said).groups()


def test_a_chain_of_jobs_ends_in_a_hugging_face_folder(cluster, chain, benchmark):
    cluster.wait_for(lambda: facts(cluster, chain[-1])["JobState"] == "COMPLETED", "the end of the chain", 300)
    assert (cluster.home / "chain" / "hf" / "config.json").exists()
    times = [facts(cluster, job) for job in chain]
    assert all(a["EndTime"] <= b["StartTime"] for a, b in zip(times, times[1:]))


def test_the_benchmark_ends_with_one_json_document_inside_a_container_too(benchmark):
    benchmark.wait("COMPLETED")
    said = benchmark.out.read_text()
    assert f"inside x.sif at {ROOT} with {ROOT},{ROOT}" in said
    assert json.loads(said[said.index("\n{\n"):])["loops"]["packed fp32"]["tokens_per_s"] > 0
