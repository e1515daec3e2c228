"""When the body of a step ends.

A save has to hold all that a loop does in a step, also after ``run.step()``. So what is due there waits until the loop asks
for more: its loader for a batch, ``run.steps`` for a step, ``run.epochs`` for an epoch. Where nobody sees that, the body of
a step ends at its boundary.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

from harness.data.loader import Loader, nothing
from harness.data.loaders import Epochs
from harness.state.capture import State
from harness.training.save_policy import Due


class Bodies:
    """Follows the bodies of the steps of a loop.

    ``on_over`` is called when a body has ended, and then ``on_end`` where something is due, with that; ``on_more`` before,
    when a loader shows that it has; and ``fence`` before the loop may change what a save is still copying.
    """

    def __init__(
        self,
        state: State,
        loader: Loader | None,
        *,
        fence: Callable[[], None],
        on_more: Callable[[], None],
        on_over: Callable[[], None],
        on_end: Callable[[Due], None],
    ) -> None:
        self._state, self._loader = state, loader
        self._fence, self._on_more, self._on_over, self._on_end = fence, on_more, on_over, on_end
        self._always_show = False  # the ends of the bodies of this loop
        self.ends_show = False
        """Whether the loop comes back here, or to a loader that tells, when it has done with a step."""
        self._is_open = False  # the body of the step that was just taken has not ended
        self._due = Due.NOTHING
        self._given_by: Epochs | None = None  # the newest batch, where a loader of torch's kind tells
        self._trained_from: Epochs | None = None  # the last step, likewise

    @contextlib.contextmanager
    def followed(self, *, is_by_steps: bool) -> Iterator[None]:
        """The time of a loop, which shows where it is by what it asks its loader for."""
        self._always_show = self.ends_show = is_by_steps or self._loader is not None
        self._due = Due.NOTHING
        if self._loader is not None:
            self._loader.on_return, self._loader.on_exit = self._end_of_batch, self._fence
        for each in self._state.epochs if self._loader is None else ():
            each.epoch = self._state.progress.epoch
            each.on_return = functools.partial(self._end_of_batch, each)
            each.on_give = functools.partial(setattr, self, "_given_by", each)
        try:
            yield
        finally:
            if self._loader is not None:
                self._loader.on_return = self._loader.on_exit = nothing
            for each in self._state.epochs:
                each.on_return = each.on_give = nothing

    def reach_boundary(self, due: Due) -> None:
        """The optimizer has taken its step, and the body goes on. What the boundary before has left is still due."""
        self._is_open = True
        self._trained_from = self._given_by
        self.ends_show = self._always_show or self._trained_from is not None
        if due:
            self._due = max(self._due, due)

    def save_next(self) -> None:
        """Has a save made at the end of the next body."""
        self._due = max(self._due, Due.SAVE)

    def save_at_end(self) -> None:
        """Has a save made at the end of this body; at once where that has come, and nobody sees the next one."""
        if self._is_open:
            self._due = max(self._due, Due.SAVE)
        elif not self.ends_show:
            self._on_end(Due.SAVE)

    def end_unseen(self) -> None:
        """The boundary is over, and with it the body where nobody sees its end."""
        if not self.ends_show:
            self.end()

    def end(self, due: Due = Due.NOTHING) -> None:
        """The loop has done with a step, and with all that it does after it: now is the time for what is due."""
        due, self._due, self._is_open = self._due or due, Due.NOTHING, False
        self._on_over()
        if due:
            self._on_end(due)

    def forget(self) -> None:
        """Nothing is due any more."""
        self._due = Due.NOTHING

    def _end_of_batch(self, asked: Epochs | None = None) -> None:
        """The loop asks for another batch, from the Loader in the state or from the loader that is ``asked``."""
        if self._is_open and asked is self._trained_from:
            self._on_more()
            self.end()
