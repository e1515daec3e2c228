"""What is examined."""

from dataclasses import dataclass

import torch

from harness.checkpoint.store import Store
from harness.config import Config
from harness.task import Task
from harness.world import World


@dataclass
class Case:
    """A run on one rank, and what the checks have learnt of it so far: each may use what those before it have found."""

    config: Config
    world: World  # gloo on CPUs, whatever the run will use
    hosts: list[str]  # of every rank
    device: torch.device | None = None  # the run's; None where it cannot be had
    task: Task | None = None  # None where it cannot be built
    state_bytes: int | None = None  # of a checkpoint, on rank 0
    store: Store | None = None  # on rank 0, where it has shown that it works
    put_bytes_per_second: float | None = None  # on rank 0
    saves: int = 0  # whole checkpoints that the run has already, on rank 0
    last_save_seconds: float | None = None  # on rank 0
    micro_batch_bytes: int | None = None  # on the first rank of each machine

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0

    @property
    def save_seconds(self) -> float | None:
        """What a save will take, as far as can be told: what the last one took, or else by the measured speed."""
        if self.last_save_seconds is not None:
            return self.last_save_seconds
        if self.state_bytes is None or self.put_bytes_per_second is None:
            return None
        return self.state_bytes / self.put_bytes_per_second
