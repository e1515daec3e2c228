"""A data set that the loop makes harder from epoch to epoch, fetched by workers, with noise of each sample's own."""

import random

import torch
from torch import nn
from torch.utils.data import Dataset

import harness


class Sums(Dataset):
    def __init__(self):
        self.most = 1

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x = torch.rand(5) * self.most * random.random()
        return x, x.sum(0, keepdim=True) + index / 60


torch.manual_seed(6)
data = Sums()
model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.Rprop(model.parameters(), lr=0.01)
loader = harness.Loader(data, 6, workers=2)
run = harness.Run("run", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=4)
for epoch in run.epochs(6):
    data.most = 1 + epoch // 2
    for x, y in loader:
        loss = nn.functional.smooth_l1_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
