"""The program's own loop, as far as a run sees it: what happens at its boundaries, and what is due there."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.config import Config
from harness.distributed import device
from harness.distributed.agreement import Decision
from harness.errors import ConfigError
from harness.state.optimizers import stepping
from harness.telemetry.events import as_json, metrics_in_words
from harness.training.bodies import Bodies
from harness.training.boundary import Boundary
from harness.training.course import Length
from harness.training.omissions import Omissions
from harness.training.progress_log import ProgressLog
from harness.training.run_context import RunContext
from harness.training.save_policy import Due
from harness.training.saves import Saves
from harness.training.stragglers import OwnWork


class ProgramLoop:
    """Goes along with the loops of a program, one after the other.

    ``on_due`` is called when the time has come for a save, or for a stop. ``emit`` takes an event, a message and values.
    """

    def __init__(self, context: RunContext, emit: Callable[..., None], on_due: Callable[[Due], None]) -> None:
        world, state, loader = context.world, context.state, context.loader
        self._config, self._state, self._loader = context.config, state, loader
        self._saves, self._on_due, self._emit = Saves(), on_due, emit
        self._policy, self._course = context.policy, context.course
        self._own_work = OwnWork(world.device, state.modules.values(), loader)
        self._omissions = Omissions(state, self._own_work, loader, is_active=world.rank == 0)
        self._log = ProgressLog(context, self._own_work, emit)
        self.boundary = Boundary(world, state, self._log)
        more, over, end = self._omissions.at_next_batch, self.boundary.reached, self._at_end_of_body
        self._bodies = Bodies(state, loader, fence=self._fence, on_more=more, on_over=over, on_end=end)
        self.end_unseen = self._bodies.end_unseen
        """To be called when the boundary is over: the body ends with it where nobody would see its end."""
        self._hooks = [each.register_step_pre_hook(self._before_optimizer) for each in stepping(state.optimizers)]
        self._has_stepped = False  # an optimizer, since the last boundary
        self._device = device.of(world.device)
        self._is_graphed = False  # a step of an optimizer is in a graph, which takes it again unseen

    def close(self) -> None:
        """Ends the loader's workers, and takes away what looks at the program's optimizers and modules."""
        if self._loader is not None:
            self._loader.close()
        self._course.close()
        for hook in self._hooks:
            hook.remove()
        self._own_work.stop()

    # --- a loop ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def under_way(self, length: Length) -> Iterator[None]:
        """The time of a loop."""
        with (
            self._course.under_way(length),
            self._bodies.followed(is_by_steps=length.steps is not None),
            self._omissions.looking(),
        ):
            yield

    def begin_here(self, saves: Saves) -> int | None:
        """The loop continues from the position of the state, and the clocks run from now on. All ranks call it.

        ``saves`` are those of the attempt. Returns how many steps the run has in all, where that is known.
        """
        self._saves = saves
        steps_in_all = self._course.begin_here()
        self._log.begin_here()
        self._state.check_lengths(steps_in_all, self._course.length.epochs, each_step=isinstance(self._config, Config))
        self._state.restore_random()
        self._has_stepped = self._state.progress.half is not None
        self.boundary.begin_here(saves)
        if saves.is_first_due:
            self._bodies.save_next()
        return steps_in_all

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to be trained."""
        course = self._course
        may_be_empty = self._loader is None  # what is left of an epoch, by a position that others keep
        while not course.is_over():
            epoch, boundaries = course.epoch, course.boundaries
            self._fence()  # the loop may change anything before its first step
            self._omissions.at_epoch_begin()
            yield epoch
            if course.boundaries == boundaries and not may_be_empty:
                raise ConfigError(f"epoch {epoch}: the loop did not call run.step()")
            may_be_empty = False
            self._end_epoch(epoch)

    def steps(self) -> Iterator[int]:
        """The steps that are still to be trained, by their number from 0."""
        while not self._course.is_over():
            step, boundaries = self._state.progress.step, self._course.boundaries
            yield step
            if self._course.boundaries == boundaries:
                raise ConfigError(f"step {step + 1}: the loop did not call run.step()")
            self._bodies.end()

    def finish(self) -> None:
        """The loop ends here for good."""
        self._bodies.forget()
        self._course.finish()

    # --- what happens in it ------------------------------------------------------------------------------------------

    def reach_boundary(self, metrics: Mapping[str, Any], decision: Decision) -> tuple[int, int]:
        """The optimizer has taken its step, and all ranks are here. Returns the step, and the epoch of the next batch."""
        if decision.settled:
            self._saves.keeper.settled(*divmod(decision.settled, 2))
        course, progress = self._course, self._state.progress
        epochs = course.reach_boundary()
        step = progress.step
        if self._device.is_async:
            self._saves.sees_optimizers = self._has_stepped and not self._is_graphed
        self._has_stepped = False
        self._log.note(metrics)
        is_best = progress.best.get("step") == step
        self._bodies.reach_boundary(
            self._policy.due(step, epochs, is_asked=decision.save, is_best=is_best, is_stop=decision.stop)
        )
        if course.length.is_last_step(step) or self._log.is_due(epochs):
            self._log.log()
        self._omissions.at_boundary()
        if course.boundaries == 1:
            self._state.after_first_step()
            self._omissions.after_first_step()
        return step, epochs[1]

    def roll_back(self) -> None:
        """The step is over, in its way."""
        self._course.roll_back()
        self._bodies.forget()

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool) -> None:
        """Notes what an evaluation found, and logs it with the step that it judged."""
        self._fence()  # weights may be put in another place for an evaluation, and back after it
        progress = self._state.progress
        if metric not in values:
            raise ConfigError(f"evaluation.metric is {metric!r}, but the evaluation returned: {', '.join(values)}")
        judged = progress.step + self._has_stepped
        progress.last |= values
        if _is_better(values[metric], progress.best.get(metric), higher_is_better=higher_is_better):
            progress.best = {**values, "step": judged}
            if self._config.checkpoint.keep_best and not self._has_stepped:
                self._bodies.save_at_end()
        message = f"step {self._course.shown(judged)}  evaluation  {metrics_in_words(dict(values))}"
        self._emit("evaluate", message, step=judged, **values)

    def describe_save(self) -> dict[str, Any]:
        """What a manifest says of where the loop is, when a save is made here. All ranks call it."""
        self._log.average()
        progress, epoch = self._state.progress, self._course.epoch
        self._omissions.at_save(epoch)
        if not self._bodies.ends_show:
            self._omissions.after_save(progress.step)
        return {"epoch": epoch, "metrics": {"last": as_json(progress.last), "best": as_json(progress.best)}}

    def _before_optimizer(self, *_args: object) -> None:
        """An optimizer is about to take its step."""
        self._has_stepped = True
        self._is_graphed = self._is_graphed or self._device.is_capturing()
        self._saves.keeper.touch()
        self._saves.fence()
        if not self._bodies.ends_show:
            self._omissions.at_optimizer()

    def _fence(self) -> None:
        """Before anything may change what a save may still be copying."""
        self._saves.fence()

    def _end_epoch(self, epoch: int) -> None:
        due = Due.NOTHING
        if (epochs := self._course.end_epoch(epoch)) is not None:
            due = self._policy.due_after_epoch(epochs)
            if self._log.is_due_after_epoch(epochs):
                self._log.log()
        self._omissions.at_epoch_end()
        self._bodies.end(due)

    def _at_end_of_body(self, due: Due) -> None:
        if not self._course.length.is_reached(self._state.progress.step, self._course.epoch):  # the end is saved by itself
            self._on_due(due)


def _is_better(value: float, best: float | None, *, higher_is_better: bool) -> bool:
    """Whether a value is better than the best so far. NaN is better than nothing."""
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or (value > best if higher_is_better else value < best)
