"""Gradients that a hook centres and counts, a spectral norm with a state of its own, a dropout that grows with the epoch."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import TensorDataset

import harness


class Centred(nn.Module):
    """Keeps a running mean of its gradients' norms in a buffer, by a hook."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(spectral_norm(nn.Linear(6, 24)), nn.ReLU(), nn.Dropout(0.0), weight_norm(nn.Linear(24, 2)))
        self.register_buffer("seen", torch.zeros(()))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.register_hook(self.centre)

    def centre(self, gradient):
        self.seen.mul_(0.9).add_(0.1 * gradient.norm())
        return gradient - gradient.mean(dim=1, keepdim=True) / (1 + self.seen)

    def forward(self, x):
        return self.body(x)


torch.manual_seed(5)
data = TensorDataset(torch.randn(56, 6))
model = Centred()
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
loader = harness.Loader(data, 7)
run = harness.Run("run", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=3)
for epoch in run.epochs(9):
    model.body[2].p = 0.05 * epoch
    for (x,) in loader:
        loss = (model(x) - x[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step(loss=loss)
