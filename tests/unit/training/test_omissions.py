"""What a loop uses and its state lacks is named at the first step that uses it; so are batches that are fetched ahead."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from harness import Loader, Run, StopRequest

SAMPLES = 12


class Parts:
    """A model and what trains it; ``run`` has those that are named."""

    def __init__(self, *names: str, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.dataset = TensorDataset(torch.randn(SAMPLES, 2))
        self.loader = Loader(self.dataset, 2)
        state = {name: getattr(self, name) for name in ("model", "optimizer", *names)}
        self.run = Run(None, state, stop=StopRequest(), config={"log": {"every_steps": None}}, **options)

    def train(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "harness.training.omissions"]


def test_what_is_in_the_state_is_not_named(caplog):
    """Nor what does nothing, nor what is a view of what is there."""
    parts = Parts("loader")
    critic, teacher = nn.Linear(1, 1), nn.Linear(2, 1)  # of no use
    frozen = copy.deepcopy(parts.model).eval()
    wrapped = nn.ModuleDict({"inner": parts.model})
    for _ in parts.run.epochs(2):
        for (x,) in parts.loader:
            teacher(x), frozen(x), wrapped["inner"](x), critic(torch.ones(1))
            parts.train(x)
            parts.run.step()
    assert warnings_of(caplog) == []


def test_an_optimizer_and_its_model(caplog):
    """Both are named, as the program calls them."""
    parts = Parts("loader")
    critic = nn.Linear(2, 1)
    critic_optimizer = torch.optim.Adam(critic.parameters())
    for _ in parts.run.epochs(1):
        for (x,) in parts.loader:
            critic(x).sum().backward()
            critic_optimizer.step()
            parts.train(x)
            parts.run.step()
    optimizer, module = warnings_of(caplog)
    assert optimizer.startswith("critic_optimizer (Adam) is used in training and is not in the run's state")
    assert module.startswith("critic (Linear) is used in training")
    assert 'state={..., "critic": critic}' in module


class Trainer:
    """Keeps its things as attributes, as many programs do."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.average = AveragedModel(parts.model)
        self.scaler = torch.amp.GradScaler("cpu")
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(parts.optimizer)

    def fit(self) -> None:
        for _ in self.parts.run.epochs(2):
            for (x,) in self.parts.loader:
                self.scaler.scale(torch.ones(1))
                self.parts.train(x)
                self.parts.run.step()
            self.average.update_parameters(self.parts.model)
            self.plateau.step(1.0)


def test_things_that_a_trainer_keeps(caplog):
    """A scaler and a schedule at the first step, an average at the end of the epoch, which is when it is first used."""
    Trainer(Parts("loader")).fit()
    found = warnings_of(caplog)
    assert {message.partition(" is ")[0] for message in found} == {
        "self.average (AveragedModel)",
        "self.scaler (GradScaler)",
        "self.plateau (ReduceLROnPlateau)",
    }
    assert len(found) == 3


def test_torchs_own_loader(caplog):
    """A restart would begin its epoch anew."""
    parts = Parts()
    train_loader = DataLoader(parts.dataset, batch_size=2)
    for _ in parts.run.epochs(1):
        for (x,) in train_loader:
            parts.train(x)
            parts.run.step()
    (found,) = warnings_of(caplog)
    assert found.startswith("train_loader (DataLoader) is not in the run's state")


def test_the_loader_of_a_validation(caplog):
    """It gives the same samples in the same order after each restart."""
    parts = Parts()
    train_loader = DataLoader(parts.dataset, batch_size=2, shuffle=True)
    valid_loader = DataLoader(parts.dataset, batch_size=2)
    for _ in parts.run.epochs(1):
        for (x,) in train_loader:
            parts.train(x)
            parts.run.step()
        assert [*valid_loader]
    (found,) = warnings_of(caplog)
    assert found.startswith("train_loader (DataLoader) is not in the run's state")


@pytest.mark.parametrize("order", ["before the forward pass", "after the forward pass", "at the end"])
def test_batches_that_are_fetched_ahead(caplog, order):
    """The position is one batch ahead of the training: a restart would skip one."""
    parts = Parts("loader")
    for _ in parts.run.epochs(1):
        batches = iter(parts.loader)
        x = next(batches)
        while x is not None:
            following = next(batches, None) if order == "before the forward pass" else None
            parts.optimizer.zero_grad()
            loss = parts.model(x[0]).square().mean()
            following = next(batches, None) if order == "after the forward pass" else following
            loss.backward()
            parts.optimizer.step()
            following = next(batches, None) if order == "at the end" else following
            parts.run.step()
            x = following
    assert any("fetched ahead" in message for message in warnings_of(caplog))


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_accumulation_is_not_fetching_ahead(caplog, batches):
    """Whether an epoch can be divided by it or not."""
    parts = Parts("loader")
    for _ in parts.run.epochs(2):
        for number, (x,) in enumerate(parts.loader, 1):
            parts.train(x)
            if number % batches == 0:
                parts.run.step()
        if number % batches:
            parts.run.step()
    assert warnings_of(caplog) == []


def test_two_steps_for_one_batch(caplog):
    """A restart goes on after the batch, and would skip the second."""
    parts = Parts("loader")
    for _ in parts.run.epochs(1):
        for (x,) in parts.loader:
            for _ in range(2):
                parts.train(x)
                parts.run.step()
    assert [message for message in warnings_of(caplog) if "called again before another batch" in message]


def test_what_follows_a_boundary_in_somebody_elses_loop(tmp_path, caplog):
    """Where nobody tells when the body of a batch has ended, ``step`` saves, and what comes after it is not in the save."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(tmp_path, state, every_steps=2, stop=StopRequest(), config={"log": {"every_steps": None}})
    for _ in run.epochs(2):
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            run.step()
            scheduler.step()
    position, change = warnings_of(caplog)
    assert position.startswith("epoch 0 was saved midway, but the state holds no position in the data")
    assert change.startswith("scheduler changed after run.step(): the checkpoint of step 2 lacks the change")


def test_a_loop_that_changes_nothing(caplog):
    """Its optimizer has the parameters of another model, or none of its steps is taken."""
    parts = Parts("loader")
    for _ in parts.run.epochs(1):
        for (x,) in parts.loader:
            parts.model(x).square().mean().backward()
            parts.run.step()
    (message,) = warnings_of(caplog)
    assert message.startswith("no parameter of model has changed in 2 steps. See that optimizer.step() is called")
