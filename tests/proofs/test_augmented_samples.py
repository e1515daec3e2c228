"""What is trained on after a SIGKILL in the middle of an epoch: the same augmented samples, whatever workers and ranks."""

import json
import os
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from harness import Task
from tests.support.cluster import committed, held, hold, launch, newest

SAMPLES, BATCH = 28, 8  # four steps in an epoch; the last batch is a short one, and three ranks share none evenly
STEPS, EVERY, KILLED_IN = 11, 5, 6  # from the middle of the second epoch to the middle of the third


class Augmented(Dataset):
    """Points that are moved, scaled and mirrored by the three libraries that people draw augmentations with."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = torch.rand(4) + random.random()
        return (index + drawn) * float(np.random.choice([-1.0, 1.0]))


def build(place: str) -> Task:
    """Files every batch that a step was taken with; the last rank waits in one step to be killed."""
    rank = os.environ.get("RANK", "0")
    file = open(Path(place, f"stream.{rank}"), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open until the end
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    taken: list = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if scheduler.last_epoch == KILLED_IN and int(rank) == int(os.environ.get("WORLD_SIZE", "0")) - 1:
            hold(Path(place, "step"))
        taken[:] = batch.tolist()
        return model(batch).square().mean()

    optimizer.register_step_post_hook(lambda *_: file.write(json.dumps([scheduler.last_epoch, taken]) + "\n"))
    return Task(model, Augmented(), optimizer, loss, scheduler)


def config(folder: Path, workers: int = 0) -> dict:
    """The run of this file."""
    return {
        "task": f"{__file__}:build",
        "args": {"place": str(folder)},
        "train": {"steps": STEPS, "global_batch_size": BATCH},
        "data": {"workers": workers},
        "checkpoint": {"url": str(folder / "run"), "every_steps": EVERY},
    }


def stream(folder: Path, rank: int) -> list[tuple[int, list]]:
    """The steps that a rank took, in order, the repeated ones twice, each with its share of the batch."""
    return [tuple(json.loads(line)) for line in (folder / f"stream.{rank}").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[list]:
    """The batches of the run that one process trains without loader workers and without a death."""
    folder = tmp_path_factory.mktemp("whole")
    with launch(folder, config(folder)) as run:
        run.succeed()
    return [batch for _, batch in stream(folder, 0)]


def combinations() -> list:
    """Workers and ranks: the one with the most parts every time, all in ``make soak``."""
    every = [(workers, ranks) for workers in (0, 2, 4) for ranks in (1, 2, 3)]
    return [pytest.param(*each, marks=[] if each == (2, 3) else pytest.mark.soak) for each in every]


@pytest.mark.parametrize(("workers", "ranks"), combinations())
def test_a_killed_stream(tmp_path, whole, workers, ranks):
    """Each rank takes up its share where the checkpoint was; the steps that it repeats see the samples that they saw."""
    with launch(tmp_path, config(tmp_path, workers), ranks=ranks, max_restarts=3) as run:
        run.wait(lambda: held(tmp_path / "step") and EVERY in committed(tmp_path / "run"), "a step after a checkpoint")
        run.kill_rank(ranks - 1)
        run.succeed()
    assert newest(tmp_path / "run")["step"] == STEPS
    streams = [stream(tmp_path, rank) for rank in range(ranks)]
    for taken in streams:
        assert [step for step, _ in taken] == [*range(KILLED_IN), *range(EVERY, STEPS)], "one step was taken twice"
        assert taken[EVERY] == taken[KILLED_IN], "with the same samples"
    for step in range(STEPS):
        shares = [dict(taken)[step] for taken in streams]
        assert list(chain.from_iterable(shares)) == whole[step]
