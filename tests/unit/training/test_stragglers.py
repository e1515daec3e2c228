"""A rank that is slower than the others is named, and only such a one."""

import json
import platform
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from harness import Task
from harness.training.stragglers import Straggler, Stragglers
from tests.support.cluster import play, played, returned, train_here

SLOW_SECONDS = 0.03  # for each sample or forward pass


class Points(Dataset):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.full((2,), index / 30)


class Slow(nn.Module):
    """A layer with buffers, for which DDP makes the ranks meet before each forward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.layers(x)


def named(world, place: Path, *, in_data: float = 0, in_model: float = 0) -> list:
    """Trains on ranks of which this one may be slow; who was named, by the log of rank 0."""

    def task() -> Task:
        model = Slow(in_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Task(model=model, dataset=Points(in_data), optimizer=optimizer, loss=lambda model, x: F.mse_loss(model(x), x))

    log = place / "log.jsonl"
    train_here(
        task,
        world,
        train={"steps": 40, "global_batch_size": 6},
        log={"every_steps": 5, "jsonl": str(log)},
        stragglers={"factor": 3, "window_seconds": 0.6},
    )
    if world.rank:
        return []
    told = [json.loads(line) for line in log.read_text().splitlines()]
    return [[each["rank"], each["host"], each["seconds"]] for each in told if each["event"] == "straggler"]


def nobody(world, place: Path) -> list:
    return named(world, place, in_model=SLOW_SECONDS)


def slow_data(world, place: Path) -> list:
    return named(world, place, in_data=SLOW_SECONDS if world.rank == 2 else 0)


def slow_model(world, place: Path) -> list:
    return named(world, place, in_model=SLOW_SECONDS if world.rank == 0 else 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return played(__file__, tmp_path_factory.mktemp("ranks"), 3)


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("scenario", "rank", "seconds"), [("slow_data", 2, 2 * SLOW_SECONDS), ("slow_model", 0, SLOW_SECONDS)]
)
def test_the_slow_rank_is_named(results, scenario, rank, seconds):
    """With its host and its time, whether its data or its model is slow, though all ranks' steps last equally long."""
    found = returned(results[scenario])[0]
    assert found
    assert {(each[0], each[1]) for each in found} == {(rank, platform.node())}
    assert all(each[2] >= seconds for each in found)


@pytest.mark.torchrun
def test_nobody_is_named_where_all_are_alike(results):
    """The ranks wait for each other, and none is called slow for that."""
    assert returned(results["nobody"])[0] == []


def test_what_counts_as_slow():
    """The factor over the median of the others, where it costs the run something; the first look has nothing to compare."""
    stragglers = Stragglers(["a", "b", "c"], factor=1.5, window_seconds=10, clock=iter([0, 10, 20, 30]).__next__)
    assert stragglers.look(0, [0, 0, 0]) == []
    assert stragglers.look(10, [4, 2, 2]) == [Straggler(0, "a", 0.4, 0.2)]
    assert stragglers.look(20, [6.9, 4, 4]) == []  # 1.45 times
    assert stragglers.look(30, [7.2, 4.1, 4.1]) == []  # 3 times, and a fiftieth of the window
    assert str(Straggler(0, "a", 0.4, 0.2)) == "rank 0 on a is slow: 0.4 s of its own work in a step, the others 0.2 s"


if __name__ == "__main__":
    play([nobody, slow_data, slow_model], Path(sys.argv[1]))
