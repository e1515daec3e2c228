"""A target that follows in the forward pass, a sparse embedding with a largest norm, on two ranks."""

import copy
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import harness

STEPS = 60


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 8, sparse=True, max_norm=0.9)
        self.online = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Linear(4, 4)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, one, other):
        if self.training:
            self.passes += 1
            momentum = 1 - 0.1 * (math.cos(math.pi * int(self.passes) / STEPS) + 1) / 2
            with torch.no_grad():
                for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    mine.mul_(momentum).add_(theirs, alpha=1 - momentum)
        wanted = self.target(self.words(other)).detach()
        return (self.predictor(self.online(self.words(one))) - wanted).square().mean()


dist.init_process_group("gloo")
torch.manual_seed(9)
data = TensorDataset(torch.randint(40, (96,)), torch.randint(40, (96,)))
model = DistributedDataParallel(Pair(), find_unused_parameters=False)
dense = torch.optim.AdamW([p for name, p in model.named_parameters() if "words" not in name], lr=0.01)
sparse = torch.optim.SparseAdam(model.module.words.parameters(), lr=0.01)
loader = harness.Loader(data, 16)
state = {"model": model, "dense": dense, "sparse": sparse, "loader": loader}
run = harness.Run("run", state, every_steps=4, config={"checkpoint": {"writers": "all"}})
for _ in run.epochs(STEPS // 6):
    for one, other in loader:
        loss = model(one, other)
        dense.zero_grad()
        sparse.zero_grad()
        loss.backward()
        dense.step()
        sparse.step()
        run.step(loss=loss)
dist.destroy_process_group()
