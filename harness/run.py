"""Everything around a training loop that keeps it alive, whoever has written the loop.

A ``Run`` claims an attempt at a URL, restores the newest whole checkpoint on all ranks, and then goes along with the loop:
at each step boundary it agrees with the other ranks, logs, saves, and stops when it was asked to.
"""

import atexit
import contextlib
import functools
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import harness
from harness import crashes, loaders, outcome, program, resume
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.saver import Saved, Saver
from harness.checkpoint.shares import Writers
from harness.checkpoint.staging import HostMemory
from harness.checkpoint.store import open_store
from harness.config import Config, RunConfig, run_config
from harness.console import complain
from harness.crashes import Crash
from harness.data import Loader, is_due, nothing
from harness.environment import (
    began,
    is_first_of_node,
    launch_id,
    launcher_began,
    rank,
    restarts,
    shutdown_grace_seconds,
)
from harness.errors import ConfigError, HarnessError, NoCheckpoint, Stopped, StoreError
from harness.loaders import Epochs
from harness.metrics import Reporter, as_json, check_metric_names, hash_of, in_words, number_of
from harness.notices import Watcher
from harness.omissions import Omissions
from harness.signals import StopRequest
from harness.state import Adapt, State, restore_random_state
from harness.stragglers import OwnWork, Stragglers
from harness.watchdog import Watchdog
from harness.world import Agreement, World, has_lost_a_peer, is_timeout, leave_at_once, world_of_program

log = logging.getLogger(__name__)

# The doctor's, while it runs a script: it is given what a Run is made of, looks at that, and ends the program.
examiner: Callable[[RunConfig, Mapping[str, Any], World | None, bool], None] | None = None


class Run:
    """A training that survives the death of its processes.

    ``state`` names what is saved and restored: modules (plain, in DDP, compiled), optimizers, schedulers, gradient scalers,
    a ``Loader``, and whatever else has ``state_dict`` and ``load_state_dict``. When the run is made, the newest whole
    checkpoint at ``url`` (any fsspec URL, or a path) is in them, on every rank. Then::

        for epoch in run.epochs(10):      # or: for step in run.steps(10_000)
            for batch in loader:
                ...                       # forward, backward, optimizer.step()
                run.step(loss=loss)

    Every rank makes it with the same arguments, after ``init_process_group`` and after the model was wrapped. A checkpoint
    is written every ``every_steps`` steps, ``every_seconds`` seconds and ``every_epochs`` epochs, and at the end; the last
    ``keep_last`` are kept (None: all). It has all that the loop does before it asks for the next batch, or, after the last
    one of an epoch, for the next epoch: a save that is due waits for that, and so does a stop. ``config`` has further
    sections as in the configuration of ``harness train``: ``{"checkpoint": {…}, "watchdog": {…}}``. ``url=None`` saves
    nothing.

    ``initialize`` is called where there is nothing to resume from (to load weights, say); what it returns is logged.
    ``about`` goes into each manifest and must be the same on all ranks. At a resume the checkpoint's learning rates and
    schedules count; of the ``reset_options`` that are named (``["lr"]``) the program's. ``adapt(step, epoch, names)`` is
    called before a checkpoint is compared, with dtype and shape of its tensors by part and name, to give a model or an
    optimizer that grows what it had then.

    A stop signal, or a cloud's notice, ends the program after the step, saved, with exit code 75 (0 under torchrun); given a
    ``stop`` request of its own, the loop raises ``Stopped`` instead. ``fresh`` refuses a URL that holds a run,
    ``must_exist`` one that holds none. A loop that ``finish`` has ended early has nothing left to do when the program is
    started again; ``reopen`` trains on.

    Raises ``ConfigError`` for a bad setting, ``Mismatch`` where the newest checkpoint does not fit the state,
    ``NoCheckpoint`` where none is whole, or none there that ``must_exist``, ``StoreError`` where the storage fails,
    ``CrashLoop`` where attempts die of the same error again and again.
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
        if examiner is not None:
            examiner(_settings(url, given, config), state, world, fresh)
        self._host = program.host() if stop is None else None
        self.stop = program.host().stop if stop is None else stop
        if self._host is not None:
            self._host.hear_of_errors(self._fail)
        self._pid = os.getpid()
        self.config = _settings(url, given, config)
        self.world = world or world_of_program(device_of(state), self.config.world.timeout_seconds)
        self.stop.before_leaving = self._before_leaving
        self.about = dict(about or {})
        self._initialize = initialize
        self.state = State(state, self.world.device, reset_options=reset_options, adapt=adapt, speaks=self.world.rank == 0)
        self.loader = next((each for each in state.values() if isinstance(each, Loader)), None)
        _check_place(self.loader, self.world)
        self.total_steps: int | None = None
        self.total_epochs: int | None = None
        self._own_work = OwnWork(self.world.device, self.state.modules.values(), self.loader)
        self._saver: Saver | None = None  # on the ranks that write, where the run has a URL
        self._host_memory = HostMemory(pinned=self.world.device.type == "cuda")
        self._record_crash: Callable[[Crash], None] | None = None  # on every rank, where the run has a URL
        self._random: Mapping[str, Any] | None = None  # this rank's, to be restored when the loop begins
        self._save_seconds: float | None = None  # what the last save took, on rank 0
        self._warned_of_slow_saves = False
        self._agreement: Agreement | None = None  # while the loop goes on
        self._metrics: Mapping[str, Any] = {}  # of the last step
        self._boundaries = 0  # how many this process has seen
        self._is_at_boundary = False  # the body of the step that was just taken has not ended
        self._due: _Due | None = None  # what waits for that
        self._epoch_before = 0  # at the boundary before
        self._has_stepped = False  # an optimizer, since the last boundary
        self._loops = 0  # over ``epochs`` or ``steps`` that have begun
        self._is_in_loop = False  # the last of these has not come to its own end
        self._has_saved = False  # in this attempt
        self._is_by_steps = False  # the loop, and not by epochs
        self._error: BaseException | None = None  # that was seen last
        self._given_by: Epochs | None = None  # the newest batch, where a loader of torch's kind tells
        self._trained_from: Epochs | None = None  # the last step, likewise
        self._omissions = Omissions(self.state, is_active=self.world.rank == 0)
        for optimizer in self.state.stepping():
            optimizer.register_step_pre_hook(self._before_optimizer)
        with self._host.start(self._saw) if self._host else contextlib.nullcontext(), _watching(self.config):
            self._open(fresh=fresh)
        if reopen:
            self.state.progress.finished_loops = 0
        if self._host is not None:
            atexit.register(self._leave_program)

    # --- what the loop asks ------------------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, over all attempts."""
        return self.state.progress.step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.loader.epoch if self.loader else self.state.progress.epoch

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are still to be trained, the one that was interrupted first. The end is saved."""
        self.total_epochs, self.total_steps = total, None
        with self._under_way():
            may_be_empty = self.loader is None  # what is left of an epoch, by a position that others keep
            while not self._is_finished() and (epoch := self.epoch) < total:
                boundaries = self._boundaries
                self._fence()  # the loop may change anything before its first step
                self._omissions.at_epoch_begin()
                yield epoch
                if self._boundaries == boundaries and not may_be_empty:
                    raise ConfigError(f"epoch {epoch}: the loop did not call run.step()")
                may_be_empty = False
                self._end_epoch(epoch)

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are still to be trained, by their number from 0; each must call ``step``. The end is saved."""
        self.total_steps, self.total_epochs = total, None
        with self._under_way():
            self._is_by_steps = True
            while not self._is_finished() and self.global_step < total:
                boundaries = self._boundaries
                yield self.global_step
                if self._boundaries == boundaries:
                    raise ConfigError(f"step {self.global_step + 1}: the loop did not call run.step()")
                self._end_body()

    def step(self, /, **metrics: Any) -> None:
        """A step boundary: the optimizer has taken its step, and every rank is here. Metrics (numbers or 0-dim tensors) are
        averaged over the ranks where they are logged; all ranks tell the same.

        Raises ``StoreError`` after too many failed saves in a row, ``Superseded`` where a newer attempt trains this run,
        ``Stopped`` (see the class), ``ConfigError`` where the ranks tell different metrics. In a loop over a ``Loader``, or
        over ``steps``, what is due happens when the loop asks for more, and raises there.
        """
        if self._agreement is None:
            raise ConfigError("run.step() belongs into a loop over run.epochs() or run.steps()")
        self._boundaries += 1
        self._is_at_boundary = True
        self.state.progress.step += 1
        if metrics.keys() != self._metrics.keys():
            check_metric_names(metrics)
        self._metrics = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in metrics.items()}
        if (notice := self._watcher.poll()) is not None and notice.kind == "stop":
            self.stop.ask(notice.text)
        stopping, save_is_wanted = self._agreement.exchange(bool(self.stop), self._wants_save())
        if stopping:
            self.stop.settled = "stop"
        self._has_stepped, self._trained_from = False, self._given_by
        self._reporter.reached(self.global_step, self.epoch)
        self._plan(save=bool(save_is_wanted), stop=bool(stopping))
        if self._saver is not None:
            self._tell_of(self._saver.poll())
        self._omissions.at_boundary(self.loader, self._own_work.forwards)
        if self._boundaries == 1:
            self._after_first_step()
        if self._watchdog is not None:
            self._watchdog.step()
        if not self._ends_of_bodies_show():
            self._end_body()

    def _plan(self, *, save: bool, stop: bool) -> None:
        """Notes what is due at this boundary; what the boundary before has left is still due."""
        checkpoint, step, epochs = self.config.checkpoint, self.global_step, (self._epoch_before, self.epoch)
        self._epoch_before = self.epoch
        save = save or is_due(step, epochs, checkpoint.every_steps, checkpoint.every_epochs) or self._is_new_best()
        if save or stop:
            self._mark_due(save=save, stop=stop)
        if self._is_last_step() or is_due(step, epochs, self.config.log.every_steps, self.config.log.every_epochs):
            self._log()

    def _mark_due(self, *, save: bool = False, stop: bool = False) -> None:
        """Has it done at the end of the body, beside what is due there already."""
        before = self._due or _Due()
        self._due = _Due(save=save or before.save, stop=stop or before.stop)

    def _ends_of_bodies_show(self) -> bool:
        """Whether the loop comes back here, or to a loader that tells, when it has done with the step."""
        return self._is_by_steps or self.loader is not None or self._trained_from is not None

    def _end_batch(self, asked: Epochs | None = None) -> None:
        """The loop asks for another batch, of ours or of the loader that is ``asked``."""
        if self._is_at_boundary and asked is self._trained_from:
            self._omissions.at_next_batch(self._own_work.forwards)
            self._end_body()

    def _end_epoch(self, epoch: int) -> None:
        """The body of an epoch has ended, which the loop may have left early."""
        if self.loader:
            self.loader.end_epoch(epoch)
        else:
            self.state.progress.epoch += 1
        if self.epoch != self._epoch_before:
            checkpoint, log_every = self.config.checkpoint, self.config.log.every_epochs
            epochs = (self._epoch_before, self.epoch)
            self._epoch_before = self.epoch
            if is_due(1, epochs, None, checkpoint.every_epochs):
                self._mark_due(save=True)
            if is_due(1, epochs, None, log_every):
                self._log()
        self._omissions.at_epoch_end()
        self._end_body()

    def _end_body(self) -> None:
        """The loop has done with a step, and with all that it does after it: now is the time for what is due."""
        due, self._due, self._is_at_boundary = self._due, None, False
        if due is None or self._is_over():  # the end is saved by itself
            return
        self._save(must_succeed=due.stop)
        if due.stop:
            self._leave()

    def _after_first_step(self) -> None:
        """What the first step of this process has shown."""
        for gradients in self.state.gradients.values():
            gradients.stop_noting()
        self.state.check_frozen()
        self._omissions.warn()
        if self.loader and self.world.rank == 0:
            loaders.warn_of_single_samples(self.loader, self.state.modules.items())

    def finish(self) -> None:
        """Saves the end, and waits for it: for a loop that is left early, which is over then: when the program is started
        again, it has nothing left to do. ``epochs`` and ``steps`` save at their own end."""
        self._due = None
        if self._is_in_loop:
            self.state.progress.finished_loops = self._loops
        self._wait_for_save()
        if not resume.on_first(self.world, self._end_is_saved):
            self._save(must_succeed=True)
        self.tell("done", f"done: step {self.global_step}  {in_words(self.state.progress.last)}", step=self.global_step)
        self._leave_host()

    def _end_is_saved(self) -> bool:
        """Whether the newest checkpoint has everything as it is now: a loop may change something after its last save."""
        if self._saver is None or self._committed is None or self._committed[0] != self.global_step:
            return False
        return self.state.is_that_of(self._catalog.open(self._committed[1]))

    def _is_finished(self) -> bool:
        """Whether an earlier attempt has ended this loop early, for good."""
        return self._loops <= self.state.progress.finished_loops

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool = False) -> None:
        """Tells what an evaluation found; the best ``metric`` is remembered, and its checkpoint kept where
        ``checkpoint.keep_best`` says so. NaN is never the best. Every rank calls it with the same values.

        What was judged is the step of the last ``step()``, or, where an optimizer has taken a step since, the one after it.
        """
        self._fence()  # weights may be put in another place for an evaluation, and back after it
        progress = self.state.progress
        if metric not in values:
            raise ConfigError(f"evaluation.metric is {metric!r}, but measured were: {', '.join(values)}")
        judged = progress.step + self._has_stepped
        progress.last |= values
        if _is_better(values[metric], progress.best.get(metric), higher_is_better=higher_is_better):
            progress.best = {**values, "step": judged}
        message = f"step {self._of_total(judged)}  evaluation  {in_words(dict(values))}"
        self.tell("evaluate", message, step=judged, **values)
        if not self._is_new_best() or self._has_stepped:
            return
        if self._is_at_boundary:
            self._mark_due(save=True)
        elif not self._ends_of_bodies_show():
            self._save(must_succeed=False)

    def tell(self, event: str, message: str, /, **values: Any) -> None:
        """Logs an event: ``message`` for people, the values for programs. Rank 0 speaks."""
        self._reporter.event(event, message, **values)

    def can_roll_back(self) -> bool:
        """Whether there is a checkpoint to go back to. All ranks call it."""

        def is_there() -> bool:
            return self._saver is not None and any(entry.state == "whole" for entry in self._catalog.candidates())

        self._wait_for_save()
        return bool(resume.on_first(self.world, is_there))

    def roll_back(self) -> None:
        """Returns all ranks to the newest checkpoint; what follows is an attempt of its own, as after a restart. All ranks
        call it. Raises ``NoCheckpoint`` where there is none."""
        if not self.can_roll_back():
            raise NoCheckpoint(f"{self.config.checkpoint.url}: there is no checkpoint yet to go back to")
        self._boundaries += 1  # the step is over, in its way
        self._due = None
        resume.on_first(self.world, lambda: self._catalog.refuse_superseded(self._saver.attempt) if self._saver else None)
        self.tell("rollback", "", step=self.global_step)
        self._reporter.close()
        self._begin_attempt()
        self._begin_here()

    def close(self) -> None:
        """Ends the loader's workers, and a save that is under way: one that can be finished soon is worth it."""
        if self.loader:
            self.loader.close()
        if self._saver is not None:
            self._tell_of(self._saver.give_up_after(self.config.stop.grace_seconds))
        self._warn_of_lost_steps()
        self._reporter.close()
        self.stop.before_leaving = nothing
        self._leave_host()

    def _warn_of_lost_steps(self) -> None:
        """Says so where the loop was left by ``break``, and its end is not saved."""
        is_at_an_error = self._error is not None or sys.exc_info()[0] is not None
        if not self._is_in_loop or self._saver is None or self.stop.settled or is_at_an_error:
            return
        committed = self._committed[0] if self._committed else 0
        self._is_in_loop = False
        if committed < self.global_step and self.world.rank == 0:
            log.warning(
                "the loop was left before its end, at step %d: what came after step %d is not saved. Call run.finish() then",
                self.global_step,
                committed,
            )

    def _leave_host(self) -> None:
        """The training is over: an error from now on is the program's own."""
        if self._host is not None:
            self._host.forget_errors(self._fail)

    def _leave_program(self) -> None:
        if os.getpid() == self._pid:  # a forked child has none of the threads, and must not touch the parent's connections
            self.close()
            self.world.let_go()

    def _before_leaving(self) -> None:
        """Another rank has died, and this one leaves, in another thread: a save that is under way is worth some time."""
        if self._saver is not None:
            self._saver.let_end(self.config.stop.grace_seconds)
        self._reporter.flush()
        if self._watchdog is not None and self._watchdog.is_reporting:  # it ends the process when it is done
            time.sleep(self.config.stop.grace_seconds)

    # --- an attempt --------------------------------------------------------------------------------------------------

    def _open(self, *, fresh: bool) -> None:
        """Begins the run's next attempt, or its first."""
        checkpoint, world = self.config.checkpoint, self.world
        if checkpoint.url is None:
            self._reporter = Reporter(self.config, active=world.rank == 0)
            self.tell("start", "no checkpoint.url: this run is not saved", step=self.global_step)
            self._start_anew()
            resume.check_lockstep(world, self.state, self.about, resumed=False)
            return
        self._catalog = catalog = Catalog(open_store(checkpoint.url, checkpoint.storage_options))
        if fresh and checkpoint.must_exist:
            raise ConfigError("checkpoint.must_exist expects a run in checkpoint.url, fresh an unused one: choose")
        if fresh:
            resume.on_first(world, lambda: resume.refuse_to_reuse(catalog, launch_id()))
        if checkpoint.must_exist:
            resume.on_first(world, lambda: resume.refuse_to_begin(catalog))
        looping = resume.on_first(world, lambda: crashes.is_looping(catalog, self.config.crash_loop.same_failures))
        self._begin_attempt(pass_over_newest=looping)
        if world.rank == 0:
            self._tell_of_differences()

    def _begin_attempt(self, *, pass_over_newest: bool = False) -> None:
        """Claims an attempt, resumes, and makes sure that all ranks hold the same."""
        checkpoint, world, catalog = self.config.checkpoint, self.world, self._catalog
        about: dict[str, Any] = {"launch": launch_id(), "world_size": world.size, "host": platform.node()}
        about |= {"pid": os.getpid(), "began": began(), "restarts": restarts(), "launcher_began": launcher_began()}
        attempt = resume.on_first(world, lambda: catalog.claim_attempt(about))
        self._reporter = Reporter(self.config, active=world.rank == 0, attempt=attempt.id)
        self._record_crash = functools.partial(crashes.record, catalog, attempt)
        resumed = resume.resume(world, catalog, self.state, how=checkpoint.restore, pass_over_newest=pass_over_newest)
        if resumed is None:
            self._start_anew()
        self._random = resumed.random if resumed else None
        self._committed = (resumed.step, resumed.directory) if resumed else None
        self._has_saved = False
        resume.check_lockstep(world, self.state, self.about, resumed=resumed is not None)
        writers = _writers(world, self.config)
        if world.rank in writers.ranks:
            self._saver = Saver(
                catalog=catalog,
                attempt=attempt,
                lineage=resumed.lineage if resumed else [],
                retention=Retention(checkpoint.keep_last, checkpoint.keep_every_steps),
                shard_bytes=checkpoint.shard_bytes or catalog.store.shard_bytes,
                streams=checkpoint.streams or catalog.store.streams,
                writers=writers,
                failures_allowed=checkpoint.failures_allowed,
                memory=self._host_memory,
                memory_limit_bytes=checkpoint.memory_limit_bytes,
                before_commit=self._reporter.flush,
                on_failure=lambda step, error: self.tell("save_failed", "", step=step, error=error),
                proofs=_PROOFS,
            )
        for directory, why in resumed.passed_over.items() if resumed else ():
            self.tell("fallback", "", directory=directory, why=why)  # which was logged when it was found
        outcome.resumed(self.global_step)
        where = f"resuming from {resumed.directory}" if resumed else f"starting in {catalog.store.url}"
        what = f"{world.size} x {world.device.type} ({world.backend}), step {self.global_step}"
        self.tell(
            "resume" if resumed else "start",
            f"attempt {attempt.number}: {where}, {what}",
            step=self.global_step,
            directory=resumed.directory if resumed else None,
            lineage=[(ancestor.attempt, ancestor.until_step) for ancestor in resumed.lineage] if resumed else [],
            world_size=world.size,
        )
        intervals = (checkpoint.every_steps, checkpoint.every_seconds, checkpoint.every_epochs)
        if world.rank == 0 and intervals == (None, None, None):
            log.warning(
                "nothing is saved before the end of the run: a death costs all of it. Give every_steps, every_seconds or "
                "every_epochs (checkpoint.every_… in a configuration)"
            )
        if world.rank == 0 and resumed is not None:
            self._save_seconds = resumed.save_seconds
            self._warn_if_saves_are_slow()

    def _tell_of_differences(self) -> None:
        """Says what somebody has edited in the program since the checkpoint, and whose word counts."""
        for each in self.state.differences:
            is_task = isinstance(self.config, Config)
            how = f"train.reset_options=[{each.name}]" if is_task else f'Run(..., reset_options=["{each.name}"])'
            log.warning("%s%s", each, f". To use the program's: {how}" if each.who_counts == "checkpoint" else "")

    def _start_anew(self) -> None:
        """Gives a new run what it is to begin with."""
        if self._initialize is not None and (what := self._initialize()):
            self.tell("init", what)

    # --- the loop ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """The time of the loop: somebody watches; afterwards the end is saved."""
        cloud = self.config.preemption.watch if is_first_of_node() else "none"
        host: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._host is not None:
            self._host.hear_of_errors(self._fail)
            host = self._host.loop(self.config.stop.grace_seconds, self._saw)
        with (
            host,
            _watching(self.config) as self._watchdog,
            Watcher(cloud, self.config.preemption.base_url) as self._watcher,
        ):
            self._agreement = Agreement(self.world, wants=2)
            self._due = None
            self._is_by_steps = False
            self._loops += 1
            self._is_in_loop = True
            if self._is_finished():
                log.warning(
                    "run.finish() has ended this run early, at step %s: there is nothing left to train. To train on, give "
                    "Run reopen=True",
                    self.global_step,
                )
            try:
                with self._followed():
                    self._begin_here()
                    yield
                self._is_in_loop = False
                self._agreement.finish()
                self.finish()
            finally:
                self._agreement = None

    @contextlib.contextmanager
    def _followed(self) -> Iterator[None]:
        """The time in which the loop shows where it is, by what it asks the loader for."""
        if self.loader:
            self.loader.on_return, self.loader.on_exit = self._end_batch, self._fence
        for each in self.state.epochs if self.loader is None else ():
            each.epoch = self.epoch
            each.on_return = functools.partial(self._end_batch, each)
            each.on_give = functools.partial(setattr, self, "_given_by", each)
        with self._omissions.looking():
            try:
                yield
            finally:
                if self.loader:
                    self.loader.on_return = self.loader.on_exit = nothing
                for each in self.state.epochs:
                    each.on_return = each.on_give = nothing

    def _begin_here(self) -> None:
        """Has the clocks run, and the random numbers come, from where the state is."""
        stragglers = self.config.stragglers
        hosts = self.world.all_gather(platform.node())
        self._stragglers = (
            Stragglers(hosts, stragglers.factor, stragglers.window_seconds) if stragglers.factor and len(hosts) > 1 else None
        )
        self._last_saved_time = self._last_logged_time = time.monotonic()
        self._last_logged_step = self.global_step
        self._epoch_before = self.epoch
        by_epochs = self.total_epochs * len(self.loader) if self.total_epochs and self.loader else None
        self._reporter.show(self.global_step, self.total_steps or by_epochs)
        self.state.check_lengths(self.total_steps or by_epochs, self.total_epochs, each_step=isinstance(self.config, Config))
        if self._random is not None:
            restore_random_state(self._random, self.world.device)
            self._random = None

    def _is_over(self) -> bool:
        """Whether the loop is at its own end."""
        return self._is_last_step() or (self.total_epochs is not None and self.epoch >= self.total_epochs)

    def _is_last_step(self) -> bool:
        return self.total_steps is not None and self.global_step >= self.total_steps

    def _of_total(self, step: int) -> str:
        return str(step) if self.total_steps is None else f"{step}/{self.total_steps}"

    def _leave(self) -> None:
        """All ranks have stopped at this step."""
        assert self._agreement is not None
        self._agreement.finish()
        saved = "which is saved" if self.config.checkpoint.url else "and nothing is saved: there is no checkpoint.url"
        reason = self.stop.reason or "on another rank"
        stopped = Stopped(f"asked to stop ({reason}) at step {self.global_step}, {saved}")
        self.tell("stop", "", step=self.global_step, reason=reason)  # how the program ends is logged when it does
        if self._host is None:
            raise stopped
        if program.is_interactive():  # the prompt goes on
            raise KeyboardInterrupt(str(stopped)) if self.stop.reason == "SIGINT" else stopped
        self.close()
        sys.exit(program.record_stop(stopped))

    def _fail(self, error: BaseException) -> None:
        """Before an error ends the program."""
        self._saw(error)
        with contextlib.suppress(Exception):  # the error that is under way matters more
            self.close()

    def _saw(self, error: BaseException) -> None:
        """An error has ended the loop, or the program, or first the one and then the other."""
        if error is not self._error:
            self._error = error
            self.remember_crash(error)

    def remember_crash(self, error: BaseException) -> None:
        """Leaves a record of an error in the training code, or in a sample, for the attempts to come."""
        if not isinstance(error, Stopped):
            self.stop.settled = "error"
        has_lost = has_lost_a_peer(error)  # what torch says of that has nothing to do with the training
        what = "lost contact with another rank" if has_lost else f"{type(error).__name__}: {error}".partition("\n")[0]
        if not isinstance(error, Stopped) and hasattr(self, "_reporter"):
            self.tell("error", "", step=self.global_step, error=what)
        if has_lost and is_timeout(error):
            log.error(
                "rank %d waited in vain for another rank, after %d calls of run.step() in this process (step %d): every "
                "rank has to call it equally often",
                *(self.world.rank, self._boundaries, self.global_step),
            )
        is_theirs = isinstance(error, Exception) and not isinstance(error, HarnessError) and not has_lost
        if not is_theirs or getattr(self, "_record_crash", None) is None:
            return
        samples = self.loader.samples() if self.loader else []
        with contextlib.suppress(StoreError):  # the error that is under way matters more
            self._record_crash(Crash(self.global_step + 1, what, self.world.rank, samples))  # type: ignore[misc]

    # --- logging -----------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        own_seconds = self._note_metrics()
        progress, now = self.state.progress, time.monotonic()
        steps_per_second = (self.global_step - self._last_logged_step) / max(now - self._last_logged_time, 1e-9)
        self._last_logged_time, self._last_logged_step = now, self.global_step
        values = {name: progress.last[name] for name in self._metrics}
        for optimizer in list(self.state.optimizers.values())[:1]:
            if "lr" in optimizer.param_groups[0]:  # few optimizers have no such option
                values["lr"] = float(optimizer.param_groups[0]["lr"])
        if self.loader:
            values["samples/s"] = self.loader.schedule.global_batch_size * steps_per_second
        else:
            values["steps/s"] = steps_per_second
        place = f"step {self._of_total(self.global_step)}  epoch {self.epoch}"
        self.tell("train", f"{place}  {in_words(values)}", step=self.global_step, **values)
        if self._stragglers is not None:
            for found in self._stragglers.look(self.global_step, own_seconds):
                self.tell("straggler", str(found), step=self.global_step, **asdict(found))

    def _note_metrics(self) -> list[float]:
        """Averages this step's metrics over the ranks, and returns the seconds of own work of each. All ranks call it.

        Raises ``ConfigError`` where they tell different metrics. The names travel with the first numbers, as a hash.
        """
        own = [self._own_work.seconds(), float(hash_of(self._metrics)), *map(number_of, self._metrics.items())]
        first, rest = own[:_FLOATS_AT_ONCE], own[_FLOATS_AT_ONCE:]
        rows = self.world.all_gather_floats([*first, *[0.0] * (_FLOATS_AT_ONCE - len(first))])  # a length that all agree on
        if any(row[1] != rows[0][1] for row in rows):
            told = [
                f"rank {rank} tells {', '.join(names)}" for rank, names in enumerate(self.world.all_gather([*self._metrics]))
            ]
            raise ConfigError(f"run.step: all ranks must tell the same metrics, in the same order; {'; '.join(told)}")
        more = self.world.all_gather_floats(rest) if rest else [[] for _ in rows]
        seconds, _, *metrics = zip(
            *([*row[: len(first)], *others] for row, others in zip(rows, more, strict=True)), strict=True
        )
        # Added in rank order, since an all-reduce may add in another order at every size of the message.
        means = [sum(values) / self.world.size for values in metrics]
        self.state.progress.last |= dict(zip(self._metrics, means, strict=True))
        return list(seconds)

    # --- saving ------------------------------------------------------------------------------------------------------

    def _wants_save(self) -> bool:
        """Whether this rank asks for a save: ``checkpoint.every_seconds`` have passed by rank 0's clock, or the last one saw
        the state change while it was copied."""
        every = self.config.checkpoint.every_seconds
        seconds_are_over = every is not None and self.world.rank == 0 and time.monotonic() - self._last_saved_time >= every
        return seconds_are_over or (self._saver is not None and self._saver.must_repeat)

    def _is_new_best(self) -> bool:
        """Whether this step's evaluation is the best so far, and such a checkpoint is to be kept."""
        return self.config.checkpoint.keep_best and self.state.progress.best.get("step") == self.global_step

    def _before_optimizer(self, *_args: object) -> None:
        """An optimizer is about to take its step."""
        self._has_stepped = True
        if self._saver is not None:
            self._saver.fence()
            self._omissions.at_optimizer()

    def _fence(self) -> None:
        """Before anything may change what a save may still be copying."""
        if self._saver is not None:
            self._saver.fence()

    def _wait_for_save(self) -> None:
        self._on_writers(lambda saver: self._tell_of(saver.wait()))

    def _on_writers(self, function: Callable[[Saver], None]) -> None:
        """Calls it on each rank that writes. None goes on before rank 0 is done, nor without knowing its error."""
        if self._saver is not None and self.world.rank != 0:
            function(self._saver)
        resume.on_first(self.world, lambda: function(self._saver) if self._saver else None)

    def _save(self, *, must_succeed: bool) -> None:
        if self.config.checkpoint.url is None:
            return
        if not self._has_saved:
            resume.check_alike(self.world, self.state)
            self._has_saved = True
        self._note_metrics()
        ranks = self.world.gather(self.state.capture_rank())
        self._last_saved_time = time.monotonic()
        self._omissions.at_save(self.epoch)
        directory = self._directory_of_save(must_succeed=must_succeed)
        if directory is None:
            return
        if must_succeed:
            self._on_writers(lambda saver: self._save_here(saver, directory, ranks, must_succeed=True))
        elif self._saver is not None:
            self._save_here(self._saver, directory, ranks, must_succeed=False)

    def _directory_of_save(self, *, must_succeed: bool) -> str | None:
        """Where to save, as rank 0 says to all that need to know; None where this rank does not, or where the save before is
        still being written, and is not to be waited for."""

        def choose() -> str | None:
            assert self._saver is not None, "rank 0 writes"
            step = self.state.progress.step
            if self._saver.is_busy and self.config.checkpoint.when_busy == "skip" and not must_succeed:
                message = f"step {self._of_total(step)}  NOT saved: the save before is still being written"
                self.tell("skip", message, step=step)
                return None
            return self._saver.new_directory(step)

        if must_succeed or self.config.checkpoint.writers != "rank0":
            return resume.on_first(self.world, choose)  # type: ignore[no-any-return]
        return choose() if self.world.rank == 0 else None

    def _save_here(self, saver: Saver, directory: str, ranks: list[Any] | None, *, must_succeed: bool) -> None:
        """Saves this rank's share beside the training, or, when this is to be the last thing to happen, before it goes on.
        What is each rank's own, rank 0 has of all ``ranks``."""
        checkpoint, progress = self.config.checkpoint, self.state.progress
        self._tell_of(saver.wait())
        parts = self.state.capture()
        if ranks is not None:
            parts |= {name: {str(rank): each[name] for rank, each in enumerate(ranks)} for name in ranks[0]}
        best = int(progress.best["step"]) if checkpoint.keep_best and progress.best else None
        about: dict[str, Any] = {"step": progress.step, "meta": self._meta(), "best_step": best, "directory": directory}
        about["is_steady"] = self.state.is_steady()
        self.tell("saving", "", step=progress.step)
        if must_succeed or checkpoint.mode == "sync":
            self._tell_of(saver.save(parts, **about, must_succeed=must_succeed))
        else:
            saver.begin(parts, **about, overlap=checkpoint.overlap, check=checkpoint.check_snapshots)
        if not self._ends_of_bodies_show():
            self._omissions.after_save(progress.step)

    def _tell_of(self, saved: Saved | None) -> None:
        """Logs a save that has been committed."""
        if saved is None:
            return
        self._committed = (saved.step, saved.directory)
        times = f"in {saved.seconds:.2f} s, of which training waited {saved.blocked_seconds:.3f} s"
        message = f"step {self._of_total(saved.step)}  saved {saved.directory} {times}"
        self.tell("save", message, **asdict(saved))
        self._save_seconds = saved.seconds
        self._warn_if_saves_are_slow()

    def _warn_if_saves_are_slow(self) -> None:
        """Says once, while there is time to act, that a save would not fit between a stop signal and the end."""
        grace_seconds = min(self.config.stop.grace_seconds, shutdown_grace_seconds())
        if self._save_seconds is not None and self._save_seconds > grace_seconds and not self._warned_of_slow_saves:
            self._warned_of_slow_saves = True
            log.warning(
                "the last save took %.2f s, and a stop has %g s: it would end before it is saved; raise stop.grace_seconds "
                "(%g) and what the launcher grants (torchrun: --shutdown-timeout)",
                self._save_seconds,
                grace_seconds,
                self.config.stop.grace_seconds,
            )

    def _meta(self) -> dict[str, Any]:
        """What the manifest says beside the state."""
        progress = self.state.progress
        return {
            "epoch": self.epoch,
            "metrics": {"last": as_json(progress.last), "best": as_json(progress.best)},
            **self.about,
            **resume.conditions(self.world),
            "save_seconds": self._save_seconds,  # the save before this one; None at the first
            "python": platform.python_version(),
            "harness": harness.__version__,
        }


_PROOFS = 2  # saves of an attempt that show whether only the optimizer changes what it owns
_FLOATS_AT_ONCE = 32


@dataclass(frozen=True)
class _Due:
    """What is to be done when the body of a step has ended."""

    save: bool = False
    stop: bool = False


def _is_better(value: float, best: float | None, *, higher_is_better: bool) -> bool:
    """Whether a value is better than the best so far. NaN is better than nothing."""
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or (value > best if higher_is_better else value < best)


def _settings(
    url: str | os.PathLike[str] | None, checkpoint: Mapping[str, Any], config: Mapping[str, Any] | RunConfig | None
) -> RunConfig:
    """All settings in one; what is None was not given."""
    if isinstance(config, RunConfig):
        return config
    sections = dict(config or {})
    given = {key: value for key, value in checkpoint.items() if value is not None}
    literal = None if url is None else os.fspath(url).replace("$", "$$")  # as everywhere else in Python
    sections["checkpoint"] = {"url": literal, **sections.get("checkpoint", {}), **given}
    return run_config(sections)


def _writers(world: World, config: RunConfig) -> Writers:
    """The ranks that write, as ``checkpoint.writers`` has it. All ranks call it."""
    which = config.checkpoint.writers
    is_one = world.rank == 0 or which == "all" or (which == "node" and is_first_of_node())
    ranks = tuple(rank for rank, writes in enumerate(world.all_gather(is_one)) if writes)
    return Writers(ranks, world.rank, 0.9 * config.world.timeout_seconds)  # before those who wait for rank 0 give it up


def _check_place(loader: Loader | None, world: World) -> None:
    """Raises ``ConfigError`` where a loader was made for another rank than this process has become since."""
    if loader is None or loader.is_placed or (loader.rank, loader.world_size) == (world.rank, world.size):
        return
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


# --- hangs -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watching(config: RunConfig) -> Iterator[Watchdog | None]:
    """A watchdog for the time of the training, where one is wanted."""
    limits = config.watchdog
    if limits.timeout_seconds is None:
        yield None
        return
    watchdog = Watchdog(limits.timeout_seconds, limits.first_step_seconds, _report_hang(config), _leave_hung)
    try:
        yield watchdog
    finally:
        watchdog.stop()


def _report_hang(config: RunConfig) -> Callable[[str], None]:
    """Writes the stacks beside the checkpoints, if the storage still answers."""

    def report(stacks: str) -> None:
        if config.checkpoint.url is None:
            return
        text = stacks.encode()
        name = f"hangs/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-rank-{rank()}.txt"
        try:
            store = open_store(config.checkpoint.url, config.checkpoint.storage_options, attempts=1, deadline_seconds=10)
            store.put(name, lambda: [text], len(text))
        except Exception as error:  # whatever it is, leaving comes first
            complain(f"harness: could not write {name}: {error}")

    return report


def _leave_hung() -> None:
    time.sleep(1)  # the other ranks hang with this one and finish their reports now; the first to leave ends them all
    leave_at_once(1)
