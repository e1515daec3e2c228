"""Cosine restarts that are stepped by fractions of an epoch, after the boundary, with a counter of ``enumerate``."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness

torch.manual_seed(0)
data = TensorDataset(torch.randn(60, 4))
model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2)
loader = harness.Loader(data, 4)
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
run = harness.Run("run", state, every_steps=7)
for epoch in run.epochs(8):
    for (x,) in loader:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
        scheduler.step(epoch + (loader.batch + 1) / len(loader))
