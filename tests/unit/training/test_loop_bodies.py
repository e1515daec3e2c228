"""What a loop does after a step and after an epoch's last batch is in the checkpoint: once, whatever dies when."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from harness import Loader, Run, StopRequest
from harness.data.seeding import seed_everything
from harness.errors import Stopped
from tests.support.cluster import newest

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
SAMPLES, BATCH, EPOCHS = 10, 4, 3  # three steps an epoch


class DiedError(Exception):
    """Ends a program in the middle, as a kill does: nothing that it has not saved counts."""


class History:
    """What a program notes down for itself."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict:
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict) -> None:
        self.values = list(state["values"])


class Program:
    """What the loops below share. ``tick`` is called at each place where a program can die."""

    def __init__(
        self, url: Path, loop: Callable, *, die_at: int | None = None, stop_at: int | None = None, **options
    ) -> None:
        seed_everything(3)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.9, patience=0)
        self.average = AveragedModel(self.model)
        self.history = History()
        data = TensorDataset(torch.randn(SAMPLES, 2))
        self.loader: Any = Loader(data, BATCH, seed=3)
        self.judging = StatefulDataLoader(data, 5)
        if loop is loads_with_torchdata:
            self.loader = StatefulDataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))
        self.validation = torch.randn(6, 2)
        self.ticks, self.die_at, self.stop_at = 0, die_at, stop_at
        self.stop = StopRequest()
        state = {
            name: getattr(self, name)
            for name in ("model", "optimizer", "scheduler", "plateau", "average", "history", "judging")
        }
        config = {"log": {"every_steps": None}, **options.pop("config", {})}
        self.run = Run(url, {**state, "loader": self.loader}, config=config, stop=self.stop, **options)

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks == self.die_at:
            raise DiedError
        if self.ticks == self.stop_at:
            self.stop.ask("a bell")

    def train(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def judge(self) -> None:
        """With dropout and batch statistics, which changes the model."""
        self.history.values.append(sum(float(self.model(y).sum()) for (y,) in self.judging))

    def validate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = float(self.model(self.validation).square().mean() + torch.rand(()))
        self.model.train()
        return loss


def steps_at_the_end_of_an_epoch(program: Program) -> None:
    """torch's own tutorials: the schedule, a validation that draws random numbers, a history."""
    for _epoch in program.run.epochs(EPOCHS):
        for (x,) in program.loader:
            loss = program.train(x)
            program.tick()
            program.run.step(loss=loss)
        assert loss.isfinite()
        program.tick()
        program.scheduler.step()
        value = program.validate()
        program.plateau.step(value)
        program.tick()
        program.history.values.append(value)


def steps_after_a_boundary(program: Program) -> None:
    """The schedule and the average follow ``run.step()`` in each batch."""
    for _epoch in program.run.epochs(EPOCHS):
        for (x,) in program.loader:
            program.run.step(loss=program.train(x))
            program.tick()
            program.scheduler.step()
            program.average.update_parameters(program.model)
            program.history.values.append(float(torch.rand(())))


def steps_by_number(program: Program) -> None:
    """A loop over steps that fetches for itself."""
    batches = iter(program.loader)
    for step in program.run.steps(EPOCHS * 3):
        batch = next(batches, None)
        if batch is None:
            batches = iter(program.loader)
            batch = next(batches)
        loss = program.train(batch[0])
        program.run.step(loss=loss)
        program.tick()
        program.scheduler.step()
        if step % 2:
            program.history.values.append(program.validate())


def swaps_weights(program: Program) -> None:
    """Validates with averaged weights, and leaves them in the model over the end of every other epoch."""
    for epoch in program.run.epochs(EPOCHS):
        for (x,) in program.loader:
            program.train(x)
            program.average.update_parameters(program.model)
            program.run.step()
            program.tick()
        kept = copy.deepcopy(program.model.state_dict())
        program.model.load_state_dict(program.average.module.state_dict())
        program.history.values.append(program.validate())
        program.tick()
        if epoch % 2:
            program.model.load_state_dict(kept)


def leaves_epochs_early(program: Program) -> None:
    """Two batches of three, and then what belongs to the end of an epoch."""
    for _epoch in program.run.epochs(EPOCHS):
        for (x,) in program.loader:
            program.train(x)
            program.run.step()
            program.tick()
            if program.loader.cursor.offset == 2 * BATCH:
                break
        program.scheduler.step()
        program.tick()


def accumulates_with_a_rest(program: Program) -> None:
    """A step of the optimizer for two batches; what is left of an epoch gets one of its own."""
    for _epoch in program.run.epochs(EPOCHS):
        program.optimizer.zero_grad()
        waiting = 0
        for (x,) in program.loader:
            program.model(x).square().mean().backward()
            waiting += 1
            if waiting == 2:
                waiting = 0
                program.optimizer.step()
                program.optimizer.zero_grad()
                program.run.step()
                program.tick()
        if waiting:
            program.optimizer.step()
            program.run.step()
            program.tick()
        program.scheduler.step()
        program.tick()


def loads_with_torchdata(program: Program) -> None:
    """And judges with it, in the middle of an epoch and at its end; the schedule follows ``run.step()``."""
    for _epoch in program.run.epochs(EPOCHS):
        for (x,) in program.loader:
            loss = program.train(x)
            program.run.step(loss=loss)
            program.tick()
            program.scheduler.step()
            if program.run.global_step % 3 == 2:
                program.judge()
        assert loss.isfinite()
        program.judge()
        program.tick()
        program.plateau.step(program.validate())


LOOPS = [
    loads_with_torchdata,
    steps_at_the_end_of_an_epoch,
    steps_after_a_boundary,
    steps_by_number,
    swaps_weights,
    leaves_epochs_early,
    accumulates_with_a_rest,
]


def final(url: Path) -> dict:
    found = newest(url)
    return {"step": found["step"], **found["digests"]}


def loops_and_intervals() -> list[Any]:
    """The first loops with both intervals, of the others each with one; the rest is for `make soak`."""
    both, often, seldom = LOOPS[:3], {"every_steps": 2}, {"every_epochs": 1}
    others = [(loop, (often, seldom)[number % 2], (seldom, often)[number % 2]) for number, loop in enumerate(LOOPS[3:])]
    cases = [
        *((loop, interval, []) for loop in both for interval in (often, seldom)),
        *((loop, one, []) for loop, one, _ in others),
        *((loop, other, [pytest.mark.soak]) for loop, _, other in others),
    ]
    return [pytest.param(loop, interval, id=f"{loop.__name__}-{interval}", marks=marks) for loop, interval, marks in cases]


@pytest.mark.parametrize(("loop", "interval"), loops_and_intervals())
def test_whatever_dies_when_the_end_has_the_same_bits(tmp_path, loop, interval):
    """Of weights, moments, schedules, averages and histories: each end of a batch and of an epoch counts once."""
    straight = Program(tmp_path / "straight", loop)
    loop(straight)
    for die_at in range(4, straight.ticks + 1, max(straight.ticks // 3, 2)):
        url = tmp_path / f"died-{die_at}"
        with pytest.raises(DiedError):
            loop(dying := Program(url, loop, die_at=die_at, **interval))
        dying.run.close()
        loop(Program(url, loop, **interval))
        assert final(url) == final(tmp_path / "straight"), die_at


@pytest.mark.parametrize("stop_at", [2, 5, 6, 7])
@pytest.mark.parametrize("loop", LOOPS[:3], ids=lambda loop: loop.__name__)
def test_a_stop_waits_for_the_end_of_the_body(tmp_path, loop, stop_at):
    """Then all is saved, and a new start does nothing twice."""
    loop(Program(tmp_path / "straight", loop))
    with pytest.raises(Stopped):
        loop(Program(tmp_path / "stopped", loop, stop_at=stop_at))
    loop(Program(tmp_path / "stopped", loop))
    assert final(tmp_path / "stopped") == final(tmp_path / "straight")
