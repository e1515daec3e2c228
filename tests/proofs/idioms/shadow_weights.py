"""Averages in a list of one's own, exchanged with the weights by their ``data`` for a validation at some steps."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness


class Shadow:
    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(self.values, self.parameters, 0.05)

    def exchange(self):
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.values[index] = self.values[index], parameter.data

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = [value.clone() for value in state["values"]]


class Judge:
    """Remembers what was judged, and when to stop."""

    def __init__(self):
        self.losses = []

    def state_dict(self):
        return {"losses": list(self.losses)}

    def load_state_dict(self, state):
        self.losses = state["losses"]


torch.manual_seed(1)
data = TensorDataset(torch.randn(80, 300))
held_out = torch.randn(50, 300)
model = nn.Sequential(nn.Linear(300, 300), nn.GELU(), nn.Dropout(0.1), nn.Linear(300, 1))
optimizer = torch.optim.RAdam(model.parameters(), lr=0.003)
shadow, judge = Shadow(model.parameters()), Judge()
loader = harness.Loader(data, 8)
state = {"model": model, "optimizer": optimizer, "shadow": shadow, "judge": judge, "loader": loader}
run = harness.Run("run", state, every_steps=3)
for _ in run.epochs(10):
    for (x,) in loader:
        loss = (model(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shadow.update()
        run.step(loss=loss)
        if run.global_step % 4 == 0:
            shadow.exchange()
            model.eval()
            with torch.no_grad():
                judge.losses.append(float((model(held_out) - held_out[:, :1]).square().mean() + 0.001 * torch.rand(())))
            model.train()
            shadow.exchange()
