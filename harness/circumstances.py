"""What all attempts of a run have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import RunConfig
from harness.state import State
from harness.world import World


@dataclass(frozen=True)
class Place:
    """Where a rank is: its last step, how often it has called ``run.step()`` in this process, and the samples it trains."""

    rank: int
    step: int
    boundaries: int
    samples: Sequence[int]


@dataclass(frozen=True)
class Circumstances:
    """What each attempt of a run is made of.

    ``initialize`` gives a new run what it is to begin with, and says what it was; ``about`` must be the same on all ranks;
    ``describe_save`` says what a manifest has beside it and the state; ``shown`` has a step as people see it; ``place`` is
    where this rank is.
    """

    world: World
    config: RunConfig
    state: State
    about: Mapping[str, Any]
    initialize: Callable[[], str | None]
    describe_save: Callable[[], Mapping[str, Any]]
    shown: Callable[[int], str]
    place: Callable[[], Place]
