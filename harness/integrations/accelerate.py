"""Accelerate's plain loop: ``run, loader = resilient(accelerator, loader, url)``.

A step boundary is where the loop asks for a batch after an optimizer has taken its step: nothing needs to be called there.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import harness
from harness.errors import ConfigError
from harness.integrations import named
from harness.integrations.prepared import Prepared


def resilient(
    accelerator: Any, loader: Any, url: str | os.PathLike[str] | None, **options: Any
) -> tuple["Resilient", Prepared]:
    """Has a loop survive the death of its processes. Comes after ``accelerator.prepare``, and gives the run and the loader::

        run, loader = resilient(accelerator, loader, "runs/mine", every_steps=50)
        for epoch in run.epochs(10):
            for batch in loader:
                ...                     # as before

    What was prepared, and registered by ``accelerator.register_for_checkpointing``, is saved and restored. ``options`` are
    those of ``harness.Run``. Raises ``ConfigError`` for a loader that Accelerate has not prepared.
    """
    position = Prepared("loader", loader, accelerator.num_processes)
    return Resilient(accelerator, position, url, options), position


class Resilient:
    """A run of ``harness`` along a loop of Accelerate's."""

    def __init__(
        self, accelerator: Any, position: Prepared, url: str | os.PathLike[str] | None, options: Mapping[str, Any]
    ) -> None:
        if not accelerator._models or not accelerator._optimizers:
            raise ConfigError("resilient: found no model or no optimizer; call it after accelerator.prepare")
        self._accelerator, self._position = accelerator, position
        state: dict[str, Any] = named("model", accelerator._models)
        state |= named("optimizer", accelerator._optimizers)
        state |= named("scheduler", [each.scheduler for each in accelerator._schedulers])
        state |= named("object", accelerator._custom_objects)
        state |= {"loader": position, "course": self}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler
        self._epoch = 0  # that is being trained, or comes next
        self._has_stepped = False  # an optimizer, since the last boundary
        self.run = harness.Run(url, state, **options)
        self._steps: Iterator[int] = iter(())
        self._is_over = False  # no step is left, as far as was known
        self._hooks = [_plain(each).register_step_post_hook(self._note) for each in accelerator._optimizers]

    def state_dict(self) -> dict[str, Any]:
        """Which epoch it is."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The loop continues with this epoch."""
        self._epoch = state["epoch"]

    def epochs(self, total: int) -> Iterator[int]:
        """Yields the epochs that remain to be trained, an interrupted one first. Saves at the end."""
        if self._epoch >= total:
            return
        self._position.on_return = self._end_batch
        self._begin(self._steps_in(total))
        try:
            while self._epoch < total:
                yield self._epoch
                self._epoch += 1
                self._position.end_epoch()
                self._position.set_epoch(self._epoch)
                self._end_body()
            if not self._is_over:
                self._steps.close()  # type: ignore[attr-defined]
                self.run.finish()
        finally:
            self._position.on_return = lambda: None

    def close(self) -> None:
        """Takes the hooks away, and ends the run."""
        for hook in self._hooks:
            hook.remove()
        self.run.close()

    def _note(self, *_: Any) -> None:
        self._has_stepped = True

    def _steps_in(self, epochs: int) -> int | None:
        """The number of steps in these epochs, where that is known."""
        try:
            accumulated = int(self._accelerator.gradient_accumulation_steps)
            return epochs * -(-len(self._position) // accumulated)
        except TypeError:
            return None

    def _begin(self, steps: int | None) -> None:
        self._steps = self.run.steps(steps)
        self._is_over = next(self._steps, None) is None

    def _end_batch(self) -> None:
        """The loop asks for a batch. After the last one of an epoch its body goes on."""
        with contextlib.suppress(TypeError):  # a stream has no last one that is known
            if self._position.batches == len(self._position):
                return
        self._end_body()

    def _end_body(self) -> None:
        """If an optimizer has stepped, a step is over, which is when a save, or a stop, happens."""
        if not self._has_stepped:
            return
        self._has_stepped = False
        if self._is_over:  # the loop takes more steps than Accelerate's own way to accumulate would
            self._begin(None)
        self.run.step()
        self._is_over = next(self._steps, None) is None


def _plain(optimizer: Any) -> Any:
    """The optimizer within Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
