"""Keeps a training loop alive: that of ``harness train``, or one of a program's own.

A ``Run`` claims an attempt at a URL and restores the newest whole checkpoint on all ranks. At each step boundary it agrees
with the other ranks, logs, saves, and stops on request.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from harness.config import RunConfig, run_config
from harness.data.loader import Loader, nothing
from harness.distributed import device
from harness.distributed.agreement import Agreement, NoLoop
from harness.distributed.world import World, world_of_program
from harness.errors import ConfigError, Stopped
from harness.launcher import outcome
from harness.runtime.environment import is_first_of_node
from harness.runtime.preemption import Watcher
from harness.runtime.signals import StopRequest
from harness.runtime.watchdog import Watchdog
from harness.state.capture import Adapt, State
from harness.storage.urls import shown
from harness.telemetry.events import EventLog
from harness.training import attempt, observer, program
from harness.training.attempt import Attempt
from harness.training.course import ENDLESS, Course, Length
from harness.training.hangs import NoWatchdog, watching
from harness.training.program_loop import ProgramLoop
from harness.training.run_context import RunContext
from harness.training.save_policy import Due

log = logging.getLogger(__name__)


class Run:
    """A training that survives the death of its processes.

    ``state`` names what is saved and restored: modules (plain, in DDP, sharded, compiled), optimizers, schedulers,
    scalers, a ``Loader``, and anything else with ``state_dict`` and ``load_state_dict``. Making the run loads the newest
    whole checkpoint at ``url`` into them, on every rank. ``url`` is any fsspec URL, or a path; None saves nothing. Then::

        for epoch in run.epochs(10):      # or: for step in run.steps(10_000)
            for batch in loader:
                ...                       # forward, backward, optimizer.step()
                run.step(loss=loss)

    Every rank makes the run with the same arguments, after ``init_process_group`` and after it has wrapped the model. The
    run saves every ``every_steps`` steps, ``every_seconds`` seconds (``"auto"``: at the interval that loses least time) and
    ``every_epochs`` epochs, and at the end. It keeps the last ``keep_last`` checkpoints (None: all). A save, or a stop,
    waits until the loop asks for its next batch, or for the next epoch after the last batch. So a checkpoint holds
    everything that the body of the loop has done. ``config`` takes the sections of ``harness train``:
    ``{"checkpoint": {…}, "watchdog": {…}}``.

    If there is no checkpoint, ``initialize`` is called, for example to load weights; what it returns is logged. ``about``
    goes into each manifest, and must be the same on all ranks. A resume takes learning rates and schedules from the
    checkpoint, and those named in ``reset_options`` (``["lr"]``) from the program. If the model or the optimizer grows
    during training, ``adapt(step, epoch, names)`` rebuilds what they had at that step; ``names`` gives the dtype and the
    shape of each tensor in the checkpoint, by part and name.

    A stop signal, or a cloud's notice, ends the program after the step: the run saves, and the exit code is 75 (0 under
    torchrun). If you pass a ``stop`` request, the loop raises ``Stopped`` instead. ``fresh`` refuses a URL that holds a run;
    ``must_exist`` refuses one that holds none. After ``finish`` has ended a loop early, a new start has nothing to train,
    unless ``reopen`` is true.

    Raises ``ConfigError`` for a bad setting, ``Mismatch`` if the newest checkpoint does not fit, ``NoCheckpoint`` if none is
    whole, ``StoreError`` if the storage fails, and ``CrashLoop`` if attempts repeatedly die of the same error.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None,
        state: Mapping[str, Any],
        *,
        every_steps: int | None = None,
        every_seconds: float | Literal["auto"] | None = None,
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
        self._host = program.host() if stop is None else program.Guest(stop)
        self.stop = self._host.stop
        with self._host.preparing():
            given = {"every_steps": every_steps, "every_seconds": every_seconds, "every_epochs": every_epochs}
            given |= {"keep_last": keep_last, "must_exist": must_exist or None}
            self.config = observer.current.settings(settings_of(url, given, config))
        observer.current.making(self.config, state, world, fresh)
        self._watchdog: Watchdog | NoWatchdog = NoWatchdog()
        self._decisions: Agreement | NoLoop = NoLoop()
        self._attempt = Attempt(EventLog(self.config, active=False))  # until there is one
        self._error: BaseException | None = None  # that was seen last
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._host.let_go, self)
        with self._host.start(self), watching(self.config):
            world = self.world = world or self._closing.enter_context(world_of(state, self.config))
            self.state = State(state, world.device, reset_options=reset_options, adapt=adapt, speaks=world.rank == 0)
            self.loader = loader_of(state, world)
            self._course = Course(world.rank, self.state, self.loader)
            context = RunContext(
                world, self.config, self.state, self.loader, self._course, about or {}, initialize or nothing
            )
            self._loop = ProgramLoop(context, self.tell, self._do)
            self.boundary = self._loop.boundary
            self._closing.callback(self._loop.close)
            self._attempt = attempt.first_of(context, fresh=fresh, reopen=reopen)
            self.stop.before_leaving = lambda: self._attempt.end_soon(self.config.stop.grace_seconds, self._watchdog)
            self.stop.keep = lambda seconds: self._attempt.keep("no step boundary within the grace", seconds)
            self._closing.callback(self.stop.forget_training)
        observer.current.begun(self)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, over all attempts."""
        return self.state.progress.step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._course.epoch

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the best evaluation over all attempts, and its ``step``; empty before the first one."""
        return dict(self.state.progress.best)

    def epochs(self, total: int) -> Iterator[int]:
        """Yields the epochs that remain to be trained, an interrupted one first. Saves at the end."""
        with self._training(Length(epochs=total)):
            yield from self._loop.epochs()

    def steps(self, total: int | None) -> Iterator[int]:
        """Yields the numbers of the steps that remain to be trained, from 0; each must call ``step``. Saves at the end.
        None: until you leave the loop, and call ``finish``."""
        with self._training(Length(steps=ENDLESS if total is None else total)):
            yield from self._loop.steps()

    def step(self, /, **metrics: Any) -> None:
        """Marks a step boundary: the optimizer has taken its step on every rank.

        Metrics are numbers or 0-dim tensors. The log shows their mean over the ranks, so all ranks must pass the same names.
        In a loop over a ``Loader``, or over ``steps``, saves and stops happen when the loop asks for more, and raise there.

        Raises ``StoreError`` after too many failed saves in a row, ``Superseded`` if a newer attempt trains this run,
        ``Stopped`` (see the class), and ``ConfigError`` if the ranks pass different metrics.
        """
        saves = self._attempt.saves
        decision = self._decisions.decide(save_is_wanted=saves.is_wanted(), settled=saves.settled)
        step, epoch = self._loop.reach_boundary(metrics, decision)
        self._attempt.events.reached(step, epoch)
        outcome.reached(step)
        saves.poll()
        self._watchdog.step()
        observer.current.reached(self, metrics)
        self._loop.end_unseen()

    def finish(self) -> None:
        """Ends the run early: saves, and waits for the save. A new start of the program then has nothing left to train.

        Call it after you leave the loop by ``break``. ``epochs`` and ``steps`` save at their own end."""
        self._loop.finish()
        self._attempt.finish(self.state.progress, self._loop.describe_save)
        self._host.has_finished(self)

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool = False) -> None:
        """Records an evaluation. Every rank calls it with the same values.

        The best ``metric`` is remembered; ``checkpoint.keep_best`` keeps its checkpoint. NaN is never the best. The values
        belong to the step of the last ``step()``, or to the next one if an optimizer has taken a step since.
        """
        self._loop.evaluated(metric, values, higher_is_better=higher_is_better)

    def tell(self, event: str, message: str, /, **values: Any) -> None:
        """Logs an event on rank 0: ``message`` for people, the values for programs."""
        self._attempt.events.emit(event, message, **values)

    def can_roll_back(self) -> bool:
        """Whether there is a checkpoint to return to. All ranks call it."""
        return self._attempt.saves.can_roll_back()

    def roll_back(self) -> None:
        """Returns all ranks to the newest checkpoint, as a restart does; ``NoCheckpoint`` if there is none. All call it."""
        self._attempt = self._attempt.rolled_back(self.global_step)
        self._loop.roll_back()
        self._attempt.begin_here(self.global_step, self._loop.begin_here(self._attempt.saves))

    def remember_crash(self, error: BaseException) -> None:
        """Records an error in the training code, or in a sample, for later attempts."""
        if error is not self._error and not isinstance(error, Stopped):
            self._error = error
            self.stop.settled = "error"
            self._attempt.keep(type(error).__name__)
            self._attempt.remember(error)

    def close(self) -> None:
        """Ends the loader's workers, and finishes a save in progress if that is soon possible."""
        is_at_an_error = self._error is not None or sys.exc_info()[0] is not None
        is_left = not is_at_an_error and not self.stop.settled and self._course.is_under_way
        self._attempt.close(self.config.stop.grace_seconds, left_at=self.global_step if is_left else None)
        self._closing.close()

    @contextlib.contextmanager
    def _training(self, length: Length) -> Iterator[None]:
        """The time of the loop: somebody watches; afterwards the end is saved."""
        preemption = self.config.preemption
        with (
            self._host.loop(self, self.config.stop.grace_seconds),
            watching(self.config, lambda: self._attempt.keep("a hang")) as self._watchdog,
            Watcher(preemption.watch if is_first_of_node() else "none", preemption.base_url) as watcher,
        ):
            self._decisions = Agreement(self.world, self.stop, watcher)
            try:
                with self._loop.under_way(length):
                    self._attempt.begin_here(self.global_step, self._loop.begin_here(self._attempt.saves))
                    observer.current.looping(self)
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
            self._host.end(self, self._attempt.stopped(self.global_step, self.stop.reason))


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


@contextlib.contextmanager
def world_of(state: Mapping[str, Any], config: RunConfig) -> Iterator[World]:
    """The ranks of a program that has started them itself, as long as the run needs them."""
    world = world_of_program(device_of(state), config.world.timeout_seconds)
    try:
        yield world
    finally:
        world.let_go()


def loader_of(state: Mapping[str, Any], world: World) -> Loader | None:
    """The ``Loader`` in a state, if there is one.

    Raises ``ConfigError`` where it was made for another rank than this process has become since.
    """
    loader = next((each for each in state.values() if isinstance(each, Loader)), None)
    if loader is None or loader.is_placed or (loader.rank, loader.world_size) == (world.rank, world.size):
        return loader
    made_for = f"rank {loader.rank} of {loader.world_size}"
    raise ConfigError(
        f"the Loader is for {made_for}, but this process is rank {world.rank} of {world.size}: make the Loader "
        "after init_process_group, or give it rank= and world_size="
    )


def device_of(state: Mapping[str, Any]) -> torch.device:
    """Where the program trains: on the device of its first parameter; of its first one on an accelerator, if there is any,
    since an average of a model's weights may lie on the CPU."""
    modules = [each for each in state.values() if isinstance(each, torch.nn.Module)]
    found = dict.fromkeys(parameter.device for each in modules for parameter in each.parameters())
    return next((each for each in found if device.of(each).is_async), next(iter(found), torch.device("cpu")))
