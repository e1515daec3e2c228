"""Which samples are trained when, and by whom: a function of the seed and of one global position.

The order of epoch *e* is a permutation that depends on ``(seed, e)`` alone. A global batch is the next
``global_batch_size`` samples of it (the last of an epoch may be shorter: every sample is trained once an epoch). The
position is data, not replay: ``Cursor`` says how many samples of which epoch have been trained, at any world size.

A batch is divided among the ranks in contiguous shares whose sizes differ by at most one. Gradients are weighted by samples,
so the sum over ranks is the mean over the batch whatever the shares. A rank whose share is empty (a batch of fewer
samples than ranks) goes through the motions with a sample that weighs nothing, because DDP waits for every rank.

What a sample looks like must not depend on which process fetches it, nor when: before a sample is fetched, the generators
of Python, NumPy and torch are seeded from ``(seed, epoch, index)``, and in the training process put back afterwards.
"""

import multiprocessing
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from harness.errors import ConfigError
from harness.signals import STOP_SIGNALS, die_with_parent


@dataclass(frozen=True)
class Cursor:
    """The position of a run: ``offset`` samples of ``epoch`` have been trained."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Samples that a rank puts through the model at once, and their weight in the mean over the global batch."""

    epoch: int
    indices: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Schedule:
    """Divides a data set of ``samples`` into global batches, those into ranks' shares, those into micro-batches."""

    samples: int
    seed: int
    global_batch_size: int
    micro_batch_size: int | None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("task: expected a data set with samples, found an empty one")

    def order(self, epoch: int) -> torch.Tensor:
        """The permutation of an epoch. Shape (samples,), int64."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        return torch.randperm(self.samples, generator=generator)

    def after(self, cursor: Cursor) -> Cursor:
        """The position after the batch that begins at ``cursor``."""
        offset = min(cursor.offset + self.global_batch_size, self.samples)
        return Cursor(cursor.epoch + 1) if offset == self.samples else Cursor(cursor.epoch, offset)

    def steps_per_epoch(self) -> int:
        """How many global batches an epoch has."""
        return -(-self.samples // self.global_batch_size)

    def steps(self, cursor: Cursor, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """The rank's micro-batches of every step from a position on, without end."""
        while True:
            order = self.order(cursor.epoch)
            while True:
                batch = order[cursor.offset : cursor.offset + self.global_batch_size]
                yield self._share(cursor.epoch, batch.tolist(), rank, world_size)
                epoch, cursor = cursor.epoch, self.after(cursor)
                if cursor.epoch != epoch:
                    break

    def _share(self, epoch: int, batch: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        share = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]
        if not share:
            return [MicroBatch(epoch, (batch[0],), 0.0)]
        size = self.micro_batch_size or len(share)
        pieces = (tuple(share[start : start + size]) for start in range(0, len(share), size))
        return [MicroBatch(epoch, piece, len(piece) / len(batch)) for piece in pieces]


def mix(*numbers: int) -> int:
    """A well-spread 63-bit seed from several numbers. (NumPy's ``SeedSequence``; O'Neill's seed_seq hashing, 2015.)"""
    low, high = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def seed_everything(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, those of all devices included."""
    seed = mix(*numbers) if len(numbers) > 1 else numbers[0]
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # the global generator is the one that users' data sets draw from
    torch.manual_seed(seed)


@dataclass
class _Seeded(Dataset[Any]):
    """A data set whose samples are drawn with random numbers of their own."""

    dataset: Dataset[Any]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed = mix(self.seed, epoch, index)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # as above
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: the devices' generators are not a loader's
        return self.dataset[index]


def batches(
    dataset: Dataset[Any],
    plan: Iterator[list[MicroBatch]],
    *,
    seed: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
) -> Generator[list[tuple[Any, float]]]:
    """Fetches what a plan says: for each step, the collated micro-batches and their weights.

    Loader workers, where there are any, run ahead through the plan, over the ends of epochs too, and are never started
    anew. ``close()`` ends them.
    """
    announced: list[list[MicroBatch]] = []  # steps whose batches were asked for and have not come yet, oldest first

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in plan:
            announced.append(step)
            for micro in step:
                yield [(micro.epoch, index) for index in micro.indices]

    loader = DataLoader(
        _Seeded(dataset, seed),
        batch_sampler=keys(),
        num_workers=workers,
        collate_fn=collate or default_collate,
        pin_memory=pin_memory,
        worker_init_fn=_shield_worker if workers else None,
        generator=torch.Generator().manual_seed(seed),  # else every iterator takes a number from the training's generator
    )
    others = multiprocessing.active_children()
    fetched = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in others]
    try:
        while True:
            state = _generators() if not workers else None
            first = next(fetched)
            step = announced.pop(0)
            micro_batches = [(first, step[0].weight)] + [(next(fetched), micro.weight) for micro in step[1:]]
            if state is not None:
                _set_generators(state)
            yield micro_batches
    finally:
        if processes:
            fetched._shutdown_workers()  # type: ignore[attr-defined]  # its finalizer may come too late: see below
        for process in processes:  # those that are still busy ignore SIGTERM, and Python would wait for them when it exits
            process.kill()


def _shield_worker(_worker: int) -> None:
    """A worker outlives the signal that stops the run: torchrun signals the whole process group, and a trainer whose
    workers die cannot take its last steps. Workers end when the trainer closes them or is gone, whatever they are at."""
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _generators() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002  # as above


def _set_generators(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002  # as above
    torch.default_generator.set_state(state[2])


def to_device(value: Any, device: torch.device) -> Any:
    """A batch on a device: tensors within tuples, lists and dictionaries are moved, everything else stays."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return type(value)({key: to_device(item, device) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
