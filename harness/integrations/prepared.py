"""The position in a loader that Accelerate has prepared, as ``transformers.Trainer`` uses it, too.

Such a loader fetches one batch ahead, before the step that precedes it is trained. If a data set or a collator draws random
numbers, no restart could draw the same. ``Prepared`` fetches a batch when it is due.
"""

from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import send_to_device, synchronize_rng_states

from harness.errors import ConfigError
from harness.integrations.position import Position


class Prepared(Position):
    """Gives the batches of a prepared loader. Raises ``ConfigError`` for any other one."""

    def __init__(self, name: str, loader: Any, ranks: int) -> None:
        if not issubclass(type(loader), DataLoaderShard | DataLoaderDispatcher):
            raise ConfigError(
                f"{name}: expected a loader that Accelerate has prepared, found {type(loader).__name__}; pass it through "
                "accelerator.prepare"
            )
        super().__init__(name, loader, ranks)

    @property
    def epoch(self) -> int:
        """As the loader counts them."""
        return int(self.loader.iteration)

    def set_epoch(self, epoch: int) -> None:
        """Also for the batch samplers that Accelerate has wrapped, which it forgets."""
        self.loader.set_epoch(epoch)
        self.loader.iteration = epoch  # a DataLoaderDispatcher has it elsewhere
        inner: Any = getattr(getattr(self.loader, "batch_sampler", None), "batch_sampler", None)
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)

    def _generators(self) -> dict[str, torch.Generator]:
        generator = getattr(self.loader, "synchronized_generator", None)
        return {} if generator is None else {"generator": generator}

    def _is_read_in_order(self) -> bool:
        return issubclass(type(self.loader), DataLoaderShard) and super()._is_read_in_order()

    def _begin(self) -> None:
        loader = self.loader
        if loader.rng_types is not None:
            synchronize_rng_states(loader.rng_types, loader.synchronized_generator)
        loader.begin()
        self.set_epoch(loader.iteration)

    def _given(self, batch: Any, *, is_last: bool) -> Any:
        self.loader.end_of_dataloader = is_last
        return batch if self.loader.device is None else send_to_device(batch, self.loader.device)

    def _end(self) -> None:
        self.loader.end()
