"""Warm-up by hand, a weight decay that follows the step, early stopping with patience, the best weights kept in memory."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness


class Patience:
    def __init__(self, most):
        self.most, self.waited, self.best, self.weights = most, 0, float("inf"), None

    def is_over(self, value, model):
        if value < self.best:
            self.best, self.waited = value, 0
            self.weights = {name: each.clone() for name, each in model.state_dict().items()}
        else:
            self.waited += 1
        return self.waited >= self.most

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


torch.manual_seed(2)
x = torch.randn(64, 5)
data = TensorDataset(x, x.sum(1, keepdim=True) + 0.5 * torch.randn(64, 1))
model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
patience = Patience(9)
loader = harness.Loader(data, 8)
state = {"model": model, "optimizer": optimizer, "patience": patience, "loader": loader}
run = harness.Run("run", state, every_epochs=1)
for _ in run.epochs(200):
    for x, y in loader:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1, (run.global_step + 1) / 20)
            group["weight_decay"] = 1e-3 * run.global_step / 100
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
    value = float(loss + torch.rand(()) * 0.2)
    run.evaluated("value", {"value": value})
    if patience.is_over(value, model):
        model.load_state_dict(patience.weights)
        break
run.finish()
