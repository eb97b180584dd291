"""Where this process stands among all ranks, read from whatever launcher started it.

    python -c "from minimind_ds.distributed.world import read_world; print(read_world())"
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

import torch

from minimind_ds.config.errors import UserError

# Our names -> SLURM's, for ranks that srun starts without a launcher in between.
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


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
    """From the launcher's variables (deepspeed, torchrun), SLURM's (srun), or as a single process; changes nothing.

    Raises:
        ValueError: what the variables say cannot be, or contradicts itself.
    """
    env = {name: value for name, value in os.environ.items() if value}
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env
    tasks = whole(env, "SLURM_NTASKS", 1, least=1)
    if "RANK" not in env and "SLURM_PROCID" in env and tasks > 1:
        refuse_lone_tasks(env, in_step, tasks)
        env |= {name: env[source] for name, source in SLURM.items() if source in env}
        env["LOCAL_WORLD_SIZE"] = str(tasks_here(env))
    size, rank = whole(env, "WORLD_SIZE", 1, least=1), whole(env, "RANK", 0)
    if rank >= size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: ranks count from 0 to WORLD_SIZE - 1; unset both, or "
                        "start the ranks with deepspeed, torchrun or srun")
    if in_step and "RANK" in os.environ and size < tasks:
        raise UserError(f"srun started {tasks} tasks, and the environment says WORLD_SIZE={size}, inherited from "
                        "elsewhere: each task would train by itself. Unset RANK, WORLD_SIZE, LOCAL_RANK")
    local_rank = whole(env, "LOCAL_RANK", 0)
    local_size = whole(env, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", 1, least=1)
    # A batch system may show each process its own GPU only, which is then number 0.
    device = (torch.device("cuda", local_rank % torch.cuda.device_count()) if torch.cuda.is_available()
              else torch.device("cpu"))
    return World(rank, size, local_rank, local_size, device, env.get("MASTER_ADDR", "127.0.0.1"),
                 whole(env, "MASTER_PORT", 0, most=65535) or None)


def whole(env: dict[str, str], name: str, default: int, *, least: int = 0, most: int = 2**31) -> int:
    """A variable as a whole number.  Raises ValueError, naming it, where it is none or out of range."""
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise UserError(f"the environment says {name}={text[:40]!r}; it must be a whole number from {least} to "
                        f"{most}: unset it, or start the ranks with deepspeed, torchrun or srun")
    return int(text)


def refuse_lone_tasks(env: dict[str, str], in_step: bool, tasks: int) -> None:
    """Raises ValueError where SLURM has several tasks that cannot find each other."""
    if not in_step:
        raise UserError(f"this SLURM job has {tasks} tasks, and this process is none of them: start them with srun, "
                        "or use launch/slurm/sft.sbatch; for one process alone: srun --ntasks=1")
    nodes = whole(env, "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in env else "SLURM_NNODES", 1, least=1)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT")[nodes == 1:] if name not in env]
    if missing:
        raise UserError(f"srun started {tasks} tasks, and {' and '.join(missing)} "
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
