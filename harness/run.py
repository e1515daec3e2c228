"""Everything around a training loop that keeps it alive, whoever has written the loop.

A ``Run`` claims an attempt at a URL, restores the newest whole checkpoint on all ranks, and then goes along with the loop:
at each step boundary it agrees with the other ranks, logs, saves, and stops when it was asked to.
"""

import atexit
import contextlib
import functools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

import harness
from harness import crashes, outcome, program, resume
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.saver import Saved, Saver
from harness.checkpoint.shares import Writers
from harness.checkpoint.staging import HostMemory
from harness.checkpoint.store import open_store
from harness.config import RunConfig, run_config
from harness.crashes import Crash
from harness.data import Loader, is_due
from harness.environment import began, is_first_of_node, launch_id, rank, shutdown_grace_seconds
from harness.errors import ConfigError, HarnessError, NoCheckpoint, Stopped, StoreError
from harness.metrics import Reporter, as_json, in_words
from harness.notices import Watcher
from harness.signals import StopRequest
from harness.state import State, restore_random_state
from harness.stragglers import OwnWork, Stragglers
from harness.watchdog import Watchdog
from harness.world import Agreement, World, has_lost_a_peer, leave_at_once, world_of_program

log = logging.getLogger(__name__)


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
    ``keep_last`` are kept (None: all). ``config`` has further sections as in the configuration of ``harness train``:
    ``{"checkpoint": {…}, "watchdog": {…}}``. ``url=None`` saves nothing.

    ``initialize`` is called where there is nothing to resume from (to load weights, say); what it returns is logged.
    ``about`` goes into each manifest and must be the same on all ranks. A stop signal, or a cloud's notice, ends the program
    after the step, saved, with exit code 75 (0 under torchrun); given a ``stop`` request of its own, ``step`` raises
    ``Stopped`` instead. ``fresh`` refuses a URL that holds a run.

    Raises ``ConfigError`` for a bad setting, ``Mismatch`` where the newest checkpoint does not fit the state,
    ``NoCheckpoint`` where none is whole, ``StoreError`` where the storage fails, ``CrashLoop`` where attempts die of the
    same error again and again.
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
        world: World | None = None,
        stop: StopRequest | None = None,
        fresh: bool = False,
    ) -> None:
        self._host = program.host() if stop is None else None
        self.stop = program.host().stop if stop is None else stop
        if self._host is not None:
            self._host.hear_of_errors(self._fail)
        self._pid = os.getpid()
        intervals = {"every_steps": every_steps, "every_seconds": every_seconds, "every_epochs": every_epochs}
        self.config = _settings(url, {**intervals, "keep_last": keep_last}, config)
        self.world = world or world_of_program(_device(state), self.config.world.timeout_seconds)
        self.stop.before_leaving = self._before_leaving
        self.about = dict(about or {})
        self._initialize = initialize
        self.state = State(state, self.world.device)
        self.loader = next((each for each in state.values() if isinstance(each, Loader)), None)
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
        self._error: BaseException | None = None  # that was seen last
        for optimizer in self.state.optimizers.values():
            optimizer.register_step_pre_hook(self._fence)
        with self._host.start(self._saw) if self._host else contextlib.nullcontext(), _watching(self.config):
            self._open(fresh=fresh)
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
        self.total_epochs = total
        with self._under_way():
            may_be_empty = self.loader is None  # what is left of an epoch, by a position that others keep
            while (epoch := self.epoch) < total:
                boundaries = self._boundaries
                yield epoch
                if self._boundaries == boundaries and not may_be_empty:
                    raise ConfigError(f"epoch {epoch}: the loop did not call run.step()")
                may_be_empty = False
                if self.loader:
                    self.loader.end_epoch(epoch)  # which the loop may have left early
                else:
                    self._end_epoch()

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are still to be trained, by their number from 0; each must call ``step``. The end is saved."""
        self.total_steps = total
        with self._under_way():
            while self.global_step < total:
                boundaries = self._boundaries
                yield self.global_step
                if self._boundaries == boundaries:
                    raise ConfigError(f"step {self.global_step + 1}: the loop did not call run.step()")

    def step(self, **metrics: Any) -> None:
        """A step boundary: the optimizer has taken its step, and every rank is here. Metrics (numbers or 0-dim tensors) are
        averaged over the ranks where they are logged.

        Raises ``StoreError`` after too many failed saves in a row, ``Superseded`` where a newer attempt trains this run,
        ``Stopped`` (see the class).
        """
        if self._agreement is None:
            raise ConfigError("run.step() belongs into a loop over run.epochs() or run.steps()")
        self._boundaries += 1
        self.state.progress.step += 1
        self._metrics = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in metrics.items()}
        if (notice := self._watcher.poll()) is not None and notice.kind == "stop":
            self.stop.ask(notice.text)
        stopping, save_is_due = self._agreement.exchange(bool(self.stop), self._seconds_are_over())
        if stopping:
            self.stop.settled = "stop"
        self._reporter.reached(self.global_step, self.epoch)
        self._log_if_due()
        self._save_if_due(now=bool(stopping or save_is_due or self._is_new_best()), must_succeed=bool(stopping))
        if self._boundaries == 1:
            self._after_first_step()
        if self._watchdog is not None:
            self._watchdog.step()
        if stopping and not self._is_over():
            self._leave()

    def _after_first_step(self) -> None:
        """What the first step of this process has shown."""
        for gradients in self.state.gradients.values():
            gradients.stop_noting()
        if self.world.rank == 0:
            self._warn_of_what_is_left_out()

    def _warn_of_what_is_left_out(self) -> None:
        left_out = "is not in the run's state: a resume would begin"
        if self.loader is None and Loader.in_use:
            log.warning("a harness.Loader hands out batches and %s its epoch anew", left_out)
        for name in self.state.without_scheduler():
            log.warning("%s has a learning rate scheduler, which %s its schedule anew", name, left_out)

    def finish(self) -> None:
        """Saves the end, and waits for it: for a loop that is left early. ``epochs`` and ``steps`` do it at theirs."""
        self._wait_for_save()
        if resume.on_first(self.world, lambda: self._committed_step if self._saver else None) != self.global_step:
            self._save(must_succeed=True)
        self.tell("done", f"done: step {self.global_step}  {in_words(self.state.progress.last)}", step=self.global_step)
        self._leave_host()

    def evaluated(self, metric: str, values: Mapping[str, float], *, higher_is_better: bool = False) -> None:
        """Tells what an evaluation found, before the ``step`` that it belongs to; the best ``metric`` is remembered, and its
        checkpoint kept where ``checkpoint.keep_best`` says so. Every rank calls it with the same values."""
        progress = self.state.progress
        if metric not in values:
            raise ConfigError(f"task: evaluation.metric is {metric!r}, measured were {', '.join(values)}")
        progress.last |= values
        value, best = values[metric], progress.best.get(metric)
        if best is None or (value > best if higher_is_better else value < best):
            progress.best = {**values, "step": progress.step + 1}
        message = f"step {self._of_total(progress.step + 1)}  evaluation  {in_words(dict(values))}"
        self.tell("evaluate", message, step=progress.step + 1, **values)

    def tell(self, event: str, message: str, **values: Any) -> None:
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
        self._reporter.close()
        self._leave_host()

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
        if fresh:
            resume.on_first(world, lambda: resume.refuse_to_reuse(catalog, launch_id()))
        looping = resume.on_first(world, lambda: crashes.is_looping(catalog, self.config.crash_loop.same_failures))
        self._begin_attempt(pass_over_newest=looping)

    def _begin_attempt(self, *, pass_over_newest: bool = False) -> None:
        """Claims an attempt, resumes, and makes sure that all ranks hold the same."""
        checkpoint, world, catalog = self.config.checkpoint, self.world, self._catalog
        about: dict[str, Any] = {"launch": launch_id(), "world_size": world.size, "host": platform.node()}
        about |= {"pid": os.getpid(), "began": began()}
        attempt = resume.on_first(world, lambda: catalog.claim_attempt(about))
        self._reporter = Reporter(self.config, active=world.rank == 0, attempt=attempt.id)
        self._record_crash = functools.partial(crashes.record, catalog, attempt)
        resumed = resume.resume(world, catalog, self.state, how=checkpoint.restore, pass_over_newest=pass_over_newest)
        if resumed is None:
            self._start_anew()
        self._random = resumed.random if resumed else None
        self._committed_step = resumed.step if resumed else None
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
        if world.rank == 0 and resumed is not None:
            self._save_seconds = resumed.save_seconds
            self._warn_if_saves_are_slow()

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
            try:
                self._begin_here()
                yield
                self._agreement.finish()
                self.finish()
            finally:
                self._agreement = None

    def _begin_here(self) -> None:
        """Has the clocks run, and the random numbers come, from where the state is."""
        stragglers = self.config.stragglers
        hosts = self.world.all_gather(platform.node())
        self._stragglers = (
            Stragglers(hosts, stragglers.factor, stragglers.window_seconds) if stragglers.factor and len(hosts) > 1 else None
        )
        self._last_saved_time = self._last_logged_time = time.monotonic()
        self._last_logged_step = self.global_step
        by_epochs = self.total_epochs * len(self.loader) if self.total_epochs and self.loader else None
        self._reporter.show(self.global_step, self.total_steps or by_epochs)
        if self._random is not None:
            restore_random_state(self._random, self.world.device)
            self._random = None

    def _end_epoch(self) -> None:
        """The end of an epoch that no loader of ours counts."""
        self.state.progress.epoch += 1
        every = self.config.checkpoint.every_epochs
        if every is not None and self.epoch % every == 0 and self.epoch != self.total_epochs:
            self._save(must_succeed=False)

    def _is_over(self) -> bool:
        return self.total_steps is not None and self.global_step >= self.total_steps

    def _is_due(self, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether an interval ends with the step that was just finished."""
        return is_due(self.global_step, self.loader.cursor if self.loader else None, every_steps, every_epochs)

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
        is_theirs = isinstance(error, Exception) and not isinstance(error, HarnessError) and not has_lost
        if not is_theirs or getattr(self, "_record_crash", None) is None:
            return
        samples = self.loader.samples() if self.loader else []
        with contextlib.suppress(StoreError):  # the error that is under way matters more
            self._record_crash(Crash(self.global_step + 1, what, self.world.rank, samples))  # type: ignore[misc]

    # --- logging -----------------------------------------------------------------------------------------------------

    def _log_if_due(self) -> None:
        every = self.config.log
        if not (self._is_over() or self._is_due(every.every_steps, every.every_epochs)):
            return
        own_seconds = self._note_metrics()
        progress, now = self.state.progress, time.monotonic()
        steps_per_second = (self.global_step - self._last_logged_step) / max(now - self._last_logged_time, 1e-9)
        self._last_logged_time, self._last_logged_step = now, self.global_step
        values = {name: progress.last[name] for name in self._metrics}
        for optimizer in list(self.state.optimizers.values())[:1]:
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
        """Averages this step's metrics over the ranks, and returns the seconds of own work of each. All ranks call it."""
        own = [float(value) for value in self._metrics.values()]
        # Added in rank order, since an all-reduce may add in another order at every size of the message.
        *metrics, seconds = zip(*self.world.all_gather_floats([*own, self._own_work.seconds()]), strict=True)
        means = [sum(values) / self.world.size for values in metrics]
        self.state.progress.last |= dict(zip(self._metrics, means, strict=True))
        return list(seconds)

    # --- saving ------------------------------------------------------------------------------------------------------

    def _seconds_are_over(self) -> bool:
        """Whether ``checkpoint.every_seconds`` have passed, by rank 0's clock."""
        every = self.config.checkpoint.every_seconds
        return every is not None and self.world.rank == 0 and time.monotonic() - self._last_saved_time >= every

    def _is_new_best(self) -> bool:
        """Whether this step's evaluation is the best so far, and such a checkpoint is to be kept."""
        return self.config.checkpoint.keep_best and self.state.progress.best.get("step") == self.global_step

    def _fence(self, *_args: object) -> None:
        """Before an optimizer changes what a save may still be copying."""
        if self._saver is not None:
            self._saver.fence()

    def _save_if_due(self, *, now: bool, must_succeed: bool) -> None:
        """Saves the state as it is at this step boundary. All ranks call it; rank 0 writes."""
        checkpoint = self.config.checkpoint
        if self._saver is not None:
            self._tell_of(self._saver.poll())
        if self._is_over():  # the end is saved by itself
            return
        if now or self._is_due(checkpoint.every_steps, checkpoint.every_epochs):
            self._save(must_succeed=must_succeed)

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
        self._note_metrics()
        ranks = self.world.gather(self.state.capture_rank())
        self._last_saved_time = time.monotonic()
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

    def _tell_of(self, saved: Saved | None) -> None:
        """Logs a save that has been committed."""
        if saved is None:
            return
        self._committed_step = saved.step
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


def _settings(
    url: str | os.PathLike[str] | None, checkpoint: Mapping[str, Any], config: Mapping[str, Any] | RunConfig | None
) -> RunConfig:
    """All settings in one; what is None was not given."""
    if isinstance(config, RunConfig):
        return config
    sections = dict(config or {})
    given = {key: value for key, value in checkpoint.items() if value is not None}
    sections["checkpoint"] = {"url": None if url is None else os.fspath(url), **sections.get("checkpoint", {}), **given}
    return run_config(sections)


def _writers(world: World, config: RunConfig) -> Writers:
    """The ranks that write, as ``checkpoint.writers`` has it. All ranks call it."""
    which = config.checkpoint.writers
    is_one = world.rank == 0 or which == "all" or (which == "node" and is_first_of_node())
    ranks = tuple(rank for rank, writes in enumerate(world.all_gather(is_one)) if writes)
    return Writers(ranks, world.rank, 0.9 * config.world.timeout_seconds)  # before those who wait for rank 0 give it up


def _device(state: Mapping[str, Any]) -> torch.device:
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
            print(f"harness: could not write {name}: {error}", file=sys.stderr, flush=True)

    return report


def _leave_hung() -> None:
    time.sleep(1)  # the other ranks hang with this one and finish their reports now; the first to leave ends them all
    leave_at_once(1)
