"""The loader that gives a rank its share of every global batch, from a position that can be saved."""

import logging
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from harness.data.batch_sampler import BatchSampler, BatchSchedule
from harness.data.counting import warn_of_counts
from harness.data.fetching import Fetcher, Step
from harness.data.fingerprint import Fingerprint
from harness.data.position import Position, SkippedBatch
from harness.data.schedule import Cursor, Schedule
from harness.data.weights import Weights
from harness.distributed.world import rank_and_size
from harness.errors import ConfigError

log = logging.getLogger(__name__)


class Loader:
    """Gives this rank its share of every global batch of a map-style data set, from a position that can be saved.

    ``for batch in loader`` yields the rest of the current epoch, collated. Then the loader is at the beginning of the next
    epoch. The order of an epoch depends only on ``seed`` and the epoch. The random numbers that a sample draws (from Python,
    NumPy and torch) depend only on ``seed``, the epoch and the sample. So the batches are the same with any number of
    ``workers``, and the global batches at any world size. The last batch of an epoch may be shorter; ``drop_last`` leaves it
    out. ``weight`` is the weight of this rank's mean loss in the mean over all ranks: 1 if all shares are equal.

    ``weights`` (one for each sample) draws samples with replacement, as many in an epoch as the data set has.
    ``batch_sampler`` gives the global batches, as lists of indices, in place of ``global_batch_size``. It can be iterated
    anew for each epoch (its ``set_epoch`` is called before), or is a function of the epoch. It is asked with the generators
    of Python, NumPy and torch seeded for the epoch, and has to give the same batches each time. ``collate`` makes a batch of
    the list of its samples, as in torch's ``DataLoader``.

    Workers hold a copy of the data set. If one of its attributes changes between two batches, they are restarted, so that
    they see the change. ``tells_epoch`` calls its ``set_epoch(epoch)`` before the first sample of each epoch, in the process
    that fetches.

    ``state_dict()`` is the position after the last batch that the loader gave; it is the same on every rank. It holds a
    ledger, a running hash of the trained samples. If you ask for it before the first batch, it also holds a ``fingerprint``
    of three samples. Raises ``ConfigError`` if the data set is empty or its length has changed, or weights or batches are
    wrong. ``load_state_dict`` raises ``Mismatch`` if seed, size, order or samples differ from those of the saved position.

    ``rank`` and ``world_size`` default to those of ``init_process_group``, or else to those that torchrun gave this process.

    A loop that asks for a batch has finished the one before. ``on_return`` is called then, before anything else. ``on_exit``
    is called when the loop over an epoch's batches ends, in whatever way.
    """

    in_use: ClassVar[weakref.WeakSet["Loader"]] = weakref.WeakSet()  # those of this process that have handed out a batch

    def __init__(
        self,
        dataset: Dataset[Any],
        global_batch_size: int | None = None,
        *,
        weights: Sequence[float] | NDArray[Any] | torch.Tensor | None = None,
        batch_sampler: BatchSampler | None = None,
        seed: int = 0,
        micro_batch_size: int | None = None,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        tells_epoch: bool = False,
        fingerprint: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        samples: int = len(dataset)  # type: ignore[arg-type]
        if batch_sampler is not None:
            _refuse_beside_batches(global_batch_size=global_batch_size, weights=weights, drop_last=drop_last or None)
            self.schedule: Schedule = BatchSchedule.of(batch_sampler, samples, seed, micro_batch_size)
        elif global_batch_size is None:
            raise ConfigError("Loader: expected global_batch_size, the samples of a batch on all ranks, or batch_sampler")
        else:
            drawn = None if weights is None else Weights(weights, samples)
            self.schedule = Schedule(samples, seed, global_batch_size, micro_batch_size, drop_last, weights=drawn)
        own_rank, size = rank_and_size()
        self.is_placed = rank is not None or world_size is not None  # by the program, which may have its own reasons
        self.rank = own_rank if rank is None else rank
        self.world_size = size if world_size is None else world_size
        self.position = Position(self.schedule)
        self.weight = 1.0
        self.taken = 0  # batches, since the position was set
        self.waited_seconds = 0.0  # for batches, in all
        self.used_at = 0.0  # when the last batch was asked for, by the performance counter
        self.on_return: Callable[[], None] = nothing
        self.on_exit: Callable[[], None] = nothing
        speaks = self.rank == 0
        self.fetcher = Fetcher(
            seed=seed, workers=workers, collate=collate, pin_memory=pin_memory, tells_epoch=tells_epoch, speaks=speaks
        )
        # A loader that shares nothing may have data of the rank's own.
        compares = fingerprint and self.world_size >= size
        self.fingerprint = Fingerprint(self.schedule, self.fetcher, compares=compares, speaks=speaks)
        self._has_failed = False
        self._walking: Callable[[], Any] = lambda: None  # the newest loop over an epoch
        self._goes_on = False  # the first one begins within an epoch, after a restart

    @property
    def cursor(self) -> Cursor:
        """The position after the last batch that the loader gave."""
        return self.position.cursor

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.position.cursor.epoch

    @property
    def batch(self) -> int:
        """The number of the last batch within its epoch, from 0; -1 before the first one. It continues after a restart,
        where ``enumerate`` would start again at 0."""
        return self.position.batch

    @property
    def skipped(self) -> list[SkippedBatch]:
        """The batches that are not trained."""
        return self.position.skipped

    def __len__(self) -> int:
        """Batches in the current epoch."""
        return self.schedule.steps_per_epoch(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        batches = self._walk()
        self._walking = weakref.ref(batches)
        return batches

    def _walk(self) -> Generator[Any]:
        epoch = self.position.cursor.epoch
        if self._goes_on and self.rank == 0:
            warn_of_counts(self._walking(), epoch, self.batch + 1)
        self._goes_on = False
        try:
            while self.position.cursor.epoch == epoch:
                step = self.next_step(whole=True)
                if step:
                    (batch, share), *_ = step
                    self.weight = share * self.world_size
                    yield batch
        finally:
            self.on_exit()

    def next_step(self, *, whole: bool = False) -> Step:
        """The micro-batches of the next global batch, of this epoch or the one after it, and what the mean loss of each
        counts in that of the global batch; nothing for a batch that is not to be trained. After an error the next call tries
        to fetch the same batch."""
        self.on_return()
        began = self.used_at = time.perf_counter()
        position, fetcher = self.position, self.fetcher
        position.note()
        self._has_failed = True  # until it has come
        is_idle = fetcher.follow_changes(self.dataset)
        if is_idle or position.cursor.offset == 0:
            self.schedule.check_length(self.dataset, position.cursor.epoch)
        if position.is_skipped(position.cursor):
            step: Step = []
        else:
            if is_idle:
                Loader.in_use.add(self)
                self.fingerprint.stop_looking()
                schedule = replace(self.schedule, micro_batch_size=None) if whole else self.schedule
                fetcher.begin(self.dataset, position.shares(schedule, self.rank, self.world_size))
            step = fetcher.fetch()
        self._has_failed = False
        position.hand_out()
        self.taken += 1
        self.waited_seconds += time.perf_counter() - began
        return step

    def samples(self) -> list[int]:
        """The samples in this rank's share of the batch that was handed out last, or is to be next."""
        return self.position.samples(self.rank, self.world_size)

    def end_epoch(self, epoch: int) -> None:
        """Goes to the beginning of the next epoch, if the loader is still within this one.

        Raises ``ConfigError`` where the loop went on without a batch that could not be fetched, or has gone through more
        epochs than this one.
        """
        if self._has_failed:
            raise ConfigError(
                f"epoch {epoch}: a batch could not be fetched, and the loop continued without the rest of the "
                "epoch; let the error end the program, or let the data set replace a bad sample"
            )
        if self.epoch > epoch + 1:
            times = self.epoch - epoch
            raise ConfigError(
                f"epoch {epoch}: the loop iterated over the loader {times} times, but each pass is an epoch; "
                "iterate once, or make a second Loader"
            )
        if self.epoch == epoch:
            self.close()
            self.position.begin_epoch(epoch + 1)

    def close(self) -> None:
        """Ends the workers; they are started again for the next batch."""
        self.fetcher.close()

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last, as plain numbers and words."""
        fingerprint = self.fingerprint.value(self.dataset)
        return {
            **self.position.state_dict(),
            **({} if fingerprint is None else {"fingerprint": [list(each) for each in fingerprint]}),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``Mismatch`` where a saved position is not one in this data, ``Corrupt`` where it is none at all."""
        Position.restored(self.schedule, state)
        self.fingerprint.refuse_others(self.dataset, state.get("fingerprint"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position, in the order that its run began with. Raises as ``check_state_dict`` does."""
        position = Position.restored(self.schedule, state)
        self.fingerprint.refuse_others(self.dataset, state.get("fingerprint"))
        self.close()
        self.position, self.schedule = position, position.schedule
        self.taken, self._has_failed = 0, False
        self._goes_on = position.cursor.offset > 0
        self.fingerprint.restore(state.get("fingerprint"))
        saved = Cursor(state["epoch"], state["offset"])
        if position.cursor != saved and self.rank == 0:
            log.warning(
                "epoch %d ends at sample %d: the rest is smaller than a batch, and drop_last was not set before", *saved
            )


def _refuse_beside_batches(**options: Any) -> None:
    """Raises ``ConfigError`` where an option has a value that a batch sampler decides."""
    if names := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"Loader: batch_sampler decides what a batch has; leave {' and '.join(names)} out")


def nothing() -> None:
    """Nobody wants to know."""
