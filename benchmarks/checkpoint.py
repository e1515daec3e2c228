"""What saving and restoring cost the training: harness beside what else there is, each beside what the machine can do.

    python benchmarks/checkpoint.py [--states 0.1GB 0.5GB 2GB 20000-tensors] [--contenders harness torch.save …]
                                    [--repeats 3] [--quick] [--publish]

Every measurement is a fresh process, in which one contender saves beside the training of one model, or restores it. In each
round all contenders have a turn, and the floors, too, in an order that changes from round to round. README.md beside
this file says what is measured. ``--publish`` writes the results beside it, its tables, and docs/stall.png.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import measure
import report
import torch
import torch._dynamo  # every process would import it with its first optimizer
import workload
from contenders import BY_NAME, ENTRIES, Entry
from relay import counting

from harness.runtime.signals import die_with_parent

HERE = Path(__file__).parent
FORK = multiprocessing.get_context("fork")
STATES = ["0.1GB", "0.5GB", "2GB", "20000-tensors"]
S3_STATES = ["0.1GB", "0.5GB"]  # the server has the same cores as the training, and writes 0.1 GB/s
REPEATS = 3
FLOORS = "floors"
RANKS = 2
LIMIT_SECONDS = 400  # for one process
BUCKET = "runs"  # of tests/support/servers.py
PACKAGES = ["torch", "torchsnapshot", "lightning-fabric", "accelerate", "fsspec", "s3fs", "s3torchconnector", "boto3"]


class Failed(Exception):
    """A process ended badly; the message says how, in a line."""


class Bench:
    """The measurements of one run of this program."""

    def __init__(self, scratch: Path, threads: int | None) -> None:
        self.scratch = scratch
        self.began = time.monotonic()
        self.runs: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.threads = threads
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "log").unlink(missing_ok=True)
        self.env = {"BENCH_BUCKET": BUCKET, "PYTHONWARNINGS": "ignore"}

    # --- one process ---

    def measure(self, function: Callable[..., dict], *arguments: Any, env: dict[str, str] | None = None) -> dict[str, Any]:
        """What a function returns in a process of its own. Raises ``Failed``.

        It is forked from this one, which has imported torch and done nothing with it: that is two seconds less for each.
        What all of them have imported is frozen: to look for garbage in it would copy it, and take a second of some save.
        """
        gc.freeze()
        receiving, sending = FORK.Pipe(duplex=False)
        process = FORK.Process(target=self.in_child, args=(sending, env or {}, function, *arguments))
        process.start()
        sending.close()
        children_bytes = self.watch(process)
        try:
            found = receiving.recv()
        except EOFError:
            found = f"ended with exit status {process.exitcode}"
        receiving.close()
        if isinstance(found, str):
            raise Failed(found)
        return {**found, "children_memory_bytes": children_bytes}

    def in_child(self, sending: Connection, env: dict[str, str], function: Callable[..., Any], *arguments: Any) -> NoReturn:
        """The child's side: sends the figures, or why there are none."""
        os.setsid()
        die_with_parent()
        os.environ.update(self.env | env)
        with open(self.scratch / "log", "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        warnings.simplefilter("ignore")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            sending.send(function(*arguments))
        except BaseException as error:  # whatever a contender raises is told of
            traceback.print_exc()
            sending.send(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        sys.stdout.flush()
        os._exit(0)  # whatever threads a contender has left

    def watch(self, process: BaseProcess) -> int:
        """Waits for a process to end; the most memory of their own that its children had together."""
        deadline, peak_bytes = time.monotonic() + LIMIT_SECONDS, 0
        try:
            while process.is_alive():
                if time.monotonic() > deadline:
                    raise Failed(f"no end within {LIMIT_SECONDS} s")
                peak_bytes = max(peak_bytes, sum(own_memory_bytes(pid) for pid in descendants(process.pid)))
                time.sleep(0.02)
        except BaseException:  # Ctrl-C, too
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.join()
            raise
        return peak_bytes

    def measure_ranks(self, entry: Entry, state: str, url: str, env: dict[str, str]) -> dict[str, Any]:
        """The same for several ranks under torchrun."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        program = [*torchrun, str(HERE / "measure.py"), entry.name, state, url]
        environment = {**os.environ, **self.env, **env}
        try:
            done = subprocess.run(
                program, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within {LIMIT_SECONDS} s") from None
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if re.search(r"^(\[rank\d\]: )?\w*(Error|Exception)\b", line)]
            raise Failed((told or [f"exit status {done.returncode}"])[0][:200])
        return json.loads(done.stdout.splitlines()[-1])

    # --- one turn ---

    @contextlib.contextmanager
    def place(self, state: str, *, s3: bool) -> Iterator[tuple[str, dict[str, str], Any]]:
        """A fresh folder, or a server with its first uploads; its URL, what a process has to know of it, and the server."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            if s3:
                from servers import seaweedfs

                with seaweedfs(folder) as server:
                    self.measure(measure.measure_first_uploads, state, server.url("first"), env=server.env)
                    yield server.url("bench"), server.env, server
            else:
                yield str(folder), {}, None
        finally:
            shutil.rmtree(folder)
            os.sync()  # the next one does not wait for what this one has left

    def turn(self, entry: Entry, state: str, repeat: int, batch: int) -> None:
        """Saves and restores, and keeps the figures or the reason why there are none.

        Where others are restored in the same way, it is only seen to, once, that the state is the one that was saved.
        """
        run: dict[str, Any] = {"contender": entry.name, "state": state, "repeat": repeat}
        with self.place(state, s3=entry.s3) as (url, env, _), self.noting_failures(run):
            if entry.only_restores:
                saved = self.measure(measure.measure_write, entry, state, url, env=env)
            else:
                saved = self.measure(measure.measure_save, entry, state, url, batch, env=env)
                self.keep(run, save=saved)
            if entry.restores_as and repeat > 0:
                return
            restored = self.measure(measure.measure_restore, entry, state, url, env=env)
            for how in ("warm", "backed", "cold"):
                if how in restored and restored[how]["digest"] != saved["digest"]:
                    raise Failed("restored another state than was saved")
            if not entry.restores_as:
                self.keep(run, restore=restored)

    def floors(self, state: str, repeat: int, batch: int, *, s3: bool) -> None:
        for on_s3 in (False, True) if s3 else (False,):
            run = {"contender": FLOORS, "state": state, "repeat": repeat, "s3": on_s3}
            with self.place(state, s3=on_s3) as (url, env, _), self.noting_failures(run):
                self.keep(run, floors=self.measure(measure.measure_floors, state, url, batch, env=env))

    def ranks(self, entry: Entry, state: str) -> None:
        """How much several ranks read to restore one checkpoint."""
        run: dict[str, Any] = {"contender": entry.name, "state": state, "repeat": 0}
        with self.place(state, s3=entry.s3) as (url, env, server), self.noting_failures(run):
            saved = self.measure(measure.measure_write, entry, state, url, env=env)
            with counting(server.port) if server else contextlib.nullcontext() as relay:
                seen = {**env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}"} if relay else env
                found = self.measure_ranks(entry, state, url, seen)
                if relay:
                    found["read_bytes"] = relay.answered_bytes
            if found["digests"] != [saved["digest"]]:
                raise Failed(f"{RANKS} ranks restored another state than was saved")
            self.keep(run, ranks={"stored_bytes": saved["stored_bytes"], "read_bytes": found["read_bytes"], "ranks": RANKS})

    def keep(self, run: dict[str, Any], **figures: dict[str, Any]) -> None:
        self.runs.append({**run, **figures})
        print(f"{self.minutes()}  {report.in_a_line(self.runs[-1])}", flush=True)

    @contextlib.contextmanager
    def noting_failures(self, run: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except Failed as failed:
            self.failures.append({**run, "reason": str(failed)})
            print(f"{self.minutes()}  {run['contender']}, {run['state']}: FAILED: {failed}", flush=True)

    def minutes(self) -> str:
        passed = int(time.monotonic() - self.began)
        return f"{passed // 60:3d}:{passed % 60:02d}"

    # --- everything ---

    def run(self, states: list[str], entries: list[Entry], repeats: int, *, count_ranks: bool) -> None:
        for state in states:
            taking_part = [entry for entry in entries if takes_part(entry, state)]
            batch = self.measure(measure.measure_calibrate, state)["batch"]
            for repeat in range(repeats):
                for entry in in_turn([None, *taking_part], repeat, repeats):
                    if entry is None:
                        self.floors(state, repeat, batch, s3=any(other.s3 for other in taking_part))
                    elif self.count_failures(entry, state) < 2:
                        self.turn(entry, state, repeat, batch)
        sized = [state for state in states if not state.endswith("-tensors")]
        for entry in entries if sized and count_ranks else []:
            if not entry.restores_as:
                self.ranks(entry, sized[0])

    def count_failures(self, entry: Entry, state: str) -> int:
        return sum((failure["contender"], failure["state"]) == (entry.name, state) for failure in self.failures)


def takes_part(entry: Entry, state: str) -> bool:
    return not entry.s3 or state not in STATES or state in S3_STATES


def in_turn(items: list, repeat: int, repeats: int) -> list:
    """Another begin in every round, and every other round backwards: nobody always has the same one before it."""
    begin = repeat * len(items) // repeats
    turned = items[begin:] + items[:begin]
    return turned[::-1] if repeat % 2 else turned


def descendants(pid: int) -> list[int]:
    children: list[str] = []
    with contextlib.suppress(OSError):  # it has ended
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in children for each in (int(child), *descendants(int(child)))]


def own_memory_bytes(pid: int) -> int:
    """What a process shares with no other."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def machine(scratch: Path) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    kind = subprocess.run(["df", "--output=fstype", scratch], capture_output=True, text=True, check=True).stdout.split()[-1]
    versions = {}
    for package in ("harness", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": cpu[0] if cpu else "unknown",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "filesystem": kind,
        "kernel": os.uname().release,
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def existing_state(name: str) -> str:
    """One that exists; ``ValueError`` is argparse's affair."""
    workload.shape_of(name)
    return name


def check_room(scratch: Path, states: list[str]) -> None:
    """All saves of a process and one before them lie on the disk, and another library writes to temporary files first."""
    needed = max(workload.size_bytes(state) * (3 + workload.times(state)) for state in states)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"--scratch: expected {needed / 1e9:.1f} GB of room in {scratch}, found {free / 1e9:.1f}")


def chosen(names: list[str] | None, *, quick: bool) -> list[Entry]:
    if names is None:
        return [entry for entry in ENTRIES if not (quick and entry.s3)]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise SystemExit(f"--contenders: no {', '.join(unknown)}; there are: {' | '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", metavar="STATE", type=existing_state, help=f"by default {' '.join(STATES)}")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"of: {' | '.join(BY_NAME)}")
    parser.add_argument("--repeats", type=int, help=f"rounds (default: {REPEATS})")
    parser.add_argument("--quick", action="store_true", help="0.1 GB on the disk, once: three minutes")
    parser.add_argument("--threads", type=int, help="of the training (default: all cores, with which savers then compete)")
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "build/bench", help="where checkpoints are written")
    parser.add_argument("--results", type=Path, help="a file for the results")
    parser.add_argument("--publish", action="store_true", help="write the results, README.md's tables and the picture")
    arguments = parser.parse_args()
    sys.path.append(str(HERE.parent / "tests/support"))  # servers.py
    entries = chosen(arguments.contenders, quick=arguments.quick)
    states = arguments.states or (STATES[:1] if arguments.quick else STATES)
    bench = Bench(arguments.scratch.absolute(), arguments.threads)
    about = machine(bench.scratch)
    check_room(bench.scratch, states)
    if about["load_before"] > 0.5:
        print(f"the machine is busy (load {about['load_before']}): the figures will not be worth much", flush=True)
    repeats = arguments.repeats or (1 if arguments.quick else REPEATS)
    try:
        bench.run(states, entries, repeats, count_ranks=not arguments.quick)
    except Failed as failed:
        raise SystemExit(f"without a contender: {failed}; {bench.scratch}/log has more") from None
    about["minutes"] = round((time.monotonic() - bench.began) / 60)
    results = {"machine": about, "runs": bench.runs, "failures": bench.failures}
    print(report.tables(results))
    if arguments.results:
        report.write(results, arguments.results)
    if arguments.publish:
        report.publish(results)


if __name__ == "__main__":
    main()
