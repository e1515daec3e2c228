"""A right loop, and ten mistakes that one can make in it: ``python mistakes.py NAME``, or ``none``.

Each is as somebody would write it who has not thought of a restart. Without it the script is exact.
"""

import random
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import harness

STEPS = 60
mistake = sys.argv[1]


class Noisy(Dataset):
    """Samples with noise: of a generator of the data set's own, which the mistake is, or of torch's."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.own if mistake == "data that is no function of the sample" else None
        noise = torch.randn(8, generator=own)
        return torch.full((8,), index / 400) + 0.1 * noise, torch.tensor(index % 4)


def shuffled(dataset: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in an order that is drawn when the program starts."""
    order = random.Random(3)
    while True:
        picked = [dataset[order.randrange(400)] for _ in range(10)]
        yield torch.stack([x for x, _ in picked]), torch.stack([y for _, y in picked])


def main() -> None:
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(400, 8), torch.randint(4, (400,)))
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    loader = harness.Loader(Noisy() if mistake.startswith("data that") else dataset, global_batch_size=10)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    if mistake in ("a sampler without a state", "a loader that is not in the state"):
        del state["loader"]
    if mistake == "a scheduler that is not in the state":
        del state["scheduler"]
    run = harness.Run("runs/mistakes", state, every_steps=50)
    if mistake == "code that runs only at the first start" and run.global_step == 0:
        model[3].p = 0.4  # a warm-up
    if mistake == "a sampler without a state":
        batches = shuffled(dataset)
    elif mistake == "a loader that is not in the state":
        batches = endless(DataLoader(dataset, batch_size=10, generator=torch.Generator().manual_seed(0)))
    else:
        batches = endless(loader)
    count, ahead, shadow = 0, None, model[0].weight.detach().clone()
    if mistake == "a batch that is fetched before the loop":
        ahead = next(batches)
    is_first = True
    for _ in run.steps(STEPS):
        if mistake == "seeding anew at each start" and is_first:
            torch.manual_seed(0)
        is_first = False
        x, y = ahead or next(batches)
        if mistake == "a BatchNorm that is changed by hand":
            model[1].momentum *= 0.95
        if mistake == "a counter of the script's own":
            count += 1
            x = x * min(1.0, count / 20)
        loss = nn.functional.cross_entropy(model(x), y)
        if mistake == "weights that the state has not":
            shadow.lerp_(model[0].weight.detach(), 0.1)
            loss = loss + 0.01 * (model[0].weight - shadow).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.step(loss=loss)
        if mistake == "a batch that is fetched before the loop":
            ahead = next(batches)


def endless(loader: harness.Loader | DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def own_loop() -> None:
    """A loop of which nobody sees where a step ends, with an evaluation that draws random numbers after some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = harness.Run("runs/mistakes", {"model": model, "optimizer": optimizer}, every_steps=50)
    for epoch in run.epochs(6):
        done = run.global_step - epoch * 10
        for _ in range(10 - done):
            loss = model(torch.randn(10, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
            if mistake == "an evaluation that draws random numbers" and run.global_step % 5 == 0:
                model.eval()
                model(torch.randn(5, 8))
                model.train()


if __name__ == "__main__":
    own_loop() if mistake == "an evaluation that draws random numbers" else main()
