"""Global batches that a batch sampler of the user's puts together, as a function of the seed and the epoch."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from harness.data.order import BATCH_SAMPLER
from harness.data.schedule import Cursor, Schedule
from harness.data.seeding import generators_kept, mix, on_cpu, seed_process
from harness.errors import ConfigError, Mismatch

BatchSampler = Iterable[Iterable[int]] | Callable[[int], Iterable[Iterable[int]]]

_EPOCHS_KEPT = 2  # the loader's workers may be an epoch ahead
_MOST_TIMES, _MOST_SAMPLES = 1000, 10**7  # an epoch with more samples than either allows is taken to have no end


class Epoch(NamedTuple):
    """The samples of an epoch in the order of its batches, and the position at which each batch ends."""

    samples: NDArray[np.int64]
    ends: NDArray[np.int64]


class Batches:
    """What a batch sampler gives for an epoch; it is asked again when another process, or a restart, needs the epoch.

    It is asked with the generators of Python, NumPy and torch seeded for the epoch. Raises ``ConfigError`` where it cannot
    be asked twice, or says something else the second time.
    """

    def __init__(self, source: BatchSampler, samples: int, seed: int) -> None:
        self._source, self._samples, self._seed = source, samples, seed
        self._known: dict[int, Epoch] = {}
        inner = getattr(source, "sampler", None)
        if isinstance(source, Iterator):
            raise ConfigError(
                "batch_sampler: expected batches that can be read again for each epoch, found an iterator, which is empty "
                "after the first; pass a function of the epoch that returns it"
            )
        if any(isinstance(each, DistributedSampler) and each.num_replicas > 1 for each in (source, inner)):
            raise ConfigError(
                "batch_sampler: expected global batches, found a DistributedSampler, which gives each rank other samples; "
                "pass a sampler of the whole data set: the Loader divides each batch among the ranks"
            )
        first = self.of(0)
        again = self._drawn(0)
        if not all(map(np.array_equal, first, again)):
            raise ConfigError(
                "batch_sampler: expected the same batches each time for the same epoch, found others when asked twice for "
                "epoch 0; a resume could not find its place. Draw from the global generators of Python, NumPy or torch, "
                "which are seeded for the epoch, or from one that is made anew from the epoch"
            )
        self.digest = xxhash.xxh3_128_hexdigest(b"".join(each.astype("<i8").tobytes() for each in first))

    def of(self, epoch: int) -> Epoch:
        """The batches of an epoch."""
        if epoch not in self._known:
            drawn = self._drawn(epoch)
            self._known = dict([*self._known.items(), (epoch, drawn)][-_EPOCHS_KEPT:])
        return self._known[epoch]

    def _drawn(self, epoch: int) -> Epoch:
        samples: list[int] = []
        ends: list[int] = []
        most = max(_MOST_TIMES * self._samples, _MOST_SAMPLES)
        with generators_kept(), on_cpu():
            seed_process(mix(self._seed, epoch))
            for number, batch in enumerate(self._asked(epoch)):
                samples += _indices(batch, f"batch_sampler: epoch {epoch}, batch {number}")
                ends.append(len(samples))
                if len(samples) > most:
                    raise ConfigError(
                        f"batch_sampler: expected an epoch that ends, found over {most} samples in epoch {epoch}"
                    )
        if not ends:
            raise ConfigError(f"batch_sampler: expected at least one batch an epoch, found none in epoch {epoch}")
        lowest, highest = min(samples), max(samples)
        if lowest < 0 or highest >= self._samples:
            wrong = lowest if lowest < 0 else highest
            raise ConfigError(
                f"batch_sampler: expected indices from 0 to {self._samples - 1}, found {wrong} in a batch of epoch {epoch}"
            )
        return Epoch(np.array(samples, dtype=np.int64), np.array(ends, dtype=np.int64))

    def _asked(self, epoch: int) -> Iterable[Iterable[int]]:
        source = self._source
        if not isinstance(source, Iterable):
            return source(epoch)
        for each in (source, getattr(source, "sampler", None)):
            if callable(set_epoch := getattr(each, "set_epoch", None)):
                set_epoch(epoch)
        return source


def _indices(batch: Any, which: str) -> list[int]:
    try:
        found = [operator.index(each) for each in (batch.tolist() if isinstance(batch, torch.Tensor) else batch)]
    except TypeError as error:
        raise ConfigError(
            f"{which}: expected a list of indices, found {batch!r}; for single indices put a BatchSampler around the sampler"
        ) from error
    if not found:
        raise ConfigError(f"{which}: expected a list of indices, found an empty one; leave it out")
    return found


@dataclass(frozen=True)
class BatchSchedule(Schedule):
    """Global batches as a batch sampler gives them. ``global_batch_size`` is what the batches of epoch 0 have on average.

    An epoch has as many samples as its batches. They are held in memory, as is the next epoch where workers are ahead.
    """

    batches: Batches = field(kw_only=True)

    @classmethod
    def of(cls, source: BatchSampler, samples: int, seed: int, micro_batch_size: int | None) -> "BatchSchedule":
        """The schedule of a batch sampler. Raises ``ConfigError`` as ``Batches`` does."""
        batches = Batches(source, samples, seed)
        found, ends = batches.of(0)
        average = round(len(found) / len(ends))
        return cls(samples, seed, average, micro_batch_size, batches=batches)

    @property
    def given(self) -> dict[str, str]:
        return {BATCH_SAMPLER: self.batches.digest}

    def order(self, epoch: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        return self.batches.of(epoch).samples[start:stop]

    def batch(self, cursor: Cursor) -> NDArray[np.int64]:
        return self.order(cursor.epoch, cursor.offset, cursor.offset + self.size(cursor))

    def number(self, cursor: Cursor) -> int:
        return int(np.searchsorted(self.batches.of(cursor.epoch).ends, cursor.offset, side="right")) if cursor.offset else 0

    def size(self, cursor: Cursor) -> int:
        return int(self.batches.of(cursor.epoch).ends[self.number(cursor)]) - cursor.offset

    def after(self, cursor: Cursor) -> Cursor:
        return self.settled(Cursor(cursor.epoch, cursor.offset + self.size(cursor)))

    def settled(self, cursor: Cursor) -> Cursor:
        is_over = cursor.offset > 0 and cursor.offset >= len(self.batches.of(cursor.epoch).samples)
        return Cursor(cursor.epoch + 1) if is_over else cursor

    def refuse(self, cursor: Cursor) -> None:
        if cursor.offset and cursor.offset not in self.batches.of(cursor.epoch).ends[:-1]:
            raise Mismatch(
                f"batch_sampler: the checkpoint continues at sample {cursor.offset} of epoch {cursor.epoch}, where no batch "
                "begins; give the Loader the batch_sampler that the run began with, or start a new run"
            )

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return len(self.batches.of(epoch).ends)

    def _sizes(self) -> set[int]:
        return {stop - start for start, stop in itertools.pairwise([0, *self.batches.of(0).ends.tolist()])}
