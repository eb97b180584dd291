"""What launchers say is believed only where it can be; whatever keeps ranks from meeting is one line."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from minimind_ds.config.errors import UserError
from minimind_ds.distributed import rendezvous
from minimind_ds.distributed.world import export, free_port, read_world
from tests.conftest import OF_RANKS, ROOT, cache_dir, environment, rank_environment
from tests.waiting import HANG_S, until

RANK = """
import datetime, sys
from minimind_ds.config.errors import report_bugs
from minimind_ds.distributed import rendezvous
from minimind_ds.distributed.world import read_world
report_bugs()
rendezvous.TELL_S = 0.2
world = read_world()
store = rendezvous.join(world, {"seed": sys.argv[1]}, datetime.timedelta(seconds=float(sys.argv[2])))
store.set(f"bye/{world.rank}", "")
store.wait([f"bye/{rank}" for rank in range(world.size)])
if world.rank == 0:
    import time; time.sleep(0.5)
print("met")
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name in OF_RANKS or name.startswith(("SLURM_", "TORCHELASTIC")):
            monkeypatch.delenv(name)


def start(rank: int, ranks: int, port: int, *, seed: str = "1", seconds: float = 60, **extra: str):
    return subprocess.Popen([sys.executable, "-c", RANK, seed, str(seconds)], cwd=ROOT, text=True,
                            env={**rank_environment(rank, ranks, port), **extra}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def ended(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out.strip(), err.strip()


def test_a_lone_rank_leaves_a_taken_port_to_its_owner(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        export(read_world())
        assert os.environ["MASTER_PORT"] != port
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        export(read_world())
        assert os.environ["MASTER_PORT"] == port


def test_ranks_that_agree_meet_whoever_comes_first():
    port = int(free_port())
    late = start(1, 2, port, LOCAL_RANK="0")
    assert "rank 1 on " in (line := late.stderr.readline()) and f"waiting for rank 0 at 127.0.0.1:{port}" in line
    first = start(0, 2, port)
    assert [ended(p)[:2] for p in (first, late)] == [(0, "met")] * 2


def test_ranks_with_other_settings_are_told_which():
    port = int(free_port())
    both = [start(0, 2, port), start(1, 2, port, seed="2")]
    code, out, err = ended(both[0])
    assert code == 2 and not out and err.count("error: ") == 1
    assert "ranks differ: seed is 1 on rank 0" in err and "and 2 on rank 1" in err
    assert ended(both[1])[0] == 2


def test_a_rank_that_does_not_come_is_named_after_a_line_that_says_who_is_waited_for():
    code, _, err = ended(start(0, 3, int(free_port()), seconds=1.0))
    assert code == 2 and "waiting for 2 of 3 ranks: 1, 2; here are ranks on" in err.splitlines()[0]
    assert "error: 2 of 3 ranks did not come to 127.0.0.1" in err.splitlines()[-1]
    code, _, err = ended(start(1, 2, int(free_port()), seconds=0.5))
    assert code == 2 and "cannot reach rank 0 at 127.0.0.1" in err.splitlines()[-1] and "Traceback" not in err


def test_two_processes_that_claim_one_rank_are_told():
    port = int(free_port())
    first, *twins = [start(rank, 3, port) for rank in (0, 1, 1)]
    until(lambda: any(p.poll() is not None for p in twins), "the second rank 1", [first])
    second = next(p for p in twins if p.poll() is not None)
    code, _, err = ended(second)
    assert code == 2 and "error: rank 1 is here twice, once on " in err
    for process in (first, *twins):
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_named_with_its_holder(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = tmp_path / "outcome"
        code, _, err = ended(start(0, 2, port, seconds=5, MINIMIND_DS_OUTCOME=str(outcome)))
    # A batch script's next start has another port.
    assert outcome.read_text() == "unmet\n"
    assert code == 2 and err.splitlines()[-1].startswith(f"error: MASTER_PORT {port} is taken on ")
    assert f"by process {os.getpid()} (" in err


@pytest.mark.parametrize("variables, said", [
    ({"GLOO_SOCKET_IFNAME": "ib0"}, "GLOO_SOCKET_IFNAME is 'ib0', and "),
    ({"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME is '=l', and "),
    ({"NCCL_SOCKET_IFNAME": "ib0,ib1"}, "NCCL_SOCKET_IFNAME is 'ib0,ib1', and .* it has .*lo"),
    # For documentation: nobody has it.
    ({"MASTER_ADDR": "203.0.113.7"}, "MASTER_ADDR is 203.0.113.7, which is no address of "),
    ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR is 'nowhere.invalid', which "),
    ({"MASTER_PORT": ""}, "there are 2 ranks, and MASTER_PORT is not set"),
])
def test_an_environment_that_cannot_work_is_one_line(monkeypatch, variables, said):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29511", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        rendezvous.join(read_world(), {}, datetime.timedelta(seconds=1))


def test_one_rank_needs_the_interface_of_its_own_library_alone():
    start = "from minimind_ds.distributed import engine, world; engine.start(world.read_world())"
    for variable, error in (("GLOO", "GLOO_SOCKET_IFNAME is 'ib0', and "), ("NCCL", "")):
        done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True,
                              env=environment(**{f"{variable}_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": ""}))
        assert error in done.stderr and bool(done.returncode) == bool(error), done.stderr


STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
            [("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")]}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TWO_NODES = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2,1"}


@pytest.mark.parametrize("variables, said", [
    ({"RANK": "x"}, "RANK='x'; it must be a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "start them with srun"),
    ({**STEP, **TWO_NODES}, "MASTER_ADDR and MASTER_PORT are not set"),
    ({**STEP, "SLURM_TASKS_PER_NODE": "3"}, "MASTER_PORT is not set"),
    ({**STEP, "MASTER_PORT": "29500", "SLURM_TASKS_PER_NODE": "3(y)"}, r"'3\(y\)' tasks a node"),
    ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "srun started 3 tasks, .* of task 1 says RANK=0 and WORLD_SIZE=1"),
    ({**STEP, "RANK": "0", "WORLD_SIZE": "3"}, "srun started 3 tasks, .* of task 1 says RANK=0 and WORLD_SIZE=3"),
    ({**STEP, "RANK": "1", "WORLD_SIZE": "8"}, "srun started 3 tasks, .* says RANK=1 and WORLD_SIZE=8"),
    ({"SLURM_PROCID": "0", "SLURM_NNODES": "2"}, "this SLURM job has 2 nodes, and this process is none of srun's"),
    ({**STEP, "MASTER_PORT": "29500", "SLURM_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "2"},
     "3 ranks are to run on .*, which has 2 GPUs for them: start one a GPU"),
    (OPEN_MPI, "mpirun started 4 ranks, and MASTER_ADDR and MASTER_PORT are not set"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "mpirun started 4 ranks, and MASTER_PORT is not set"),
    ({"OMPI_COMM_WORLD_SIZE": "x", **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "RANK is 4 and WORLD_SIZE 4"),
    ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many'"),
])
def test_what_a_launcher_cannot_mean_is_one_line(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        read_world()


@pytest.mark.parametrize("node, here", [("0", 4), ("1", 4), ("2", 3)])
def test_slurm_s_uneven_nodes_are_understood(monkeypatch, node, here):
    for name, value in {**STEP, "SLURM_NTASKS": "11", "SLURM_NNODES": "3", "SLURM_NODEID": node,
                        "SLURM_TASKS_PER_NODE": "4(x2),3", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    world = read_world()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 11, 1, here)
    assert (world.address, world.port) == ("n0", 29500)


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA, {**STEP, **OPEN_MPI}])
def test_mpirun_s_ranks_need_no_mpi4py(monkeypatch, variables):
    for name, value in {**variables, "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    world = read_world()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)


def test_gpus_that_nobody_uses_are_a_warning(monkeypatch, capsys):
    for name, value in {**STEP, "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x3)", "SLURM_GPUS_ON_NODE": "8",
                        "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert read_world().local_size == 1
    assert f"warning: {socket.gethostname()} has 8 GPUs and runs 1 rank: the others idle" in capsys.readouterr().err


def test_ranks_that_share_a_gpu_are_named():
    facts = {rank: {"host": f"n{rank // 2}", "gpu": f"GPU-{min(rank, 2)}", "address": "", "settings": {}}
             for rank in range(4)}
    assert rendezvous.difference(facts).startswith("ranks 2 and 3 work on the same GPU of n1: start one rank a GPU")
    alike = {rank: {**fact, "gpu": None} for rank, fact in facts.items()}
    assert rendezvous.difference(alike) is None


def test_a_machine_that_would_listen_to_itself_alone_is_named(monkeypatch):
    facts = {rank: {"host": f"n{rank}", "gpu": None, "address": address, "settings": {}}
             for rank, address in enumerate(("10.0.0.1", "127.0.1.1"))}
    assert rendezvous.difference(facts).startswith("rank 1 on n1 would listen at 127.0.1.1, where no other machine")
    assert rendezvous.difference({rank: {**fact, "host": "n0"} for rank, fact in facts.items()}) is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert rendezvous.listens_at(read_world()) == "127.0.0.1"


def test_a_launcher_in_each_task_of_an_srun_is_believed(monkeypatch):
    for name, value in {**STEP, "SLURM_NTASKS": "2", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
                        "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = read_world()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)


def test_a_program_says_so_and_ends_with_2(tmp_path):
    done = subprocess.run([sys.executable, "launch/sft.py", "--deepspeed", "zero2", "--save_dir",
                           str(tmp_path / "run"), "--cache_dir", cache_dir()], cwd=ROOT, text=True,
                          capture_output=True, timeout=HANG_S, env=environment(SLURM_PROCID="0", SLURM_NTASKS="2"))
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and said.startswith("error: this SLURM job has 2 tasks"), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, 0), (signal.SIGTERM, 1)])
def test_torchrun_s_restart_goes_on_from_the_checkpoint_unless_the_run_was_asked_to_stop(tmp_path, number, code):
    (tmp_path / "run.yaml").write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}\n")
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1",
             "launch/sft.py", "--config", str(tmp_path / "run.yaml"), "--deepspeed", "zero2", "--max_steps", "60",
             "--epochs", "100", "--save_interval", "10", "--pack_len", "128", "--max_seq_len", "128", "--dtype",
             "fp32", "--save_dir", str(run), "--cache_dir", cache_dir()]
    agent = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(), stdout=log.open("w"),
                             stderr=subprocess.STDOUT)
    until(lambda: list((run / "checkpoints").glob("step_*")), "a checkpoint", [agent], log)
    psutil.Process(agent.pid).children()[-1].send_signal(number)
    assert agent.wait(timeout=HANG_S) == code, log.read_text()[-4000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    if number == signal.SIGKILL:
        assert "resuming from" in log.read_text() and steps == list(range(1, 61)), log.read_text()[-4000:]
    else:
        said = "torchrun started a run again that was asked to stop; it stays stopped; the checkpoint of step "
        assert f"{said}{steps[-1]} is written" in log.read_text() and steps[-1] < 60, log.read_text()[-4000:]
