"""A step boundary, as far as it is no save: the random streams begin again, and a survivor's state is noted."""

from collections.abc import Mapping
from typing import Any

from harness.data.streams import keys_here, seed_streams
from harness.distributed.world import World
from harness.state.capture import State
from harness.training.progress_log import ProgressLog
from harness.training.saves import Saves


class Boundary:
    """What happens where the body of a step is over, or all of it but its evaluation."""

    def __init__(self, world: World, state: State, log: ProgressLog) -> None:
        self._world, self._state, self._log = world, state, log
        self._saves = Saves()

    def begin_here(self, saves: Saves) -> None:
        """A loop begins; ``saves`` are those of the attempt. A new run notes the keys of its streams. All ranks call it."""
        self._saves = saves
        progress = self._state.progress
        if progress.random_keys == []:
            progress.random_keys = self._world.all_gather(keys_here(self._state.device))

    def reached(self) -> None:
        """The body of a step is over: the state is what a checkpoint of this step has."""
        self._begin_streams(self._state.progress.step)
        self._saves.keeper.note(is_seen=self._saves.sees_optimizers)

    def take_half(self) -> Mapping[str, Any] | None:
        """The metrics of the step that comes now, where the attempt before has died between its training and its boundary:
        those that all ranks knew."""
        progress = self._state.progress
        half, progress.half = progress.half, None
        return half

    def trained(self) -> None:
        """The optimizer has taken its step, and nothing but an evaluation comes before the boundary. ``harness train``
        begins with that evaluation where an attempt has died in it."""
        self._saves.keeper.note(half={})

    def evaluating(self, metrics: Mapping[str, Any]) -> None:
        """The evaluation begins, and draws from the streams of the boundary. All ranks have the buffers of rank 0.

        An evaluation takes long, and a rank that dies in it takes its part of the metrics along: so their means come first.
        """
        self._begin_streams(self._state.progress.step + 1)
        self._saves.keeper.note(half=self._log.means(metrics))
        self._saves.keeper.took_first_buffers()

    def _begin_streams(self, step: int) -> None:
        if keys := self._state.progress.random_keys:
            seed_streams(keys[self._world.rank], step, self._state.device)
