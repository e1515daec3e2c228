"""An endless stream of samples, of which each rank reads its own, with torchdata's loader."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import harness

STEPS = 400


class Stream(IterableDataset):
    """Noisy points of a line, for ever; it knows where it is."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            x = torch.rand(4, generator=self.generator)
            yield x, x.sum(0, keepdim=True) + 0.1 * torch.randn(1, generator=self.generator)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    loader = StatefulDataLoader(Stream(seed=dist.get_rank()), batch_size=16)
    run = harness.Run("runs/stream", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=50)
    batches = iter(loader)
    for step in run.steps(STEPS):
        x, y = next(batches)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
        if step % 100 == 99 and dist.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
