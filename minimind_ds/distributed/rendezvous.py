"""Where all ranks meet before the process group opens: whoever does not come, or came with other settings, is named.

Rank 0 hosts a key-value store at MASTER_ADDR:MASTER_PORT (under torchrun its agent does).  Each rank writes its host
and its settings there; rank 0 compares them, and only then do collectives begin, which would wait in silence.

    python -m pytest tests/distributed/test_rendezvous.py
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time

import psutil
import torch.distributed as dist

from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.distributed.world import World

# After which a rank that waits says so; how often rank 0 looks who is there; how long it waits to be read.
TELL_S, LOOK_S, READ_S = 30.0, 0.05, 5.0
OPEN = "all ranks are here"


def join(world: World, settings: dict, limit: datetime.timedelta) -> dist.Store:
    """A store that all ranks have joined with the same settings; collective.

    Args:
        settings: what must be alike on all ranks, as JSON values by name.
        limit: how long to wait for the others.

    Raises:
        ValueError: rank 0 cannot be reached or cannot listen, ranks that did not come, settings that differ.
    """
    check_interface()
    deadline = time.monotonic() + limit.total_seconds()
    # Under torchrun the ranks of every attempt use the same store.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", connect(world, deadline))
    here = {"host": socket.gethostname(), "settings": {name: str(value) for name, value in settings.items()}}
    store.set(f"rank/{world.rank}", json.dumps(here))
    if world.rank == 0:
        wrong, others = meet(store, world, deadline)
        store.set("verdict", wrong or OPEN)
        if wrong:
            # The store ends with this process: the others are to read it first.
            until = time.monotonic() + READ_S
            while store.add("read", 0) < others and time.monotonic() < until:
                time.sleep(LOOK_S)
    else:
        try:
            store.wait(["verdict"], limit + datetime.timedelta(seconds=TELL_S))
            verdict = store.get("verdict").decode()
            store.add("read", 1)
        except RuntimeError as error:
            raise UserError(f"rank {world.rank} on {socket.gethostname()} lost rank 0 at {place(world)} while the "
                            f"ranks were gathering: {first_line(error)}") from None
        wrong = None if verdict == OPEN else verdict
    if wrong:
        raise UserError(wrong)
    return dist.PrefixStore("group", store)


def check_interface() -> None:
    """Raises ValueError where GLOO_SOCKET_IFNAME names a network interface that this machine has not."""
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise UserError(f"GLOO_SOCKET_IFNAME is {shown(name)}, and {socket.gethostname()} has no such network "
                            f"interface; it has {', '.join(there)}")


def place(world: World) -> str:
    return f"{world.address}:{world.port} (MASTER_ADDR:MASTER_PORT)"


def connect(world: World, deadline: float) -> dist.TCPStore:
    """The store at rank 0's address, hosted by this process on rank 0."""
    if world.port is None and world.size > 1:
        raise UserError(f"there are {world.size} ranks, and MASTER_PORT is not set: start them with deepspeed, "
                        "torchrun or launch/slurm/sft.sbatch, or set MASTER_ADDR and MASTER_PORT to where rank 0 can "
                        "listen")
    try:
        socket.getaddrinfo(world.address, world.port)
    except OSError as error:
        raise UserError(f"MASTER_ADDR is {world.address!r}, which {socket.gethostname()} cannot resolve: "
                        f"{error.strerror}") from None
    hosts = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        wait_for_listener(world, deadline)
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(world.address, world.port or 0, world.size, hosts, left, wait_for_workers=False,
                             multi_tenant=hosts)
    except (RuntimeError, OSError) as error:
        if not hosts:
            raise UserError(f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at {place(world)}: "
                            f"{first_line(error)}") from None
        if "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {world.port} is taken on {socket.gethostname()}{holder(world.port)}: choose "
                            "another, with deepspeed by --master_port") from None
        raise UserError(f"rank 0 on {socket.gethostname()} cannot listen at {place(world)}: {first_line(error)}; is "
                        "that this machine's address?") from None


def wait_for_listener(world: World, deadline: float) -> None:
    """Until something listens at rank 0's address; torch's own waiting fills the screen with stacks."""
    told = time.monotonic() + TELL_S
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=5).close()
            return
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise UserError(f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at {place(world)}: "
                                f"{error.strerror or error}; did rank 0 start, can this machine see it?") from None
            if now > told and world.local_rank == 0:
                print(f"rank {world.rank} on {socket.gethostname()}: waiting for rank 0 at {place(world)}: "
                      f"{error.strerror or error}", file=sys.stderr, flush=True)
                told = now + 10 * TELL_S
            time.sleep(LOOK_S)


def holder(port: int) -> str:
    """', by process 12 (python train.py)' where that can be told."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                words = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({words[:100]})"
    except (psutil.Error, OSError):
        pass
    return ""


def meet(store: dist.Store, world: World, deadline: float) -> tuple[str | None, int]:
    """On rank 0: waits for all ranks and compares; -> (what is wrong, how many others are here)."""
    here, told = {}, time.monotonic() + TELL_S
    while True:
        for rank in set(range(world.size)) - here.keys():
            if store.check([f"rank/{rank}"]):
                here[rank] = json.loads(store.get(f"rank/{rank}"))
        missing = [rank for rank in range(world.size) if rank not in here]
        if not missing:
            return difference(here), len(here) - 1
        now, hosts = time.monotonic(), ", ".join(sorted({fact["host"] for fact in here.values()}))
        names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        if now > deadline:
            return (f"{len(missing)} of {world.size} ranks did not come to {place(world)}: {names}; those that did "
                    f"are on {hosts}. Look at the first lines of the others' output"), len(here) - 1
        if now > told:
            print(f"waiting for {len(missing)} of {world.size} ranks: {names}; here are ranks on {hosts}",
                  file=sys.stderr, flush=True)
            told = now + 10 * TELL_S
        time.sleep(LOOK_S)


def difference(here: dict[int, dict]) -> str | None:
    """The first setting that is not alike on all ranks, in one line."""
    for name, value in here[0]["settings"].items():
        for rank, fact in sorted(here.items()):
            other = fact["settings"].get(name, "missing")
            if other != value:
                # Long ones from where they differ.
                begin = max(0, next((i for i, (a, b) in enumerate(zip(value, other)) if a != b), 0) - 30)
                shown, others = value[begin:begin + 80], other[begin:begin + 80]
                return (f"ranks differ: {name} is {shown} on rank 0 ({here[0]['host']}) and {others} on rank {rank} "
                        f"({fact['host']}); give all ranks the same code, data and flags")
    return None
