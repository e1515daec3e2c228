"""Mixed precision with a gradient scaler, and gradients accumulated over four batches."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS, ACCUMULATED = 8, 4


def curve(samples: int = 4000) -> TensorDataset:
    """A noisy curve."""
    x = torch.rand(samples, 1) * 6 - 3
    return TensorDataset(x, x.sin() + 0.1 * torch.randn(samples, 1))


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    dataset = curve()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(1, 128), nn.Tanh(), nn.BatchNorm1d(128), nn.Linear(128, 1)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            model.require_backward_grad_sync = (index + 1) % ACCUMULATED == 0 or index + 1 == len(loader)
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss / ACCUMULATED).backward()
            if model.require_backward_grad_sync:
                scaler.step(sgd)
                scaler.update()
                sgd.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
