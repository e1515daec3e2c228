"""harness, as its own loop uses it."""

import torch
from torch import nn
from torch.optim import Optimizer

from contenders.protocol import Contender
from harness import Checkpointer
from harness.checkpoint.catalog import Catalog
from harness.config import WorldConfig
from harness.data.seeding import random_state
from harness.distributed.world import SoloWorld, World, join_world
from harness.state.capture import State
from harness.storage.store import open_store
from harness.training.resume import conditions, resume


class Harness(Contender):
    """Saves are made by a ``Checkpointer``, restores by ``resume``, which looks for the newest whole checkpoint itself."""

    world: World = SoloWorld(torch.device("cpu"))

    def join(self) -> None:
        self.world = join_world(WorldConfig(device="cpu"))

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.state = self._state(model, optimizer)
        self.checkpoints = Checkpointer(self.url)

    def save(self, step: int) -> None:
        self.state.progress.step = step
        parts = {**self.state.capture(), "random": {"0": random_state(self.world.device)}}
        self.checkpoints.begin(parts, step=step, meta=conditions(self.world, self.state), is_steady=self.state.is_steady())

    def fence(self) -> None:
        self.checkpoints.fence()

    def wait(self) -> None:
        self.checkpoints.wait()

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        resumed = resume(self.world, Catalog(open_store(self.url)), self._state(model, optimizer))
        assert resumed.step == step

    def _state(self, model: nn.Module, optimizer: Optimizer) -> State:
        return State({"model": model, "optimizer": optimizer}, self.world.device)
