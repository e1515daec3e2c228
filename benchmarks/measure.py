"""The measurements. ``checkpoint.py`` makes each in a process of its own.

torchrun measure.py CONTENDER STATE URL       what several ranks read, in JSON
"""

import ctypes
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floors
import numpy as np
import torch
from contenders import BY_NAME, Entry
from contenders.protocol import Contender
from torch import nn
from workload import Training, calibrated_batch, size_bytes, times

SAVED_STEP = 10  # of the last save, which is restored
SEED = 1  # of the state that is saved; the floors move the same bytes, since some are less work for a server than others
LEAST_STEPS = 2  # so many follow a save, however soon it has ended
QUIET_STEPS = 2  # so many are timed without a save, before and after it
FIRST_UPLOADS = 3  # of as many bytes as the state has, to a fresh server


# --- memory and files ------------------------------------------------------------------------------------------------


def memory_bytes(kind: str) -> int:
    """``VmRSS`` is what the process has in memory, ``VmHWM`` the most that it had since it was asked to forget."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {kind}")


def forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def io_bytes(kind: str) -> int:
    """``rchar`` is what this process has read by system calls, ``read_bytes`` what the disk had to give it."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {kind}")


def sizes(url: str) -> dict[str, int]:
    """The files or objects below a URL, with their sizes in bytes."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name: info["size"] for name, info in fs.find(root, detail=True).items()}


# --- saving ----------------------------------------------------------------------------------------------------------


class Ending:
    """Waits in a thread for the end of a save, and notes when it came."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.time = 0.0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self) -> None:
        try:
            self.contender.wait()
        except BaseException as error:  # raised where it is looked for
            self.error = error
        self.time = time.perf_counter()

    def has_come(self) -> bool:
        if not self.time:
            return False
        if self.error is not None:
            raise self.error
        return True


def save_among_steps(training: Training, contender: Contender, step: int) -> dict[str, float]:
    """Saves, and trains on until the save has ended."""
    began = time.perf_counter()
    contender.save(step)
    blocked_seconds = time.perf_counter() - began
    ending, steps = Ending(contender), 0
    while steps < LEAST_STEPS or not ending.has_come():
        training.forward_backward()
        fenced = time.perf_counter()
        contender.fence()
        blocked_seconds += time.perf_counter() - fenced
        training.optimizer.step()
        steps += 1
    wall_seconds = time.perf_counter() - began
    return {
        "blocked_seconds": blocked_seconds,
        "durable_seconds": ending.time - began,
        "wall_seconds": wall_seconds,
        "steps": steps,
    }


def quiet_steps(training: Training) -> float:
    """The seconds that some steps take when nothing is saved and nothing is still being written."""
    os.sync()
    return floors.seconds(lambda: [training.step() for _ in range(QUIET_STEPS)])


def quiet_step_seconds(training: Training, before: float) -> float:
    """Of one such step, when those before have taken so long and as many come now."""
    return (before + quiet_steps(training)) / (2 * QUIET_STEPS)


def measure_save(entry: Entry, state: str, url: str, batch: int) -> dict[str, Any]:
    warm_up(entry)
    training = Training(state, seed=SEED, batch=batch)
    training.step()
    forget_the_peak()
    training.step()
    training.step()
    training_peak = memory_bytes("VmHWM")
    contender = entry.make(url)
    contender.prepare(training.model, training.optimizer)
    steps = range(SAVED_STEP - times(state) + 1, SAVED_STEP + 1)
    if entry.keeps_buffers:
        save_among_steps(training, contender, steps[0] - 1)
    found = []
    for step in steps:
        quiet = quiet_steps(training)
        digest, before = training.digest(), sizes(url)
        os.sync()
        found.append(save_among_steps(training, contender, step))
        peak = memory_bytes("VmHWM")
        step_seconds = quiet_step_seconds(training, quiet)
        found[-1]["step_seconds"] = step_seconds
        found[-1]["added_seconds"] = found[-1]["wall_seconds"] - found[-1]["steps"] * step_seconds
    contender.close()
    after = sizes(url)
    return {
        **medians(found),
        "digest": digest,
        "extra_memory_bytes": max(0, peak - training_peak),
        "stored_bytes": sum(after.values()) - sum(before.values()),
        "files": len(after) - len(before),
        "payload_bytes": training.size_bytes(),
        "tensors": sum(1 for _ in training.tensors()),
    }


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure that all have."""
    return {name: statistics.median(each[name] for each in found) for name, value in found[0].items() if value is not None}


def measure_write(entry: Entry, state: str, url: str) -> dict[str, Any]:
    """No figures: only what is to be restored."""
    training = Training(state, seed=SEED, batch=1)
    training.step()
    write(entry, training, url)
    return {"digest": training.digest(), "stored_bytes": sum(sizes(url).values())}


def write(entry: Entry, training: Training, url: str) -> None:
    """One save, with nothing beside it."""
    contender = entry.make(url)
    contender.prepare(training.model, training.optimizer)
    contender.save(SAVED_STEP)
    contender.fence()
    contender.wait()
    contender.close()


def warm_up(entry: Entry) -> None:
    """Saves and restores something small elsewhere: what is imported and started at the first time is there then."""
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        contender = entry.make(f"s3://{os.environ['BENCH_BUCKET']}/warm-up" if entry.s3 else folder)
        contender.prepare(model, optimizer)
        contender.save(1)
        contender.fence()
        contender.wait()
        contender.restore(model, optimizer, 1)
        contender.close()


# --- restoring -------------------------------------------------------------------------------------------------------


def restore_once(entry: Entry, training: Training, url: str) -> dict[str, Any]:
    """Into a live model and a fresh optimizer, until all of it is in memory."""
    contender = entry.make(url)
    forget_the_peak()
    before, read_before = memory_bytes("VmRSS"), io_bytes("read_bytes")

    def restore() -> None:
        contender.restore(training.model, training.optimizer, SAVED_STEP)
        training.touch()

    seconds = floors.seconds(restore)
    peak, after = memory_bytes("VmHWM"), memory_bytes("VmRSS")
    return {
        "seconds": seconds,
        "extra_memory_bytes": max(0, peak - max(before, after)),
        "disk_read_bytes": io_bytes("read_bytes") - read_before,
        "digest": training.digest(),
    }


def measure_restore(entry: Entry, state: str, url: str) -> dict[str, Any]:
    """From the page cache; where there are large files on a disk, also into memory that the host has backed, and, once, from
    the disk."""
    warm_up(entry)
    training = Training(state, seed=2, batch=1)
    if not entry.s3:
        for path in sizes(url):  # a save that goes past the page cache leaves nothing there
            Path(path).read_bytes()
    warm = []
    for _ in range(times(state)):
        forget(training)
        warm.append(restore_once(entry, training, url))
        training.forward_backward()  # there are gradients from here on
        warm[-1]["with_step_seconds"] = warm[-1]["seconds"] + floors.seconds(training.optimizer.step)
    found = {"warm": warm}
    if not entry.s3 and not state.endswith("-tensors"):
        found["backed"] = []
        for _ in range(times(state)):
            forget(training)
            floors.back_free_memory(2 * size_bytes(state))
            found["backed"].append(restore_once(entry, training, url))
        forget(training)
        floors.forget_cached(list(sizes(url)))
        found["cold"] = [restore_once(entry, training, url)]
    return {how: {"digest": agreed(each), **medians(each)} for how, each in found.items()}


def forget(training: Training) -> None:
    training.forget()
    ctypes.CDLL(None).malloc_trim(0)  # the memory of what was restored is not at hand for the next


def agreed(restored: list[dict[str, Any]]) -> str:
    """The one digest that all have; more of them are none that was ever saved."""
    return " ".join(sorted({each.pop("digest") for each in restored}))


def restore_on_rank(entry: Entry, state: str, url: str) -> None:
    """What the ranks read to restore, all together; rank 0 prints it."""
    import torch.distributed as dist

    training = Training(state, seed=2, batch=1)
    contender = entry.make(url)
    contender.join()
    before = io_bytes("rchar")
    contender.restore(training.model, training.optimizer, SAVED_STEP)
    training.touch()
    own = io_bytes("rchar") - before
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (own, training.digest()))
    if dist.get_rank() == 0:
        print(json.dumps({"read_bytes": sum(count for count, _ in found), "digests": sorted({each for _, each in found})}))
        sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # whatever threads a contender has left


# --- without a contender ---------------------------------------------------------------------------------------------


def measure_floors(state: str, url: str, batch: int) -> dict[str, Any]:
    training = Training(state, seed=SEED, batch=batch)
    training.step()

    def beside(function: Callable[[], object]) -> float:
        quiet, steps = quiet_steps(training), 0
        thread, began = threading.Thread(target=function), time.perf_counter()
        thread.start()
        while thread.is_alive():
            training.step()
            steps += 1
        wall_seconds = time.perf_counter() - began
        return wall_seconds - steps * quiet_step_seconds(training, quiet)

    if url.startswith("s3://"):
        uploads, objects = floors.Uploads(url), shards(training)
        uploads.add(objects)  # opens the connections, as a contender's warming up does
        return medians([floors.s3_floors(uploads, objects, beside) for _ in range(times(state))])
    data = b"".join(training.raw_bytes())

    def once() -> dict[str, float | None]:
        return {"naming": floors.seconds(lambda: name_all(training)), **floors.disk_floors(url, data, beside)}

    return medians([once() for _ in range(times(state))])


def measure_first_uploads(state: str, url: str) -> dict[str, Any]:
    """No figures: a server that has taken little is slower, and every measurement is to find one that has taken as much."""
    training = Training(state, seed=SEED, batch=1)
    training.step()
    uploads, objects = floors.Uploads(url), shards(training)
    for _ in range(FIRST_UPLOADS):
        uploads.add(objects)
    return {}


def shards(training: Training) -> list[bytes]:
    """What harness makes of the weights and of the optimizer's state. What else it writes is small."""
    with tempfile.TemporaryDirectory() as folder:
        write(BY_NAME["harness"], training, folder)
        return [path.read_bytes() for path in map(Path, sizes(folder)) if path.name.startswith(("model", "optimizer"))]


def name_all(training: Training) -> list[Any]:
    """What a checkpoint at a step boundary has to begin with, whoever writes it."""
    generators = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()]  # noqa: NPY002
    return [training.model.state_dict(), training.optimizer.state_dict(), generators]


def measure_calibrate(state: str) -> dict[str, Any]:
    """The batch with which forward and backward last longer than a copy of the state in memory."""
    training = Training(state, seed=SEED, batch=1)
    training.step()
    copy_seconds = copying_seconds(training.size_bytes())
    del training
    return {"batch": calibrated_batch(state, max(1.5 * copy_seconds, 0.1))}


def copying_seconds(size_bytes: int) -> float:
    source = torch.ones(size_bytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    return min(floors.seconds(lambda: target.copy_(source)) for _ in range(3))


if __name__ == "__main__":
    restore_on_rank(BY_NAME[sys.argv[1]], *sys.argv[2:])
