"""The program's own loop, as far as a run sees it: how long it is to be, where it is, and what is due there."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import Config, RunConfig
from harness.data.loader import Loader
from harness.distributed.agreement import Decision
from harness.distributed.world import World
from harness.errors import ConfigError
from harness.state.capture import State
from harness.state.optimizers import stepping
from harness.telemetry.events import as_json
from harness.training.bodies import Bodies
from harness.training.omissions import Omissions
from harness.training.progress_log import ProgressLog
from harness.training.save_policy import Due, SavePolicy
from harness.training.saves import Saves
from harness.training.stragglers import OwnWork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Length:
    """How long a loop is to be, by steps or by epochs."""

    steps: int | None = None
    epochs: int | None = None

    def is_last_step(self, step: int) -> bool:
        """Whether no step comes after this one."""
        return self.steps is not None and step >= self.steps

    def is_reached(self, step: int, epoch: int) -> bool:
        """Whether the loop is at its own end."""
        return self.is_last_step(step) or (self.epochs is not None and epoch >= self.epochs)


@dataclass(frozen=True)
class Place:
    """Where a rank is: its last step, how often it has called ``run.step()`` in this process, and the samples it trains."""

    rank: int
    step: int
    boundaries: int
    samples: Sequence[int]


class ProgramLoop:
    """Follows the loops of a program, one after the other.

    ``on_due`` is called when the time has come for a save, or for a stop. ``emit`` takes an event, a message and values.
    """

    def __init__(
        self,
        world: World,
        config: RunConfig,
        state: State,
        loader: Loader | None,
        emit: Callable[..., None],
        on_due: Callable[[Due], None],
    ) -> None:
        self._world, self._config, self._state, self._loader = world, config, state, loader
        self._saves, self._on_due = Saves(), on_due
        self._policy = SavePolicy(config.checkpoint)
        self._own_work = OwnWork(world.device, state.modules.values(), loader)
        self._omissions = Omissions(state, self._own_work, loader, is_active=world.rank == 0)
        self._log = ProgressLog(world, config, state, loader, self._own_work, emit)
        more, end = self._omissions.at_next_batch, self._at_end_of_body
        self._bodies = Bodies(state, loader, fence=self._fence, on_more=more, on_end=end)
        self.end_unseen = self._bodies.end_unseen
        """To be called when the boundary is over: the body ends with it where nobody would see its end."""
        self._hooks = [each.register_step_pre_hook(self._before_optimizer) for each in stepping(state.optimizers)]
        self._length = Length()
        self._boundaries = 0  # that this process has seen
        self._epoch_before = 0  # at the boundary before
        self._has_stepped = False  # an optimizer, since the last boundary
        self._loops = 0  # that have begun
        self._is_under_way = False  # the newest loop has not come to its own end

    def close(self) -> None:
        """Ends the loader's workers, and takes away what looks at the program's optimizers and modules."""
        if self._loader:
            self._loader.close()
        self._is_under_way = False
        for hook in self._hooks:
            hook.remove()
        self._own_work.stop()

    # --- where it is -------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._loader.epoch if self._loader else self._state.progress.epoch

    @property
    def is_left(self) -> bool:
        """Whether the newest loop was left before its own end."""
        return self._is_under_way

    def shown(self, step: int) -> str:
        """A step for people: ``12``, or ``12/100`` where the number of all is known."""
        return str(step) if self._length.steps is None else f"{step}/{self._length.steps}"

    def place(self) -> Place:
        """Where this rank is."""
        loader, rank = self._loader, self._world.rank
        samples = loader.position.samples(loader.rank, loader.world_size) if loader else []
        return Place(rank, self._state.progress.step, self._boundaries, samples)

    # --- a loop ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def under_way(self, length: Length) -> Iterator[None]:
        """The time of a loop."""
        self._length = length
        self._loops += 1
        self._is_under_way = True
        if self._has_finished():
            log.warning(
                "run.finish() has ended this run early, at step %s: there is nothing left to train. To train on, give "
                "Run reopen=True",
                self._state.progress.step,
            )
        with self._bodies.followed(is_by_steps=length.steps is not None), self._omissions.looking():
            yield
        self._is_under_way = False

    def begin_here(self, saves: Saves) -> int | None:
        """The loop goes on from where the state is, and the clocks run from now on. All ranks call it.

        ``saves`` are those of the attempt. Returns how many steps the run has in all, where that is known.
        """
        length, self._saves = self._length, saves
        self._epoch_before = self.epoch
        self._log.begin_here()
        by_epochs = length.epochs * len(self._loader) if length.epochs and self._loader else None
        steps_in_all = length.steps or by_epochs
        self._state.check_lengths(steps_in_all, length.epochs, each_step=isinstance(self._config, Config))
        self._state.restore_random()
        return steps_in_all

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to be trained."""
        may_be_empty = self._loader is None  # what is left of an epoch, by a position that others keep
        while not self._has_finished() and not self._length.is_reached(0, epoch := self.epoch):
            boundaries = self._boundaries
            self._fence()  # the loop may change anything before its first step
            self._omissions.at_epoch_begin()
            yield epoch
            if self._boundaries == boundaries and not may_be_empty:
                raise ConfigError(f"epoch {epoch}: the loop did not call run.step()")
            may_be_empty = False
            self._end_epoch(epoch)

    def steps(self) -> Iterator[int]:
        """The steps that are still to be trained, by their number from 0."""
        while not self._has_finished() and not self._length.is_last_step(step := self._state.progress.step):
            boundaries = self._boundaries
            yield step
            if self._boundaries == boundaries:
                raise ConfigError(f"step {step + 1}: the loop did not call run.step()")
            self._bodies.end()

    def finish(self) -> None:
        """The loop ends here for good."""
        self._bodies.forget()
        if self._is_under_way:
            self._state.progress.finished_loops = self._loops

    def _has_finished(self) -> bool:
        """Whether an earlier attempt has ended this loop early, for good."""
        return self._loops <= self._state.progress.finished_loops

    # --- what happens in it ------------------------------------------------------------------------------------------

    def reach_boundary(self, metrics: Mapping[str, Any], decision: Decision) -> tuple[int, int]:
        """The optimizer has taken its step, and all ranks are here. Returns the step, and the epoch of the next batch."""
        progress = self._state.progress
        progress.step += 1
        self._boundaries += 1
        self._has_stepped = False
        self._log.note(metrics)
        epochs = self._next_epochs()
        is_best = progress.best.get("step") == progress.step
        due = self._policy.due(progress.step, epochs, is_asked=decision.save, is_best=is_best, is_stop=decision.stop)
        self._bodies.reach_boundary(due)
        if self._length.is_last_step(progress.step) or self._log.is_due(epochs):
            self._log.log(self._place_in_words())
        self._omissions.at_boundary()
        if self._boundaries == 1:
            self._state.after_first_step()
            self._omissions.after_first_step()
        return progress.step, epochs[1]

    def roll_back(self) -> None:
        """The step is over, in its way."""
        self._boundaries += 1
        self._bodies.forget()

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool) -> int:
        """Notes what an evaluation found, and returns the step that it judged."""
        self._fence()  # weights may be put in another place for an evaluation, and back after it
        progress = self._state.progress
        if metric not in values:
            raise ConfigError(f"evaluation.metric is {metric!r}, but measured were: {', '.join(values)}")
        judged = progress.step + self._has_stepped
        progress.last |= values
        if _is_better(values[metric], progress.best.get(metric), higher_is_better=higher_is_better):
            progress.best = {**values, "step": judged}
            if self._config.checkpoint.keep_best and not self._has_stepped:
                self._bodies.save_at_end()
        return judged

    def describe_save(self) -> dict[str, Any]:
        """What a manifest says of where the loop is, when a save is made here. All ranks call it."""
        self._log.average()
        progress = self._state.progress
        self._omissions.at_save(self.epoch)
        if not self._bodies.ends_show:
            self._omissions.after_save(progress.step)
        return {"epoch": self.epoch, "metrics": {"last": as_json(progress.last), "best": as_json(progress.best)}}

    def _before_optimizer(self, *_args: object) -> None:
        """An optimizer is about to take its step."""
        self._has_stepped = True
        self._saves.fence()
        if not self._bodies.ends_show:
            self._omissions.at_optimizer()

    def _fence(self) -> None:
        """Before anything may change what a save may still be copying."""
        self._saves.fence()

    def _end_epoch(self, epoch: int) -> None:
        """The body of an epoch has ended, which the loop may have left early."""
        if self._loader:
            self._loader.end_epoch(epoch)
        else:
            self._state.progress.epoch += 1
        due = Due.NOTHING
        if self.epoch != self._epoch_before:  # no boundary has shown it
            epochs = self._next_epochs()
            due = self._policy.due_after_epoch(epochs)
            if self._log.is_due_after_epoch(epochs):
                self._log.log(self._place_in_words())
        self._omissions.at_epoch_end()
        self._bodies.end(due)

    def _at_end_of_body(self, due: Due) -> None:
        if not self._length.is_reached(self._state.progress.step, self.epoch):  # the end is saved by itself
            self._on_due(due)

    def _next_epochs(self) -> tuple[int, int]:
        """The epoch as it was at the boundary before, and as it is at this one."""
        epochs = self._epoch_before, self.epoch
        self._epoch_before = epochs[1]
        return epochs

    def _place_in_words(self) -> str:
        return f"step {self.shown(self._state.progress.step)}  epoch {self.epoch}"


def _is_better(value: float, best: float | None, *, higher_is_better: bool) -> bool:
    """Whether a value is better than the best so far. NaN is better than nothing."""
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or (value > best if higher_is_better else value < best)
