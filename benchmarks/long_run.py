"""What a long run costs: a year at a step a second, from 10^6 steps of a real ``Run``.

    python benchmarks/long_run.py [--steps 200000] [--attempts 100] [--parts 10] [--folder DIRECTORY]
    python benchmarks/long_run.py --days 365

One process trains a tiny model over a ``Loader``. A line is logged at every 10th step, and a save made at every 1800th,
which is every half an hour at a step a second. The attempts take turns at a stop, which saves, and at a death, which trains
again what was not saved. At equal parts of the steps are told: the memory of the process, the bytes and the files of the
journal and of the attempts' records, and the seconds of a step. At the end ``harness report`` and ``harness ls`` run in
processes of their own, whose peak memory is told. The last figures are those of the start of one more attempt.

With ``--days`` nothing is trained. The journal of an attempt that has taken a step a second for so long is written as it
would have been, and reported on.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from measure import memory_bytes
from torch import nn
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.errors import Stopped

BATCH, SAMPLES = 4, 4096
LOG_STEPS, SAVE_STEPS, KEEP_LAST = 10, 1800, 3


class Death(Exception):
    """The end of an attempt that nobody has asked for."""


def attempt(url: Path, until: int, total: int, *, dies: bool) -> Iterator[int]:
    """Trains to a step, and yields each on the way; the last attempt trains to the end."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loader = Loader(TensorDataset(torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))), BATCH)
    state, stop = {"model": model, "optimizer": optimizer, "loader": loader}, StopRequest()
    config = {"log": {"every_steps": LOG_STEPS}, "checkpoint": {"every_seconds": "auto"}}
    run = Run(url, state, every_steps=SAVE_STEPS, keep_last=KEEP_LAST, config=config, stop=stop)
    try:
        for _ in run.epochs(-(-total * BATCH // SAMPLES)):
            for (x,) in loader:
                optimizer.zero_grad()
                loss = (model(x) - 1).square().mean()
                loss.backward()
                optimizer.step()
                run.step(loss=loss)
                yield run.global_step
                if run.global_step >= until:
                    if dies:
                        raise Death(f"at step {run.global_step}")
                    stop.ask("the benchmark")
    except (Stopped, Death) as end:
        if isinstance(end, Death):
            run.remember_crash(end)
    finally:
        run.close()


def start(url: Path) -> float:
    """The seconds that one more attempt takes before its first step."""
    began = time.perf_counter()
    steps = attempt(url, 1 << 60, 1 << 60, dies=False)
    next(steps)
    seconds = time.perf_counter() - began
    steps.close()
    return seconds


def files(folder: Path) -> tuple[int, int]:
    """How many, and their bytes."""
    sizes = [each.stat().st_size for each in os.scandir(folder)] if folder.is_dir() else []
    return len(sizes), sum(sizes)


def tell_of_days(url: Path, days: float) -> None:
    """Puts the journal of an attempt there that has taken a step a second for so long, in the segments that it makes."""
    attempt, step = "000001-aaaaaaaa", 0
    (url / "metrics").mkdir(parents=True)
    (url / "attempts").mkdir()
    (url / f"attempts/{attempt}.json").write_text(json.dumps({"attempt": attempt, "started": "2026-01-01T00:00:00+00:00"}))
    began = datetime(2026, 1, 1, tzinfo=UTC).timestamp()

    def line(event: str, **values: float | str | list[str]) -> str:
        record = {"event": event, "time": began + step, "attempt": attempt, "step": step, **values}
        return json.dumps({**record, "uptime_seconds": float(step)}) + "\n"

    for number in range(round(days * 86400) // SAVE_STEPS):
        lines = [] if number else [line("start", directory="", lineage=[])]
        while step < (number + 1) * SAVE_STEPS:
            step += LOG_STEPS
            lines.append(line("train", loss=1 / (1 + step), lr=0.001, **{"samples/s": 3.9999999}))
        save = {
            "directory": f"step-{step:012}-{attempt}",
            "bytes": 1 << 30,
            "seconds": 1.5,
            "blocked_seconds": 0.01,
            "retries": 0,
        }
        lines += [line("saving"), line("save", **save)]
        (url / f"metrics/{attempt}-{number:06}.jsonl").write_text("".join(lines))


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_bytes("VmRSS")


def tell(url: Path, step: int, seconds: float) -> None:
    told = [f"{step:>9,} steps", f"{seconds * 1e6:6.0f} µs a step", f"{resident_bytes() / 1e6:7.1f} MB resident"]
    for name in ("metrics", "attempts"):
        count, size_bytes = files(url / name)
        told.append(f"{name} {count:5} files {size_bytes / 1e6:8.3f} MB")
    told.append(f"{sum(each.name.startswith('step-') for each in os.scandir(url))} checkpoints")
    print("   ".join(told), flush=True)


VERB = """
import sys
from harness.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def verb(*arguments: str) -> None:
    """Runs one of harness's commands, and tells its seconds and its peak memory."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", VERB, *arguments], check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    own_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak_bytes = int(done.stderr.split()[-2]) << 10
    what = " ".join([arguments[0], *(each.rpartition("/")[2] for each in arguments[2:])])
    print(f"{what:18} {seconds:7.2f} s   {own_seconds:7.2f} s of a core   {peak_bytes / 1e6:7.1f} MB at most", flush=True)


def report_on(url: Path) -> None:
    verb("report", str(url))
    verb("report", str(url), "--metrics")
    verb("report", str(url), str(url / "page.html"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200_000)
    options.add_argument("--attempts", type=int, default=100)
    options.add_argument("--parts", type=int, default=10)
    options.add_argument("--folder", help="where the run is made (default: the folder for temporary files)")
    options.add_argument("--days", type=float, help="only report on the journal of an attempt of so many days")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        url, part = Path(folder) / "run", chosen.steps // chosen.parts
        if chosen.days is not None:
            tell_of_days(url, chosen.days)
            count, size_bytes = files(url / "metrics")
            print(f"{chosen.days:g} days: {count} files {size_bytes / 1e6:.1f} MB", flush=True)
            report_on(url)
            return
        began, told, trained = time.perf_counter(), 0, 0
        for number in range(1, chosen.attempts + 1):
            until = number * chosen.steps // chosen.attempts
            for step in attempt(url, until, 2 * chosen.steps, dies=number % 2 == 0):
                trained += 1
                if step >= told + part:
                    told = step
                    tell(url, step, (time.perf_counter() - began) / trained)
                    began, trained = time.perf_counter(), 0
        report_on(url)
        verb("ls", str(url))
        print(f"{'start':18} {start(url):7.2f} s   {resident_bytes() / 1e6:7.1f} MB resident", flush=True)


if __name__ == "__main__":
    main()
