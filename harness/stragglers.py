"""A rank that is slower than the others, found by what it does not wait for.

With DDP every rank's step lasts as long as the slowest rank's, so the length of a step names nobody. What does is a rank's
own work: fetching its batches, and its forward passes. On a GPU the forward pass is timed by events in its stream, since the
processor only queues it. Backward passes are left out: the last of them is where the ranks wait for each other.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

_WORTH_NAMING = 0.05  # of the run's time: what a slow rank must cost before anybody is told


class OwnWork:
    """How long this rank has worked on its own, from the start of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._began: float | None = None
        self._events: list[torch.cuda.Event] = []  # beginnings and ends in turn, not yet counted

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch, and the time that it takes to come."""
        began = time.perf_counter()
        batch = next(batches)
        self._seconds += time.perf_counter() - began
        return batch

    def begin_forward(self, model: nn.Module, _inputs: object) -> None:
        """A forward pre-hook of the plain model, in training: DDP waits for rank 0's buffers before that."""
        if model.training and self._began is None:
            self._began = time.perf_counter()
            self._record_event()

    def end_forward(self) -> None:
        """After the loss."""
        if self._began is None:
            return
        if self._device.type == "cuda":
            self._record_event()
        else:
            self._seconds += time.perf_counter() - self._began
        self._began = None

    def seconds(self) -> float:
        """The whole time so far; on a GPU, without the forward passes that are still under way."""
        while len(self._events) >= 2 and self._events[1].query():  # type: ignore[no-untyped-call]
            begin, end, *self._events = self._events
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def _record_event(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)


@dataclass(frozen=True)
class Straggler:
    """A slow rank: its own work in a step, and the median of the others'."""

    rank: int
    host: str
    seconds: float
    median_seconds: float

    def __str__(self) -> str:
        times = f"{self.seconds:.3g} s of its own work in a step, the others {self.median_seconds:.3g} s"
        return f"rank {self.rank} on {self.host} is slow: {times}"


@dataclass
class Stragglers:
    """Looks at the ranks' own work, window by window."""

    hosts: Sequence[str]  # by rank
    factor: float
    window_seconds: float
    _then: float = field(default_factory=time.monotonic)
    _step: int = 0
    _totals: Sequence[float] = ()

    def look(self, step: int, totals: Sequence[float]) -> list[Straggler]:
        """The ranks that were slow since the last window. ``totals`` holds each rank's own work so far, in seconds."""
        now = time.monotonic()
        if self._totals and now - self._then < self.window_seconds:
            return []
        steps, elapsed = max(step - self._step, 1), now - self._then
        times = [(total - before) / steps for total, before in zip(totals, self._totals or totals, strict=True)]
        self._then, self._step, self._totals = now, step, list(totals)
        found = []
        for rank, seconds in enumerate(times):
            median = statistics.median(times[:rank] + times[rank + 1 :])
            if seconds > self.factor * median and (seconds - median) * steps > _WORTH_NAMING * elapsed:
                found.append(Straggler(rank, self.hosts[rank], seconds, median))
        return found
