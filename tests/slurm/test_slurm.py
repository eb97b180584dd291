"""The shipped batch scripts in a real SLURM of two nodes: they train, stop, requeue and go on, bit for bit.

Nothing is left running, whatever happens: see tests/slurm/cluster.py.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from tests.checkpoint.test_resume import curve, weights
from tests.conftest import ROOT, environment
from tests.slurm.cluster import Cluster, forbidden, missing
from tests.waiting import HANG_S

STEPS = 60
MODEL = "preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2, dropout: 0.1}\n"
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
# On the node that stays.
ONE_TASK = ("--nodelist=node1", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def cluster():
    if why := missing():
        # .ci/run has installed what is needed: there it is a failure.
        (pytest.fail if os.environ.get("MINIMIND_DS_NEEDS_ALL") else pytest.skip)(why)
    if why := forbidden():
        pytest.skip(why)
    # munge refuses a folder that only its owner may enter, and sockets with long names.
    home = pathlib.Path(tempfile.mkdtemp(prefix="mmds", dir="/tmp"))
    home.chmod(0o755)
    try:
        (home / "run.yaml").write_text(MODEL)
        with Cluster(home) as running:
            yield running
    finally:
        shutil.rmtree(home)


def facts(cluster: Cluster, job: str) -> dict:
    return dict(re.findall(r"(\w+)=(\S*)", cluster.run("scontrol", "show", "job", "--oneliner", job)))


class Batch:
    """A submitted job: launch/slurm/<program>.sbatch with a tiny model."""

    def __init__(self, cluster: Cluster, name: str, *options: str, program: str = "sft", flags: tuple = (), **extra):
        self.cluster, self.name, self.folder = cluster, name, cluster.home / name
        self.out = cluster.home / f"{name}.out"
        self.flags = [*few(cluster), "--max_steps", str(STEPS), "--save_interval", "20", "--save_dir",
                      str(self.folder), *flags]
        self.id = cluster.run(
            "sbatch", "--parsable", "--cpus-per-task=1", f"--output={self.out}", *options,
            f"launch/slurm/{program}.sbatch", *self.flags, cwd=ROOT,
            **{**environment(), "PYTHON": sys.executable, "LOG_DIR": str(cluster.home / f"{name}.logs"), **extra})

    def show(self) -> dict:
        return facts(self.cluster, self.id)

    def said(self) -> str:
        """All that the job and its ranks printed."""
        logs = sorted((self.cluster.home / f"{self.name}.logs").glob("*.log"))
        return "\n".join(path.read_text() for path in (self.out, *logs) if path.exists())

    def requeued(self) -> list[tuple[str, str]]:
        """Why the job requeued itself, and its restarts by then, for each time that it did."""
        return re.findall(r": ([^:\n]*): requeued, restart (\d+)", self.said())

    def resumed(self) -> list[int]:
        """The steps of the checkpoints that it went on from."""
        log = self.cluster.home / f"{self.name}.logs" / "sft-rank0000.log"
        return [int(step) for step in re.findall(r"resuming from \S+ after step (\d+)", log.read_text())]

    def wait_for(self, true, what: str, seconds: float = HANG_S) -> None:
        try:
            self.cluster.wait_for(true, f"{self.name}: {what}", seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.said()[-5000:]}") from None

    def wait(self, *states: str) -> dict:
        def reached():
            assert "FAILED" in states or self.show()["JobState"] != "FAILED", self.said()[-5000:]
            return self.show()["JobState"] in states
        self.wait_for(reached, " or ".join(states))
        return self.show()

    def wait_for_step(self, step: int, restarts: int = 0) -> None:
        """Until that many steps are made since the last restart."""
        path = self.folder / "metrics.jsonl"

        def reached():
            if path.exists() and len(self.resumed()) == restarts:
                if path.read_text().count('"loss"') >= step + sum(self.resumed()[-1:]):
                    return True
            assert self.show()["JobState"] not in ("FAILED", "COMPLETED"), self.said()[-5000:]
            return False
        self.wait_for(reached, f"{step} steps after {restarts} restarts")

    def freeze(self, step: int, restarts: int = 0) -> None:
        """Stops the rank on node2, for which the other then waits: what comes next comes amidst the training."""
        self.wait_for_step(step, restarts)
        self.signal("STOP")

    def signal(self, name: str) -> None:
        """To the rank on node2."""
        try:
            self.cluster.run("pkill", f"-{name}", "-f", rf"^\S*python\S* \S*sft.py.*{self.folder}", on="node2")
        except RuntimeError as error:
            raise AssertionError(f"{error}\n{self.said()[-5000:]}") from None


def few(cluster: Cluster) -> list[str]:
    """Flags of a tiny run."""
    return ["--config", str(cluster.home / "run.yaml"), "--deepspeed", "ds_configs/zero2.json", "--cache_dir",
            str(cluster.home / "cache"), "--max_seq_len", "96", "--pack_len", "96", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def early(cluster):
    """All that takes long, at the same time: a run on one node that nobody disturbs, and two on two nodes.

    Of these one, the only task of an array, is warned, then has to make room for a job of higher priority; the other
    comes to its time limit, then loses a rank, and after that is kept waiting for the loss of a node.
    """
    control = Batch(cluster, "control", *ONE_NODE)
    busy = Batch(cluster, "busy7", *TWO_NODES, "--partition=low", "--gpus-per-node=20", "--array=7",
                 flags=("--save_dir", str(cluster.home / "busy%a"), "--from_resume", "none"))
    busy.id += "_7"
    # Submitted from a shell that is a rank itself.
    limit = Batch(cluster, "limit", *TWO_NODES, "--time=60", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    pool = concurrent.futures.ThreadPoolExecutor()
    yield control, busy, limit, pool.submit(disturb, busy), pool.submit(run_out_of_time, limit)
    pool.shutdown(wait=False, cancel_futures=True)


def disturb(busy: Batch) -> str:
    """Returns the job of higher priority."""
    cluster = busy.cluster
    busy.freeze(5)
    cluster.run("scancel", "--signal=USR1", "--batch", busy.id)
    busy.wait_for(lambda: "received USR1" in busy.said(), "the warning")
    busy.signal("CONT")
    busy.freeze(3, restarts=1)
    high = cluster.run("sbatch", "--parsable", "--partition=high", "--gpus-per-node=20", "--output=/dev/null",
                       "--wrap", "sleep 1")
    busy.wait_for(lambda: "SIGTERM: a checkpoint after this step" in busy.said(), "the pre-emption")
    busy.signal("CONT")
    return high


def run_out_of_time(limit: Batch) -> None:
    """And then lose a rank."""
    limit.freeze(5)
    # The warning comes 120 s before, or when SLURM next looks, every 30 s; over a minute is left for what follows.
    end = time.strftime("%FT%T", time.localtime(time.time() + 100))
    limit.cluster.run("scontrol", "update", f"JobId={limit.id}", f"EndTime={end}")
    limit.wait_for(lambda: "received USR1" in limit.said(), "SLURM's warning")
    # Its next start has time enough.
    limit.cluster.run("scontrol", "update", f"JobId={limit.id}", "TimeLimit=60")
    limit.signal("CONT")
    limit.wait_for_step(3, restarts=1)
    limit.signal("KILL")
    limit.freeze(3, restarts=2)


@pytest.fixture(scope="module")
def control(early):
    """The undisturbed run on one node; finished."""
    early[0].wait("COMPLETED")
    assert len(curve(early[0].folder)) == STEPS and early[0].show()["NumNodes"] == "1"
    return early[0]


@pytest.fixture(scope="module")
def busy(early):
    """The run that was warned and then pre-empted; finished."""
    early[3].result()
    early[1].wait("COMPLETED")
    return early[1]


def same(batch: Batch, control: Batch, restarts: int) -> None:
    facts = batch.wait("COMPLETED")
    assert int(facts["Restarts"]) == restarts and facts["ExitCode"] == "0:0", batch.said()[-6000:]
    assert curve(batch.folder) == curve(control.folder) and weights(batch.folder) == weights(control.folder)
    assert not (batch.folder / "attempts.json").exists()


def test_a_cancelled_job_stays_cancelled_and_leaves_no_process(cluster, early):
    cancelled = Batch(cluster, "cancelled", *TWO_NODES)
    cancelled.wait_for_step(5)
    cluster.run("scancel", cancelled.id)
    cancelled.wait("CANCELLED")
    # Its script too: who could requeue it is gone.
    cancelled.wait_for(lambda: not any(str(cancelled.folder) in line for node in ("node1", "node2")
                                       for line in cluster.processes(node)), "its processes to end")
    assert cancelled.show()["JobState"] == "CANCELLED" and cancelled.show()["Restarts"] == "0"
    assert not (cancelled.folder / "DONE").exists()


def test_jobs_side_by_side_meet_at_places_of_their_own(control, early):
    places = []
    for job in (control, *early[1:3]):
        began, place = re.search(r"(\S+) \S+ job \S+, restart 0: .* rendezvous (node1:\d+)", job.said()).groups()
        places.append(place)
        assert began < control.show()["EndTime"], "they were to run side by side"
    assert len(set(places)) == 3


def test_a_warned_and_then_preempted_job_on_two_nodes_ends_as_one_node_undisturbed(cluster, control, early, busy):
    same(busy, control, restarts=2)
    # Once for each event.
    assert busy.requeued() == [("stopped by USR1", "1"), ("stopped", "2")] and busy.show()["NumNodes"] == "2"
    high = facts(cluster, early[3].result())
    assert high["JobState"] == "COMPLETED" and high["EndTime"] <= busy.show()["StartTime"]
    # The checkpoints were not periodic ones.
    for step in busy.resumed():
        assert step % 20 and f"the checkpoint of step {step} is written" in busy.said()


def test_a_time_limit_and_a_crash_requeue_a_job_once_each_and_at_once_while_its_nodes_are_well(early):
    limit = early[2]
    early[4].result()
    assert limit.requeued() == [("stopped by USR1", "1"), ("the training failed", "2")]
    assert limit.show()["Restarts"] == "2" and "restarted 2 times, failed 1 times" in limit.said()
    assert "waiting for SLURM" not in limit.said()


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
    return Batch(cluster, "benchmark", *ONE_TASK, program="benchmark", PATH=path, APPTAINER_IMAGE="x.sif",
                 PREFLIGHT_FLAGS="--min_free_gib 0.1",
                 flags=("--preflight", "--dtypes", "fp32", "--warm_up", "0", "--steps", "1", "--padded_rows", "2"))


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


@pytest.fixture(scope="module")
def broken(cluster):
    """A job whose program fails before any training: on node2 at once, on node1 when the file `dark` is there."""
    tool = cluster.home / "broken.sh"
    shim(tool, f"""while [ $SLURMD_NODENAME = node1 ] && [ ! -e {cluster.home}/dark ]; do sleep 0.1; done
        exit 3""")
    return Batch(cluster, "broken", *TWO_NODES, PYTHON=str(tool))


def test_a_lost_node_costs_one_restart_which_is_slurms_own(cluster, control, busy, early, chain, benchmark, broken):
    lost = early[2]
    early[4].result()
    broken.wait_for(lambda: "node2: task 1: Exited with exit code 3" in broken.said(), "the failure on node2")
    # The worst way: no connection is closed, and the ranks on both sides wait for each other.
    cluster.cut_off("node2")
    (cluster.home / "dark").touch()
    # A script that finds a node dark before SLURM knows of it does not requeue the job.
    broken.wait_for(lambda: "no answer from node2: waiting for SLURM to notice" in broken.said(), "the look at node2")
    cluster.give_up_after(6)
    lost.wait("PENDING")
    broken.wait("PENDING")
    cluster.give_up_after(60)
    cluster.switch_off("node2")
    cluster.switch_on("node2")
    cluster.run("slurmd", on="node2")
    same(lost, control, restarts=3)
    assert len(lost.requeued()) == 2 and len(lost.resumed()) == 3


def test_a_program_that_never_starts_is_tried_three_times_and_once_more_for_a_lost_node(broken):
    ended = broken.wait("FAILED")
    why = "the program did not start (exit code 3)"
    third = "error: the program did not come to train, three times in a row, nor to tokenise more (ended by: "
    assert broken.requeued() == [(why, "2"), (why, "3")] and ended["Restarts"] == "3" and ended["ExitCode"] == "2:0"
    assert f"{third}exit code 3, exit code 3, exit code 3); see " in broken.said()


def test_a_chain_of_jobs_ends_in_a_hugging_face_folder(cluster, chain):
    cluster.wait_for(lambda: facts(cluster, chain[-1])["JobState"] == "COMPLETED", "the end of the chain", 120)
    assert (cluster.home / "chain" / "hf" / "config.json").exists()
    times = [facts(cluster, job) for job in chain]
    assert all(a["EndTime"] <= b["StartTime"] for a, b in zip(times, times[1:]))


def test_the_benchmark_ends_with_one_json_document_inside_a_container_too(cluster, benchmark):
    benchmark.wait("COMPLETED")
    said = benchmark.out.read_text()
    assert f"inside x.sif at {ROOT} with {ROOT},{ROOT},{cluster.home}/benchmark.logs\n" in said
    assert "pre-flight: all well" in said
    assert json.loads(said[said.index("\n{\n"):])["loops"]["packed fp32"]["tokens_per_s"] > 0


@pytest.mark.slow
def test_a_job_that_is_preempted_without_a_grace_time_goes_on_from_its_own_checkpoint(cluster, control):
    job = Batch(cluster, "at_once", *TWO_NODES, "--partition=at_once", "--gpus-per-node=20")
    job.wait_for_step(5)
    cluster.run("sbatch", "--partition=high", "--gpus-per-node=20", "--output=/dev/null", "--wrap", "sleep 1")
    same(job, control, restarts=1)
    assert len(job.resumed()) == 1 and job.resumed()[0] % 20
    # SLURM's doing alone.
    assert not job.requeued()


@pytest.mark.slow
def test_a_job_that_loses_its_first_node_where_its_script_and_rank_0_are_goes_on(cluster, control):
    job = Batch(cluster, "first", *TWO_NODES)
    job.wait_for_step(22)
    cluster.switch_off("node1")
    cluster.give_up_after(6)
    job.wait("PENDING")
    cluster.give_up_after(60)
    cluster.switch_on("node1")
    cluster.run("slurmd", on="node1")
    same(job, control, restarts=1)
    assert job.resumed() == [20] and not job.requeued()


@pytest.mark.slow
def test_a_job_that_fails_at_one_step_three_times_stops_with_the_reason(cluster):
    loop = Batch(cluster, "loop", *ONE_TASK, flags=("--learning_rate", "1e18"))
    ended = loop.wait("FAILED")
    assert ended["ExitCode"] == "2:0" and ended["Restarts"] == "3"
    assert re.search(r"error: .*: training failed 3 times at step \d+, the last time with: NonFinite: .*not tried",
                     loop.said())


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
    words = ["bash", "launch/multi_node.sh", str(hostfile), "sft", *control.flags, "--save_dir", str(folder),
             "--preflight"]
    env = environment(MASTER_PORT="29511")
    env["PATH"] = f"{tools}:{env['PATH']}:/usr/sbin"

    def run(machines: str) -> subprocess.CompletedProcess:
        hostfile.write_text(machines)
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_S)
    for machines, said in [("node1 slots=1\nnode3 slots=1\n", "ssh node3 asks for a password or fails"),
                           ("node1 slots=1\nnode2 8\n", "line 2: node2\\ 8\\  is not 'name slots=GPUS'"),
                           ("node1 slots=1\nnode1 slots=1\n", "line 2 names node1 a second time"),
                           ("# none\n", "names no machine")]:
        refused = run(machines)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and said in refused.stderr, refused
    done = run("# two machines\nnode1 slots=1\nnode2 slots=1")
    assert done.returncode == 0 and "pre-flight: all well" in done.stdout, done.stdout[-3000:] + done.stderr[-5000:]
    assert curve(folder) == curve(control.folder) and weights(folder) == weights(control.folder)
