"""What harness costs a step: the same loop with and without it, for an empty model and for a step of about 10 ms.

    torchrun --standalone --nproc-per-node=2 benchmarks/step.py [--rounds 5] [--steps 2000]

Three loops train the same model in DDP over the same number of batches of a ``TensorDataset``: one in plain torch (sampler,
loader), one with a ``Run`` and its ``Loader`` added to it, and that of ``harness train``, which also divides the batch among
unequal shares, looks for losses and gradients that are not finite, and casts. Each round times each loop once, in an order
that turns; what is told are the medians of the rounds' mean steps, and of the differences within a round, with their spread.
Nothing is saved: what saving costs is in ``checkpoint.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from harness import Loader, Run, StopRequest, Task
from harness.config import Config
from harness.distributed.world import TorchrunWorld, World
from harness.training.loop import train

BATCH = 8


class Empty(nn.Module):
    """One parameter, one addition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class TenMilliseconds(Empty):
    """The same, and nothing else for 10 ms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:
            pass
        return super().forward(x)


def dataset(steps: int) -> TensorDataset:
    return TensorDataset(torch.ones(steps * BATCH * dist.get_world_size(), 1))


def bare(build: Callable[[], nn.Module], _world: World, steps: int) -> float:
    data = dataset(steps)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data))
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began = time.perf_counter()
    for (x,) in loader:
        loss = model(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - began) / steps


def with_run(build: Callable[[], nn.Module], world: World, steps: int) -> float:
    loader = Loader(dataset(steps), BATCH * world.size)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    run = Run(None, state, world=world, stop=StopRequest())
    for _ in run.epochs(1):
        began = time.perf_counter()
        for (x,) in loader:
            loss = model(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
        seconds = time.perf_counter() - began
    return seconds / steps


def with_task(build: Callable[[], nn.Module], world: World, steps: int) -> float:
    times: list[float] = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        times.append(time.perf_counter())
        return model(batch[0]).mean()

    model = build()
    task = Task(model, dataset(steps), torch.optim.SGD(model.parameters(), lr=0.1), loss)
    config = Config.model_validate({"task": "a:b", "train": {"steps": steps, "global_batch_size": BATCH * world.size}})
    train(config, task, world, StopRequest())
    return (times[-1] - times[0]) / (len(times) - 1)


LOOPS = {"bare": bare, "Run": with_run, "harness train": with_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = TorchrunWorld(torch.device("cpu"), "gloo", 600)
    for name, build, steps in (("empty model", Empty, options.steps), ("10 ms", TenMilliseconds, options.steps // 20)):
        found: dict[str, list[float]] = {loop: [] for loop in LOOPS}
        for number in range(options.rounds):
            names = list(LOOPS)
            for loop in names[number % 3 :] + names[: number % 3]:
                found[loop].append(LOOPS[loop](build, world, steps))
        if world.rank == 0:
            print(f"{name}: bare {statistics.median(found['bare']) * 1e6:.0f} µs a step")
            for loop in list(LOOPS)[1:]:
                added = [(own - plain) * 1e6 for own, plain in zip(found[loop], found["bare"], strict=True)]
                print(f"  {loop}: {statistics.median(added):+.0f} µs ({min(added):+.0f} to {max(added):+.0f})")
    world.close()


if __name__ == "__main__":
    main()
