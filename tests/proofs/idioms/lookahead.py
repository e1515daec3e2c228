"""Slow weights that follow the fast ones every few steps, by a wrapper that is no optimizer of torch's."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness


class Lookahead:
    def __init__(self, optimizer, k=5, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.steps = optimizer, k, alpha, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            for group, slow in zip(self.optimizer.param_groups, self.slow, strict=False):
                for p, s in zip(group["params"], slow, strict=False):
                    s.lerp_(p, self.alpha)
                    p.copy_(s)

    def state_dict(self):
        return {"steps": self.steps, "slow": self.slow}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        for mine, saved in zip(self.slow, state["slow"], strict=False):
            for s, value in zip(mine, saved, strict=False):
                s.copy_(value)


torch.manual_seed(3)
data = TensorDataset(torch.randn(90, 6))
model = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Dropout(0.2), nn.Linear(32, 6))
fast = torch.optim.Adamax(model.parameters(), lr=0.01)
optimizer = Lookahead(fast)
scheduler = torch.optim.lr_scheduler.ChainedScheduler(
    [torch.optim.lr_scheduler.LinearLR(fast, 0.1, total_iters=20), torch.optim.lr_scheduler.ExponentialLR(fast, 0.99)]
)
loader = harness.Loader(data, 6)
state = {"model": model, "fast": fast, "lookahead": optimizer, "scheduler": scheduler, "loader": loader}
run = harness.Run("run", state, every_steps=4)
for _ in run.epochs(8):
    for (x,) in loader:
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.step(loss=loss)
