"""A rank that is slower than the others, found by what it does not wait for.

With DDP every rank's step lasts as long as the slowest rank's, so the length of a step names nobody. What does is a rank's
own work: fetching its batches, and its forward passes. Marks time these, since a processor may only queue them. Backward
passes are left out: the last of them is where the ranks wait for each other.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from harness.data.loader import Loader
from harness.distributed import device as devices
from harness.distributed.device import Mark

_WORTH_NAMING = 0.05  # of the run's time: what a slow rank must cost before anybody is told
_MANY_PASSES = 64  # whose marks are kept until somebody asks


class OwnWork:
    """How long this rank has worked on its own, from the start of the process: in the forward passes of modules in training,
    and waiting for the batches of a loader."""

    def __init__(self, device: torch.device, modules: Iterable[nn.Module], loader: Loader | None = None) -> None:
        self._device, self._marks = device, devices.of(device)
        self._loader = loader
        self.forwards = 0  # passes of modules in training that may be followed by a backward pass, so far
        self._seconds = 0.0
        self._began: Mark | None = None
        self._passes: deque[tuple[Mark, Mark]] = deque()  # not yet counted
        self._hooks: list[RemovableHandle] = []
        for module in modules:
            inner = module.module if isinstance(module, DistributedDataParallel) else module
            # DDP waits for rank 0's buffers before the forward pass. In one that was compiled with what is around it, that
            # cannot be told from the pass itself.
            if not any(isinstance(each, DistributedDataParallel) for each in inner.modules()):
                self._hooks.append(inner.register_forward_pre_hook(self._begin_forward))
                self._hooks.append(inner.register_forward_hook(self._end_forward))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module takes its hooks along. In the copy they note down nothing that counts."""
        return type(self), (self._device, ())

    def stop(self) -> None:
        """Looks no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin_forward(self, model: nn.Module, _inputs: object) -> None:
        if model.training:
            self.forwards += torch.is_grad_enabled()
            # Within a compiled graph the marks would become a part of it.
            if not (self._marks.is_async and torch.compiler.is_compiling()):
                self._began = self._marks.mark(timed=True)

    def _end_forward(self, _model: nn.Module, _inputs: object, _outputs: object) -> None:
        if self._began is None:
            return
        begin, end, self._began = self._began, self._marks.mark(timed=True), None
        if end.is_over():
            self._seconds += begin.seconds_until(end)
            return
        self._passes.append((begin, end))
        if len(self._passes) > _MANY_PASSES:  # nobody may ever ask
            self._count()

    def seconds(self) -> float:
        """The whole time so far, without the forward passes that an accelerator is still at."""
        self._count()
        return self._seconds + (self._loader.waited_seconds if self._loader else 0.0)

    def _count(self) -> None:
        while self._passes and self._passes[0][1].is_over():
            begin, end = self._passes.popleft()
            self._seconds += begin.seconds_until(end)


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
    clock: Callable[[], float] = time.monotonic
    _then: float = 0.0  # the first look compares nothing
    _step: int = 0
    _totals: Sequence[float] = ()

    def look(self, step: int, totals: Sequence[float]) -> list[Straggler]:
        """The ranks that were slow since the last window. ``totals`` holds each rank's own work so far, in seconds."""
        now = self.clock()
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
