"""Where all ranks meet before the process group opens: whoever does not come, or came with other settings, is named.

Rank 0 hosts a key-value store at MASTER_ADDR:MASTER_PORT (under torchrun its agent does).  Each rank writes its host
and its settings there; rank 0 compares them, and only then do collectives begin, which would wait in silence.

    python -m pytest tests/distributed/test_rendezvous.py
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import torch
import torch.distributed as dist

from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.untrusted import shown
from minimind_ds.distributed.world import World
from minimind_ds.io import report

# After which a rank that waits says so; how often rank 0 looks who is there, and a rank whether the others go on; how
# long rank 0 waits to be read.
TELL_S, LOOK_S, WATCH_S, READ_S = 30.0, 0.05, 1.0, 5.0
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
    here = {"host": socket.gethostname(), "gpu": gpu(world), "address": listens_at(world),
            "settings": {name: str(value) for name, value in settings.items()}}
    if store.add(f"came/{world.rank}", 1) > 1:
        raise UserError(f"rank {world.rank} is here twice, once on {socket.gethostname()}: RANK must differ on each "
                        "process; unset RANK, WORLD_SIZE and LOCAL_RANK where they were inherited")
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
            raise unmet(f"rank {world.rank} on {socket.gethostname()} lost rank 0 at {place(world)} while the "
                            f"ranks were gathering: {first_line(error)}") from None
        wrong = None if verdict == OPEN else verdict
    if wrong:
        raise UserError(wrong)
    return dist.PrefixStore("group", store)


def unmet(message: str) -> UserError:
    """The error where ranks do not meet, which a batch script may try again, unlike other mistakes."""
    report("unmet")
    return UserError(message)


def unconnected(world: World, backend: str, error: RuntimeError) -> str:
    """What to say where ranks have met and a backend cannot connect them: mostly it took the wrong network."""
    host = socket.gethostname()
    return (f"rank {world.rank} on {host} met the others, and {backend} cannot connect them: "
            f"{first_line(error)}; did one of them end? Else set {backend.upper()}_SOCKET_IFNAME to the network "
            "interface that all machines share")


@contextlib.contextmanager
def opening(store: dist.Store, world: World, backend: str) -> Iterator[None]:
    """Within it the process group is opened: where one rank cannot, the others, which would wait for it as long as
    for a collective, end with its words.

    Raises:
        ValueError: this rank cannot.
    """
    opened = threading.Event()
    # One client serves one call at a time.
    watcher = threading.Thread(target=watch, args=(store.clone(), world, opened), daemon=True)
    watcher.start()
    try:
        yield
    except RuntimeError as error:
        said = unconnected(world, backend, error)
        with contextlib.suppress(RuntimeError):
            store.set("unconnected", said)
        raise unmet(said) from None
    finally:
        opened.set()
        watcher.join(READ_S)


def watch(store: dist.Store, world: World, opened: threading.Event) -> None:
    """Ends this process where another rank has said that it cannot open the process group, or rank 0 is gone."""
    while not opened.wait(WATCH_S):
        try:
            said = store.get("unconnected").decode() if store.check(["unconnected"]) else ""
        except RuntimeError as error:
            said = f"rank {world.rank} on {socket.gethostname()} lost rank 0 at {place(world)}: {first_line(error)}"
        # The main thread's own words come first.
        if said and not opened.wait(WATCH_S):
            report("unmet")
            print(f"error: {said}", file=sys.stderr, flush=True)
            os._exit(2)


def listens_at(world: World) -> str:
    """Where gloo will listen: on the interface that is named, or at what this machine's name stands for; "": unknown,
    or NCCL finds its way by itself."""
    if world.device.type == "cuda":
        return ""
    with contextlib.suppress(OSError, psutil.Error):
        if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
            found = psutil.net_if_addrs().get(name, ())
            return next((one.address for one in found if one.family == socket.AF_INET), "")
        return socket.gethostbyname(socket.gethostname())
    return ""


def gpu(world: World) -> str | None:
    """Which GPU this rank works on, as no other has it; None on a CPU."""
    if world.device.type != "cuda":
        return None
    return str(getattr(torch.cuda.get_device_properties(world.device), "uuid", None) or "")


def check_interface(libraries: tuple[str, ...] = ("gloo", "nccl")) -> None:
    """Raises ValueError where a variable of these libraries names no network interface of this machine."""
    there = [name for _, name in socket.if_nameindex()]
    gloo, nccl = (os.environ.get(f"{library.upper()}_SOCKET_IFNAME", "") if library in libraries else ""
                  for library in ("gloo", "nccl"))
    wrong = [("GLOO_SOCKET_IFNAME", name) for name in gloo.split(",") if name and name not in there]
    # NCCL takes beginnings of names, whole names after =, and all others after ^.
    starts = tuple(nccl.removeprefix("=").split(","))
    if nccl and not nccl.startswith("^") and not any(
            name in starts if nccl.startswith("=") else name.startswith(starts) for name in there):
        wrong.append(("NCCL_SOCKET_IFNAME", nccl))
    for variable, name in wrong:
        raise UserError(f"{variable} is {shown(name)}, and {socket.gethostname()} has no such network interface; "
                        f"it has {', '.join(there)}")


def check_address(world: World, found: list) -> None:
    """Raises ValueError where rank 0, which is to listen at MASTER_ADDR, is on another machine."""
    for family, *_, address in found:
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address[0], 0))
            return
    raise UserError(f"MASTER_ADDR is {world.address}, which is no address of {socket.gethostname()}, where rank 0 is: "
                    "set it on all ranks to the name or address of the machine that starts rank 0")


def place(world: World) -> str:
    return f"{world.address}:{world.port} (MASTER_ADDR:MASTER_PORT)"


def connect(world: World, deadline: float) -> dist.TCPStore:
    """The store at rank 0's address, hosted by this process on rank 0."""
    if world.port is None and world.size > 1:
        raise UserError(f"there are {world.size} ranks, and MASTER_PORT is not set: start them with deepspeed, "
                        "torchrun or launch/slurm/sft.sbatch, or set MASTER_ADDR and MASTER_PORT to where rank 0 can "
                        "listen")
    try:
        found = socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"MASTER_ADDR is {world.address!r}, which {socket.gethostname()} cannot resolve: "
                        f"{error.strerror}") from None
    hosts = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosts:
        check_address(world, found)
    else:
        wait_for_listener(world, deadline)
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(world.address, world.port or 0, world.size, hosts, left, wait_for_workers=False,
                             multi_tenant=hosts)
    except (RuntimeError, OSError) as error:
        if not hosts:
            raise unmet(f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at {place(world)}: "
                            f"{first_line(error)}") from None
        if "EADDRINUSE" in str(error):
            raise unmet(f"MASTER_PORT {world.port} is taken on {socket.gethostname()}{holder(world.port)}: choose "
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
                raise unmet(f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at {place(world)}: "
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
            report("unmet")
            return (f"{len(missing)} of {world.size} ranks did not come to {place(world)}: {names}; those that did "
                    f"are on {hosts}. Look at the first lines of the others' output"), len(here) - 1
        if now > told:
            print(f"waiting for {len(missing)} of {world.size} ranks: {names}; here are ranks on {hosts}",
                  file=sys.stderr, flush=True)
            told = now + 10 * TELL_S
        time.sleep(LOOK_S)


def difference(here: dict[int, dict]) -> str | None:
    """Two ranks on one GPU, one that others cannot reach, or the first setting that is not alike, in one line."""
    owners, several = {}, len({fact["host"] for fact in here.values()}) > 1
    for rank, fact in sorted(here.items()):
        other = owners.setdefault((fact["host"], fact["gpu"]), rank)
        if fact["gpu"] and other != rank:
            return (f"ranks {other} and {rank} work on the same GPU of {fact['host']}: start one rank a GPU (srun: "
                    "--ntasks-per-node as many as --gpus-per-node; torchrun: --nproc_per_node)")
        # Many distributions give a machine's name such an address in /etc/hosts; ranks would wait for ever.
        if several and fact["address"].startswith("127."):
            return (f"rank {rank} on {fact['host']} would listen at {fact['address']}, where no other machine can "
                    "reach it: set GLOO_SOCKET_IFNAME to the network interface that all machines share")
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
