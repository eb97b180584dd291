"""Before the first step, in a real SLURM of two nodes: no restart without progress, one line for what cannot be."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.checkpoint.test_resume import curve, weights
from tests.conftest import ROOT, environment, free_port
from tests.slurm.cluster import Cluster
from tests.slurm.test_slurm import ONE_NODE, ONE_TASK, STEPS, TWO_NODES, Batch, cluster, few, shim  # noqa: F401
from tests.waiting import HANG_S


def test_three_starts_without_progress_end_a_job_that_preemption_does_not(cluster):  # noqa: F811
    """Its first start tokenises and the second makes room; the three after them come to their time limit."""
    tool = cluster.home / "never.sh"
    shim(tool, """[ -n "${SLURM_RESTART_COUNT:-}" ] || echo tokenised >"$MINIMIND_DS_OUTCOME"
        trap 'exit 75' USR1; echo preparing; while :; do sleep 0.1; done""")
    job = Batch(cluster, "never", *ONE_TASK, PYTHON=str(tool))
    # What its task says, and not what the script shows of that.
    log = cluster.home / "never.logs" / "sft-rank0000.log"
    for start, event in enumerate(["USR1", "TERM", "USR1", "USR1", "USR1"], 1):
        job.wait_for(lambda n=start: log.exists() and log.read_text().count("preparing") == n, f"start {start}")
        cluster.run("scancel", f"--signal={event}", "--batch", job.id)
    ended = job.wait("FAILED")
    assert ended["ExitCode"] == "2:0" and ended["Restarts"] == "4"
    assert [why for why, _ in job.requeued()] == [f"stopped by {event}" for event in ("USR1", "TERM", "USR1", "USR1")]
    [said] = [line for line in job.said().splitlines() if line.startswith("error: ")]
    assert ("three times in a row, nor to tokenise more (ended by: " + ", ".join(["time limit (USR1)"] * 3)) in said
    assert "; starting takes longer than the time limit: run `" in said and "first, or raise --time; see " in said
    assert f"launch/tokenize_data.py --program sft {' '.join(job.flags)}`" in said
    # What held the port of one start does not hold that of the next.
    assert len(set(re.findall(r"rendezvous node1:(\d+)", job.said()))) == 5


def on(cluster: Cluster, node: str, *words: str, **extra: str) -> subprocess.Popen:  # noqa: F811
    """A command on a node, in the checkout; all that it prints comes through one pipe."""
    enter = ["nsenter", f"--target={cluster.pid(node)}", "--mount", "--uts", "--ipc", "--net", "--pid", f"--wd={ROOT}"]
    return subprocess.Popen([*enter, "--", *words], env=environment(**extra), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def srun(cluster: Cluster, *options: str, **extra: str) -> subprocess.CompletedProcess:  # noqa: F811
    """launch/sft.py as tasks of a step, without the batch script."""
    step = on(cluster, "head", "srun", "--kill-on-bad-exit=0", *options, sys.executable, "launch/sft.py",
              *few(cluster), "--save_dir", str(cluster.home / "never"), **extra)
    said, _ = step.communicate(timeout=HANG_S)
    return subprocess.CompletedProcess(step.args, step.returncode, said)


@pytest.mark.parametrize("options, variables, said", [
    (["--nodes=2", "--ntasks=2"], {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
     "error: srun started 2 tasks, and the environment of task 1 says RANK=0 and WORLD_SIZE=1"),
    pytest.param(["--nodes=2", "--ntasks=3"], {},
                 "error: srun started 3 tasks, and MASTER_ADDR and MASTER_PORT are not set", marks=pytest.mark.slow),
    pytest.param(["--nodes=1", "--ntasks=2", "--gpus-per-node=1"], {"MASTER_PORT": "29517"},
                 "error: 2 ranks are to run on node1, which has 1 GPU for them", marks=pytest.mark.slow)])
def test_tasks_that_cannot_be_ranks_of_one_run_are_one_line(cluster, options, variables, said):  # noqa: F811
    done = srun(cluster, *options, **variables)
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert said in done.stdout and not (cluster.home / "never" / "metrics.jsonl").exists()


def test_ranks_that_meet_and_whose_networks_do_not_are_told_which_variable_to_set(cluster):  # noqa: F811
    """Each node has an interface of its own that no cable leaves, and the variable names it."""
    both, port = [], str(free_port())
    for rank, address in enumerate(("192.0.2.1", "198.51.100.1")):
        node = f"node{rank + 1}"
        for words in ("link add apart type bridge", f"address add {address}/24 dev apart", "link set apart up"):
            cluster.run("ip", *words.split(), on=node)
        both.append(on(cluster, node, sys.executable, "launch/sft.py", *few(cluster), "--save_dir",
                       str(cluster.home / "apart"), RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2",
                       LOCAL_WORLD_SIZE="1", MASTER_ADDR="node1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="apart"))
    for rank, process in enumerate(both):
        said = process.communicate(timeout=HANG_S)[0]
        cluster.run("ip", "link", "delete", "apart", on=f"node{rank + 1}")
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said
        assert re.match(r"error: rank [01] on node[12] met the others, and gloo cannot connect them: ", lines[0])
        assert "set GLOO_SOCKET_IFNAME to the network interface that all machines share" in lines[0]


@pytest.mark.slow
def test_plain_torchrun_on_two_machines_trains_as_slurm_does(cluster):  # noqa: F811
    """Two network namespaces, an agent on each, no SLURM in between; the port of the first, or their own meeting."""
    control = Batch(cluster, "control", *TWO_NODES)
    folders = [cluster.home / name for name in ("static", "c10d")]
    for folder in folders:
        port = str(free_port())
        meeting = (["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"node1:{port}"]
                   if folder.name == "c10d" else ["--master_addr", "node1", "--master_port", port])
        words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
        flags = [*few(cluster), "--max_steps", str(STEPS), "--save_interval", "20", "--save_dir", str(folder)]
        agents = []
        for node in range(2):
            which = [] if folder.name == "c10d" else ["--node_rank", str(node)]
            agents.append(on(cluster, f"node{node + 1}", sys.executable, *words, *which, "launch/sft.py", *flags))
        said = [agent.communicate(timeout=HANG_S)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-6000:]
    control.wait("COMPLETED")
    for folder in folders:
        assert curve(folder) == curve(control.folder) and weights(folder) == weights(control.folder)


@pytest.mark.slow
def test_a_node_with_another_checkout_is_named_before_the_training_begins(cluster):  # noqa: F811
    other = cluster.home / "other"
    shutil.copytree(ROOT / "minimind_ds", other)
    (other / "io.py").write_text((other / "io.py").read_text() + "# Changed on one node only.\n")
    check = {"PREFLIGHT_FLAGS": "--min_free_gib 0.1"}
    cluster.run("mount", "--bind", str(other), str(ROOT / "minimind_ds"), on="node2")
    refused = Batch(cluster, "refused", *TWO_NODES, PREFLIGHT="1", **check)
    unchecked = Batch(cluster, "unchecked", *TWO_NODES)
    alike = Batch(cluster, "alike", *ONE_NODE, flags=("--preflight", "--max_steps", "2"), **check)
    assert refused.wait("FAILED")["ExitCode"] == "2:0"
    assert re.search(r"error: node2: source is \w+, elsewhere \w+", refused.said()) and not refused.folder.exists()
    assert unchecked.wait("FAILED")["ExitCode"] == "2:0"
    assert re.search(r"error: ranks differ: the code is \w+ on rank 0 \(node1\) and \w+ on rank 1", unchecked.said())
    cluster.run("umount", str(ROOT / "minimind_ds"), on="node2")
    alike.wait("COMPLETED")
    assert "pre-flight: all well" in alike.said() and re.search(r"all-reduce over 2 ranks: .* GB/s", alike.said())


@pytest.mark.slow
def test_a_time_limit_while_tokenising_keeps_what_is_done_and_the_next_start_goes_on(cluster):  # noqa: F811
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    (cluster.home / "data.jsonl").write_text(f"{json.dumps({'conversations': said})}\n" * 150_000)
    job = Batch(cluster, "tokenises", *TWO_NODES, flags=("--data_path", str(cluster.home / "data.jsonl"),
                                                         "--num_workers", "0", "--max_steps", "3"))
    outcome = cluster.home / "tokenises.logs" / "outcome"
    job.wait_for(outcome.exists, "the first chunk")
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    ended = job.wait("COMPLETED")
    assert ended["Restarts"] == "1" and job.requeued() == [("stopped by USR1", "1")]
    assert "SIGUSR1: ends at once, before any step; what is tokenised is kept" in job.said()
    assert re.search(r"going on after [\d,]+ records of \S+ that were tokenised before", job.said())
    assert not (cluster.home / "tokenises.logs" / "failed_starts").exists()
