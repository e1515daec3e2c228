"""Runs harness as people do, and does to it what happens to them.

``launch`` starts ``harness train`` (or a script) under torchrun or as one plain process, with an environment of its own;
a test waits for what the run tells in its JSON lines, kills a rank, waits for the end. Whatever happens in the test,
nothing that was started survives it: every process of a run carries a token in its environment, and is found by it.

``play`` lets one start of torchrun show many things: the ranks go through named scenarios together, and what each rank
returns or raises is handed to the tests.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.runtime.torch_import import import_torch
from tests.support import fork_server

T = TypeVar("T")

# torchrun as ``harness launch`` starts it, and stock: these differ in nothing but how fast they start.
AGENT, TORCHRUN = "harness.launcher.agent", "torch.distributed.run"
# Before a command: makes it process 1, as in a container. Needs root, or leave to be it.
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
POLL_SECONDS = 0.005
SHARE_OF_LOOKING = 0.1  # of the time that is waited: what looks at a long log, or asks a program, is not asked all the time
LONGEST_POLL_SECONDS = 0.3
PATIENCE_SECONDS = 240.0  # for what takes a few seconds on a fast machine that does nothing else
# A rank that hangs says where, before a test is impatient with it.
WATCHDOG = {"timeout_seconds": PATIENCE_SECONDS / 2, "first_step_seconds": PATIENCE_SECONDS / 2}


class Impatient(AssertionError):
    """What a test waited for did not come; the message has the last words of the run."""


def wait_until(found: Callable[[], T | None], what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """The first true value of ``found()``; ``Impatient`` when there is none in time."""
    began = looked = time.monotonic()
    while not (value := found()):
        now = time.monotonic()
        if now > began + seconds:
            raise Impatient(f"waited {seconds:.0f} s for {what}")
        time.sleep(min(max(POLL_SECONDS, (now - looked) / SHARE_OF_LOOKING), LONGEST_POLL_SECONDS))
        looked = time.monotonic()
    return value


def records(log: Path, event: str | None = None, *, start: int = 0) -> list[dict[str, Any]]:
    """What a JSON log tells from a byte on, in order, of one event or of all; a last line that is still being written is
    left out."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    found = [json.loads(line) for line in lines]
    return [record for record in found if event in (None, record["event"])]


def path_with_harness(folder: Path) -> str:
    """A PATH on which ``harness`` is that of this interpreter, as after an installation; its program lies in a folder."""
    folder.mkdir(exist_ok=True)
    program = folder / "harness"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m harness "$@"\n')
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@dataclass
class Run:
    """A run that was launched: its processes and what they tell."""

    process: subprocess.Popen[bytes]
    token: str
    log: Path  # JSON lines; earlier launches may have written to it
    log_start: int
    output_path: Path

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What this launch has told so far, in order; a last line that is still being written is left out."""
        return records(self.log, name, start=self.log_start)

    def wait(self, found: Callable[[], T | None], what: str, seconds: float = PATIENCE_SECONDS) -> T:
        """As ``wait_until``, and gives up at once when the run ends without it."""

        def found_or_over() -> tuple[T | None] | None:
            over = self.process.poll() is not None  # looked at first: what came before the end still counts
            if value := found():
                return (value,)
            return (None,) if over else None

        try:
            (value,) = wait_until(found_or_over, what, seconds)
        except Impatient as error:
            raise Impatient(f"{error}; the run has said:\n{self.output()[-4000:]}") from None
        if not value:
            raise Impatient(f"exit code {self.process.returncode} before {what}; the run has said:\n{self.output()[-4000:]}")
        return value

    def wait_for(self, event: str, *, step: int = 0, attempt: int = 1, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """The first event of this name of at least a step and at least an attempt (they are counted over the URL's life)."""

        def found() -> dict[str, Any] | None:
            for record in self.events(event):
                if record.get("step", 0) >= step and int(record["attempt"][:6] or 0) >= attempt:
                    return record
            return None

        return self.wait(found, f"{event!r} of step {step}, attempt {attempt}", seconds)

    def workers(self) -> dict[int, int]:
        """The process ids of the living ranks; their loader workers, which have their environment, are not meant."""
        ranks = {pid: int(environment["RANK"]) for pid, environment in _carrying(self.token) if "RANK" in environment}
        return {rank: pid for pid, rank in ranks.items() if _parent(pid) not in ranks}

    def processes(self) -> list[int]:
        """The process ids of everything that was launched and is alive."""
        return [pid for pid, _ in _carrying(self.token)]

    def kill_rank(self, rank: int) -> None:
        """SIGKILL for a rank under torchrun, which is waited for."""
        pid = self.wait(lambda: self.workers().get(rank), f"the process of rank {rank}")
        os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL for everything that was launched, at once."""
        reap(self.token)
        self.process.wait()

    def finish(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Waits for the end and returns the exit code."""
        wait_until(lambda: self.process.poll() is not None, f"the end of the run\n{self.output()[-4000:]}", seconds)
        return self.process.returncode

    def succeed(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Waits for the end, which must be a good one."""
        code = self.finish(seconds)
        assert code == 0, f"exit code {code}; the run has said:\n{self.output()[-6000:]}"

    def output(self) -> str:
        """Everything on stdout and stderr so far."""
        return self.output_path.read_text(errors="replace")


def torchrun(ranks: int, agent: str = TORCHRUN) -> list[str]:
    """What Python is started with, before a program that is to run on some ranks of this machine."""
    return ["-u", "-m", agent, "--standalone", f"--nproc-per-node={ranks}"]


@contextlib.contextmanager
def launch(
    directory: Path,
    config: Mapping[str, Any] | None,
    *arguments: str,
    ranks: int | None = None,
    max_restarts: int = 0,
    command: Sequence[str] = ("-m", "harness", "train"),
    agent: str = AGENT,
    env: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Starts ``harness train`` with a configuration and further arguments, in ``directory``: on ``ranks`` processes under
    torchrun, or as one plain process. The configuration gets a ``log`` section and a watchdog where it has none, each
    snapshot of its state is checked, and nothing is kept in memory. With another ``command`` and no configuration, starts
    that."""
    directory.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    log = directory / "log.jsonl"
    if config is not None:
        path = directory / f"config-{token[:8]}.yaml"
        careful = {"check_snapshots": True, "keep": None}  # most tests are about what is durable
        checked = {"checkpoint": {**careful, **config["checkpoint"]}} if "checkpoint" in config else {}
        told = {"log": {"every_steps": 1, "jsonl": str(log)}, "watchdog": WATCHDOG}
        path.write_text(json.dumps({**told, **config, **checked}, indent=1))
        arguments = (str(path), *arguments)
    launcher = [*torchrun(ranks, agent), f"--max-restarts={max_restarts}"] if ranks else []
    temporary = tempfile.mkdtemp(prefix="h-")  # not in pytest's: sockets lie here, and their names must be short
    output = directory / f"output-{token[:8]}.txt"
    try:
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, *launcher, *command, *arguments],
                cwd=directory,
                env={**environment(temporary), "HARNESS_TEST_TOKEN": token, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        try:
            yield Run(process, token, log, log.stat().st_size if log.exists() else 0, output)
        finally:
            reap(token)
            process.wait()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def train_undisturbed(directory: Path, config: Mapping[str, Any], ranks: int, seconds: float = PATIENCE_SECONDS) -> None:
    """The run that others are compared with, on ranks that share one import of torch."""
    with launch(directory, config, command=(__file__, str(ranks), "harness", "train")) as run:
        run.succeed(seconds)


COVERAGE = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")  # how `make coverage` reaches what a test starts


def environment(temporary: str | None = None) -> dict[str, str]:
    """An environment that does not depend on who runs the tests, and in which numerics do not depend on the launcher."""
    kept = {key: os.environ[key] for key in (*("PATH", "HOME", "LANG", "LD_LIBRARY_PATH"), *COVERAGE) if key in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", **({"TMPDIR": temporary} if temporary else {})}


def reap(token: str) -> None:
    """SIGKILL for every process that carries a token, until there is none."""

    def none_left() -> bool:
        pids = [pid for pid, _ in _carrying(token)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(none_left, f"the processes of {token} to die")


def _carrying(token: str) -> Iterator[tuple[int, dict[str, str]]]:
    wanted = f"HARNESS_TEST_TOKEN={token}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            raw = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue  # it has ended, or is not ours
        if wanted in raw:
            pairs = (item.decode(errors="replace").partition("=") for item in raw.split(b"\0") if item)
            yield int(name), {key: value for key, _, value in pairs}


def _parent(pid: int) -> int | None:
    try:
        found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def harness(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str = "", warm: bool = False
) -> Any:
    """Runs ``python -m harness`` to its end, as one plain process; a ``warm`` one has torch imported when it begins."""
    whole = {**environment(), **(env or {})}
    if warm:
        return fork_server.harness(*arguments, env=whole, cwd=cwd, stdin=stdin, seconds=PATIENCE_SECONDS)
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        env=whole,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def read_json(*arguments: str) -> Any:
    """What a verb prints with ``--json``."""
    done = harness(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def branch(source: Path, target: Path, step: int) -> str:
    """Copies a run's checkpoints up to a step to a new place, as if the run had died after it; the new URL."""
    for directory in source.glob("step-*"):
        if int(directory.name.split("-")[1]) <= step:
            shutil.copytree(directory, target / directory.name)
    return str(target)


# --- what the user's side of a test may need -------------------------------------------------------------------------


def hold(place: Path) -> None:
    """Makes this process wait here, once in the life of ``place``: it says so, and goes on when it is released."""
    reached = place.with_suffix(".reached")
    if reached.exists():
        return
    reached.touch()
    wait_until(place.with_suffix(".released").exists, f"release of {place}")


def held(place: Path) -> bool:
    """Whether a process waits, or has waited, at a place."""
    return place.with_suffix(".reached").exists()


def release(place: Path) -> None:
    """Lets the process at a place go on."""
    place.with_suffix(".released").touch()


# --- many scenarios in one start of torchrun -------------------------------------------------------------------------


def play(scenarios: Sequence[Callable[[Any, Path], Any]], directory: Path) -> None:
    """On every rank: goes through the scenarios in order and files what each returns, or raises."""
    from harness.config import WorldConfig
    from harness.distributed.world import join_world

    world = join_world(WorldConfig(timeout_seconds=60))
    for scenario in scenarios:
        place = directory / scenario.__name__
        place.mkdir(exist_ok=True)
        try:
            result = {"returned": scenario(world, place)}
        except Exception as error:
            result = {"raised": type(error).__name__, "message": str(error)}
        (directory / f"{scenario.__name__}.{world.rank}.json").write_text(json.dumps(result))
    world.close()


def played(file: str, directory: Path, ranks: int) -> dict[str, list[Any]]:
    """Starts a test file as a script on some ranks, lets it ``play``, and returns for each scenario the ranks' results."""
    with launch(directory, None, command=(__file__, str(ranks), file, str(directory))) as run:
        run.succeed(150)
    names = {path.name.split(".")[0] for path in directory.glob("*.0.json")}
    return {name: [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(ranks)] for name in names}


def returned(results: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the ranks returned from a scenario; none may have raised."""
    for rank, result in enumerate(results):
        assert "returned" in result, f"rank {rank}: {result}"
    return [result["returned"] for result in results]


def train_here(task: Any, world: Any = None, *, fresh: bool = False, **config: Any) -> Any:
    """Trains a task in this process, by default as a world of one, and returns its progress. Sections of the configuration
    are keyword arguments; ``url`` goes to ``checkpoint.url``."""
    import torch

    from harness.config import Config
    from harness.distributed.world import SoloWorld
    from harness.runtime.signals import StopRequest
    from harness.training.loop import build_task, train

    url = config.pop("url", None)
    checkpoint = {"check_snapshots": True, **config.pop("checkpoint", {}), **({"url": str(url)} if url else {})}
    torch.set_num_threads(1)  # as under torchrun; on a busy machine, several threads mostly wait for each other
    log = {"every_steps": None, **config.pop("log", {})}
    whole = Config.model_validate({"task": "here:build", "checkpoint": checkpoint, "log": log, **config})
    return train(whole, build_task(whole, task), world or SoloWorld(torch.device("cpu")), StopRequest(), fresh=fresh)


def hears(pid: int) -> bool:
    """Whether a process has its handlers by now. Before that nothing of ours runs in it."""
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)  # the last one
    return False


def committed(url: Path | str, storage_options: Mapping[str, Any] | None = None) -> set[int]:
    """The steps that are committed: a save goes on beside the training, so a test that is about to kill waits for it."""
    from harness.checkpoint.format import MANIFEST
    from harness.storage.store import open_store

    names = open_store(str(url), storage_options).list()
    return {int(name.split("-")[1]) for name in names if name.startswith("step-") and name.endswith(f"/{MANIFEST}")}


def newest(url: Path | str) -> dict[str, Any]:
    """The newest whole checkpoint of a run: its manifest's metadata and digests, and its parts."""
    from harness.checkpoint import load
    from harness.checkpoint.catalog import Catalog
    from harness.storage.store import open_store

    catalog = Catalog(open_store(str(url)))
    entry = catalog.newest()
    assert entry.manifest is not None
    digests = {name: part.digest for name, part in entry.manifest.parts.items()}
    return {"step": entry.step, "digests": digests, "parts": load.read(catalog.store, entry.directory, entry.manifest)}


def become_ranks(count: int) -> None:
    """Forks so many ranks, in which it returns, with the environment, the session and the store that torchrun's workers
    have; here it ends when they have ended. What torchrun takes longest for, importing torch in each, was done before."""
    told = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
    }
    elastic = {"RUN_ID": uuid.uuid4(), "USE_AGENT_STORE": True, "MAX_RESTARTS": 0, "RESTART_COUNT": 0}
    told |= {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
    reader, writer = os.pipe()
    ranks = {}
    for rank in range(count):
        if not (pid := os.fork()):
            os.close(writer)
            os.setsid()
            port = int.from_bytes(os.read(reader, 2), "big")
            os.close(reader)
            told |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in told.items()})
            return
        ranks[pid] = rank
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # it has threads: not before the forks
    os.write(writer, store.port.to_bytes(2, "big") * count)
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if code := os.waitstatus_to_exitcode(status):
            print(f"rank {rank} has ended with {code}", file=sys.stderr, flush=True)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":  # the ranks of ``played``, for which the test file is the program, or of ``train_undisturbed``
    import_torch()
    become_ranks(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    if sys.argv[0] == "harness":
        sys.path[0] = os.getcwd()
        runpy.run_module("harness", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
