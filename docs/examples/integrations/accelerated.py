"""Accelerate's plain loop: a regression with gradients accumulated over four batches, and a schedule."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.integrations.accelerate import resilient

EPOCHS = 4


def curve(samples: int = 600) -> TensorDataset:
    """A noisy curve."""
    x = torch.rand(samples, 1) * 6 - 3
    return TensorDataset(x, x.sin() + 0.1 * torch.randn(samples, 1))


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=not torch.cuda.is_available())
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    loader = DataLoader(curve(), batch_size=4, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    run, loader = resilient(accelerator, loader, "runs/curve", every_steps=7)
    for epoch in run.epochs(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}  loss {loss.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
