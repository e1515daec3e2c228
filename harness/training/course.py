"""The course of a program's loop: how long it is to be, and how far it is."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.data.loader import Loader
from harness.state.capture import State

log = logging.getLogger(__name__)


ENDLESS = sys.maxsize  # steps of a loop that somebody else ends


@dataclass(frozen=True)
class Length:
    """How long a loop is to be, by steps or by epochs."""

    steps: int | None = None
    epochs: int | None = None

    @property
    def known_steps(self) -> int | None:
        """The number of all steps, where there is one."""
        return None if self.steps is None or self.steps >= ENDLESS else self.steps

    def is_last_step(self, step: int) -> bool:
        """Whether no step comes after this one."""
        return self.steps is not None and step >= self.steps

    def is_reached(self, step: int, epoch: int) -> bool:
        """Whether the loop is at its own end."""
        return self.is_last_step(step) or (self.epochs is not None and epoch >= self.epochs)


@dataclass(frozen=True)
class Place:
    """Where a rank is: its last step, how often it has called ``run.step()`` in this process, and the samples it trains."""

    rank: int
    step: int
    boundaries: int
    samples: Sequence[int]


class Course:
    """Follows the loops of a program, one after the other."""

    def __init__(self, rank: int, state: State, loader: Loader | None) -> None:
        self._rank, self._state, self._loader = rank, state, loader
        self.length = Length()
        self.boundaries = 0  # that this process has seen
        self.is_under_way = False  # the newest loop has not come to its own end
        self._loops = 0  # that have begun
        self._epoch_before = 0  # at the boundary before

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._loader.epoch if self._loader is not None else self._state.progress.epoch

    def place(self) -> Place:
        """Where this rank is."""
        loader = self._loader
        samples = loader.samples() if loader is not None else []
        return Place(self._rank, self._state.progress.step, self.boundaries, samples)

    def shown(self, step: int) -> str:
        """A step for people: ``12``, or ``12/100`` where the number of all is known."""
        return str(step) if self.length.known_steps is None else f"{step}/{self.length.known_steps}"

    def __str__(self) -> str:
        return f"step {self.shown(self._state.progress.step)}  epoch {self.epoch}"

    @contextlib.contextmanager
    def under_way(self, length: Length) -> Iterator[None]:
        """The time of a loop."""
        self.length = length
        self._loops += 1
        self.is_under_way = True
        if self.has_finished():
            log.warning(
                "run.finish() ended this run early, at step %s; nothing is left to train. To train on, pass "
                "reopen=True to Run",
                self._state.progress.step,
            )
        yield
        self.is_under_way = False

    def begin_here(self) -> int | None:
        """The loop continues from the position of the state. Returns the total of steps, if it is known."""
        self._epoch_before = self.epoch
        length = self.length
        by_epochs = length.epochs * len(self._loader) if length.epochs and self._loader is not None else None
        return length.known_steps or by_epochs

    def is_over(self) -> bool:
        """Whether the loop is at its own end, or an earlier attempt has ended it early, for good."""
        return self.has_finished() or self.length.is_reached(self._state.progress.step, self.epoch)

    def has_finished(self) -> bool:
        """Whether an earlier attempt has ended this loop early, for good."""
        return self._loops <= self._state.progress.finished_loops

    def finish(self) -> None:
        """The loop ends here for good."""
        if self.is_under_way:
            self._state.progress.finished_loops = self._loops

    def reach_boundary(self) -> tuple[int, int]:
        """A step is over. Returns the epoch of the boundary before and of this one."""
        self._state.progress.step += 1
        self.boundaries += 1
        return self._next_epochs()

    def end_epoch(self, epoch: int) -> tuple[int, int] | None:
        """The body of an epoch has ended, which the loop may have left early. Returns the epochs as ``reach_boundary`` does,
        where no boundary has shown it."""
        if self._loader is not None:
            self._loader.end_epoch(epoch)
        else:
            self._state.progress.epoch += 1
        return self._next_epochs() if self.epoch != self._epoch_before else None

    def roll_back(self) -> None:
        """The step is over, in its way."""
        self.boundaries += 1

    def close(self) -> None:
        """There is no loop any more."""
        self.is_under_way = False

    def _next_epochs(self) -> tuple[int, int]:
        epochs = self._epoch_before, self.epoch
        self._epoch_before = epochs[1]
        return epochs
