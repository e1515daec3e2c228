"""The machine: its devices, its shared memory, and whether the loader's processes live through a stop."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from harness.config import Config
from harness.data.nested import tensors_in
from harness.data.schedule import Cursor
from harness.distributed import device as devices
from harness.distributed.world import choose_backend, choose_device
from harness.doctor.bounded import run_bounded
from harness.doctor.case import Case
from harness.doctor.findings import Finding, error, ok, warn
from harness.errors import ConfigError
from harness.runtime.environment import is_first_of_node, local_size

_BATCH_SECONDS = 120.0  # a loader that takes longer for a few batches does not work
_PREFETCHED = 2  # batches that torch's loader has in flight for each worker
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where torch's workers leave batches


def device(case: Case) -> list[Finding]:
    """The device and the backend that the run asks for; a script has chosen its own."""
    if not isinstance(case.config, Config):
        return [ok("looked where the script's model is", f"{case.device}, {case.world.backend}")]
    tried = "looked for the devices of world.device and world.backend"
    try:
        case.device = choose_device(case.config.world)
        backend = choose_backend(case.config.world, case.device)
    except ConfigError as mistake:
        case.device = None
        return [error(tried, str(mistake), "start fewer processes on each machine, or choose another device")]
    count, here = devices.count(), local_size()
    if case.config.world.device == "auto" and case.device.type == "cpu":
        if count:
            what = f"{count} CUDA devices for {here} processes: all will train on the CPU"
            return [warn(tried, what, "give torchrun --nproc-per-node no more than there are, or set world.device")]
        if os.path.exists("/dev/nvidiactl"):
            what = f"there is an NVIDIA device, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
            return [warn(tried, what, "install a torch that fits the driver, or set world.device=cpu")]
    return [ok(tried, f"{here} x {case.device.type} on this machine, {backend}")]


def batch(case: Case) -> list[Finding]:
    """Fetches the first batches in this process, as the run would without loader workers."""
    if case.loader is None or not is_first_of_node():
        return []
    tried = "fetched the first batch"
    fetched = _batches(case, workers=0)
    found, problem = run_bounded(lambda: next(fetched), _BATCH_SECONDS)
    if found is None:
        return [error(tried, problem, "fix the data set or its collate function; a run would fail here, too")]
    case.micro_batch_bytes = max(sum(tensor.nbytes for tensor in tensors_in(values)) for values, _ in found)
    return [ok(tried, f"{case.micro_batch_bytes / 1e6:.1f} MB at once")]


def _batches(case: Case, workers: int) -> Generator[list[tuple[Any, float]]]:
    """This rank's batches, from the first one."""
    loader = case.loader
    assert loader is not None
    plan = loader.schedule.steps(Cursor(), case.world.rank, case.world.size)
    return loader.fetcher.batches(loader.dataset, plan, workers=workers)


def memory(case: Case) -> list[Finding]:
    """Through the shared memory the loader's workers hand batches over; in a container it is often 64 MB."""
    workers = case.loader.fetcher.workers if case.loader else 0
    if not workers or case.micro_batch_bytes is None or not os.path.isdir(_SHARED_MEMORY):
        return []
    processes = local_size()
    needed_bytes = processes * workers * _PREFETCHED * case.micro_batch_bytes
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    tried = f"compared {_SHARED_MEMORY} with the batches that {processes} x {workers} loader workers have in flight"
    what = f"{needed_bytes / 1e6:.1f} MB are needed, {free_bytes / 1e6:.1f} MB are free"
    if free_bytes < needed_bytes:
        return [error(tried, what, "make it larger (docker run --shm-size), or set data.workers lower")]
    return [ok(tried, what)]


def workers(case: Case) -> list[Finding]:
    """Starts loader workers as the run does, sends them the SIGTERM that torchrun sends to the whole process group, and
    fetches on, beyond what they had fetched before."""
    count = case.loader.fetcher.workers if case.loader else 0
    if case.loader is None or case.micro_batch_bytes is None or not count:
        return []
    tried = f"sent SIGTERM to {count} loader workers and fetched on"
    fetched = _batches(case, count)
    others = multiprocessing.active_children()

    def started() -> list[Any]:
        return [process for process in multiprocessing.active_children() if process not in others]

    signalled: list[Any] = []

    def fetch_on() -> None:
        next(fetched)
        signalled.extend(started())
        for process in signalled:
            os.kill(process.pid, signal.SIGTERM)
        for _ in range(_PREFETCHED * count + 1):
            next(fetched)
        fetched.close()

    _, problem = run_bounded(fetch_on, _BATCH_SECONDS)
    if problem:
        dead = [process for process in signalled if process.exitcode == -signal.SIGTERM]
        found = f"{len(dead)} of them died of it ({problem})" if dead else problem
        for process in started():  # Python would wait for them when it exits
            process.kill()
        advice = "see that nothing in the data set sets handlers for SIGTERM, or set data.workers=0"
        return [error(tried, found, advice)]
    return [ok(tried, "they live")]


def processes(case: Case) -> list[Finding]:
    """Processes that the task has started by itself, which nobody has shielded: torchrun's SIGTERM goes to them, too."""
    if case.objects is None or not is_first_of_node():
        return []
    tried = "looked at the processes that the task has started"
    doomed = []
    for pid in _descendants(os.getpid()):
        status = dict(line.split(":\t", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
        heeded = int(status.get("SigIgn", "f" * 16), 16) | int(status.get("SigCgt", "0"), 16)
        if not heeded >> (signal.SIGTERM - 1) & 1 and _group(pid) == os.getpgrp():
            doomed.append(f"{pid} ({' '.join(_read(f'/proc/{pid}/cmdline').split(chr(0)))[:60].strip()})")
    if doomed:
        what = f"{', '.join(doomed)} would be killed by the stop signal, before the last step is saved"
        return [warn(tried, what, "have them ignore SIGTERM, or start them in a session of their own")]
    return [ok(tried, "none would be killed by the stop signal")]


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _read(str(task)).split()):
            yield child
            yield from _descendants(child)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _read(path: str) -> str:
    """What /proc says of a process, nothing once it has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
