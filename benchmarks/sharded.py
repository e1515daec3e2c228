"""What saving and restoring a sharded model cost: harness beside torch.distributed.checkpoint (DCP), on the same ranks.

    python benchmarks/sharded.py [--states 0.2GB 1GB] [--ranks 2 4] [--repeats 3]

A model in FSDP2 with AdamW is trained on 2 and on 4 ranks of this machine, and saved among the steps. Fresh processes
restore each checkpoint, on as many ranks and on the other number, and it is compared with what was saved, bit for bit. The
contenders take turns in every round; each cell is the median of the rounds. At last one bit of each checkpoint is flipped.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the ranks would import one by one is there before they are forked
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from floors import forget_cached
from measure import io_bytes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from workload import shape_of, size_bytes

import harness
from harness.checkpoint.catalog import Catalog
from harness.distributed.world import World, world_of_program
from harness.runtime.signals import StopRequest
from harness.state.capture import State
from harness.storage.store import open_store
from harness.training.resume import resume

HERE = Path(__file__).parent
FORK = multiprocessing.get_context("fork")
STATES = ["0.2GB", "1GB"]
RANKS = [2, 4]
REPEATS = 3
SAVES = 4  # of a process
# The last ones. The first two take memory that the next ones have. In them, harness copies everything at the step boundary,
# to see whether the next ones may copy beside the training.
COUNTED = 2
STEPS = 6  # from one save to the next
TIMEOUT_SECONDS = 300


class Training:
    """A sharded model and its optimizer."""

    def __init__(self, state: str, ranks: int, seed: int) -> None:
        torch.manual_seed(seed)
        shape = shape_of(state)
        self.model = nn.Sequential(*(nn.Linear(shape.width, shape.width) for _ in range(shape.layers)))
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(8, shape.width)

    def forward_backward(self) -> None:
        self.model(self.batch).square().mean().backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def digest(self) -> str:
        """What the whole state is, bit for bit, however it is sharded. All ranks call it."""
        whole = xxhash.xxh3_128()
        for parameter in self.model.parameters():
            state = self.optimizer.state.get(parameter, {})
            for tensor in (parameter.detach(), *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)):
                whole.update(tensor.full_tensor().numpy().data)
        return whole.hexdigest()


# --- on each rank ----------------------------------------------------------------------------------------------------


class Waiting:
    """The time that a training thread is kept from an optimizer's step: between a hook before all others, and one after."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = self._began = 0.0
        optimizer.register_step_pre_hook(self._begin)
        self._optimizer = optimizer

    def others_are_there(self) -> None:
        self._optimizer.register_step_pre_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def save_harness(state: str, url: str, ranks: int) -> dict[str, Any]:
    training = Training(state, ranks, seed=1)
    training.step()
    waiting, total = Waiting(training.optimizer), SAVES * STEPS
    parts = {"model": training.model, "optimizer": training.optimizer}
    run = harness.Run(url, parts, every_steps=STEPS, stop=StopRequest(), config={"checkpoint": {"keep_last": 2}})
    waiting.others_are_there()
    found: list[dict[str, float]] = []
    digests, quiet = {}, []
    ended, watcher = 0.0, None
    for _ in run.steps(total + STEPS - 1):  # the last save has steps beside it, too
        began_step = time.perf_counter()
        if ended:
            between = began_step - ended
            if (run.global_step % STEPS) == 0:
                found.append({"blocked_seconds": between})
            else:
                quiet.append(between)
        before = waiting.seconds
        training.step()
        if found and "fence" not in found[-1]:
            found[-1]["blocked_seconds"] += waiting.seconds - before
            found[-1]["fence"] = waiting.seconds - before
        if (run.global_step + 1) % STEPS == 0 and run.global_step + 1 <= total:
            digests[run.global_step + 1] = training.digest()
            dist.barrier()
            watcher = Committed(Path(url), run.global_step + 1)
        ended = time.perf_counter()
        run.step()
        if watcher is not None and (run.global_step % STEPS) == STEPS - 1:
            watcher.join()
            found[-1]["durable_seconds"] = watcher.seconds
    run.close()
    digests[run.global_step] = training.digest()  # the end is saved, too
    for each in found:
        each["blocked_seconds"] -= statistics.median(quiet)
    return {"saves": found[-COUNTED:], "digests": digests, "stored_bytes": stored_bytes(newest(Path(url)))}


class Committed(threading.Thread):
    """Waits for a checkpoint of harness, from when it is made."""

    def __init__(self, url: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.url, self.step, self.seconds, self.began = url, step, 0.0, time.perf_counter()
        self.start()

    def run(self) -> None:
        while not any(self.url.glob(f"step-{self.step:012}-*/manifest.json")):
            time.sleep(0.002)
        self.seconds = time.perf_counter() - self.began


def save_dcp(state: str, url: str, ranks: int) -> dict[str, Any]:
    """Asynchronous, and once more synchronous: with a group of its own, since its collectives would meet the training's."""
    training = Training(state, ranks, seed=1)
    training.step()
    group = dist.new_group(backend="gloo")
    found, digests = [], {}
    for number in range(1, SAVES + 1):
        for _ in range(STEPS):
            training.step()
        step = number * STEPS
        digests[step] = training.digest()
        dist.barrier()
        began = time.perf_counter()
        future = dcp.async_save(state_of(training), checkpoint_id=f"{url}/{step}", process_group=group)
        blocked = time.perf_counter() - began
        training.step()  # as after each save of the other
        while not future.done() and time.perf_counter() - began < TIMEOUT_SECONDS:
            time.sleep(0.002)
        future.result()
        seconds = time.perf_counter() - began
        dist.barrier()
        shutil.rmtree(f"{url}/synchronous", ignore_errors=True)
        dist.barrier()
        began = time.perf_counter()
        dcp.save(state_of(training), checkpoint_id=f"{url}/synchronous")
        synchronous = time.perf_counter() - began
        found.append({"blocked_seconds": blocked, "durable_async_seconds": seconds, "durable_seconds": synchronous})
    shutil.rmtree(f"{url}/synchronous", ignore_errors=True)
    return {"saves": found[-COUNTED:], "digests": digests, "stored_bytes": stored_bytes(newest(Path(url)))}


def state_of(training: Training) -> dict[str, Any]:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optimizer": optimizer}


def restore_harness(training: Training, url: str, world: World) -> None:
    state = State({"model": training.model, "optimizer": training.optimizer}, torch.device("cpu"))
    resume(world, Catalog(open_store(url)), state, how="auto")


def restore_dcp(training: Training, url: str, _world: World) -> None:
    state = state_of(training)
    dcp.load(state, checkpoint_id=str(newest(Path(url))))
    set_state_dict(training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


SAVING = {"harness": save_harness, "DCP": save_dcp}
RESTORING: dict[str, Callable[[Training, str, World], None]] = {"harness": restore_harness, "DCP": restore_dcp}


def restore(contender: str, state: str, url: str, ranks: int) -> dict[str, Any]:
    """From the page cache, into a live model and an optimizer that has no state."""
    training = Training(state, ranks, seed=2)
    world = world_of_program(torch.device("cpu"), TIMEOUT_SECONDS)  # a group is there when a restore begins
    dist.barrier()
    read, began = io_bytes("rchar"), time.perf_counter()
    problem = ""
    try:
        RESTORING[contender](training, url, world)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:300]
    dist.barrier()
    seconds = time.perf_counter() - began
    read = io_bytes("rchar") - read
    return {
        "seconds": seconds,
        "rchar_bytes": read,
        "problem": problem,
        "digest": "" if problem else training.digest(),
    }


# --- files -----------------------------------------------------------------------------------------------------------


def newest(url: Path) -> Path:
    """The directory of the last checkpoint."""
    found = [path for path in url.iterdir() if path.name.isdigit() or (path / "manifest.json").exists()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-").partition("-")[0]))


def stored_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def flip_a_bit(directory: Path) -> None:
    """In the middle of the largest file, and of a tensor's bytes."""
    path = max(directory.iterdir(), key=lambda each: each.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    forget_cached([str(path)])


# --- the ranks -------------------------------------------------------------------------------------------------------


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns on so many ranks, forked from this process, which has done nothing with torch."""
    with tempfile.TemporaryDirectory() as place:
        pipes = [FORK.Pipe(duplex=False) for _ in range(ranks)]
        children = [
            FORK.Process(target=as_rank, args=(rank, ranks, place, sending, function, arguments))
            for rank, (_, sending) in enumerate(pipes)
        ]
        for child in children:
            child.start()
        for _, sending in pipes:
            sending.close()
        found = []
        for receiving, _ in pipes:
            try:
                found.append(receiving.recv())
            except EOFError:
                found.append("a rank has ended without a word")
        for child in children:
            child.join()
    if failed := next((each for each in found if isinstance(each, str)), None):
        raise SystemExit(failed)
    return found


def as_rank(
    rank: int, ranks: int, place: str, sending: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    limit = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{place}/join", rank=rank, world_size=ranks, timeout=limit)
    try:
        sending.send(function(*arguments))
    except BaseException:
        sending.send(traceback.format_exc())
    dist.barrier()
    os._exit(0)  # whatever threads there are


# --- everything ------------------------------------------------------------------------------------------------------


@contextmanager
def folder(scratch: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir=scratch))
    try:
        yield place
    finally:
        shutil.rmtree(place)
        os.sync()


def turn(contender: str, state: str, ranks: int, others: list[int], scratch: Path) -> dict[str, Any]:
    """Saved by some ranks; restored by as many, and by others; then a bit is flipped."""
    with folder(scratch) as place:
        url = str(place)
        saved = on_ranks(ranks, SAVING[contender], state, url, ranks)
        os.sync()
        digest = saved[0]["digests"][max(saved[0]["digests"])]
        found: dict[str, Any] = {
            "stored_bytes": saved[0]["stored_bytes"],
            "save": {
                key: statistics.median(max(each["saves"][number][key] for each in saved) for number in range(COUNTED))
                for key in saved[0]["saves"][0]
                if key != "fence"
            },
        }
        for other in others:
            for path in newest(place).iterdir():
                path.read_bytes()  # into the page cache
            restored = on_ranks(other, restore, contender, state, url, other)
            if problem := next((each["problem"] for each in restored if each["problem"]), ""):
                raise SystemExit(f"{contender}, {ranks} → {other}: {problem}")
            if {each["digest"] for each in restored} != {digest}:
                raise SystemExit(f"{contender}, {ranks} → {other}: restored another state than was saved")
            read = sum(each["rchar_bytes"] for each in restored)  # what comes over gloo's sockets does not count in it
            found[f"restore_{other}"] = {"seconds": max(each["seconds"] for each in restored), "read_bytes": read}
        flip_a_bit(newest(place))
        restored = on_ranks(ranks, restore, contender, state, url, ranks)
        found["flipped"] = what_became(restored, saved[0]["digests"])
    return found


def what_became(restored: list[dict[str, Any]], digests: dict[int, str]) -> str:
    """Of a checkpoint of which one bit is another."""
    if problem := next((each["problem"] for each in restored if each["problem"]), ""):
        return problem
    steps = {digest: step for step, digest in digests.items()}
    found = {steps.get(each["digest"]) for each in restored}
    if found == {max(digests)}:
        return "loads what was saved"
    if found <= set(digests):
        return "refuses it on all ranks, which go back to the checkpoint before"
    return "loads other numbers than were saved, without a word"


def tables(runs: list[dict[str, Any]]) -> str:
    """The figures, as Markdown."""
    lines = []
    for state in dict.fromkeys(run["state"] for run in runs):
        lines += [f"\n**{state}**\n", "| | harness | DCP | ratio |", "| --- | --- | --- | --- |"]
        for ranks in dict.fromkeys(run["ranks"] for run in runs if run["state"] == state):
            of = {
                contender: [
                    run for run in runs if (run["state"], run["ranks"], run["contender"]) == (state, ranks, contender)
                ]
                for contender in SAVING
            }
            rows = [
                (f"{ranks} ranks: blocked", lambda run: 1000 * run["save"]["blocked_seconds"], "ms"),
                (f"{ranks} ranks: durable (DCP: synchronous)", lambda run: run["save"]["durable_seconds"], "s"),
            ]
            for other in sorted(int(key.removeprefix("restore_")) for key in of["harness"][0] if key.startswith("restore_")):
                key = f"restore_{other}"
                rows.append((f"{ranks} → {other}: restore", lambda run, key=key: run[key]["seconds"], "s"))
                rows.append(
                    (
                        f"{ranks} → {other}: read from files, of the checkpoint",
                        lambda run, key=key: run[key]["read_bytes"] / run["stored_bytes"],
                        "times",
                    )
                )
            for name, figure, unit in rows:
                cells, medians = [], []
                for contender in SAVING:
                    values = [figure(run) for run in of[contender]]
                    medians.append(statistics.median(values))
                    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
                    cells.append(f"{medians[-1]:.3g} {unit}{spread}")
                lines.append(f"| {name} | {cells[0]} | {cells[1]} | {medians[0] / medians[1]:.2f} |")
    lines.append("\nOne bit of the newest checkpoint is flipped:\n")
    for contender in SAVING:
        words = dict.fromkeys(run["flipped"] for run in runs if run["contender"] == contender)
        lines.append(f"- {contender}: {'; '.join(words)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", default=STATES, help=f"by default {' '.join(STATES)}")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="numbers of ranks that save and restore")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds (default: {REPEATS})")
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "build/bench", help="where checkpoints are written")
    parser.add_argument("--results", type=Path, help="a file for the results")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    runs = []
    for state in arguments.states:
        for repeat in range(arguments.repeats):
            for ranks in arguments.ranks:
                for contender in list(SAVING)[:: 1 if repeat % 2 else -1]:
                    began = time.monotonic()
                    found = turn(contender, state, ranks, arguments.ranks, arguments.scratch.absolute())
                    runs.append({"contender": contender, "state": state, "ranks": ranks, "repeat": repeat, **found})
                    print(f"{time.monotonic() - began:4.0f} s  {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
    print(tables(runs))
    if arguments.results:
        about = {
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "bytes": {each: size_bytes(each) for each in arguments.states},
        }
        arguments.results.write_text(json.dumps({"machine": about, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
