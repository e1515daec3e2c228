"""How long it takes to restore a model and its optimizer from the local disk, with the files in the page cache.

    python benchmarks/restore.py [--megabytes 500 2000] [--rounds 9] [--threads 2]

The contenders restore the same AdamW-trained model, each in a fresh process that has imported everything and built the
model before its clock starts:

harness     lists the run, reads the newest checkpoint, verifies every byte, restores model and optimizer
torch.load  ``torch.load`` and two ``load_state_dict``; verifies nothing
mmap        the same with ``mmap=True``: the optimizer's state stays in the file until it is first touched
dcp         ``torch.distributed.checkpoint`` into a model and an optimizer of this process; verifies nothing

and what no restore can undercut that has all of the state in memory of its own when it ends:

floor       reads the bytes once, by as many threads, into fresh huge pages, and copies the model's third from there

``to the step`` has one optimizer step more: what was put off is paid then. They take turns, so that all see the same
machine; the ratio is that of the medians, with the quartiles of the rounds' own ratios as its spread. The last column
is the processor time, which a busy machine distorts less.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from harness.checkpoint import commit, load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.checkpoint.memory import fresh_region
from harness.checkpoint.store import open_store
from harness.state import State

WIDTH = 1024  # a layer has a million parameters: 4 MB, and 12 MB of state with AdamW's moments
CPU = torch.device("cpu")


def build(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, and an optimizer without state."""
    model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, WIDTH, WIDTH) for _ in range(layers)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step, from gradients that are there; the seconds that it took."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    return State({"model": model, "optimizer": optimizer}, CPU)


def save(place: Path, layers: int) -> None:
    """The same state in every contender's form."""
    model, optimizer = build(layers)
    step(model, optimizer)
    optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, place / "checkpoint.pt")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=place / "dcp", no_dist=True)
    parts = training_state(model, optimizer).capture()
    commit.write(open_store(str(place / "run")), parts, step=1, attempt=Attempt.after([]))


# --- the contenders --------------------------------------------------------------------------------------------------


def harness(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    catalog = Catalog(open_store(str(place / "run")))
    entry = catalog.candidates()[0]
    parts = load.read(catalog.store, entry.directory, entry.manifest)
    training_state(model, optimizer).restore(parts, entry.step)


def by_torch_load(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, mmap: bool = False) -> None:
    checkpoint = torch.load(place / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=mmap)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])


def by_mmap(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    by_torch_load(place, model, optimizer, mmap=True)


def by_dcp(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=place / "dcp", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def floor(place: Path, model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Is no restore, and leaves an optimizer without state: the least that one could do."""
    regions = {path: fresh_region(path.stat().st_size) for path in place.glob("run/step-*/*.safetensors")}

    def read(number: int, count: int) -> None:
        for path, region in regions.items():
            size_bytes, view = len(region), memoryview(region)
            stop = size_bytes * (number + 1) // count
            with path.open("rb", buffering=0) as file:
                file.seek(size_bytes * number // count)
                while file.tell() < stop:
                    file.readinto(view[file.tell() : min(file.tell() + (1 << 20), stop)])

    count = os.cpu_count() or 1
    threads = [threading.Thread(target=read, args=(number, count)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (region,) = [region for path, region in regions.items() if path.name == "model.safetensors"]
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.frombuffer(region, dtype=parameter.dtype, count=parameter.numel(), offset=start).view_as(parameter)
            )
            start += parameter.nbytes


CONTENDERS = {"harness": harness, "torch.load": by_torch_load, "mmap": by_mmap, "dcp": by_dcp, "floor": floor}


# --- the race --------------------------------------------------------------------------------------------------------


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, place: Path, layers: int, threads: int) -> dict[str, float]:
    """One restore in a process of its own."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        model, optimizer = build(layers)
        began, began_processor = time.perf_counter(), processor_seconds()
        CONTENDERS[name](place, model, optimizer)
        restored, processor = time.perf_counter() - began, processor_seconds() - began_processor
        assert name == "floor" or len(optimizer.state) == 2 * layers, "dcp restores nothing where it finds gradients"
        found = {"restore": restored, "to the step": restored + step(model, optimizer), "processor": processor}
        os.write(sender, json.dumps(found).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


def in_a_child(function, *arguments) -> None:
    child = os.fork()
    if child == 0:
        function(*arguments)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def warm(place: Path) -> None:
    """Reads every file, so that all of them lie in the page cache."""
    for path in place.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def settle(size_bytes: int) -> None:
    """Takes memory and gives it back. Else whoever comes first waits until a virtual machine's host has found some."""
    place = ctypes.c_char.from_buffer(fresh_region(size_bytes))
    ctypes.memset(ctypes.addressof(place), 1, size_bytes)


def race(place: Path, layers: int, rounds: int, threads: int) -> None:
    times: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        warm(place)
        for name in list(CONTENDERS)[:: 1 if number % 2 else -1]:
            in_a_child(settle, 2 * 12_600_000 * layers)
            times[name].append(measure(name, place, layers, threads))
    for what in ("restore", "to the step", "processor"):
        print(f"{what}, {12.6 * layers / 1000:.1f} GB")
        ours = [found[what] for found in times["harness"]]
        for name, found in times.items():
            theirs = [each[what] for each in found]
            middle = statistics.median(theirs)
            line = f"  {name:<10} {middle:7.3f} s  ({min(theirs):.3f} to {max(theirs):.3f})"
            if name != "harness":
                low, _, high = statistics.quantiles([mine / other for mine, other in zip(ours, theirs, strict=True)], n=4)
                line += f"   harness takes {statistics.median(ours) / middle:.2f} times as long  ({low:.2f} to {high:.2f})"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 2000], help="of model and optimizer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="torch's own; torchrun sets 1")
    parser.add_argument("--place", help="a directory on the disk to be measured")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # dcp warns that there is one process
    torch.set_num_threads(1)  # no threads of torch's own may be there when this process is forked
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for layers in [1, *(round(megabytes / 12.6) for megabytes in arguments.megabytes)]:
        place = Path(tempfile.mkdtemp(dir=arguments.place))
        try:
            in_a_child(save, place, layers)
            if layers == 1:  # so that everything is imported
                for contender in CONTENDERS.values():
                    contender(place, *build(1))
            else:
                race(place, layers, arguments.rounds, arguments.threads)
        finally:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
