"""Stochastic weight averaging: another schedule from the middle on, batch statistics when all is over."""

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import harness

torch.manual_seed(4)
data = TensorDataset(torch.randn(48, 5))
model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
average = AveragedModel(model)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
late = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
loader = harness.Loader(data, 6)
state = {"model": model, "optimizer": optimizer, "average": average, "cosine": cosine, "late": late, "loader": loader}
run = harness.Run("run", state, every_steps=5)
for epoch in run.epochs(12):
    for (x,) in loader:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
    if epoch >= 6:
        average.update_parameters(model)
        late.step()
    else:
        cosine.step()
update_bn(DataLoader(data, batch_size=12), average)
run.finish()
