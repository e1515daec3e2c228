"""A classifier in DDP: the loop that everybody has."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import harness

EPOCHS = 5


def rings(samples: int = 2000) -> TensorDataset:
    """Points of the plane, and in which of four rings they lie."""
    x = torch.randn(samples, 2)
    return TensorDataset(x, (x.norm(dim=1) * 2).long().clamp(max=3))


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    dataset = rings()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    loader = harness.Loader(dataset, global_batch_size=20)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    run = harness.Run("runs/rings", state, every_steps=50)
    for epoch in run.epochs(EPOCHS):
        for x, ring in loader:
            loss = nn.functional.cross_entropy(model(x), ring)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.step(loss=loss)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
