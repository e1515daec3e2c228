"""Several hosts on one machine: network namespaces with host names of their own, on one switch. Needs root, ip and nsenter.

The hosts share the disk and the clock; ``/dev/shm`` is each host's own. A cable can be pulled out and put back. A host can
be lost: everything on it is killed at once, and its memory is empty then.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster import environment, wait_until

_IN_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" /dev/shm; shift 3; exec "$@"'
_counter = itertools.count()


def what_is_missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    if missing := [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]:
        return f"needs {', '.join(missing)}"
    name = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return "needs leave to make network namespaces"
    _run("ip", "netns", "delete", name)
    return ""


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass
class Host:
    """A host: a namespace with one network card."""

    name: str
    namespace: str
    switch: str
    folder: Path
    memory: Path  # /dev/shm of this host, as it is seen from outside
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self, *command: str, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Starts a command on this host; what it says goes to a file of the host's."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "sh", "-c", _IN_HOST, "sh"]
        with self.output_path.open("ab") as sink:
            process = subprocess.Popen(
                [*enter, self.name, str(self.folder / "hosts"), str(self.memory), *command],
                env={**environment(str(self.folder)), **env},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.processes.append(process)
        return process

    @property
    def output_path(self) -> Path:
        return self.folder / f"{self.name}.txt"

    def pids(self) -> list[int]:
        """Everything that runs on this host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split()]

    def worker(self) -> int:
        """The process of the rank on this host, of which there is one."""

        def found() -> int:
            for pid in self.pids():
                with contextlib.suppress(OSError):  # it has ended
                    if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                        return pid
            return 0

        return wait_until(found, f"a rank on {self.name}")

    def lose(self) -> None:
        """SIGKILL for everything on this host, and what was in its memory is gone."""
        for process in self.processes:  # first the parents, which would start others
            process.kill()
            process.wait()
        self.processes.clear()

        def none_left() -> bool:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.pids()

        wait_until(none_left, f"the processes on {self.name} to die")
        shutil.rmtree(self.memory)
        self.memory.mkdir()

    def cut(self) -> None:
        """Pulls the cable out: whoever sends or waits hears nothing."""
        _run("ip", "-n", self.switch, "link", "set", "dev", self.name, "down")

    def heal(self) -> None:
        """Puts it back in."""
        _run("ip", "-n", self.switch, "link", "set", "dev", self.name, "up")


@contextlib.contextmanager
def hosts(names: list[str]) -> Iterator[dict[str, Host]]:
    """Makes hosts that reach each other by name; takes them away with everything that runs on them."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    prefix = f"t{os.getpid()}-{next(_counter)}-"
    switch = f"{prefix}switch"
    lines = ["127.0.0.1 localhost", *(f"10.77.0.{index} {name}" for index, name in enumerate(names, 1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    for name in names:
        (folder / f"{name}.txt").touch()
    memory = Path(tempfile.mkdtemp(prefix="hosts-", dir="/dev/shm"))
    for name in names:
        (memory / name).mkdir()
    made = {name: Host(name, f"{prefix}{name}", switch, folder, memory / name) for name in names}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(shutil.rmtree, memory, ignore_errors=True)
        _run("ip", "netns", "add", switch)
        stack.callback(_run, "ip", "netns", "delete", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for index, host in enumerate(made.values(), 1):
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "delete", host.namespace)
            stack.callback(host.lose)
            card = ["type", "veth", "peer", "name", host.name, "netns", switch]
            _run("ip", "link", "add", "eth0", "netns", host.namespace, *card)
            _run("ip", "-n", switch, "link", "set", "dev", host.name, "master", "bridge", "up")
            _run("ip", "-n", host.namespace, "address", "add", f"10.77.0.{index}/24", "dev", "eth0")
            _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            # A connection whose other end is silent is given up after seconds, not after a quarter of an hour.
            _run("ip", "netns", "exec", host.namespace, "sysctl", "-qw", "net.ipv4.tcp_retries2=4")
        yield made
