"""The shipped batch scripts in a real SLURM of two nodes: they train, stop, requeue and go on, bit for bit.

Nothing is left running, whatever happens: see tests/slurm/cluster.py.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from tests.conftest import ROOT, environment
from tests.slurm.cluster import Cluster, forbidden, missing
from tests.test_resume import curve, weights

STEPS = 60
MODEL = "preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2, dropout: 0.1}\n"
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def cluster():
    if why := missing():
        # .ci/run has installed what is needed: there it is a failure.
        (pytest.fail if os.environ.get("MINIMIND_DS_NEEDS_SLURM") else pytest.skip)(why)
    if why := forbidden():
        pytest.skip(why)
    # munge refuses a folder that only its owner may enter, and sockets with long names.
    home = pathlib.Path(tempfile.mkdtemp(prefix="mmds", dir="/tmp"))
    home.chmod(0o755)
    try:
        with Cluster(home) as running:
            yield running
    finally:
        shutil.rmtree(home)


class Batch:
    """A submitted job: launch/slurm/<program>.sbatch with a tiny model."""

    def __init__(self, cluster: Cluster, name: str, *options: str, program: str = "sft", flags: tuple = (), **extra):
        self.cluster, self.name, self.folder = cluster, name, cluster.home / name
        config = cluster.home / "run.yaml"
        config.write_text(MODEL)
        self.out = cluster.home / f"{name}.out"
        self.flags = ["--config", str(config), "--deepspeed", "ds_configs/zero2.json", "--cache_dir",
                      str(cluster.home / "cache"), "--max_steps", str(STEPS), "--save_interval", "20", "--max_seq_len",
                      "96", "--pack_len", "96", "--dtype", "fp32", "--save_dir", str(self.folder), *flags]
        self.id = cluster.run(
            "sbatch", "--parsable", "--cpus-per-task=1", f"--output={self.out}", *options,
            f"launch/slurm/{program}.sbatch", *self.flags, cwd=ROOT,
            **{**environment(), "PYTHON": sys.executable, "LOG_DIR": str(cluster.home / f"{name}.logs"), **extra})

    def show(self) -> dict:
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.run("scontrol", "show", "job", "--oneliner", self.id)))

    def said(self) -> str:
        """All that the job and its ranks printed."""
        logs = sorted((self.cluster.home / f"{self.name}.logs").glob("*.log"))
        return "\n".join(path.read_text() for path in (self.out, *logs) if path.exists())

    def wait(self, *states: str, seconds: float = 150) -> dict:
        def reached():
            assert "FAILED" in states or self.show()["JobState"] != "FAILED", self.said()[-5000:]
            return self.show()["JobState"] in states
        try:
            self.cluster.wait_for(reached, f"{self.name} to be {states}", seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.said()[-5000:]}") from None
        return self.show()

    def wait_for_step(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"

        def reached():
            assert self.show()["JobState"] not in ("FAILED", "COMPLETED"), self.said()[-5000:]
            return path.exists() and path.read_text().count("\n") >= step
        self.cluster.wait_for(reached, f"step {step} of {self.name}", 120)


def thaw(cluster: Cluster, limit: Batch) -> None:
    """Lets a frozen job go on once it was warned; its next start has time enough."""
    cluster.wait_for(lambda: "received USR1" in limit.said(), "SLURM's warning", 90)
    cluster.run("scontrol", "update", f"JobId={limit.id}", "TimeLimit=60")
    cluster.run("pkill", "-CONT", "-f", str(limit.folder), on="node2")


@pytest.fixture(scope="module")
def early(cluster):
    """A run on one node and one on two at the same time; one that is frozen until SLURM warns of its time limit."""
    control, pair = Batch(cluster, "control", *ONE_NODE), Batch(cluster, "pair", *TWO_NODES)
    limit = Batch(cluster, "limit", *TWO_NODES, "--time=60")
    limit.wait_for_step(5)
    cluster.run("pkill", "-STOP", "-f", str(limit.folder), on="node2")
    # SLURM looks at time limits every 30 seconds.
    end = time.strftime("%FT%T", time.localtime(time.time() + 100))
    cluster.run("scontrol", "update", f"JobId={limit.id}", f"EndTime={end}")
    # Other tests go on meanwhile, however slow the machine is.
    threading.Thread(target=thaw, args=(cluster, limit), daemon=True).start()
    return control, pair, limit


@pytest.fixture(scope="module")
def control(early):
    """The undisturbed run on one node; finished."""
    early[0].wait("COMPLETED")
    assert len(curve(early[0].folder)) == STEPS
    return early[0]


def same(batch: Batch, control: Batch, restarts: int, at_most: int | None = None) -> None:
    facts = batch.wait("COMPLETED")
    assert restarts <= int(facts["Restarts"]) <= (at_most or restarts), batch.said()[-6000:]
    assert facts["ExitCode"] == "0:0", batch.said()[-6000:]
    assert curve(batch.folder) == curve(control.folder) and weights(batch.folder) == weights(control.folder)
    assert not (batch.folder / "attempts.json").exists()


def test_two_nodes_train_as_one_node_does_with_another_job_beside_them(early, control):
    pair = early[1]
    same(pair, control, restarts=0)
    a, b = control.show(), pair.show()
    assert a["StartTime"] < b["EndTime"] and b["StartTime"] < a["EndTime"], "they were to run side by side"
    assert a["NumNodes"] == "1" and b["NumNodes"] == "2"
    places = [re.search(r"rendezvous (node\d:\d+)", batch.said()).group(1) for batch in (control, pair)]
    assert len(set(places)) == 2 and {place.split(":")[0] for place in places} == {"node1"}


@pytest.fixture(scope="module")
def disturbed(cluster, early):
    """A warned job, as one task of an array, whose plain id is the whole array's; and one whose rank was killed."""
    warned = Batch(cluster, "warned7", *TWO_NODES, "--array=7",
                   flags=("--save_dir", str(cluster.home / "warned%a"), "--from_resume", "none"))
    warned.id += "_7"
    crashed = Batch(cluster, "crashed", *ONE_NODE)
    warned.wait_for_step(5)
    cluster.run("scancel", "--signal=USR1", "--batch", warned.id)
    crashed.wait_for_step(5)
    victim = cluster.run("pgrep", "-n", "-f", rf"^\S*python\S* \S*sft.py.*{crashed.folder}")
    cluster.run("kill", "-KILL", victim)
    return warned, crashed


def test_a_cancelled_job_stays_cancelled_and_leaves_no_process(cluster, disturbed):
    cancelled = Batch(cluster, "cancelled", *TWO_NODES)
    cancelled.wait_for_step(5)
    cluster.run("scancel", cancelled.id)
    cancelled.wait("CANCELLED")
    time.sleep(3)
    for node in ("node1", "node2"):
        assert not [line for line in cluster.processes(node) if str(cancelled.folder) in line]
    assert cancelled.show()["JobState"] == "CANCELLED" and cancelled.show()["Restarts"] == "0"
    assert not (cancelled.folder / "DONE").exists()


def test_a_warned_job_writes_a_checkpoint_and_is_requeued_once(control, disturbed):
    warned = disturbed[0]
    same(warned, control, restarts=1)
    # The checkpoint was not a periodic one.
    step = int(re.search(r"resuming from \S+ after step (\d+)", warned.said()).group(1))
    assert step % 20 and f"the checkpoint of step {step} is written" in warned.said()
    assert "received USR1" in warned.said() and "restarted 1 times" in warned.said()


def test_a_crash_in_training_is_requeued(control, disturbed):
    crashed = disturbed[1]
    same(crashed, control, restarts=1)
    assert "the training failed: requeued" in crashed.said() and "failed 1 times" in crashed.said()


def test_a_job_at_its_time_limit_goes_on_after_it(early, control):
    limit = early[2]
    same(limit, control, restarts=1)
    assert "stopped by USR1: requeued, restart 1" in limit.said()


def shim(path: pathlib.Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def benchmark(cluster):
    """One round of the benchmark, in a container whose program is a stand-in that only starts what it is given."""
    tools = cluster.home / "container"
    tools.mkdir()
    shim(tools / "apptainer", """[ "$1 $2 $3 $5" = "exec --nv --bind --pwd" ] || exit 9
        echo "inside $7 at $6 with $4"; exec "${@:8}" """)
    path = f"{tools}:{environment()['PATH']}"
    return Batch(cluster, "benchmark", "--ntasks-per-node=1", program="benchmark", PATH=path, APPTAINER_IMAGE="x.sif",
                 flags=("--dtypes", "fp32", "--warm_up", "0", "--steps", "1", "--padded_rows", "2"))


@pytest.fixture(scope="module")
def chain(cluster):
    """Pretraining, then fine-tuning of its weights, then an export; submitted all at once."""
    few, one = ("--max_steps", "3", "--save_interval", "0"), ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    first = Batch(cluster, "first", *one, program="pretrain", flags=few)
    second = Batch(cluster, "second", *one, f"--dependency=afterok:{first.id}",
                   flags=(*few, "--from_weight", str(first.folder)))
    last = cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{second.id}", f"--output={cluster.home}/last.out", "--wrap",
        f"{sys.executable} launch/export.py --weight {second.folder} --to hf --out {cluster.home}/hf", cwd=ROOT,
        **environment())
    return first, second, last


def test_a_lost_node_is_survived(cluster, control, chain, benchmark):
    lost = Batch(cluster, "lost", *TWO_NODES, flags=("--save_interval", "3"))
    lost.wait_for_step(7)
    cluster.switch_off("node2")
    cluster.give_up_after(6)
    lost.wait("PENDING")
    assert lost.show()["Restarts"] == "1"
    cluster.give_up_after(60)
    cluster.switch_on("node2")
    cluster.run("slurmd", on="node2")
    # The rank that is left says that the other is gone before SLURM knows of the node, which may cost one start more.
    same(lost, control, restarts=1, at_most=2)


def test_a_chain_of_jobs_ends_in_a_hugging_face_folder(cluster, chain):
    first, second, last = chain
    second.wait("COMPLETED")
    cluster.wait_for((cluster.home / "hf" / "config.json").exists, "the export", 60)
    assert first.show()["EndTime"] <= second.show()["StartTime"]


def test_the_benchmark_ends_with_one_json_document_inside_a_container_too(benchmark):
    benchmark.wait("COMPLETED")
    said = benchmark.out.read_text()
    assert f"inside x.sif at {ROOT} with {ROOT},{ROOT}" in said
    assert json.loads(said[said.index("\n{\n"):])["loops"]["packed fp32"]["tokens_per_s"] > 0


@pytest.mark.slow
def test_a_node_with_another_checkout_is_named_before_the_training_begins(cluster):
    other = cluster.home / "other"
    shutil.copytree(ROOT / "minimind_ds", other)
    (other / "loss.py").write_text((other / "loss.py").read_text() + "# Changed on one node only.\n")
    check = {"PREFLIGHT": "1", "PREFLIGHT_FLAGS": "--min_free_gib 0.1"}
    cluster.run("mount", "--bind", str(other), str(ROOT / "minimind_ds"), on="node2")
    refused = Batch(cluster, "refused", *TWO_NODES, **check)
    alike = Batch(cluster, "alike", *ONE_NODE, flags=("--max_steps", "2"), **check)
    assert refused.wait("FAILED")["ExitCode"] == "2:0"
    assert re.search(r"error: node2: source is \w+, elsewhere \w+", refused.said()) and not refused.folder.exists()
    cluster.run("umount", str(ROOT / "minimind_ds"), on="node2")
    alike.wait("COMPLETED")
    assert "pre-flight: all well" in alike.said() and re.search(r"all-reduce over 2 ranks: .* GB/s", alike.said())


@pytest.mark.slow
def test_a_plain_host_file_trains_as_slurm_does(cluster, control):
    """launch/multi_node.sh and DeepSpeed's launcher as they are; ssh and pdsh enter the test's nodes instead."""
    tools = cluster.home / "bin"
    tools.mkdir()
    pids = " ".join(f"[{name}]={cluster.pid(name)}" for name in cluster.nodes)
    shim(tools / "ssh", f"""declare -A pid=({pids})
        while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
        [ -n "${{pid[$1]:-}}" ] || {{ echo "$1: Permission denied (publickey,password)." >&2; exit 255; }}
        exec nsenter --target=${{pid[$1]}} --mount --uts --ipc --net --pid --wd="$PWD" -- bash -c "${{*:2}}" """)
    # pdsh -S -f 1024 -w HOST,HOST COMMAND, in which %n is the host's number.
    shim(tools / "pdsh", """IFS=, read -ra hosts <<<"$5"; command="${*:6}" n=0 code=0
        for host in "${hosts[@]}"; do ssh "$host" "${command//%n/$n}" & n=$((n + 1)); done
        while [ $n -gt 0 ]; do wait -n || code=$?; n=$((n - 1)); done; exit $code""")
    hostfile, folder = cluster.home / "hostfile", cluster.home / "plain"
    words = ["bash", "launch/multi_node.sh", str(hostfile), "sft", *control.flags, "--save_dir", str(folder)]
    env = environment(MASTER_PORT="29511")
    env["PATH"] = f"{tools}:{env['PATH']}:/usr/sbin"

    def run(machines: str) -> subprocess.CompletedProcess:
        hostfile.write_text(machines)
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    for machines, said in [("node1 slots=1\nnode3 slots=1\n", "ssh node3 asks for a password or fails"),
                           ("node1 slots=1\nnode2 8\n", "line 2: 'node2 8 ' is not 'name slots=GPUS'"),
                           ("# none\n", "names no machine")]:
        refused = run(machines)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and said in refused.stderr, refused
    done = run("# two machines\nnode1 slots=1\nnode2 slots=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert curve(folder) == curve(control.folder) and weights(folder) == weights(control.folder)
