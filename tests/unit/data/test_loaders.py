"""Loaders of torch's kind: which order they give after a resume, and what a run says of those that it does not have."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from harness import Loader, Run, StopRequest
from harness.data.loaders import with_single_samples
from harness.errors import ConfigError, Mismatch
from harness.state.capture import State
from harness.state.parts import TRAINING

stateful = pytest.importorskip("torchdata.stateful_dataloader")

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata calls it
]

SAMPLES = 23
DATA = TensorDataset(torch.arange(SAMPLES))
WEIGHTS = torch.arange(1.0, SAMPLES + 1)


class Drawn(Sampler[int]):
    """A sampler of the program's own without a state, which draws all at once or one by one, from wherever it is told."""

    def __init__(self, source: str, *, at_once: bool) -> None:
        self.source, self.at_once = source, at_once
        self.own = {"torch": torch.Generator().manual_seed(3), "numpy": np.random.default_rng(3), "python": random.Random(3)}
        vars(self).update(self.own)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        drawn = (self.draw() for _ in range(SAMPLES))
        return iter(list(drawn)) if self.at_once else drawn

    def draw(self) -> int:
        match self.source:
            case "process":
                return (int(torch.randint(7, ())) + np.random.randint(7) + random.randrange(7)) % SAMPLES
            case "torch":
                return int(torch.randint(SAMPLES, (), generator=self.own["torch"]))
            case "numpy":
                return int(self.own["numpy"].integers(SAMPLES))
        return self.own["python"].randrange(SAMPLES)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "shuffle": lambda: {"shuffle": True},
    "shuffle from a generator": lambda: {"shuffle": True, "generator": seeded()},
    "random": lambda: {"sampler": RandomSampler(DATA)},
    "random from a generator": lambda: {"sampler": RandomSampler(DATA, generator=seeded())},
    "random with replacement": lambda: {"sampler": RandomSampler(DATA, replacement=True, num_samples=70)},
    "torchdata's random": lambda: {"sampler": stateful.sampler.RandomSampler(DATA, generator=seeded())},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(0, SAMPLES, 2))},
    "weighted": lambda: {"sampler": WeightedRandomSampler(WEIGHTS, 30)},
    "weighted batches": lambda: {"batch_sampler": BatchSampler(WeightedRandomSampler(WEIGHTS, 30), 4, drop_last=False)},
    "whole batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(DATA, generator=seeded()), 4, drop_last=True)},
    "distributed": lambda: {"sampler": DistributedSampler(DATA, 2, 1)},
    "torchdata's distributed": lambda: {"sampler": stateful.sampler.StatefulDistributedSampler(DATA, 2, 1)},
    "own, numpy": lambda: {"sampler": Drawn("numpy", at_once=False)},
    "own, python": lambda: {"sampler": Drawn("python", at_once=True)},
    "own, torch": lambda: {"sampler": Drawn("torch", at_once=True)},
    "own, of the process": lambda: {"sampler": Drawn("process", at_once=True)},
    "own batches": lambda: {"batch_sampler": BatchSampler(Drawn("torch", at_once=True), 4, drop_last=False)},
}


class Walk:
    """A loop over a loader, as a program has it; it draws numbers of its own, too, in each step and before all."""

    def __init__(self, kind: str, workers: int, *, persistent: bool = False) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        options = LOADERS[kind]()
        size = {} if "batch_sampler" in options else {"batch_size": 4}
        self.loader = stateful.StatefulDataLoader(
            DATA, num_workers=workers, persistent_workers=persistent and workers > 0, **size, **options
        )
        self.state = State({"loader": self.loader}, torch.device("cpu"))

    def go(self, epoch: int, epochs: int, until: int | None = None) -> list[tuple[int, list[int]]]:
        """What it is given, from an epoch on or until so many batches have come."""
        found: list[tuple[int, list[int]]] = []
        for number in range(epoch, epochs):
            if hasattr(self.loader.sampler, "set_epoch"):
                self.loader.sampler.set_epoch(number)
            for (batch,) in self.loader:
                found.append((number, batch.tolist()))
                torch.rand(3), np.random.rand(), random.random()
                if len(found) == until:
                    return found
        return found

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy(self.state.capture_rank(0))

    def restore(self, saved: dict[str, Any]) -> None:
        self.state.restore({"loader": {"0": saved["loader"]}, TRAINING: self.state.capture()[TRAINING]}, 1)
        random_state = saved["random"]
        torch.set_rng_state(random_state["torch"])
        np.random.set_state(random_state["numpy"])
        words = random_state["python"]
        random.setstate((words["version"], tuple(words["words"].tolist()), words["gauss"]))


def assert_goes_on(kind: str, workers: int, deaths: Callable[[int], list[int]], *, persistent: bool = False) -> None:
    """After each of some deaths the loader gives what it would have given."""
    straight = Walk(kind, workers, persistent=persistent).go(0, 3)
    per_epoch = sum(epoch == 0 for epoch, _ in straight)
    assert straight[:per_epoch] != straight[per_epoch : 2 * per_epoch], "epochs have orders of their own"
    for until in deaths(per_epoch):
        first = Walk(kind, workers, persistent=persistent)
        taken, saved = first.go(0, 3, until), first.saved()
        second = Walk(kind, workers, persistent=persistent)
        second.restore(saved)
        assert taken + second.go(taken[-1][0], 3) == straight, f"after {until} batches of {per_epoch} an epoch"


@pytest.mark.parametrize("kind", list(LOADERS))
def test_every_sampler_goes_on(kind):
    """Whatever draws the order of an epoch, a resume goes on in it: within each epoch, and at its end."""
    assert_goes_on(kind, 0, lambda epoch: [2, epoch, epoch + 2, 2 * epoch, 2 * epoch + 1])


@pytest.mark.parametrize("kind", ["weighted", "own, torch", "shuffle from a generator"])
def test_with_workers_too(kind):
    """They are sent indices ahead of what the loop has got."""
    assert_goes_on(kind, 2, lambda epoch: [epoch + 2])


def test_with_workers_that_stay():
    """From the second epoch on their order is drawn in another place."""
    assert_goes_on("own, torch", 2, lambda epoch: [epoch + 2], persistent=True)


def test_an_older_checkpoint():
    """It says nothing of generators; the position counts as ever."""
    first = Walk("torchdata's random", 0)
    taken, saved = first.go(0, 3, 2), first.saved()
    del saved["loader"]["generators"]
    second = Walk("torchdata's random", 0)
    second.restore(saved)
    assert taken + second.go(0, 1) == Walk("torchdata's random", 0).go(0, 1)


def test_another_sampler_is_refused():
    """Its generators would be set to nothing, and those that were saved would be lost."""
    first = Walk("subset", 0)
    first.go(0, 1, 2)
    with pytest.raises(Mismatch, match=r"loader: only the run draws from numpy; use the samplers that the run began with"):
        Walk("own, of the process", 0).restore(first.saved())


@pytest.mark.parametrize("is_called", [True, False])
def test_a_sampler_that_nobody_tells_the_epoch(caplog, is_called):
    """Every epoch would have the order of the first one."""
    walk = Walk("distributed", 0)
    for epoch in range(3):
        if is_called:
            walk.loader.sampler.set_epoch(epoch)
        for _ in walk.loader:
            pass
    assert ("sampler repeats the order of the epoch before; call its set_epoch(epoch)" in caplog.text) != is_called


# --- what is not in the state ----------------------------------------------------------------------------------------


def script(url, state: dict[str, Any] | None = None, **options) -> Run:
    model = nn.Linear(1, 1)
    quiet = {"log": {"every_steps": None}, "checkpoint": {"mode": "sync"}}
    return Run(url, {"model": model, **(state or {})}, config=quiet, stop=StopRequest(), **options)


def test_a_stock_loader_beside_a_run(tmp_path, caplog):
    """A resume would walk through the interrupted epoch again: it is told once, at the first step."""
    run, loader = script(tmp_path), DataLoader(DATA, 4, shuffle=True)
    for _ in run.epochs(2):
        for _ in loader:
            run.step()
    assert caplog.text.count("loader (DataLoader) is not in the run's state") == 1
    assert "put the loader into the state (harness.Loader, or torchdata's StatefulDataLoader)" in caplog.text


def test_a_loader_that_the_state_has(tmp_path, caplog):
    """Another one, that judges a model, is nobody's business."""
    judging = DataLoader(DATA, 4)
    own = stateful.StatefulDataLoader(DATA, 4)
    run = script(tmp_path, {"loader": own}, every_steps=1)
    for _ in run.epochs(1):
        for _ in own:
            run.step()
        assert list(judging)
    assert "DataLoader" not in caplog.text
    assert "in its middle" not in caplog.text


@pytest.mark.parametrize("every", [{"every_steps": 3}, {"every_epochs": 1}])
def test_an_epoch_without_any_loader(tmp_path, caplog, every):
    """A save in its middle says that a resume begins it anew; one at its end is right."""
    run = script(tmp_path, **every)
    for _ in run.epochs(2):
        for _ in range(5):
            run.step()
    found = caplog.text.count("was saved midway, but the state holds no position in the data")
    assert found == ("every_steps" in every)


def test_a_batch_that_is_fetched_ahead(tmp_path, caplog):
    """It counts as trained when the step before it is saved."""
    loader = Loader(DATA, 4)
    run = script(tmp_path, {"loader": loader})
    batches = iter(loader)
    batch = next(batches)
    for _ in run.steps(4):
        assert batch is not None
        batch = next(batches)
        run.step()
    assert caplog.text.count("batches seem to be fetched ahead") == 1


@pytest.mark.parametrize(("accumulated", "epochs"), [(1, 2), (2, 2), (4, 3)])
def test_batches_that_are_accumulated(tmp_path, caplog, accumulated, epochs):
    """That is not ahead, also where an epoch leaves some over."""
    loader = Loader(DATA, 4)
    run = script(tmp_path, {"loader": loader})
    for _ in run.epochs(epochs):
        for _ in loader:
            if (loader.batch + 1) % accumulated == 0 or loader.batch + 1 == len(loader):
                run.step()
    assert "fetched ahead" not in caplog.text


@pytest.mark.parametrize(
    ("norm", "batch", "options", "told"),
    [
        (nn.BatchNorm1d(1), 11, {}, True),  # 23 = 11 + 11 + 1
        (nn.BatchNorm1d(1), 11, {"drop_last": True}, False),
        (nn.BatchNorm1d(1), 10, {}, False),  # 3 are left
        (nn.BatchNorm1d(1), 10, {"rank": 0, "world_size": 4}, True),  # one rank has none of the 3, and goes along with one
        (nn.BatchNorm1d(1), 10, {"micro_batch_size": 3}, True),  # 10 = 3 + 3 + 3 + 1
        (nn.BatchNorm1d(1).eval(), 11, {}, False),
        (nn.LayerNorm(1), 11, {}, False),
        (nn.SyncBatchNorm(1), 11, {}, False),
    ],
)
def test_a_batch_norm_and_a_single_sample(norm, batch, options, told):
    """It dies in an epoch's last batch."""
    model = nn.Sequential(nn.Linear(1, 1), norm)
    assert with_single_samples(Loader(DATA, batch, **options), [("model", model)]) == ("model" if told else None)


def test_that_is_told_at_the_first_step(tmp_path, caplog):
    """While there is time to act."""
    loader = Loader(DATA, 11)
    run = script(tmp_path, {"norm": nn.BatchNorm1d(1), "loader": loader})
    for _ in run.steps(1):
        next(iter(loader))
        run.step()
    assert "on which a batch norm cannot train (norm): set drop_last (train.drop_last)" in caplog.text


class Endless(IterableDataset):
    """A stream without a position."""

    def __iter__(self):
        return iter(torch.arange(400.0))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_a_position_is_refused(tmp_path, workers):
    """torchdata counts wrong after a second restart of such a one: it would go on with other samples, and say nothing."""
    loader = stateful.StatefulDataLoader(Endless(), batch_size=4, num_workers=workers)
    run = Run(str(tmp_path), {"model": nn.Linear(1, 1), "loader": loader}, every_steps=2, stop=StopRequest())
    batches = iter(loader)
    with pytest.raises(ConfigError, match="loader: Endless is iterable and has no state_dict"):
        for _ in run.steps(5):
            next(batches)
            run.step()
    run.close()
