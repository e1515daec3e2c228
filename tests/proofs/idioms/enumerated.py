"""A rate that depends on a counter of ``enumerate``, which a restart begins anew: it must be told of."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness

torch.manual_seed(0)
data = TensorDataset(torch.randn(60, 4))
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = harness.Loader(data, 4)
run = harness.Run("run", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=7)
for epoch in run.epochs(8):
    for number, (x,) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + epoch + number / len(loader))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        run.step()
