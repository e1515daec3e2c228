"""What all attempts of a run have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.config import RunConfig
from harness.distributed.world import World
from harness.state.capture import State
from harness.training.program_loop import ProgramLoop


@dataclass(frozen=True)
class RunContext:
    """What each attempt of a run is made of.

    ``about`` goes into each manifest, and must be the same on all ranks. ``initialize`` gives a new run what it is to begin
    with, and says what that was.
    """

    world: World
    config: RunConfig
    state: State
    loop: ProgramLoop
    about: Mapping[str, Any]
    initialize: Callable[[], str | None]
