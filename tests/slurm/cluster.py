"""A real SLURM of two nodes on one machine, for tests: a head with slurmctld, and a power switch for each node.

A node is a set of namespaces with its own processes, network, host name and /dev/shm; files are shared, as on NFS.
Its first process waits on a pipe that this process holds, so that a node ends, and by the kernel's doing everything in
it, when it is switched off or when this process dies.  Needs root, and the packages named in `missing`.

    with Cluster(folder) as cluster:
        print(cluster.run("srun", "--nodes=2", "hostname"))
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import time

from tests.conftest import WIDE
from tests.waiting import HANG_S

NETWORK = "10.213.47"
ADDRESSES = {"head": 100, "node1": 1, "node2": 2}
# Free to choose: SLURM is told not to look at the hardware.
CPUS, GPUS = 64, 32
SLURM_CONF = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until its old credential has run out.
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
# How long a finished job can be asked about.
MinJobAge=3600
SlurmdTimeout=60
MessageTimeout=5
TCPTimeout=2
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=node[1-2] CPUs={cpus} RealMemory=100000 Gres=gpu:{gpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PreemptMode=OFF
# Jobs of `low` are asked to leave, and have to within GraceTime seconds, when one of `high` needs what they hold.
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60
# These are told to leave and killed KillWait seconds later.
PartitionName=at_once Nodes=ALL MaxTime=INFINITE PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""
FIRST_PROCESS = """
mount -n -t proc proc /proc && mount -n -t tmpfs tmpfs /dev/shm && mount -n --bind {home}/hosts /etc/hosts &&
mount -n --bind {home}/etc /etc/slurm && hostname {name} && ip link set lo up && echo up && read -r until_switched_off
"""


def missing() -> str | None:
    """Why there can be no cluster here; None when there can."""
    if os.geteuid() != 0:
        return "a SLURM test cluster needs root"
    for command in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter"):
        if shutil.which(command, path=search_path()) is None:
            return (f"no {command}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge "
                    "iproute2 util-linux")
    return None


def forbidden() -> str | None:
    """Why this machine allows no namespaces; None when it does."""
    tried = subprocess.run(["unshare", "--fork", "--pid", "--net", "--uts", "--ipc", "--mount", "true"],
                           capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """node1, node2 and their head.  `home` must be short and readable by all: munge wants it so."""

    def __init__(self, home: pathlib.Path):
        self.home, self.nodes = home, {}

    def __enter__(self) -> Cluster:
        for name in ("etc", "munge", "state", "spool"):
            (self.home / name).mkdir()
        # slurm-client brings the folder that the configuration is mounted on; not every package does.
        pathlib.Path("/etc/slurm").mkdir(exist_ok=True)
        key = self.home / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.home / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{NETWORK}.{last} {name}\n" for name, last in ADDRESSES.items()))
        for number in range(GPUS):
            (self.home / "etc" / f"gpu{number}").touch()
        (self.home / "etc" / "gres.conf").write_text(f"Name=gpu File={self.home}/etc/gpu[0-{GPUS - 1}]\n")
        (self.home / "etc" / "slurm.conf").write_text(SLURM_CONF.format(home=self.home, cpus=CPUS, gpus=GPUS))
        try:
            self.switch_on("head")
            m = self.home / "munge"
            self.run("munged", f"--key-file={m}/key", f"--socket={m}/socket", f"--pid-file={m}/pid",
                     f"--seed-file={m}/seed", f"--log-file={m}/log")
            self.run("slurmctld")
            for node in ("node1", "node2"):
                self.switch_on(node)
                self.run("slurmd", on=node)
            self.wait_for(lambda: set(self.run("sinfo", "-hN", "-tidle", "-o%N").split()) == {"node1", "node2"},
                          "both nodes to be idle", 180)
        except BaseException:
            print(*(log.read_text() for log in self.home.glob("*.log")), sep="\n")
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.switch_off(*self.nodes)

    def switch_on(self, name: str) -> None:
        self.nodes[name] = subprocess.Popen(
            ["unshare", "--fork", "--kill-child", "--pid", "--net", "--uts", "--ipc", "--mount", "bash", "-c",
             FIRST_PROCESS.format(home=self.home, name=name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, env={**os.environ, "PATH": search_path(), "COLUMNS": WIDE})
        if self.nodes[name].stdout.readline() != b"up\n":
            raise RuntimeError(f"{name} did not come up")
        self.connect(name)

    def connect(self, name: str) -> None:
        """A network: the head has the switch, the others have a cable to it."""
        last = ADDRESSES[name]
        if name == "head":
            card = "switch"
            self.run("ip", "link", "add", card, "type", "bridge")
        else:
            card, plug = "card", f"to{last}"
            # The kernel takes a network that is gone apart when it has time.
            with contextlib.suppress(RuntimeError):
                self.run("ip", "link", "delete", plug, only="net")
            self.run("ip", "link", "add", plug, "type", "veth", "peer", "name", card, "netns", str(self.pid(name)),
                     only="net")
            self.run("ip", "link", "set", plug, "master", "switch", "up")
        self.run("ip", "address", "add", f"{NETWORK}.{last}/24", "dev", card, on=name)
        self.run("ip", "link", "set", card, "up", on=name)

    def give_up_after(self, seconds: int) -> None:
        """How long a node may be silent before it counts as lost.  Busy machines are silent at times."""
        conf = self.home / "etc" / "slurm.conf"
        conf.write_text(re.sub(r"SlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", conf.read_text()))
        self.run("scontrol", "reconfigure")

    def cut_off(self, name: str) -> None:
        """The node's cable is pulled: it runs on, unheard; no connection to it is closed."""
        self.run("ip", "link", "set", f"to{ADDRESSES[name]}", "down")

    def switch_off(self, *names: str) -> None:
        """A power cut."""
        firsts = []
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                firsts.append(pathlib.Path(f"/proc/{self.pid(name)}"))
            node = self.nodes.pop(name)
            node.kill()
            node.wait()
            node.stdin.close()
            node.stdout.close()
        # The kernel ends a node's first process, which unshare's end has killed, after everything else in it.
        deadline = time.monotonic() + HANG_S
        while any(first.exists() for first in firsts) and time.monotonic() < deadline:
            time.sleep(0.02)

    def pid(self, name: str) -> int:
        """The node's first process."""
        unshare = self.nodes[name].pid
        return int(pathlib.Path(f"/proc/{unshare}/task/{unshare}/children").read_text())

    def run(self, *command: str, on: str = "head", cwd=None, only: str | None = None, **extra: str) -> str:
        """A command on a node; returns its output.  `only`: enter this namespace and no other."""
        enter = [f"--{only}"] if only else ["--mount", "--uts", "--ipc", "--net", "--pid"]
        words = ["nsenter", f"--target={self.pid(on)}", *enter, f"--wd={cwd or self.home}", "--", *command]
        done = subprocess.run(words, text=True, capture_output=True, timeout=HANG_S, stdin=subprocess.DEVNULL,
                              env={**os.environ, "PATH": search_path(), "COLUMNS": WIDE, **extra})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def processes(self, name: str) -> list[str]:
        """Command lines of what runs on a node, SLURM's own daemons and zombies left out."""
        lines = self.run("ps", "-e", "-ww", "-o", "stat=,args=", on=name).splitlines()
        lines = [line.split(None, 1)[-1] for line in lines if not line.startswith("Z")]
        return [line for line in lines if not line.split()[0].endswith(("slurmctld", "slurmd", "munged", "ps"))
                and "until_switched_off" not in line]

    def wait_for(self, true, what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}\n{self.run('scontrol', 'show', 'jobs')}")
            time.sleep(0.1)
