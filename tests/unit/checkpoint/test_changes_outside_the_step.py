"""Programs that change weights outside of ``optimizer.step()``: each checkpoint is of one step boundary all the same."""

import logging
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.checkpoint.commit import digest_of
from harness.checkpoint.saver import SaveRequest
from harness.state.modules import model_state
from tests.support.saving import saver, slow_copies

STEPS = 8


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """Copies beside the training that take so long that whatever changes the weights comes first."""
    slow_copies(monkeypatch, 0.02)


class Renormed(nn.Module):
    """Its forward pass changes a parameter, where torch's embedding does it, or by hand, in a way that no counter sees."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, max_norm=1.0 if how == "max_norm" else None)
        self.keys = nn.Linear(4, 4, bias=False)  # a momentum encoder
        self.keys.weight.requires_grad_(how != "momentum encoder")
        self.out = nn.Linear(4, 1)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            match self.how:
                case "momentum encoder":
                    self.keys.weight.mul_(0.9).add_(self.out.weight, alpha=0.1)
                case "in place":
                    self.out.weight.mul_(0.9)
                case "data":
                    self.out.weight.data.mul_(0.9)
        return self.out(self.keys(self.embedding(x)))


def train(url: Path, how: str, **checkpoint) -> dict[int, str]:
    """Saves after every step; the digest of the model at each step boundary."""
    torch.manual_seed(0)
    model = Renormed(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = Loader(TensorDataset(torch.arange(STEPS * 2) % 6), 2)
    config = {"log": {"every_steps": None}, "checkpoint": checkpoint}
    run = Run(
        url, {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=1, stop=StopRequest(), config=config
    )
    boundaries = {}
    for _ in run.epochs(1):
        for (x,) in loader:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
            boundaries[run.global_step] = digest_of(model_state(model), "model")
    run.close()
    return boundaries


def saved(url: Path) -> dict[int, str]:
    return {
        entry.step: entry.manifest.parts["model"].digest for entry in saver(str(url)).catalog.entries() if entry.manifest
    }


@pytest.mark.parametrize("how", ["nothing", "max_norm", "momentum encoder", "in place", "data"])
def test_every_checkpoint_is_that_of_its_boundary(tmp_path, caplog, how):
    """Whoever moves the weights in the next forward pass. Where that could not be known before, it is said, once."""
    boundaries = train(tmp_path, how)
    assert saved(tmp_path) == boundaries
    assert caplog.text.count("changed outside of optimizer.step()") == (how in ("in place", "data"))


def test_a_change_that_begins_later_costs_one_save(tmp_path, caplog, monkeypatch):
    """It is not committed; the next boundary is saved in its place, and from then on everything is copied at once."""
    forward = Renormed.forward

    def later(model, x):
        model.calls = getattr(model, "calls", 0) + 1
        model.how = "in place" if model.calls > 5 else "nothing"
        return forward(model, x)

    monkeypatch.setattr(Renormed, "forward", later)
    boundaries = train(tmp_path, "nothing")
    found = saved(tmp_path)
    assert found == {step: boundaries[step] for step in found}
    assert set(boundaries) - set(found) == {5}
    assert caplog.text.count("changed outside of optimizer.step()") == 1
    assert "FAILED" not in caplog.text


def test_a_torn_save_is_made_up_for_at_the_next_boundary(tmp_path, monkeypatch):
    """Whatever the interval is."""
    forward = Renormed.forward

    def later(model, x):
        model.calls = getattr(model, "calls", 0) + 1
        model.how = "in place" if model.calls == 7 else "nothing"
        return forward(model, x)

    monkeypatch.setattr(Renormed, "forward", later)
    monkeypatch.setattr("harness.training.checkpointing.PROOFS", 0)
    torch.manual_seed(0)
    model = Renormed("nothing")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, {"model": model, "optimizer": optimizer}, every_steps=6, stop=StopRequest())
    for _ in run.steps(11):
        loss = model(torch.arange(6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.1)  # until the save is over
        run.step()
    assert sorted(saved(tmp_path)) == [8, 11]


def test_weights_that_are_swapped_in_for_a_validation(tmp_path, caplog):
    """After the last batch of an epoch, while a save of an earlier step may be under way, and over the end of an epoch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = Loader(TensorDataset(torch.randn(6, 2)), 2)
    run = Run(
        tmp_path,
        {"model": model, "optimizer": optimizer, "loader": loader},
        every_steps=1,
        stop=StopRequest(),
        config={"log": {"every_steps": None}},
    )
    boundaries = {}
    for _ in run.epochs(4):
        with torch.no_grad():
            model.weight.data.mul_(2)  # as ``optimizer.train()`` of a schedule-free optimizer does
        for (x,) in loader:
            F.mse_loss(model(x), x[:, :1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            boundaries[run.global_step] = digest_of(model_state(model), "model")
        with torch.no_grad():
            model.weight.data.mul_(0.5)
        boundaries[run.global_step] = digest_of(model_state(model), "model")
    assert saved(tmp_path) == boundaries
    assert "outside" not in caplog.text


def test_a_save_that_is_torn_is_no_failure(tmp_path, caplog):
    """It says which tensors, is not counted, and nothing of it is a checkpoint."""
    caplog.set_level(logging.WARNING)
    writer = saver(str(tmp_path), failures_allowed=0)
    weight = torch.zeros(10)
    writer.begin({"model": {"weight": weight}}, SaveRequest(1, is_steady=lambda tensor: True))
    weight.add_(1)
    writer.fence()
    assert writer.wait() is None
    assert (writer.failures, writer.must_repeat) == (0, True)
    assert "weight changed outside of optimizer.step()" in caplog.text
    writer.begin({"model": {"weight": weight}}, SaveRequest(2, is_steady=lambda tensor: True))
    weight.add_(1)
    assert writer.wait().step == 2
    assert not writer.must_repeat
    assert [entry.step for entry in writer.catalog.entries() if entry.state == "whole"] == [2]
