"""
A SLURM cluster of many nodes on this one host, for a test: real daemons, real sbatch and srun.

Everything lies in one folder but the names of the nodes, which go into the hosts file and out of it
again. The nodes' GPUs are terminals: SLURM only counts them.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
HOSTS = Path("/etc/hosts")
CONFIG = """\
ClusterName=scaling
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node[01-{nodes:02}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs=32 RealMemory=1000 Gres=gpu:{per_node} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no such cluster here; empty if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a SLURM cluster on one host needs root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lack = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if lack:
        return f"no {', '.join(lack)}: apt-get install slurm-wlm munge"
    lack = [f"/dev/tty{n}" for n in range(1, 5) if not Path(f"/dev/tty{n}").exists()]
    if lack:
        return f"no {', '.join(lack)}, which stand in for GPUs"
    return "" if os.access(HOSTS, os.W_OK) else f"{HOSTS} cannot be written"


def _ports(count: int) -> int:
    # The first of so many ports that are free now.
    for first in range(31_000, 60_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                taken = stack.enter_context(socket.socket())
                taken.bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def _daemon(*command: str, environment: dict[str, str]) -> None:
    subprocess.run(command, env=environment, check=True, timeout=30)


def _stop(folder: Path) -> None:
    pids = [int(path.read_text()) for path in folder.glob("*.pid") if path.read_text().strip()]
    for number, wait_s in ((15, 10.0), (9, 2.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + wait_s
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(folder: Path, nodes: int, per_node: int) -> Iterator[dict[str, str]]:
    """The environment in which ``sbatch`` finds a cluster of idle nodes; shut down afterwards."""
    names = [f"node{n:02}" for n in range(1, nodes + 1)]
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
    }
    environment = {k: v for k, v in environment.items() if k != "SLURM_JOB_ID"}
    first = _ports(nodes + 1)
    config = CONFIG.format(
        host=socket.gethostname(),
        folder=folder,
        port=first,
        first=first + 1,
        last=first + nodes,
        nodes=nodes,
        per_node=per_node,
    )
    (folder / "slurm.conf").write_text(config)
    gres = f"NodeName=node[01-{nodes:02}] Name=gpu File=/dev/tty[1-{per_node}]\n"
    (folder / "gres.conf").write_text(gres)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    own = f"# SLURM test at {first}"
    try:
        lines = [*HOSTS.read_text().splitlines(), *(f"127.0.0.1 {name} {own}" for name in names)]
        HOSTS.write_text("\n".join(lines) + "\n")
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{name}={folder / path}" for name, path in files.items()]
        _daemon("munged", "--force", *options, environment=environment)
        _daemon("slurmctld", environment=environment)
        for name in names:
            _daemon("slurmd", "-N", name, environment=environment)
        _wait_idle(nodes, environment)
        yield environment
    finally:
        _stop(folder)
        lines = [line for line in HOSTS.read_text().splitlines() if not line.endswith(own)]
        HOSTS.write_text("\n".join(lines) + "\n")


def _wait_idle(nodes: int, environment: dict[str, str]) -> None:
    until = time.monotonic() + 60
    while True:
        command = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.stdout.split() == [str(nodes)]:
            return
        if time.monotonic() > until:
            raise RuntimeError(f"the nodes are not idle after 60 s: {done.stdout}{done.stderr}")
        time.sleep(0.2)
