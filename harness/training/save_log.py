"""Logs the saves of an attempt, and knows which one was committed last."""

import logging
from collections.abc import Mapping
from dataclasses import asdict

from harness.checkpoint.saver import Saved
from harness.launcher import outcome
from harness.runtime.environment import shutdown_grace_seconds
from harness.telemetry.events import EventLog
from harness.training.interval import Interval
from harness.training.resume import Resumed
from harness.training.run_context import RunContext

log = logging.getLogger(__name__)


class SaveLog:
    """Logs what becomes of saves. Before the first of them, the newest checkpoint is the one that was resumed from."""

    def __init__(self, context: RunContext, resumed: Resumed, events: EventLog, auto: Interval | None) -> None:
        self._course, self._events, self._stop = context.course, events, context.config.stop
        self._is_first = context.world.rank == 0
        self.step, self.directory = (0, "") if resumed.kept else (resumed.step, resumed.directory)
        self.seconds = resumed.save_seconds if self._is_first else None  # what the last save took, on rank 0
        self.settled = 0  # as ``Decision`` has it
        self._auto = auto
        self._has_warned = False
        self._warn_if_slow()

    def begun(self, step: int) -> None:
        """A save of a step begins."""
        self._events.emit("saving", "", step=step)

    def skipped(self, step: int) -> None:
        """A step is not saved, because the save before is under way."""
        message = f"step {self._course.shown(step)}  NOT saved: the previous save is still being written"
        self._events.emit("skip", message, step=step)

    def failed(self, step: int, error: str) -> None:
        """A save has failed, which was logged where it did."""
        self.settled = 2 * step
        self._events.emit("save_failed", "", step=step, error=error)

    def committed(self, saved: Saved | None) -> None:
        """A save has been committed, if any has."""
        if saved is None:
            return
        self.step, self.directory, self.seconds = saved.step, saved.directory, saved.seconds
        self.settled = 2 * saved.step + 1
        outcome.saved(saved.step)
        times = f"in {saved.seconds:.2f} s, of which training waited {saved.blocked_seconds:.3f} s"
        message = f"step {self._course.shown(saved.step)}  saved {saved.directory} {times}"
        self._events.emit("save", message, **asdict(saved))
        self._warn_if_slow()
        if self._auto is not None and (changed := self._auto.saved(saved)) is not None:
            self._log_interval(changed)

    def _log_interval(self, changed: Mapping[str, float]) -> None:
        """``checkpoint.every_seconds: auto`` means another interval from now on."""
        cost_seconds, between_hours = changed["cost_seconds"], changed["between_deaths_seconds"] / 3600
        because = f"a save costs {cost_seconds:.3f} s, and {between_hours:.1f} h are expected between deaths"
        self._events.emit("interval", f"saving every {changed['seconds']:.0f} s from now on: {because}", **changed)

    def warn_of_lost_steps(self, step: int) -> None:
        """Says so where what came before ``step`` is not saved, and the loop was left."""
        if self.step < step and self._is_first:
            log.warning(
                "the loop was left early, at step %d; nothing after step %d is saved. Call run.finish() after such a loop",
                step,
                self.step,
            )

    def _warn_if_slow(self) -> None:
        """Says once, while there is time to act, that a save would not fit between a stop signal and the end."""
        grace_seconds = min(self._stop.grace_seconds, shutdown_grace_seconds())
        if self.seconds is None or self.seconds <= grace_seconds or self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "the last save took %.2f s, but only %g s are allowed after a stop signal; the process would be "
            "killed before the checkpoint commits. Raise stop.grace_seconds (%g) and what the launcher grants "
            "(torchrun: --shutdown-timeout)",
            *(self.seconds, grace_seconds, self._stop.grace_seconds),
        )
