"""Everything around a training loop that keeps it alive, whoever has written the loop.

A ``Run`` claims an attempt at a URL, restores the newest whole checkpoint on all ranks, and then goes along with the loop:
at each step boundary it agrees with the other ranks, logs, saves, and stops when it was asked to.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.config import RunConfig, run_config
from harness.data.loader import Loader, nothing
from harness.distributed.agreement import Agreement, NoLoop
from harness.distributed.world import World, world_of_program
from harness.errors import ConfigError, NoCheckpoint, Stopped
from harness.runtime.environment import is_first_of_node
from harness.runtime.preemption import Watcher
from harness.runtime.signals import StopRequest
from harness.runtime.watchdog import Watchdog
from harness.state.capture import Adapt, State
from harness.storage.urls import shown
from harness.telemetry.events import EventLog, metrics_in_words
from harness.training import attempt, program
from harness.training.attempt import Attempt
from harness.training.course import Course, Length
from harness.training.hangs import NoWatchdog, watching
from harness.training.program_loop import ProgramLoop
from harness.training.run_context import RunContext
from harness.training.save_policy import Due

log = logging.getLogger(__name__)

# The doctor's, while it runs a script: it is given what a Run is made of, looks at that, and ends the program.
examiner: Callable[[RunConfig, Mapping[str, Any], World | None, bool], None] | None = None


class Run:
    """A training that survives the death of its processes.

    ``state`` names what is saved and restored: modules (plain, in DDP, sharded, compiled), optimizers, schedulers, scalers,
    a ``Loader``, whatever else has ``state_dict`` and ``load_state_dict``. When the run is made, the newest whole checkpoint
    at ``url`` (any fsspec URL, or a path; None saves nothing) is in them, on every rank. Then::

        for epoch in run.epochs(10):      # or: for step in run.steps(10_000)
            for batch in loader:
                ...                       # forward, backward, optimizer.step()
                run.step(loss=loss)

    Every rank makes it with the same arguments, after ``init_process_group`` and after the model was wrapped. A checkpoint
    is written every ``every_steps`` steps, ``every_seconds`` seconds and ``every_epochs`` epochs, and at the end; the last
    ``keep_last`` are kept (None: all). It has all that the loop does before it asks for the next batch, or, after an
    epoch's last one, for the next epoch: a save that is due waits for that, and so does a stop. ``config`` has further
    sections as for ``harness train``: ``{"checkpoint": {…}, "watchdog": {…}}``.

    ``initialize`` is called where there is nothing to resume from (to load weights, say); what it returns is logged.
    ``about`` goes into each manifest and must be the same on all ranks. At a resume the checkpoint's learning rates and
    schedules count; of the ``reset_options`` that are named (``["lr"]``) the program's. ``adapt(step, epoch, names)`` is
    called before a checkpoint is compared, with dtype and shape of its tensors by part and name, to give a model or an
    optimizer that grows what it had then.

    A stop signal, or a cloud's notice, ends the program after the step, saved, with exit code 75 (0 under torchrun); given a
    ``stop`` request of its own, the loop raises ``Stopped`` instead. ``fresh`` refuses a URL that holds a run,
    ``must_exist`` one that holds none. A loop that ``finish`` has ended early has nothing left to do when the program is
    started again; ``reopen`` trains on.

    Raises ``ConfigError`` for a bad setting, ``Mismatch`` where the newest checkpoint does not fit, ``NoCheckpoint`` where
    none is whole, ``StoreError`` where the storage fails, ``CrashLoop`` where attempts die of the same error repeatedly.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None,
        state: Mapping[str, Any],
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        every_epochs: int | None = None,
        keep_last: int | None = None,
        config: Mapping[str, Any] | RunConfig | None = None,
        initialize: Callable[[], str | None] | None = None,
        about: Mapping[str, Any] | None = None,
        reset_options: Sequence[str] = (),
        adapt: Adapt | None = None,
        world: World | None = None,
        stop: StopRequest | None = None,
        fresh: bool = False,
        reopen: bool = False,
        must_exist: bool = False,
    ) -> None:
        given = {"every_steps": every_steps, "every_seconds": every_seconds, "every_epochs": every_epochs}
        given |= {"keep_last": keep_last, "must_exist": must_exist or None}
        self.config = settings_of(url, given, config)
        if examiner is not None:
            examiner(self.config, state, world, fresh)
        self._host = program.host() if stop is None else program.Guest(stop)
        self.stop = self._host.stop
        self._watchdog: Watchdog | NoWatchdog = NoWatchdog()
        self._decisions: Agreement | NoLoop = NoLoop()
        self._attempt = Attempt(EventLog(self.config, active=False))  # until there is one
        self._error: BaseException | None = None  # that was seen last
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._host.let_go, self)
        with self._host.start(self), watching(self.config):
            self.world = world or world_of_program(device_of(state), self.config.world.timeout_seconds)
            if world is None:
                self._closing.callback(self.world.let_go)
            speaks = self.world.rank == 0
            self.state = State(state, self.world.device, reset_options=reset_options, adapt=adapt, speaks=speaks)
            self.loader = loader_of(state, self.world)
            self._course = Course(self.world.rank, self.state, self.loader)
            parts = self.world, self.config, self.state, self.loader, self._course
            context = RunContext(*parts, about or {}, initialize or nothing)
            self._loop = ProgramLoop(context, self.tell, self._do)
            self._closing.callback(self._loop.close)
            self._attempt = attempt.first_of(context, fresh=fresh)
            self.stop.before_leaving = lambda: self._attempt.end_soon(self.config.stop.grace_seconds, self._watchdog)
            self._closing.callback(setattr, self.stop, "before_leaving", nothing)
        if reopen:
            self.state.progress.finished_loops = 0

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, over all attempts."""
        return self.state.progress.step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._course.epoch

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are still to be trained, the one that was interrupted first. The end is saved."""
        with self._training(Length(epochs=total)):
            yield from self._loop.epochs()

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are still to be trained, by their number from 0; each must call ``step``. The end is saved."""
        with self._training(Length(steps=total)):
            yield from self._loop.steps()

    def step(self, /, **metrics: Any) -> None:
        """A step boundary: the optimizer has taken its step, and every rank is here. Metrics (numbers or 0-dim tensors) are
        averaged over the ranks where they are logged; all ranks tell the same. Raises ``StoreError`` after too many failed
        saves in a row, ``Superseded`` where a newer attempt trains this run, ``Stopped`` (see the class), ``ConfigError``
        where the ranks tell different metrics. In a loop over a ``Loader``, or over ``steps``, what is due happens when the
        loop asks for more, and raises there.
        """
        decision = self._decisions.decide(save_is_wanted=self._attempt.saves.is_wanted())
        step, epoch = self._loop.reach_boundary(metrics, decision)
        self._attempt.events.reached(step, epoch)
        self._attempt.saves.poll()
        self._watchdog.step()
        self._loop.end_unseen()

    def finish(self) -> None:
        """Saves the end, and waits for it: for a loop that is left early, which is over then: when the program is started
        again, it has nothing left to do. ``epochs`` and ``steps`` save at their own end."""
        self._loop.finish()
        self._attempt.saves.wait()
        if not self._attempt.saves.has_end():
            self._attempt.saves.save(self._loop.describe_save, must_succeed=True)
        message = f"done: step {self.global_step}  {metrics_in_words(self.state.progress.last)}"
        self.tell("done", message, step=self.global_step)
        self._attempt.events.flush()
        self._host.has_finished(self)

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool = False) -> None:
        """Tells what an evaluation found; the best ``metric`` is remembered, and its checkpoint kept where
        ``checkpoint.keep_best`` says so. NaN is never the best. Every rank calls it with the same values.

        What was judged is the step of the last ``step()``, or, where an optimizer has taken a step since, the one after it.
        """
        judged = self._loop.evaluated(metric, values, higher_is_better=higher_is_better)
        message = f"step {self._course.shown(judged)}  evaluation  {metrics_in_words(dict(values))}"
        self.tell("evaluate", message, step=judged, **values)

    def tell(self, event: str, message: str, /, **values: Any) -> None:
        """Logs an event: ``message`` for people, the values for programs. Rank 0 speaks."""
        self._attempt.events.emit(event, message, **values)

    def can_roll_back(self) -> bool:
        """Whether there is a checkpoint to go back to. All ranks call it."""
        return self._attempt.saves.can_roll_back()

    def roll_back(self) -> None:
        """Returns all ranks to the newest checkpoint; what follows is an attempt of its own, as after a restart. All ranks
        call it. Raises ``NoCheckpoint`` where there is none."""
        if not self.can_roll_back():
            raise NoCheckpoint(f"{self.config.checkpoint.url}: there is no checkpoint yet to go back to")
        self._loop.roll_back()
        self._attempt.saves.refuse_superseded()
        self.tell("rollback", "", step=self.global_step)
        self._attempt.events.close()
        assert self._attempt.next is not None, "there is a checkpoint"
        self._attempt = self._attempt.next()
        self._attempt.begin_here(self.global_step, self._loop.begin_here(self._attempt.saves))

    def remember_crash(self, error: BaseException) -> None:
        """Leaves a record of an error in the training code, or in a sample, for the attempts to come."""
        if error is not self._error and not isinstance(error, Stopped):
            self._error = error
            self.stop.settled = "error"
            self._attempt.remember(error)

    def close(self) -> None:
        """Ends the loader's workers, and a save that is under way: one that can be finished soon is worth it."""
        is_at_an_error = self._error is not None or sys.exc_info()[0] is not None
        is_left = not is_at_an_error and not self.stop.settled and self._course.is_under_way
        self._attempt.close(self.config.stop.grace_seconds, left_at=self.global_step if is_left else None)
        self._closing.close()

    @contextlib.contextmanager
    def _training(self, length: Length) -> Iterator[None]:
        """The time of the loop: somebody watches; afterwards the end is saved."""
        cloud = self.config.preemption.watch if is_first_of_node() else "none"
        with (
            self._host.loop(self, self.config.stop.grace_seconds),
            watching(self.config) as self._watchdog,
            Watcher(cloud, self.config.preemption.base_url) as watcher,
        ):
            self._decisions = Agreement(self.world, self.stop, watcher)
            try:
                with self._loop.under_way(length):
                    self._attempt.begin_here(self.global_step, self._loop.begin_here(self._attempt.saves))
                    yield
                self._decisions.finish()
                self.finish()
            finally:
                self._decisions = NoLoop()

    def _do(self, due: Due) -> None:
        """What is due at the end of a step's body."""
        self._attempt.saves.save(self._loop.describe_save, must_succeed=due is Due.STOP)
        if due is Due.STOP:
            self._decisions.finish()
            saved = "which is saved" if self.config.checkpoint.url else "and nothing is saved: there is no checkpoint.url"
            reason = self.stop.reason or "on another rank"
            self.tell("stop", "", step=self.global_step, reason=reason)  # how the program ends is logged when it does
            self._host.end(self, Stopped(f"asked to stop ({reason}) at step {self.global_step}, {saved}"))


def settings_of(
    url: str | os.PathLike[str] | None, checkpoint: Mapping[str, Any], config: Mapping[str, Any] | RunConfig | None
) -> RunConfig:
    """All settings in one; what is None was not given. What is given beside ``config`` counts.

    Raises ``ConfigError`` for a setting that is wrong, and for two URLs.
    """
    place = None if url is None else os.fspath(url)
    given = {key: value for key, value in checkpoint.items() if value is not None}
    given |= {} if place is None else {"url": place.replace("$", "$$")}  # it is literal, as everywhere else in Python
    if isinstance(config, RunConfig):
        before, own = config.checkpoint.url, run_config({"checkpoint": {"url": None, **given}}).checkpoint
        changes = {key: getattr(own, key) for key in given}
        settings = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=changes)})
    else:
        sections = dict(config or {})
        before = run_config({"checkpoint": {"url": sections.get("checkpoint", {}).get("url")}}).checkpoint.url
        settings = run_config({**sections, "checkpoint": {"url": None, **sections.get("checkpoint", {}), **given}})
    if before not in (None, settings.checkpoint.url):
        raise ConfigError(
            f"Run: expected one URL, found {shown(str(place))} and checkpoint.url {shown(str(before))} in config"
        )
    return settings


def loader_of(state: Mapping[str, Any], world: World) -> Loader | None:
    """The ``Loader`` in a state, if there is one.

    Raises ``ConfigError`` where it was made for another rank than this process has become since.
    """
    loader = next((each for each in state.values() if isinstance(each, Loader)), None)
    if loader is None or loader.is_placed or (loader.rank, loader.world_size) == (world.rank, world.size):
        return loader
    made_for = f"rank {loader.rank} of {loader.world_size}"
    raise ConfigError(
        f"the Loader is for {made_for}, and this process is rank {world.rank} of {world.size}: make the Loader after "
        "init_process_group, or give it rank= and world_size="
    )


def device_of(state: Mapping[str, Any]) -> torch.device:
    """Where the program trains: on the device of its first parameter."""
    for each in state.values():
        if isinstance(each, torch.nn.Module):
            for parameter in each.parameters():
                return parameter.device
    return torch.device("cpu")
