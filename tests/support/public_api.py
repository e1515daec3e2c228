"""The public interface as a program of a user's has it: mypy reads it (``make check``), and ``test_public_api`` runs it.

What does not type-check here does not in a user's program either.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import harness


def build(lr: float = 0.1) -> harness.Task:
    """A task as ``harness train`` builds it, with an evaluation."""
    model = nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 16).unsqueeze(1)
    dataset = TensorDataset(x, 3 * x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def measure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": loss(model, batch)}

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    evaluation = harness.Evaluation(dataset, measure, metric="loss")
    return harness.Task(model, dataset, optimizer, loss, scheduler=scheduler, evaluation=evaluation)


class Average:
    """A user's object with a state."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = float(state["value"])


def train(url: str, epochs: int = 2, stop: harness.StopRequest | None = None) -> tuple[float, int]:
    """A loop of a user's own; the average loss, and the step at the end."""
    torch.manual_seed(0)
    task, average = build(), Average()
    optimizer, scheduler = task.optimizer_and_scheduler()
    loader = harness.Loader(task.dataset, global_batch_size=4, seed=1)
    state = {
        "model": task.model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "average": average,
    }
    run = harness.Run(url, state, every_steps=2, keep_last=2, stop=stop)
    for _epoch in run.epochs(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            average.value = 0.9 * average.value + 0.1 * loss.item()
            run.step(loss=loss)
    run.close()
    return average.value, run.global_step


def without_a_run(url: str) -> Iterator[str]:
    """Checkpoints of one's own: save, find the newest, load it."""
    directory: str = harness.save(url, {"weights": {"a": torch.arange(3)}, "notes": {"list": ["x", 1, None]}}, step=1)
    yield directory
    newest: int | None = harness.latest(url)
    if newest is not None:
        loaded: dict[str, Any] = harness.load(url, step=newest)
        yield from sorted(loaded)
    with harness.Checkpointer(url, keep_last=2) as checkpoints:
        checkpoints.begin({"weights": {"a": torch.arange(3)}}, step=2, meta={"note": "beside the program"})
        saved = checkpoints.wait()
        assert saved is None or saved.seconds >= saved.blocked_seconds


def who() -> tuple[int, int, torch.device]:
    """The ranks, and how what goes wrong is caught."""
    try:
        world = harness.join_world()
    except harness.HarnessError as error:
        raise SystemExit(error.exit_code) from error
    schedule = harness.Schedule(samples=10, seed=0, global_batch_size=4, micro_batch_size=None)
    assert len(schedule.order(0)) == schedule.samples
    before = harness.random_state(world.device)
    drawn = torch.rand(())
    harness.restore_random_state(before, world.device)
    assert torch.rand(()) == drawn
    return world.rank, world.size, world.device
