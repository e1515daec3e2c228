"""Which samples are trained when, and by whom: a function of the seed and of one global position.

The order of epoch *e* is a permutation that depends on the seed, *e* and the number of samples alone. It is computed for the
batch that is asked for (``harness.data.order``). A global batch is the next ``global_batch_size`` samples of it (the last of
an epoch may be shorter: every sample is trained once an epoch; with ``drop_last`` it is left out, and each epoch leaves out
other samples).

A batch is divided among the ranks in contiguous shares whose sizes differ by at most one. Gradients are weighted by samples,
so the sum over ranks is the mean over the batch whatever the shares. A rank whose share is empty (a batch of fewer
samples than ranks) goes through the motions with a sample that weighs nothing, because DDP waits for every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.data.order import ALGORITHMS, FEISTEL, WEIGHTS, samples_between
from harness.data.weights import Weights
from harness.errors import ConfigError, Corrupt


class Cursor(NamedTuple):
    """The position of a run: ``offset`` samples of ``epoch`` have been trained."""

    epoch: int = 0
    offset: int = 0


class MicroBatch(NamedTuple):
    """Samples that a rank puts through the model at once, and their weight in the mean over the global batch.

    ``position`` is that of the first within the epoch, where an epoch may have a sample more than once.
    """

    epoch: int
    indices: tuple[int, ...]
    weight: float
    position: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Divides a data set of ``samples`` into global batches, those into ranks' shares, those into micro-batches.

    ``algorithm`` computes the order of an epoch: ``feistel``, or ``randperm`` for a run that began before 0.3. With
    ``weights`` samples are drawn by lot, as many as there are; some come more than once, others not at all.
    """

    samples: int
    seed: int
    global_batch_size: int
    micro_batch_size: int | None
    drop_last: bool = False
    algorithm: str = FEISTEL
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, found {self.algorithm!r}")
        if self.samples < 1:
            raise ConfigError("task: expected a data set with samples, found an empty one")
        if self.drop_last and self.samples < self.global_batch_size:
            sizes = f"{self.samples} samples, and a global batch {self.global_batch_size}"
            raise ConfigError(f"drop_last: expected at least one whole batch; the data set has {sizes}")

    @property
    def given(self) -> dict[str, str]:
        """What of the order the user has given: its name, and a hash of it."""
        return {} if self.weights is None else {WEIGHTS: self.weights.digest}

    def check_length(self, dataset: Any, epoch: int) -> None:
        """Raises ``ConfigError`` where a data set has not as many samples as when the schedule was made."""
        if len(dataset) != self.samples:
            raise ConfigError(
                f"epoch {epoch}: the data set has {len(dataset)} samples, but had {self.samples} when its Loader "
                "was made; keep its length constant, and map indices to other samples if the data should change"
            )

    def order(self, epoch: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """The samples of an epoch, in the order in which they are trained, from position ``start`` to ``stop``.

        Shape (stop - start,), int64. Without ``stop`` to the end of the epoch, which may be more than fits into memory.
        """
        stop = self.samples if stop is None else min(stop, self.samples)
        if self.weights is not None:
            return self.weights.between(self.seed, epoch, start, stop)
        return samples_between(self.algorithm, self.samples, self.seed, epoch, start, stop)

    def batch(self, cursor: Cursor) -> NDArray[np.int64]:
        """The samples of the global batch that begins at ``cursor``."""
        return self.order(cursor.epoch, cursor.offset, cursor.offset + self.global_batch_size)

    def number(self, cursor: Cursor) -> int:
        """The number, within its epoch, of the batch that begins at ``cursor``."""
        return cursor.offset // self.global_batch_size

    def size(self, cursor: Cursor) -> int:
        """How many samples the batch that begins at ``cursor`` has."""
        return min(self.global_batch_size, self.samples - cursor.offset)

    def after(self, cursor: Cursor) -> Cursor:
        """The position after the batch that begins at ``cursor``."""
        return self.settled(Cursor(cursor.epoch, min(cursor.offset + self.global_batch_size, self.samples)))

    def settled(self, cursor: Cursor) -> Cursor:
        """The position itself, or the next epoch's beginning where no batch of this one is left."""
        left = self.samples - cursor.offset
        is_over = left < self.global_batch_size if self.drop_last else left == 0
        return Cursor(cursor.epoch + 1) if is_over else cursor

    def refuse(self, cursor: Cursor) -> None:
        """Raises ``Corrupt``, or ``Mismatch``, where a saved position is not one of this schedule."""
        if cursor.offset >= self.samples:
            raise Corrupt(f"impossible position in the data: epoch {cursor.epoch!r}, offset {cursor.offset!r}")

    def steps_per_epoch(self, epoch: int = 0) -> int:  # noqa: ARG002  # batches of the user's differ between epochs
        """How many global batches an epoch has."""
        return self.samples // self.global_batch_size + (not self.drop_last and self.samples % self.global_batch_size > 0)

    def fewest_at_once(self, world_size: int) -> int:
        """How many samples the smallest micro-batch of an epoch has, over all ranks; a rank without a share has one to go
        along with."""
        shares = {max(1, (size + extra) // world_size) for size in self._sizes() for extra in (0, world_size - 1)}
        micro_batches = {(share, self.micro_batch_size or share) for share in shares}
        return min(share % at_once or at_once for share, at_once in micro_batches)

    def _sizes(self) -> set[int]:
        """How many samples a batch may have."""
        sizes = {min(self.global_batch_size, self.samples)}
        if not self.drop_last:
            sizes.add(self.samples % self.global_batch_size or self.global_batch_size)
        return sizes

    def most_micro_batches(self, cursor: Cursor, world_size: int) -> int:
        """How many micro-batches the rank with the largest share of the batch that begins at ``cursor`` has."""
        share = -(-self.size(cursor) // world_size)
        return -(-share // (self.micro_batch_size or share))

    def steps(self, cursor: Cursor, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """The rank's micro-batches of every step from a position on, without end."""
        cursor = self.settled(cursor)
        while True:
            yield self._share(cursor, self.batch(cursor).tolist(), rank, world_size)
            cursor = self.after(cursor)

    def _share(self, cursor: Cursor, batch: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        start, stop = rank * len(batch) // world_size, (rank + 1) * len(batch) // world_size
        first = cursor.offset if self.given else None
        if start == stop:
            return [MicroBatch(cursor.epoch, (batch[0],), 0.0, first)]
        size = self.micro_batch_size or stop - start
        micro_batches = []
        for at in range(start, stop, size):
            indices = tuple(batch[at : min(at + size, stop)])
            position = None if first is None else first + at
            micro_batches.append(MicroBatch(cursor.epoch, indices, len(indices) / len(batch), position))
        return micro_batches


def is_due(step: int, epochs: tuple[int, int], every_steps: int | None, every_epochs: int | None) -> bool:
    """Whether an interval ends with a step of this number. ``epochs`` are those of the next batch, at the boundary before
    and at this one: an interval of epochs ends where the number passes a multiple, whatever the steps do."""
    if every_steps is not None and step % every_steps == 0:
        return True
    before, now = epochs
    return every_epochs is not None and now // every_epochs > before // every_epochs
