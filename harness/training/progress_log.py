"""What a run tells of its progress: the metrics of a step, their means over the ranks, its speed, and slow ranks."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from harness.data.schedule import is_due
from harness.errors import ConfigError
from harness.telemetry.events import check_metric_names, hash_of, metrics_in_words, number_of
from harness.training.run_context import RunContext
from harness.training.stragglers import OwnWork, Straggler, Stragglers

_FLOATS_AT_ONCE = 32


class ProgressLog:
    """Keeps the metrics of the newest step, and logs them. ``emit`` takes an event, a message and values; rank 0 speaks."""

    def __init__(self, context: RunContext, own_work: OwnWork, emit: Callable[..., None]) -> None:
        self._world, self._state, self._loader, self._course = context.world, context.state, context.loader, context.course
        self._every, self._stragglers = context.config.log, context.config.stragglers
        self._own_work, self._emit = own_work, emit
        self._metrics: Mapping[str, Any] = {}  # of the last step
        self._last_time, self._last_step = time.monotonic(), 0
        self._slow_ranks: Callable[[int, Sequence[float]], Sequence[Straggler]] = lambda *_: ()  # nobody looks

    def begin_here(self) -> None:
        """The clocks run from now on. All ranks call it."""
        hosts, factor = self._world.all_gather(platform.node()), self._stragglers.factor
        if factor is not None and len(hosts) > 1:
            self._slow_ranks = Stragglers(hosts, factor, self._stragglers.window_seconds).look
        self._last_time, self._last_step = time.monotonic(), self._state.progress.step

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step: numbers, or tensors, which are not waited for."""
        if metrics.keys() != self._metrics.keys():
            check_metric_names(metrics)
        self._metrics = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in metrics.items()}

    def average(self) -> list[float]:
        """Averages this step's metrics over the ranks, and returns the seconds of own work of each. All ranks call it.

        Raises ``ConfigError`` where they tell different metrics. The names travel with the first numbers, as a hash.
        """
        own = [self._own_work.seconds(), float(hash_of(self._metrics)), *map(number_of, self._metrics.items())]
        first, rest = own[:_FLOATS_AT_ONCE], own[_FLOATS_AT_ONCE:]
        rows = self._world.all_gather_floats([*first, *[0.0] * (_FLOATS_AT_ONCE - len(first))])  # all agree on a length
        if any(row[1] != rows[0][1] for row in rows):
            names = self._world.all_gather([*self._metrics])
            found = "; ".join(f"rank {rank} reports {', '.join(each)}" for rank, each in enumerate(names))
            raise ConfigError(f"run.step: all ranks must report the same metrics, in the same order; {found}")
        more = self._world.all_gather_floats(rest) if rest else [[] for _ in rows]
        seconds, _, *metrics = zip(
            *([*row[: len(first)], *others] for row, others in zip(rows, more, strict=True)), strict=True
        )
        # Added in rank order, since an all-reduce may add in another order at every size of the message.
        means = [sum(values) / self._world.size for values in metrics]
        self._state.progress.last |= dict(zip(self._metrics, means, strict=True))
        return list(seconds)

    def means(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The means of a step's metrics over the ranks. All ranks call it."""
        self.note(metrics)
        self.average()
        return {name: self._state.progress.last[name] for name in metrics}

    def is_due(self, epochs: tuple[int, int]) -> bool:
        """Whether the step that was just taken is to be logged; ``epochs`` as for the function ``is_due``."""
        return is_due(self._state.progress.step, epochs, self._every.every_steps, self._every.every_epochs)

    def is_due_after_epoch(self, epochs: tuple[int, int]) -> bool:
        """Likewise, at the end of an epoch that no step boundary has shown."""
        return is_due(1, epochs, None, self._every.every_epochs)

    def log(self) -> None:
        """Logs the step that was just taken. All ranks call it."""
        own_seconds = self.average()
        progress, now = self._state.progress, time.monotonic()
        steps_per_second = (progress.step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_step = now, progress.step
        values = {name: progress.last[name] for name in self._metrics}
        for optimizer in list(self._state.optimizers.values())[:1]:
            if "lr" in optimizer.param_groups[0]:  # few optimizers have no such option
                values["lr"] = float(optimizer.param_groups[0]["lr"])
        if self._loader is not None:
            values["samples/s"] = self._loader.schedule.global_batch_size * steps_per_second
        else:
            values["steps/s"] = steps_per_second
        self._emit("train", f"{self._course}  {metrics_in_words(values)}", step=progress.step, **values)
        for found in self._slow_ranks(progress.step, own_seconds):
            self._emit("straggler", str(found), step=progress.step, **asdict(found))
