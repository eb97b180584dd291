"""Where this process stands among all ranks, read from whatever launcher started it.

    python -c "from minimind_ds.distributed.world import read_world; print(read_world())"
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

# Our names -> SLURM's, for ranks that srun starts without a launcher in between.
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID",
         "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE"}


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
    """From the launcher's variables (deepspeed, torchrun), SLURM's (srun), or as a single process; changes nothing."""
    env = dict(os.environ)
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env |= {name: env[source].split("(")[0] for name, source in SLURM.items() if source in env}
    local_rank = int(env.get("LOCAL_RANK", "0"))
    # A batch system may show each process its own GPU only, which is then number 0.
    device = (torch.device("cuda", local_rank % torch.cuda.device_count()) if torch.cuda.is_available()
              else torch.device("cpu"))
    port = env.get("MASTER_PORT")
    return World(int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), local_rank,
                 int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))), device,
                 env.get("MASTER_ADDR", "127.0.0.1"), int(port) if port else None)


def current_device() -> torch.device:
    """The device this process works on, once the process group is open."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def export(world: World) -> None:
    """Tells the libraries that read a launcher's variables (DeepSpeed, torch.distributed) what read_world found."""
    port = world.port or (free_port() if world.size == 1 else None)
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank),
                      LOCAL_WORLD_SIZE=str(world.local_size), MASTER_ADDR=world.address,
                      **({"MASTER_PORT": str(port)} if port else {}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
