"""harness, as its own loop uses it."""

import torch
from torch import nn
from torch.optim import Optimizer

from contenders.protocol import Contender
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.saver import Saver
from harness.checkpoint.store import open_store
from harness.config import WorldConfig
from harness.resume import conditions, resume
from harness.state import State, random_state
from harness.world import SoloWorld, World, join_world


class Harness(Contender):
    """Saves are made by ``Saver``, restores by ``resume``, which looks for the newest whole checkpoint itself."""

    world: World = SoloWorld(torch.device("cpu"))

    def join(self) -> None:
        self.world = join_world(WorldConfig(device="cpu"))

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        catalog = Catalog(open_store(self.url))
        self.state = self._state(model, optimizer)
        self.saver = Saver(
            catalog=catalog,
            attempt=catalog.claim_attempt({}),
            lineage=[],
            retention=Retention(),
            shard_bytes=catalog.store.shard_bytes,
            streams=catalog.store.streams,
            failures_allowed=0,
        )

    def save(self, step: int) -> None:
        self.state.progress.step = step
        parts = {**self.state.capture(), "random": {"0": random_state(self.world.device)}}
        self.saver.begin(parts, step=step, meta=conditions(self.world), is_steady=self.state.is_steady())

    def fence(self) -> None:
        self.saver.fence()

    def wait(self) -> None:
        self.saver.wait()

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        resumed = resume(self.world, Catalog(open_store(self.url)), self._state(model, optimizer))
        assert resumed is not None
        assert resumed.step == step

    def _state(self, model: nn.Module, optimizer: Optimizer) -> State:
        return State({"model": model, "optimizer": optimizer}, self.world.device)
