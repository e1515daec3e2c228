"""The position in a loader of torch's, for a library that has a loop of its own.

A resume must give the same batches, and leave the random numbers of the training as they were.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

import harness
from harness.errors import Mismatch

_CPU = torch.device("cpu")  # the data is made there; the device's own generator is the training's
_END = object()


class Position:
    """Gives the batches of a loader, and continues within an epoch after a restart.

    A map-style data set that is read in this process is read from the batch that is due, and no earlier: its samplers draw
    the epoch's order once more. Anything else, a stream or the work of loader workers, is read again from the beginning of
    the epoch, and has random numbers of its own: then the same are drawn again.

    ``on_return`` is called when the loop asks for another batch, before anything else.
    """

    per_rank = True

    def __init__(self, name: str, loader: Any, ranks: int) -> None:
        self.loader = loader
        self.on_return: Callable[[], None] = lambda: None
        self.batches = 0
        """Those that the loop has been given in this epoch."""
        self._name, self._ranks = name, ranks
        self._began: Mapping[str, Any] = {}  # the random numbers at the beginning of the epoch
        self._goes_on = False  # within an epoch, after a restart

    # --- its state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random numbers from which the epoch has begun."""
        return {"epoch": self.epoch, "batches": self.batches, "began": self._began, "ranks": self._ranks}

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

    # --- what a library's loaders do otherwise -----------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """That of the loader, where it has one."""
        return 0

    def set_epoch(self, epoch: int) -> None:
        """Has the samplers draw the order of an epoch."""

    def _begin(self) -> None:
        """An epoch begins that this object reads in order."""

    def _given(self, batch: Any, *, is_last: bool) -> Any:
        """A batch as the loop gets it."""
        del is_last
        return batch

    def _end(self) -> None:
        """That epoch is over, or left."""

    def _generators(self) -> dict[str, torch.Generator]:
        """What the loader draws from beside the generators of the process."""
        own = {"loader": self.loader.generator, "sampler": getattr(self.loader.sampler, "generator", None)}
        return {name: each for name, each in own.items() if each is not None}

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """The loop has left the epoch."""
        self.batches, self._began, self._goes_on = 0, {}, False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        goes_on, self._goes_on = self._goes_on, False
        if not goes_on:
            self.end_epoch()
        self.on_return()  # the body of the last step is over
        if not goes_on:
            own = {name: each.get_state() for name, each in self._generators().items()}
            self._began = {"process": harness.random_state(_CPU), **own}
        epoch = self.epoch
        batches = self._from_here() if self._is_read_in_order() else self._from_the_beginning()
        try:
            while (batch := next(batches, _END)) is not _END:
                self.batches += 1
                yield batch
                self.on_return()
        finally:
            batches.close()
        self.end_epoch()
        self.set_epoch(epoch + 1)

    def _is_read_in_order(self) -> bool:
        loader = self.loader
        is_plain = not isinstance(loader.dataset, IterableDataset) and loader.num_workers == 0
        return is_plain and hasattr(loader.batch_sampler, "__len__")

    def _from_here(self) -> Generator[Any, None, None]:
        loader, skipped = self.loader, self.batches
        kept = harness.random_state(_CPU)
        if skipped:
            _set(self._generators(), self._began)
        self._begin()
        try:
            order = iter(loader.batch_sampler)
            rest = DataLoader(
                loader.dataset,
                batch_sampler=_Rest(order),
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                generator=loader.generator,
            )
            batches = iter(rest)
            for _ in range(skipped):
                next(order)
            if skipped:
                harness.restore_random_state(kept, _CPU)
            last = len(loader) - 1
            for index, batch in enumerate(batches, skipped):
                yield self._given(batch, is_last=index == last)
        finally:
            self._end()

    def _from_the_beginning(self) -> Generator[Any, None, None]:
        stream, skipped = _Stream(self._began["process"]), self.batches
        with stream.drawn_from():
            if skipped:
                _set(self._generators(), self._began)
            self.set_epoch(self.epoch)
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


def _set(generators: Mapping[str, torch.Generator], states: Mapping[str, Any]) -> None:
    """Sets them, and the process's own, to the states of an epoch's beginning."""
    harness.restore_random_state(states["process"], _CPU)
    for name, each in generators.items():
        each.set_state(states[name])


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
