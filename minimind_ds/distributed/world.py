"""Where this process stands among all ranks, read from whatever launcher started it.

    python -c "from minimind_ds.distributed.world import read_world; print(read_world())"
"""

from __future__ import annotations

import os
import re
import socket
import sys
from dataclasses import dataclass

import torch

from minimind_ds.config.errors import UserError
from minimind_ds.config.untrusted import shown

HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,254}")
# Our names -> those of what starts ranks without a launcher in between: srun, Open MPI, MPICH and Intel MPI.
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
MPI = ({"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"},
       {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID",
        "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"})
# What only a launcher sets that starts ranks of its own: torchrun's, DeepSpeed's.
OF_LAUNCHERS = {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"}


@dataclass(frozen=True)
class World:
    """This process's rank among `size`, its place on its machine, its device, and rank 0's address.

    `port` is None where no launcher named one.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    address: str = "127.0.0.1"
    port: int | None = None


def read_world() -> World:
    """From the launcher's variables (deepspeed, torchrun), SLURM's (srun), MPI's, or as a single process; changes
    nothing, and warns of GPUs that nobody uses.

    Raises:
        ValueError: what the variables say cannot be, or contradicts itself.
    """
    env = {name: value for name, value in os.environ.items() if value}
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env
    tasks = whole(env, "SLURM_NTASKS", 1, least=1)
    if "RANK" not in env:
        env |= of_mpi(env) or of_slurm(env, in_step, tasks)
    size, rank = whole(env, "WORLD_SIZE", 1, least=1), whole(env, "RANK", 0)
    if rank >= size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: ranks count from 0 to WORLD_SIZE - 1; unset both, or "
                        "start the ranks with deepspeed, torchrun or srun")
    if in_step and os.environ.get("RANK"):
        refuse_foreign_rank(env, rank, size, tasks)
    local_rank = whole(env, "LOCAL_RANK", 0)
    local_size = whole(env, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", 1, least=1)
    if size == 1 or env.keys() & OF_LAUNCHERS:
        check_gpus(whole(env, "SLURM_GPUS_ON_NODE", 0) if in_step else 0, local_rank, local_size)
    # A batch system may show each process its own GPU only, which is then number 0.
    device = (torch.device("cuda", local_rank % torch.cuda.device_count()) if torch.cuda.is_available()
              else torch.device("cpu"))
    address = env.get("MASTER_ADDR", "127.0.0.1")
    if not HOST.fullmatch(address):
        raise UserError(f"the environment says MASTER_ADDR={shown(address)}, which is no host's name or address: "
                        "unset it, or name rank 0's")
    return World(rank, size, local_rank, local_size, device, address,
                 whole(env, "MASTER_PORT", 0, most=65535) or None)


def whole(env: dict[str, str], name: str, default: int, *, least: int = 0, most: int = 2**31) -> int:
    """A variable as a whole number.  Raises ValueError, naming it, where it is none or out of range."""
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise UserError(f"the environment says {name}={text[:40]!r}; it must be a whole number from {least} to "
                        f"{most}: unset it, or start the ranks with deepspeed, torchrun or srun")
    return int(text)


def of_slurm(env: dict[str, str], in_step: bool, tasks: int) -> dict[str, str]:
    """Our variables for one of several tasks of srun; {} where there is one.

    Raises:
        ValueError: a batch script started one process for what are several tasks or nodes, or they have no address.
    """
    if not in_step and "SLURM_PROCID" in env:
        nodes = whole(env, "SLURM_NNODES", 1, least=1)
        if tasks > 1 or nodes > 1:
            has = f"{tasks} tasks" if tasks > 1 else f"{nodes} nodes"
            raise UserError(f"this SLURM job has {has}, and this process is none of srun's: start them with srun, or "
                            "use launch/slurm/sft.sbatch; for one process alone: srun --ntasks=1")
    if not in_step or tasks == 1:
        return {}
    nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in env else "SLURM_NNODES"
    refuse_lone_tasks(env, f"srun started {tasks} tasks", whole(env, nodes, 1, least=1))
    return {**{name: env[source] for name, source in SLURM.items() if source in env},
            "LOCAL_WORLD_SIZE": str(tasks_here(env))}


def refuse_foreign_rank(env: dict[str, str], rank: int, size: int, tasks: int) -> None:
    """Raises ValueError where an srun step's task has RANK and WORLD_SIZE of elsewhere."""
    task = whole(env, "SLURM_PROCID", 0)
    if size < tasks or not env.keys() & OF_LAUNCHERS and (size, rank) != (tasks, task):
        raise UserError(f"srun started {tasks} tasks, and the environment of task {task} says RANK={rank} and "
                        f"WORLD_SIZE={size}, inherited from elsewhere: unset RANK, WORLD_SIZE, LOCAL_RANK")


def of_mpi(env: dict[str, str]) -> dict[str, str]:
    """Our variables, as mpirun has them by its own names; {} where it started nothing, or one process."""
    for names in MPI:
        # srun has some of them, too, for libraries of MPI.
        if all(source in env for source in names.values()) and (size := whole(env, names["WORLD_SIZE"], 1)) > 1:
            nodes = 1 if whole(env, names["LOCAL_WORLD_SIZE"], 1) == size else 2
            refuse_lone_tasks(env, f"mpirun started {size} ranks", nodes)
            return {name: env[source] for name, source in names.items()}
    return {}


def check_gpus(given: int, local_rank: int, local_size: int) -> None:
    """Raises ValueError for more ranks than GPUs on this machine; warns where there are fewer.

    given: how many SLURM has given the step on this node; 0: unknown.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus, host = max(given, seen), socket.gethostname()
    # Each rank may be shown one of its own; where two are shown the same, they will find out (rendezvous.difference).
    if local_size > gpus > 0 and seen != 1:
        raise UserError(f"{local_size} ranks are to run on {host}, which has {gpus} GPU{'s' * (gpus > 1)} for them: "
                        "start one a GPU (srun: --ntasks-per-node as many as --gpus-per-node; torchrun: "
                        "--nproc_per_node)")
    if gpus > local_size and local_rank == 0:
        print(f"warning: {host} has {gpus} GPUs and runs {local_size} rank{'s' * (local_size > 1)}: the others idle; "
              "start one rank a GPU", file=sys.stderr, flush=True)


def refuse_lone_tasks(env: dict[str, str], started: str, nodes: int) -> None:
    """Raises ValueError where several processes cannot find each other."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT")[nodes == 1:] if name not in env]
    if missing:
        raise UserError(f"{started}, and {' and '.join(missing)} "
                        f"{'is' if len(missing) == 1 else 'are'} not set, so they cannot find rank 0: use "
                        "launch/slurm/sft.sbatch, or export the first node's name and a free port")


def tasks_here(env: dict[str, str]) -> int:
    """This node's tasks; SLURM may say 4(x2),3: four on the first two nodes, three on the third."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    text = next((env[name] for name in names if name in env), "1")
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if not found:
            raise UserError(f"SLURM says {text[:80]!r} tasks a node, which cannot be read: use "
                            "launch/slurm/sft.sbatch")
        counts += [int(found[1])] * int(found[2] or 1)
    node = whole(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[-1]


def alone() -> World:
    """The world of a program that needs no other rank, whatever started it."""
    return World(0, 1, 0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def current_device() -> torch.device:
    """The device this process works on, once the process group is open."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def export(world: World) -> None:
    """Tells the libraries that read a launcher's variables (DeepSpeed, torch.distributed) what read_world found."""
    # One rank meets nobody, and the launcher's usual port may be another run's; torchrun's has torchrun behind it.
    meets = world.size > 1 or (world.port and "TORCHELASTIC_USE_AGENT_STORE" in os.environ)
    port = world.port if meets else free_port()
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank),
                      LOCAL_WORLD_SIZE=str(world.local_size), MASTER_ADDR=world.address,
                      **({"MASTER_PORT": str(port)} if port else {}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
