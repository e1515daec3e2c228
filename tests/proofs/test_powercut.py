"""A power cut on a real filesystem: what was committed is there, and what was not is not half there.

The other half of test_crash_points.py, without a model. A filesystem lies in a file, mounted through a loop device. A
process saves on it and is killed by strace on entry to one of its storage system calls. Then the filesystem is shut down
without its journal being written (``FS_IOC_SHUTDOWN``), mounted again, which replays the journal, and resumed from. This
takes root.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness.storage.filesystem
from harness.checkpoint.catalog import Catalog
from harness.storage.store import open_store
from tests.support.cluster import wait_until
from tests.support.faults import Life, Witness, resume_from, silence

CALLS = (
    "write pwrite64 writev fsync fdatasync ftruncate openat creat rename renameat renameat2 link linkat unlink unlinkat "
    "mkdir mkdirat rmdir"
)
FILESYSTEMS = {"ext4": ("64M", "mkfs.ext4", "-q", "-F"), "xfs": ("320M", "mkfs.xfs", "-q", "-f")}
FS_IOC_SHUTDOWN, WITHOUT_THE_LOG = 0x8004587D, 2
FEW = 10  # of about a hundred calls; all of them in the long run


# --- the process that saves ------------------------------------------------------------------------------------------


class Reporter(Witness):
    """Writes down, outside the filesystem that will go down, which checkpoint must be found from now on."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def remark(self, verb: str) -> None:
        os.write(self.file, json.dumps(self.allowed).encode() + b"\n")


BUGS = {
    "": lambda: None,
    "files are not fsynced": lambda: setattr(os, "fsync", lambda descriptor: None),
    "directories are not fsynced": lambda: setattr(harness.storage.filesystem, "fsync_directory", lambda path: None),
}


def in_one_thread() -> None:
    """Runs threads where they are started: strace counts the calls of each thread for itself."""
    threading.Thread.start = lambda thread: thread.run()
    threading.Thread.join = lambda thread, timeout=None: None
    threading.Thread.is_alive = lambda thread: False


def serve() -> None:
    """Imports torch once; then bears a saver for each line of its input. A saver waits for a second line."""
    in_one_thread()
    for line in sys.stdin:
        url, remarks, step, bug = json.loads(line)
        hear, say = os.pipe()
        if (child := os.fork()) == 0:
            os.read(hear, 1)
            with silence():
                BUGS[bug]()
                reporter = Reporter(remarks)
                reporter.allowed = (10,)
                Life(reporter.watch(open_store(url))).save(step)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()
        os.write(say, b".")
        print(os.waitpid(child, 0)[1], flush=True)
        os.close(hear)
        os.close(say)


@dataclass
class ForkServer:
    process: subprocess.Popen[str]

    def ask(self, line: str) -> int:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def fork_server():
    if os.geteuid() != 0:
        pytest.skip("only root mounts filesystems")
    for program in ("strace", "losetup"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield ForkServer(process)
        process.stdin.close()


# --- the filesystem --------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    run("mount", "-o", "loop", image, folder)
    try:
        yield
    finally:
        run("umount", folder)
        wait_until(lambda: not subprocess.check_output(["losetup", "-j", image]), "the loop device to go")


def cut_power(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_THE_LOG))
    finally:
        os.close(descriptor)


@dataclass
class Bench:
    """A filesystem on which step 10 was saved by an earlier start; each trial has a copy of it."""

    folder: Path
    server: ForkServer
    clean: Path
    trials: int = 0

    @property
    def mount(self) -> Path:
        return self.folder / "mount"

    def trial(self, point: tuple[str, int] | None = None, bug: str = "") -> str | None:
        """What is wrong after a kill on entry to the k-th call of a name (None: after the save), and a power cut."""
        self.trials += 1
        image, remarks = self.folder / f"image-{self.trials}", self.folder / f"remarks-{self.trials}"
        run("cp", "--sparse=always", self.clean, image)
        with mounted(image, self.mount):
            self.save(remarks, point, bug)
            cut_power(self.mount)
        lines = remarks.read_text().split("\n")[:-1] if remarks.exists() else []
        allowed = json.loads(lines[-1]) if lines else [10]
        with mounted(image, self.mount):
            store = open_store(str(self.mount / "run"))
            _, restored = resume_from(store)
            if restored.step not in allowed or not restored.exact:
                return f"found {restored.step}, expected one of {allowed}"
            Life(store).save(40)  # the run goes on
            if [entry.step for entry in Catalog(store).entries()] != [40]:
                return f"then found {Catalog(store).entries()}"
        image.unlink()
        return None

    def save(self, remarks: Path, point: tuple[str, int] | None, bug: str) -> None:
        child = self.server.ask(json.dumps([str(self.mount / "run"), str(remarks), 20, bug]))
        inject = ["-e", f"inject={point[0]}:signal=KILL:when={point[1]}"] if point else []
        options = ["-f", "-y", "-s", "0", "-o", str(self.folder / "trace"), "-e", f"trace={CALLS.replace(' ', ',')}"]
        with subprocess.Popen(["strace", *options, *inject, "-p", str(child)], stderr=subprocess.PIPE, text=True) as strace:
            first = strace.stderr.readline()
            assert "attached" in first, first
            status = self.server.ask("go")
        assert bool(status) == bool(point), f"the saver ended with {status} at {point}"

    def points(self) -> list[tuple[str, int]]:
        """Every call of the last trial that touched the filesystem, as strace counts them."""
        counts: Counter[str] = Counter()
        points = []
        for line in (self.folder / "trace").read_text().splitlines():
            call = re.match(r"\d+ +(\w+)\(", line)
            if call is None:
                continue
            counts[call[1]] += 1
            if str(self.mount) in line and (call[1] != "openat" or "O_CREAT" in line):
                points.append((call[1], counts[call[1]]))
        return points


@pytest.fixture(scope="module", params=FILESYSTEMS)
def bench(request, fork_server, tmp_path_factory):
    size, mkfs, *options = FILESYSTEMS[request.param]
    if shutil.which(mkfs) is None:
        pytest.skip(f"{mkfs} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    bench = Bench(folder, fork_server, folder / "clean")
    bench.mount.mkdir()
    run("truncate", "-s", size, bench.clean)
    run(mkfs, *options, bench.clean)
    try:
        with mounted(bench.clean, bench.mount), silence():
            Life(open_store(str(bench.mount / "run"))).save(10)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no filesystem can be mounted here: {error.stderr.strip()}")
    return bench


@pytest.fixture(autouse=True)
def quiet():
    with silence():
        yield


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_power_cut_leaves_the_old_or_the_new_checkpoint(bench, every, capsys):
    """A save is killed on entry to a storage call, the power fails: the run resumes and goes on (soak: at every call)."""
    assert bench.trial() is None
    points = bench.points()
    tried = points if every else points[len(points) // FEW // 2 :: len(points) // FEW]
    wrong = [(point, problem) for point in tried if (problem := bench.trial(point))]
    with capsys.disabled():
        print(f"\n    {len(tried)} of {len(points)} calls", end="")
    assert not wrong, wrong[:5]
    assert len(points) > 50


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug])
def test_a_missing_fsync_is_found(bench, bug):
    """The power cut is one: without the fsync of files, or of directories, a checkpoint that was committed is lost."""
    # Now and then the kernel writes by itself what nobody has asked it to.
    assert any(bench.trial(bug=bug) is not None for _ in range(3))


if __name__ == "__main__":
    serve()
