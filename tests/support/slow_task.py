"""A small task in which everything takes its time: a run of it can be stopped, or its host lost, at any moment."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Evaluation, Task

TASK = f"{__file__}:build"
MOST_STEPS = 10**6  # it is stopped before


def build(pause_seconds: float = 0.0, counts: str | None = None) -> Task:
    """A small task in which everything takes its time: steps, with ranks that wait for a slower one, and evaluations."""
    rank = int(os.environ.get("RANK", "0"))
    x = torch.linspace(-1, 1, 64).view(-1, 1)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(pause_seconds * (1 + rank))
        return F.mse_loss(model(batch[0]), batch[1])

    def measure(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        time.sleep(pause_seconds)
        return {"error": F.mse_loss(model(batch[0]), batch[1])}

    if counts is not None:
        steps = 0

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1
            Path(counts, f"rank-{rank}").write_text(str(steps))

        optimizer.register_step_post_hook(count)
    evaluation = Evaluation(TensorDataset(x[:16], x[:16]), batch_size=4, metric="error", measure=measure)
    return Task(model=model, dataset=TensorDataset(x, 3 * x), optimizer=optimizer, loss=loss, evaluation=evaluation)
