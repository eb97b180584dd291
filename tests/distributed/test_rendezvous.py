"""What launchers say is believed only where it can be; whatever keeps ranks from meeting is one line."""

import datetime
import json
import os
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
    assert code == 2 and not out and err.count("\n") == 0
    assert "ranks differ: seed is 1 on rank 0" in err and "and 2 on rank 1" in err
    assert ended(both[1])[0] == 2


def test_a_rank_that_does_not_come_is_named_after_a_line_that_says_who_is_waited_for():
    code, _, err = ended(start(0, 3, int(free_port()), seconds=1.0))
    assert code == 2 and "waiting for 2 of 3 ranks: 1, 2; here are ranks on" in err.splitlines()[0]
    assert "error: 2 of 3 ranks did not come to 127.0.0.1" in err.splitlines()[-1]
    code, _, err = ended(start(1, 2, int(free_port()), seconds=0.5))
    assert code == 2 and "cannot reach rank 0 at 127.0.0.1" in err.splitlines()[-1] and "Traceback" not in err


def test_a_port_that_is_taken_is_named_with_its_holder():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = ended(start(0, 2, port, seconds=5))
    assert code == 2 and err.splitlines()[-1].startswith(f"error: MASTER_PORT {port} is taken on ")
    assert f"by process {os.getpid()} (" in err


@pytest.mark.parametrize("variables, said", [
    ({"GLOO_SOCKET_IFNAME": "ib0"}, "GLOO_SOCKET_IFNAME is 'ib0', and "),
    ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR is 'nowhere.invalid', which "),
    ({"MASTER_PORT": ""}, "there are 2 ranks, and MASTER_PORT is not set"),
])
def test_an_environment_that_cannot_work_is_one_line(monkeypatch, variables, said):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29511", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        rendezvous.join(read_world(), {}, datetime.timedelta(seconds=1))


STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
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
    ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "srun started 3 tasks, and the environment says WORLD_SIZE=1"),
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
def test_torchrun_s_restart_goes_on_from_the_checkpoint(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}\n")
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1",
             "launch/sft.py", "--config", str(tmp_path / "run.yaml"), "--deepspeed", "zero2", "--max_steps", "60",
             "--epochs", "100", "--save_interval", "10", "--pack_len", "128", "--max_seq_len", "128", "--dtype",
             "fp32", "--save_dir", str(run), "--cache_dir", cache_dir()]
    agent = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(), stdout=log.open("w"),
                             stderr=subprocess.STDOUT)
    until(lambda: list((run / "checkpoints").glob("step_*")), "a checkpoint", [agent], log)
    psutil.Process(agent.pid).children()[-1].kill()
    assert agent.wait(timeout=HANG_S) == 0 and "resuming from" in log.read_text(), log.read_text()[-4000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 61))
