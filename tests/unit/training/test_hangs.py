"""A run that hangs, in whatever it may hang in, tells where all ranks are, ends, and goes on: one run, three hangs."""

import contextlib
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from harness import Task
from harness.runtime.environment import rank
from harness.storage.store import open_store
from tests.support import servers
from tests.support.cluster import Run, alive, held, hold, launch


def hang_once(place: Path) -> None:
    """Waits on rank 1, if the test wants it, in the first process that comes here."""
    if rank() == 1 and place.with_suffix(".wanted").exists() and not held(place):
        place.with_suffix(".pid").write_text(str(os.getpid()))
        hold(place)


class Points(Dataset):
    """Samples of which one may take for ever."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        hang_once(self.place / "sample")
        return torch.full((2,), index / 64)


def build(place: str) -> Task:
    """Rank 1 may hang in its loss; then rank 0 waits for it in a collective."""
    model = nn.Linear(2, 2)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        hang_once(Path(place) / "loss")
        return F.mse_loss(model(batch), batch)

    return Task(model, Points(Path(place)), torch.optim.SGD(model.parameters(), lr=0.01), loss)


def config(url: str, storage_options: dict, place: Path) -> dict:
    return {
        "task": f"{__file__}:build",
        "args": {"place": str(place)},
        "train": {"steps": 10**6, "global_batch_size": 4},
        "data": {"workers": 1},
        "checkpoint": {"url": url, "storage_options": storage_options, "every_steps": 20, "keep_last": 1},
        # A start that hangs by itself is told of before the test gives up.
        "watchdog": {"timeout_seconds": 4, "first_step_seconds": 60},
    }


def stacks(run: Run) -> list[str]:
    """What the watchdogs have written to stderr, each up to the next."""
    return re.split(r"harness: no step has ended within its time", run.output())[1:]


@pytest.mark.torchrun
def test_hangs_are_told_of_and_survived(tmp_path):
    """A step in which a collective has to wait, a loader that gives nothing, a storage server that answers no more: the
    stacks of every rank go to stderr and, where it can be reached, to the run's URL; torchrun starts all ranks again."""
    with servers.seaweedfs(tmp_path) as server, contextlib.ExitStack() as stack:
        url = server.url("hangs")
        settings = config(url, server.storage_options, tmp_path)
        run = stack.enter_context(launch(tmp_path, settings, ranks=2, max_restarts=3))
        run.wait_for("save")

        (tmp_path / "loss.wanted").touch()
        run.wait_for("resume", attempt=2)
        first, second = stacks(run)
        assert ["in loss" in first, "in loss" in second].count(True) == 1, run.output()
        assert ["in accumulate" in first, "in accumulate" in second].count(True) == 2, run.output()

        run.wait_for("train", attempt=2)
        (tmp_path / "sample.wanted").touch()
        run.wait(lambda: held(tmp_path / "sample"), "the loader's worker to hang")
        run.wait_for("resume", attempt=3)
        third, fourth = stacks(run)[2:]
        assert ["in next_step" in third, "in next_step" in fourth].count(True) == 1, run.output()
        assert not alive(int((tmp_path / "sample.pid").read_text())), "the worker has ended with its rank"

        run.wait_for("save", attempt=3)
        with server.frozen():
            run.wait(lambda: len(stacks(run)) == 6, "two more reports")
            assert any("in _at_end_of_body" in text for text in stacks(run)[4:]), run.output()
        resumed = run.wait_for("resume", attempt=4)
        run.wait_for("save", step=resumed["step"] + 1, attempt=4)
        run.kill()
        written = sorted(open_store(url, server.storage_options).list("hangs"))
        assert [sum(name.endswith(f"rank-{rank}.txt") for name in written) for rank in (0, 1)] >= [2, 2], written
