"""How long a run stands still when a rank is killed: from SIGKILL to the next finished optimizer step, under torchrun.

    python benchmarks/restart.py [--rounds 5] [--kills 3] [--layers 12]

Two contenders train the same model on two ranks and load the same state after each kill: ``harness train``, which verifies
every byte, compares the ranks and claims an attempt, and the script that one writes by hand (``bare`` below): DDP,
``torch.save`` over the only file, ``torch.load`` and two ``load_state_dict``. They take turns, so that both see the same
machine; each round is a fresh torchrun in which rank 1 is killed several times. The ratio is that of the medians, with the
smallest and largest ratio of the rounds' medians as its spread.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RANKS = 2
SAVE_EVERY_STEPS = 10
MOST_STEPS = 10**6
WIDTH = 1024  # a layer has a million parameters: 4 MB, and 12 MB of state with AdamW's moments


def build(layers: int, steps_file: str):
    """A task for harness, and what the bare script trains."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    samples = torch.randn(64, WIDTH)
    if os.environ["RANK"] == "0":  # one line for each finished step
        log = open(steps_file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # as long as the process lives
        optimizer.register_step_post_hook(lambda *_: log.write(f"{os.getpid()} {time.time()}\n"))

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[0])

    from harness import Task

    return Task(model=model, dataset=TensorDataset(samples), optimizer=optimizer, loss=loss)


def bare(layers: int, folder: str) -> None:
    """The loop that one writes by hand."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    samples = torch.randn(64, WIDTH)
    path, step = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    wrapped = nn.parallel.DistributedDataParallel(model)
    log = open(Path(folder, "steps"), "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    while step < MOST_STEPS:
        batch = samples[(step * 8 + dist.get_rank() * 4) % 64 :][:4]
        nn.functional.mse_loss(wrapped(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if dist.get_rank() == 0:
            log.write(f"{os.getpid()} {time.time()}\n")
            if step % SAVE_EVERY_STEPS == 0:
                partial = path.with_suffix(".partial")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
                partial.replace(path)


@contextmanager
def training(name: str, layers: int, folder: Path) -> Iterator[None]:
    """A contender at work under torchrun."""
    steps = str(folder / "steps")
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            {
                "task": f"{__file__}:build",
                "args": {"layers": layers, "steps_file": steps},
                "train": {"steps": MOST_STEPS, "global_batch_size": 8},
                "checkpoint": {"url": str(folder / "run"), "every_steps": SAVE_EVERY_STEPS, "keep_last": 1},
            }
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    mine = ["-m", "harness", "train", str(config)]
    by_hand = [__file__, "--bare", str(folder), "--layers", str(layers)]
    # Without the second one a restart of torch 2.13 may call at a dead rank's address, and burn another: for both the best.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "output").open("wb") as output:
        command = [*torchrun, "--max-restarts=100", *(mine if name == "harness" else by_hand)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield
        finally:
            pids = [process.pid, *workers(process.pid)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def workers(agent: int) -> list[int]:
    """The ranks' processes, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def finished_steps(folder: Path) -> list[tuple[int, float]]:
    """The process and the time of every step of rank 0."""
    path = folder / "steps"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(int(pid), float(when)) for pid, when in (line.split() for line in lines if line.endswith("\n"))]


def wait_for_steps(folder: Path, count: int, after_time: float) -> list[tuple[int, float]]:
    """The steps after a time, once there are so many by processes that began after it."""
    old = {pid for pid, when in finished_steps(folder) if when < after_time}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [(pid, when) for pid, when in finished_steps(folder) if pid not in old]
        if len(steps) >= count:
            return steps
        time.sleep(0.01)
    raise SystemExit(f"no steps within two minutes; it said:\n{(folder / 'output').read_text()[-3000:]}")


def one_round(name: str, layers: int, kills: int) -> list[float]:
    """The seconds from each kill to the next step."""
    with tempfile.TemporaryDirectory() as place, training(name, layers, Path(place)):
        folder, seconds = Path(place), []
        steps = wait_for_steps(folder, SAVE_EVERY_STEPS + 2, 0.0)
        for _ in range(kills):
            rank_0 = steps[-1][0]
            parent = int(Path(f"/proc/{rank_0}/stat").read_text().rpartition(")")[2].split()[1])
            (rank_1,) = [pid for pid in workers(parent) if pid != rank_0]
            killed_time = time.time()
            os.kill(rank_1, signal.SIGKILL)
            steps = wait_for_steps(folder, SAVE_EVERY_STEPS + 2, killed_time)
            seconds.append(steps[0][1] - killed_time)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3, help="in each round")
    parser.add_argument("--layers", type=int, default=12, help="12 MB of state each")
    parser.add_argument("--bare", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.layers, arguments.bare)
        return
    medians: dict[str, list[float]] = {"bare": [], "harness": []}
    everything: dict[str, list[float]] = {"bare": [], "harness": []}
    for index in range(arguments.rounds):
        for name in ("bare", "harness") if index % 2 else ("harness", "bare"):
            seconds = one_round(name, arguments.layers, arguments.kills)
            print(f"round {index + 1}  {name:<8}", "  ".join(f"{value:.2f} s" for value in seconds), flush=True)
            medians[name].append(statistics.median(seconds))
            everything[name] += seconds
    ratios = [mine / theirs for mine, theirs in zip(medians["harness"], medians["bare"], strict=True)]
    ratio = statistics.median(everything["harness"]) / statistics.median(everything["bare"])
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {12 * arguments.layers} MB of state")
    for name, values in everything.items():
        print(f"{name:<8} median {statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")
    print(f"ratio    {ratio:.2f}  (rounds: {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
