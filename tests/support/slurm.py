"""A Slurm of one's own: a real controller and real nodes, as child processes on one machine, with quick timers.

The nodes are daemons that pose as machines of four CPUs. It needs root, and Debian's slurmctld, slurmd and slurm-client, but
no munge, cgroups, accounting or systemd. Two partitions: a job in ``high`` throws one in ``low`` out.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import environment, reap, wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=harness
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def what_is_missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    return f"needs {', '.join(missing)}" if missing else "" if os.geteuid() == 0 else "needs root"


@dataclass
class Slurm:
    """A running cluster."""

    folder: Path
    token: str
    env: Mapping[str, str]
    nodes: dict[str, "subprocess.Popen[bytes]"]

    def call(self, *command: str) -> str:
        done = subprocess.run(command, check=False, env=self.env, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), log: Path | None = None) -> str:
        """Hands a batch script in, and returns the job's number."""
        output = log or self.folder / "job-%j.txt"
        found = self.call("sbatch", "--parsable", f"--output={output}", *options, str(script), *arguments)
        return found.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job: JobState, ExitCode, Restarts, NodeList, Reason and more."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Waits until a job is in one of some states."""

        def found() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in states else None

        return wait_until(found, f"job {number} to be {' or '.join(states)}; it is {self.job(number)}", seconds)

    def lose(self, node: str) -> None:
        """SIGKILL for everything on a node, its daemon first, as when the power goes."""
        daemon = self.nodes.pop(node)
        daemon.kill()
        daemon.wait()
        marks = (f"HARNESS_TEST_NODE={node}".encode(), f"SLURMD_NODENAME={node}".encode())
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):  # it has ended
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"HARNESS_TEST_TOKEN={self.token}".encode() in variables and any(mark in variables for mark in marks):
                    os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


@contextlib.contextmanager
def slurm(nodes: int, path: str) -> Iterator[Slurm]:
    """Starts a controller and so many nodes, ``n1`` and on; ``path`` is the PATH of the jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    token = uuid.uuid4().hex
    (folder / "state").mkdir()
    first, host = _free_ports(nodes + 1), socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(folder=folder, host=host, port=first, nodes=nodes, first=first + 1, last=first + nodes)
    (folder / "slurm.conf").write_text(text)
    env = {**environment(str(folder)), "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "HARNESS_TEST_TOKEN": token}
    search = f"{path}:/usr/sbin:/sbin"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(reap, token)

        def start(program: str, *options: str, **variables: str) -> "subprocess.Popen[bytes]":
            command = [shutil.which(program, path=search) or program, "-D", *options]
            with (folder / "daemons.txt").open("ab") as sink:
                process = subprocess.Popen(
                    command, env={**env, **variables}, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL
                )
            stack.callback(process.wait)
            return process

        start("slurmctld", "-i")
        daemons = {
            f"n{index}": start("slurmd", "-N", f"n{index}", HARNESS_TEST_NODE=f"n{index}") for index in range(1, nodes + 1)
        }
        stack.callback(reap, token)
        cluster = Slurm(folder, token, env, daemons)
        wait_until(lambda: _idle(cluster) == nodes, f"the nodes; see {folder}", 60)
        yield cluster


def _idle(cluster: Slurm) -> int:
    command = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle"]
    done = subprocess.run(command, check=False, env=cluster.env, capture_output=True, text=True)  # it may not answer yet
    return len(done.stdout.splitlines())
