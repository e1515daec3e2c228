"""What a rank keeps on its way out, and when that counts: in the test process, with ``checkpoint.keep`` set to a directory."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.checkpoint.catalog import Catalog
from harness.data.seeding import seed_everything
from harness.storage.store import open_store


class Died(Exception):
    """In place of a peer's death."""


class Training:
    """A loop of a program's own with dropout, a schedule and a loader; ``die`` is called with the step and the place."""

    def __init__(
        self, directory: Path, steps: int = 12, *, every: int | None = 4, batchnorm: bool = False, **config
    ) -> None:
        seed_everything(0)
        norm = [nn.BatchNorm1d(16)] if batchnorm else []
        self.model = nn.Sequential(nn.Linear(4, 16), *norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        x = torch.randn(40, 4)
        self.loader = Loader(TensorDataset(x, x.sum(1, keepdim=True)), 8)
        self.steps = steps
        checkpoint = {"keep": str(directory / "keep"), **config}
        (directory / "keep").mkdir(exist_ok=True)
        self.run = Run(
            str(directory / "run"),
            {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "loader": self.loader},
            every_steps=every,
            stop=StopRequest(),
            config={"log": {"every_steps": None}, "checkpoint": checkpoint},
        )
        self.began_at = self.run.global_step

    def train(self, die=lambda *_: None) -> None:
        run = self.run
        with contextlib.closing(run):
            try:
                while run.global_step < self.steps:
                    for _ in run.epochs(1 + self.steps // 5):
                        for x, y in self.loader:
                            step = run.global_step + 1
                            die(step, "forward")
                            loss = F.mse_loss(self.model(x), y)
                            self.optimizer.zero_grad()
                            loss.backward()
                            die(step, "backward")
                            self.optimizer.step()
                            die(step, "optimizer")
                            self.scheduler.step()
                            run.step(loss=loss)
                            die(step, "boundary")
            except Died as error:
                run.remember_crash(error)
                raise


def dying(step: int, place: str, error: Exception | None = None):
    def die(now: int, where: str) -> None:
        if (now, where) == (step, place):
            raise error or Died

    return die


def digests(directory: Path) -> dict[str, str]:
    manifest = Catalog(open_store(str(directory / "run"))).newest().manifest
    return {name: part.digest for name, part in manifest.parts.items()}


def places(directory: Path) -> list[Path]:
    return sorted((directory / "keep").glob("harness-*/*"))


def test_try(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Training(tmp_path / "a").train()
    t = Training(tmp_path / "b")
    with pytest.raises(Died):
        t.train(dying(7, "backward"))
    print(places(tmp_path / "b"), [os.listdir(p) for p in places(tmp_path / "b")])
    t = Training(tmp_path / "b")
    assert t.began_at == 6
    t.train()
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert not places(tmp_path / "b")
