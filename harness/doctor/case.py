"""What is examined."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.config import RunConfig
from harness.data.loader import Loader
from harness.distributed.world import World
from harness.state.capture import State
from harness.storage.store import Store
from harness.task import Task


@dataclass
class Case:
    """A run on one rank, and what the checks have learnt of it so far: each may use what those before it have found.

    ``config`` is a ``Config`` for ``harness train``, whose task makes the state. A script has made its state itself.
    """

    config: RunConfig
    world: World  # for harness train gloo on CPUs, whatever the run will use; a script's own
    hosts: list[str]  # of every rank
    device: torch.device | None = None  # the run's; None where it cannot be had
    task: Task | None = None  # None for a script, and where it cannot be built
    objects: Mapping[str, Any] | None = None  # the state as a Run is given it; None where it cannot be built
    fresh: bool = False  # whether a run that is there is to be refused
    state_bytes: int | None = None  # of a checkpoint, on rank 0
    store: Store | None = None  # on rank 0, where it has shown that it works
    put_bytes_per_second: float | None = None  # on rank 0
    saves: int = 0  # whole checkpoints that the run has already, on rank 0
    last_save_seconds: float | None = None  # on rank 0
    last_save_bytes: int = 0  # on rank 0
    skips_newest: bool = False  # whether the next start takes the checkpoint before the newest, on rank 0
    micro_batch_bytes: int | None = None  # on the first rank of each machine
    _state: State | None = None

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0

    @property
    def loader(self) -> Loader | None:
        """The loader of harness's among the state."""
        return next((each for each in (self.objects or {}).values() if isinstance(each, Loader)), None)

    def state(self) -> State:
        """The state, made once. Raises what a ``Run`` would."""
        assert self.objects is not None, "what cannot be built is not looked at"
        if self._state is None:
            device = self.device if self.task is None and self.device is not None else torch.device("cpu")
            self._state = State(self.objects, device)
        return self._state

    @property
    def has_state(self) -> bool:
        """Whether it could be made."""
        return self._state is not None

    @property
    def save_seconds(self) -> float | None:
        """An estimate of what a save will take: what the last one took, or else by the measured speed."""
        if self.last_save_seconds is not None:
            return self.last_save_seconds
        if self.state_bytes is None or self.put_bytes_per_second is None:
            return None
        return self.state_bytes / self.put_bytes_per_second
