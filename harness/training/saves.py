"""What a run asks of the saves of an attempt."""

from collections.abc import Callable, Mapping
from typing import Any

from harness.training.keeper import NoKeeper


class Saves:
    """The saves of an attempt; of this very class where the run has no URL, and nothing is saved."""

    keeper = NoKeeper()
    sees_optimizers = True  # before they change anything, which a graph of a device does by itself
    is_first_due = False  # the first boundary is to be saved: what the attempt has resumed from is not durable

    @property
    def settled(self) -> int:
        """Of the newest save that has ended, as this rank knows: its step twice, and 1 if it is durable."""
        return 0

    def fence(self) -> None:
        """Called before anything may change what a save may still be copying."""

    def poll(self) -> None:
        """Tells of a save that has been committed since."""

    def wait(self) -> None:
        """Waits for a save that is under way. All ranks call it; none continues without knowing the error of rank 0."""

    def is_wanted(self) -> bool:
        """Whether this rank asks for a save: ``checkpoint.every_seconds`` have passed by rank 0's clock, or the last one saw
        the state change while it was copied."""
        return False

    def save(self, describe: Callable[[], Mapping[str, Any]], *, must_succeed: bool) -> None:
        """Saves beside the training, or, where it is the last thing to happen, before that goes on. All ranks call it.

        ``describe`` says what a manifest is to have of where the loop is; it is called on all ranks.
        """

    def begin_here(self) -> None:
        """The interval runs from now on."""

    def warn_of_lost_steps(self, step: int) -> None:
        """Says so where what came before ``step`` is not saved, and the loop was left."""

    def has_end(self) -> bool:
        """Whether the newest checkpoint has everything as it is now: a loop may change something after its last save. All
        ranks call it."""
        return True

    def can_roll_back(self) -> bool:
        """Whether there is a checkpoint to go back to. All ranks call it."""
        return False

    def refuse_superseded(self) -> None:
        """Raises ``Superseded`` where a newer attempt trains this run. All ranks call it."""

    def let_end(self, seconds: float) -> None:
        """Leaves a save that is under way some time. Any thread may call it."""

    def give_up_after(self, seconds: float) -> None:
        """The same, and whatever comes of it, there is no other save."""
