"""Linear regression: one input, one output, mean squared error, stochastic gradient descent."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness.task import Evaluation, Task

Batch = tuple[torch.Tensor, torch.Tensor]


def build(samples: int = 100, slope: float = 2.0, intercept: float = 1.0, noise: float = 0.1, lr: float = 0.05) -> Task:
    """Recovers ``slope`` and ``intercept`` from noisy points of the line. Batch: x and y, float32 (batch, 1) each."""
    x = torch.linspace(-2, 2, samples).unsqueeze(1)
    y = slope * x + intercept + noise * torch.randn(samples, 1)
    dataset = TensorDataset(x, y)
    model = nn.Linear(1, 1)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets)

    def measure(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        line = model.get_parameter("weight").flatten()[0], model.get_parameter("bias")[0]
        return {"mse": loss(model, batch), "slope": line[0], "intercept": line[1]}

    return Task(
        model=model,
        dataset=dataset,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        loss=loss,
        evaluation=Evaluation(dataset, measure, metric="mse"),
    )
