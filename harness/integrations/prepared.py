"""The position in a loader that Accelerate has prepared, as the loops of Accelerate and of ``transformers.Trainer`` use it.

A resume must give the same batches, and leave the random numbers of the training as they were. Accelerate fetches one batch
ahead, before the step that precedes it is trained: then neither holds, if a data set or a collator draws random numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import send_to_device, synchronize_rng_states
from torch.utils.data import DataLoader, IterableDataset

import harness
from harness.errors import ConfigError, Mismatch

_CPU = torch.device("cpu")  # the data is made there; the device's own generator is the training's
_END = object()


class Position:
    """Gives the batches of a prepared loader, and continues within an epoch after a restart.

    A map-style data set that is read in this process is read from the batch that is due, and no earlier: its samplers draw
    the epoch's order once more. Anything else, a stream or the work of loader workers, is read again from the beginning of
    the epoch, and has random numbers of its own: then the same are drawn again.

    ``on_return`` is called when the loop asks for another batch, before anything else.
    """

    per_rank = True

    def __init__(self, name: str, loader: Any, ranks: int) -> None:
        if not issubclass(type(loader), DataLoaderShard | DataLoaderDispatcher):
            raise ConfigError(
                f"{name}: expected a loader that Accelerate has prepared, found {type(loader).__name__}; pass it through "
                "accelerator.prepare"
            )
        self.loader = loader
        self.on_return: Callable[[], None] = lambda: None
        self.batches = 0
        """Those that the loop has been given in this epoch."""
        self._name, self._ranks = name, ranks
        self._began: Mapping[str, Any] = {}  # the random numbers at the beginning of the epoch
        self._goes_on = False  # within an epoch, after a restart

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random numbers from which the epoch has begun."""
        return {"epoch": self.loader.iteration, "batches": self.batches, "began": self._began, "ranks": self._ranks}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``Mismatch`` where the checkpoint has the position of another number of ranks."""
        if state["ranks"] != self._ranks:
            raise Mismatch(
                f"{self._name}: the checkpoint has the position of {state['ranks']} ranks, and the run has {self._ranks}; "
                "start with as many ranks as before"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from here."""
        self.batches, self._began = state["batches"], state["began"]
        self._goes_on = self.batches > 0
        self.set_epoch(state["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Has the samplers draw the order of an epoch."""
        self.loader.set_epoch(epoch)
        inner = getattr(getattr(self.loader, "batch_sampler", None), "batch_sampler", None)
        if hasattr(inner, "set_epoch"):  # Accelerate does not look that far
            inner.set_epoch(epoch)

    def end_epoch(self) -> None:
        """The loop has left the epoch."""
        self.batches, self._began, self._goes_on = 0, {}, False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        goes_on, self._goes_on = self._goes_on, False
        if not goes_on:
            self.on_return()  # the body of the last step of the epoch before is over
            self.batches, self._began = 0, self._random_state()
        epoch = self.loader.iteration
        batches = self._from_here() if self._is_read_in_order() else self._from_the_beginning()
        try:
            while True:
                if self.batches or goes_on:
                    self.on_return()
                goes_on = False
                if (batch := next(batches, _END)) is _END:
                    break
                self.batches += 1
                yield batch
        finally:
            batches.close()
        self.end_epoch()
        self.loader.iteration = epoch + 1

    def _random_state(self) -> dict[str, Any]:
        generator = getattr(self.loader, "synchronized_generator", None)
        own = {} if generator is None else {"generator": generator.get_state()}
        return {"process": harness.random_state(_CPU), **own}

    def _begin_again(self) -> None:
        """Sets the generators to the beginning of the epoch."""
        harness.restore_random_state(self._began["process"], _CPU)
        if "generator" in self._began:
            self.loader.synchronized_generator.set_state(self._began["generator"])

    def _is_read_in_order(self) -> bool:
        loader = self.loader
        return (
            issubclass(type(loader), DataLoaderShard)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
            and loader.num_workers == 0
            and hasattr(loader.batch_sampler, "__len__")
        )

    def _from_here(self) -> Iterator[Any]:
        """As ``DataLoaderShard`` does it, but for the batch ahead."""
        loader, skipped = self.loader, self.batches
        kept = harness.random_state(_CPU)
        if skipped:
            self._begin_again()
        if loader.rng_types is not None:
            synchronize_rng_states(loader.rng_types, loader.synchronized_generator)
        loader.begin()
        try:
            self.set_epoch(loader.iteration)
            order = iter(loader.batch_sampler)
            batches = iter(
                DataLoader(
                    loader.dataset,
                    batch_sampler=_Rest(order),
                    collate_fn=loader.collate_fn,
                    pin_memory=loader.pin_memory,
                    generator=loader.generator,
                )
            )
            for _ in range(skipped):
                next(order)
            if skipped:
                harness.restore_random_state(kept, _CPU)
            last = len(loader) - 1
            for index, batch in enumerate(batches, skipped):
                loader.end_of_dataloader = index == last
                moved = batch if loader.device is None else send_to_device(batch, loader.device)
                yield moved
        finally:
            loader.end()

    def _from_the_beginning(self) -> Iterator[Any]:
        """As the loader does it, with random numbers of its own."""
        stream = _Stream(self._began["process"])
        skipped = self.batches
        with stream.drawn_from():
            if skipped:
                self._begin_again()
            self.set_epoch(self.loader.iteration)
            batches = iter(self.loader)
        index = 0
        while True:
            with stream.drawn_from():
                batch = next(batches, _END)
            if batch is _END:
                return
            index += 1
            if index > skipped:
                yield batch


class _Rest:
    """What is left of an epoch's order, as a batch sampler."""

    def __init__(self, order: Iterator[Any]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[Any]:
        return self._order


class _Stream:
    """Random numbers beside those of the training."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    @contextlib.contextmanager
    def drawn_from(self) -> Iterator[None]:
        """The time in which this process draws from the stream."""
        kept = harness.random_state(_CPU)
        harness.restore_random_state(self._state, _CPU)
        try:
            yield
        finally:
            self._state = harness.random_state(_CPU)
            harness.restore_random_state(kept, _CPU)
