"""When a run saves: decided from numbers alone, without a clock."""

import enum
import math
from dataclasses import dataclass

from harness.config import CheckpointConfig
from harness.data.schedule import is_due


class Due(enum.IntEnum):
    """What is to be done when the body of a step has ended. Of two, the larger one counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2  # a save that must succeed, and then the end


@dataclass(frozen=True)
class SavePolicy:
    """The intervals of ``checkpoint.*``."""

    config: CheckpointConfig

    def is_overdue(self, seconds: float, auto_seconds: float = math.inf) -> bool:
        """Whether another save is due, ``seconds`` after the last one; ``auto_seconds`` is what ``auto`` means now."""
        every = auto_seconds if self.config.every_seconds == "auto" else self.config.every_seconds
        return every is not None and seconds >= every

    def due(self, step: int, epochs: tuple[int, int], *, is_asked: bool, is_best: bool, is_stop: bool) -> Due:
        """What follows from the boundary of ``step``. ``epochs`` are those of the boundary before and of this one.

        ``is_asked`` says that the ranks have agreed on a save, ``is_best`` that this step's evaluation is the best so far.
        """
        if is_stop:
            return Due.STOP
        checkpoint = self.config
        is_new_best = checkpoint.keep_best and is_best
        if is_asked or is_new_best or is_due(step, epochs, checkpoint.every_steps, checkpoint.every_epochs):
            return Due.SAVE
        return Due.NOTHING

    def due_after_epoch(self, epochs: tuple[int, int]) -> Due:
        """What follows from the end of an epoch that no step boundary has shown."""
        return Due.SAVE if is_due(1, epochs, None, self.config.every_epochs) else Due.NOTHING

    @property
    def has_intervals(self) -> bool:
        """Whether anything is saved before the end of the run."""
        intervals = (self.config.every_steps, self.config.every_seconds, self.config.every_epochs)
        return intervals != (None, None, None)
