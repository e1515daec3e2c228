"""A compiled model."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = 6


def sequences(samples: int = 1600) -> TensorDataset:
    """Sequences of numbers, and their sums modulo 7."""
    numbers = torch.randint(7, (samples, 12))
    return TensorDataset(numbers, numbers.sum(dim=1) % 7)


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    dataset = sequences()
    net = nn.Sequential(nn.Embedding(7, 32), nn.Flatten(), nn.Linear(384, 128), nn.GELU(), nn.Linear(128, 7))
    model = torch.compile(DistributedDataParallel(net), backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for numbers, total in loader:
            loss = nn.functional.cross_entropy(model(numbers), total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
