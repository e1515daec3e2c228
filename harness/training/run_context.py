"""What all attempts of a run have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.config import RunConfig
from harness.data.loader import Loader
from harness.distributed.world import World
from harness.state.capture import State
from harness.training.course import Course
from harness.training.save_policy import SavePolicy


@dataclass(frozen=True)
class RunContext:
    """What a run, and each attempt of it, is made of.

    ``about`` goes into each manifest, and must be the same on all ranks. ``initialize`` gives a new run what it is to begin
    with, and says what that was.
    """

    world: World
    config: RunConfig
    state: State
    loader: Loader | None
    course: Course
    about: Mapping[str, Any]
    initialize: Callable[[], str | None]

    @property
    def policy(self) -> SavePolicy:
        """When it saves."""
        return SavePolicy(self.config.checkpoint)
