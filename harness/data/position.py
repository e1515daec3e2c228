"""The position of a run in its data, and a ledger of what was trained before it.

The position is data, not replay: it says how many samples of which epoch have been trained, at any world size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from harness.data.order import ALGORITHMS, BATCH_SAMPLER, RANDPERM, WEIGHTS
from harness.data.schedule import Cursor, MicroBatch, Schedule
from harness.errors import Corrupt, Mismatch

_BLOCK_SAMPLES = 1 << 14  # of an epoch, at whose beginning the ledger is known, too; a resume computes as many at most


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that is not trained: where it begins, and how many samples it has."""

    epoch: int
    offset: int
    samples: int


class Position:
    """Where a loader is in its data. What was handed out last counts as trained when ``note`` is called."""

    def __init__(self, schedule: Schedule, cursor: Cursor | None = None) -> None:
        self.schedule = schedule
        self.cursor = schedule.settled(cursor or Cursor())  # after the batch that was handed out last
        self.latest: Cursor | None = None  # the batch that was handed out last
        self.skipped: list[SkippedBatch] = []  # batches that are not to be trained, here and later on
        self._handed_out: Cursor | None = None  # the batch that is being trained, and is not in the ledger yet
        self._ledger = Ledger(schedule)

    @classmethod
    def restored(cls, schedule: Schedule, state: Mapping[str, Any]) -> "Position":
        """A saved position. Raises ``Mismatch`` where it is not one in this data, ``Corrupt`` where it is none at all.

        The run goes on with the algorithm that it began with: the position's own schedule may have another one.
        """
        for key, live in (("seed", schedule.seed), ("samples", schedule.samples)):
            if (saved := state.get(key)) != live:
                raise Mismatch(f"{key}: the checkpoint was written with {saved!r}, the loader has {live!r}")
        numbers = [state.get("epoch"), state.get("offset")]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise Corrupt(f"impossible position in the data: epoch {numbers[0]!r}, offset {numbers[1]!r}")
        algorithm = state.get("order", RANDPERM)  # before there was another, states had no name
        if algorithm not in (known := (*ALGORITHMS, WEIGHTS, BATCH_SAMPLER)):
            names = ", ".join(known)
            raise Mismatch(
                f"order: the checkpoint was written with {algorithm!r}, this version of harness knows {names}; resume with "
                "the version of harness that wrote the checkpoint, or a later one"
            )
        _refuse_others(schedule.given, state)
        if not schedule.given:
            schedule = replace(schedule, algorithm=algorithm)
        cursor = Cursor(state["epoch"], state["offset"])
        schedule.refuse(cursor)
        position = cls(schedule, cursor)
        position._ledger = Ledger.restored(schedule, cursor, state)
        position.skipped = [SkippedBatch(*each) for each in state["gaps"]]
        return position

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last, as plain numbers and words."""
        self.note()
        given = self.schedule.given
        order = next(iter(given), self.schedule.algorithm)
        return {
            "seed": self.schedule.seed,
            "samples": self.schedule.samples,
            **({} if order == RANDPERM else {"order": order}),
            **given,
            "epoch": self.cursor.epoch,
            "offset": self.cursor.offset,
            "gaps": [[each.epoch, each.offset, each.samples] for each in self.skipped],
            **self._ledger.state_dict(self.cursor),
        }

    @property
    def batch(self) -> int:
        """The number of the batch that was handed out last, within its epoch and from 0; -1 before the first one."""
        if self.latest is not None:
            return self.schedule.number(self.latest)
        return self.schedule.number(self.cursor) - 1

    @property
    def trained_epoch(self) -> int:
        """The epoch of the batch that was handed out last."""
        return (self._handed_out or self.cursor).epoch

    def samples(self, rank: int, world_size: int) -> list[int]:
        """The samples in a rank's share of the batch that was handed out last, or is to be next."""
        share = next(self.schedule.steps(self._handed_out or self.cursor, rank, world_size))
        return [index for micro_batch in share for index in micro_batch.indices]

    def shares(self, schedule: Schedule, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """What a rank trains, from here on and without end; batches that are not to be trained are not even fetched."""
        cursor = self.cursor
        for share in schedule.steps(cursor, rank, world_size):
            if not self.is_skipped(cursor):
                yield share
            cursor = schedule.after(cursor)

    def hand_out(self) -> None:
        """The batch that begins here has come."""
        self._handed_out = self.latest = self.cursor
        self.cursor = self.schedule.after(self.cursor)

    def note(self) -> None:
        """Puts the batch that was handed out last into the ledger: it has been trained."""
        if self._handed_out is not None:
            here, self._handed_out = self._handed_out, None
            (self._ledger.skip if self.is_skipped(here) else self._ledger.add)(here)

    def is_skipped(self, cursor: Cursor) -> bool:
        """Whether the batch that begins here is not to be trained."""
        return bool(self.skipped) and any((each.epoch, each.offset) == cursor for each in self.skipped)

    def skip(self) -> SkippedBatch:
        """Notes that the batch that was handed out last is not trained."""
        assert self._handed_out is not None, "there is a batch to skip"
        here, self._handed_out = self._handed_out, None
        skipped = SkippedBatch(here.epoch, here.offset, self.schedule.size(here))
        self.skipped = [*self.skipped, skipped]
        self._ledger.skip(here)
        return skipped

    def begin_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; what is left of the one before is not trained."""
        self.note()
        self._ledger.go_to(epoch)
        self.cursor = Cursor(epoch)


def _refuse_others(given: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Raises ``Mismatch`` where what the user has given for the order is not that of a saved position."""
    for key in (WEIGHTS, BATCH_SAMPLER):
        saved, live = state.get(key), given.get(key)
        if saved != live:
            found = (
                f"the checkpoint was written without {key}, the loader has {key}"
                if saved is None
                else f"the checkpoint was written with {key}, the loader has none"
                if live is None
                else f"the checkpoint was written with other {key}"
            )
            raise Mismatch(f"{key}: {found}; give the Loader what the run began with, or start a new run")


class Ledger:
    """A running hash of the samples that were trained, in order.

    It is a chain: the hash of each block of an epoch begins with that of everything before. The state also has the one at
    the beginning of the block, so that a resume checks it at the cost of one block. With ``randperm`` an epoch is a block.
    """

    def __init__(self, schedule: Schedule, epoch: int = 0, left_out: Sequence[Sequence[int]] = ()) -> None:
        self._schedule = schedule
        self._has_blocks = schedule.algorithm != RANDPERM
        self._key = "ledger_at_block" if self._has_blocks else "ledger_at_epoch"
        self._epoch = epoch
        self._left_out = [list(interval) for interval in left_out]  # of the epoch, offsets from and to
        self._link("")

    @classmethod
    def restored(cls, schedule: Schedule, cursor: Cursor, state: Mapping[str, Any]) -> "Ledger":
        """The ledger at a position. Raises ``Mismatch`` where the samples before it are not those that were trained."""
        ledger = cls(schedule, cursor.epoch, state["left_out"])
        ledger._link(state[ledger._key])
        start = cursor.offset - cursor.offset % _BLOCK_SAMPLES if ledger._has_blocks else 0
        done = np.ones(cursor.offset - start, dtype=bool)
        for begin, end in ledger._left_out:
            done[max(begin - start, 0) : max(end - start, 0)] = False
        ledger._hash(schedule.order(cursor.epoch, start, cursor.offset)[done])
        if ledger._hasher.hexdigest() != state["ledger"]:
            raise Mismatch(
                f"the samples trained in epoch {cursor.epoch} before offset {cursor.offset} differ from those of "
                "this loader: data would be skipped or trained twice"
            )
        return ledger

    def state_dict(self, cursor: Cursor) -> dict[str, Any]:
        self.go_to(cursor.epoch)
        return {"ledger": self._hasher.hexdigest(), self._key: self._before, "left_out": self._left_out}

    def add(self, here: Cursor) -> None:
        """A batch has been trained."""
        self._pass(here, is_trained=True)

    def skip(self, here: Cursor) -> None:
        """A batch has been left out."""
        self._pass(here, is_trained=False)
        self._left_out.append([here.offset, here.offset + self._schedule.size(here)])

    def go_to(self, epoch: int) -> None:
        """What comes next is in this epoch; what is left of the one before is not trained."""
        if epoch != self._epoch:
            self._epoch, self._left_out = epoch, []
            self._link(self._hasher.hexdigest())

    def _pass(self, here: Cursor, *, is_trained: bool) -> None:
        self.go_to(here.epoch)
        start, stop = here.offset, here.offset + self._schedule.size(here)
        while start < stop:
            begin = start
            block_end = start - start % _BLOCK_SAMPLES + _BLOCK_SAMPLES if self._has_blocks else stop
            start = min(block_end, stop)
            if is_trained:
                self._hash(self._schedule.order(here.epoch, begin, start))
            if self._has_blocks and start == block_end:
                self._link(self._hasher.hexdigest())

    def _link(self, before: str) -> None:
        """A block begins, and ``before`` is the ledger there."""
        self._before = before
        self._hasher = xxhash.xxh3_128(before.encode())

    def _hash(self, samples: NDArray[np.int64]) -> None:
        self._hasher.update(samples.data)
