"""Streams of four libraries, whose positions a run saves: ``streams.py nodes``, or ``datasets``, ``web``, ``mosaic``."""
# ruff: noqa: PLC0415  # who has one of the libraries needs no other

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate

import harness

EPOCHS = 2


def numbers() -> Iterator[dict[str, float]]:
    """The samples."""
    yield from ({"x": float(index), "y": float(index % 7)} for index in range(300))


def nodes() -> Any:
    """torchdata's nodes: threads that map, batches, a prefetcher. The order is a sampler's that has ``set_epoch``."""
    from torchdata.nodes import Batcher, Loader, Mapper, ParallelMapper, Prefetcher, SamplerWrapper

    samples = [*numbers()]
    order = SamplerWrapper(DistributedSampler(samples, num_replicas=1, rank=0, seed=1))
    mapped = ParallelMapper(order, samples.__getitem__, num_workers=2, method="thread")
    return Loader(Prefetcher(Mapper(Batcher(mapped, batch_size=4), default_collate), prefetch_factor=2))


def datasets() -> Any:
    """A stream of ``datasets``, which knows its position, in torchdata's loader."""
    from datasets import IterableDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    stream = IterableDataset.from_generator(numbers).map(lambda each: {"x": each["x"], "y": each["y"] + 1})
    return StatefulDataLoader(stream, batch_size=4)


def web() -> Any:
    """Tar files, shuffled in a buffer. The stream has no position, so ``Position`` reads an interrupted epoch again."""
    import webdataset

    from harness.integrations.position import Position

    if not Path("numbers.tar").exists():
        with tarfile.open("numbers.partial", "w") as tar:
            for index, sample in enumerate(numbers()):
                for name, value in sample.items():
                    about = tarfile.TarInfo(f"{index:03}.{name}")
                    about.size = len(str(value))
                    tar.addfile(about, io.BytesIO(str(value).encode()))
        Path("numbers.partial").rename("numbers.tar")
    stream = webdataset.WebDataset("numbers.tar", shardshuffle=False).compose(webdataset.detshuffle(20, seed=1))
    stream = stream.map(lambda each: {name: float(each[name]) for name in ("x", "y")})
    return Position("loader", DataLoader(stream, batch_size=4), ranks=1)


def mosaic() -> Any:
    """Shards of ``mosaicml-streaming``, and its loader."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # of a process that was killed
    if not Path("shards/index.json").exists():
        with MDSWriter(out="shards", columns={"x": "float64", "y": "float64"}) as writer:
            for sample in numbers():
                writer.write(sample)
    stream = StreamingDataset(local="shards", shuffle=True, shuffle_seed=1, batch_size=4)
    return StreamingDataLoader(stream, batch_size=4)


class Trained:
    """A number that depends on the order of all samples."""

    value = 0

    def add(self, samples: torch.Tensor) -> None:
        for each in samples.tolist():
            self.value = (self.value * 31 + int(each)) % (1 << 61)

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def main() -> None:
    """A regression over some epochs of the stream."""
    loader = {"nodes": nodes, "datasets": datasets, "web": web, "mosaic": mosaic}[sys.argv[1]]()
    torch.manual_seed(0)
    model, trained = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1)), Trained()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    state = {"model": model, "optimizer": optimizer, "loader": loader, "trained": trained}
    run = harness.Run("runs/stream", state, every_steps=9)
    for epoch in run.epochs(EPOCHS):
        if sys.argv[1] == "datasets":  # without it each epoch would begin where the first one was continued
            loader.dataset.set_epoch(epoch)
        for batch in loader:
            trained.add(batch["x"])
            x, y = (batch[name].float()[:, None] for name in ("x", "y"))
            loss = nn.functional.mse_loss(model(x / 300), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)


if __name__ == "__main__":
    main()
