"""An attempt: one start of a run, or what follows a rollback. It has a number, a place where it resumed, and a record."""

import contextlib
import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt as AttemptId
from harness.checkpoint.kept import MEMORY, KeptPlace, remove_rubbish, where
from harness.checkpoint.staging import HostMemory
from harness.config import CheckpointConfig, Config, RunConfig
from harness.distributed import device
from harness.distributed.world import World, has_lost_a_peer, is_timeout
from harness.errors import ConfigError, HarnessError, NoCheckpoint, Stopped, StoreError
from harness.launcher import outcome
from harness.runtime.console import here
from harness.runtime.environment import (
    began,
    is_first_of_node,
    is_under_torchrun,
    launch_id,
    launcher_began,
    restarts,
)
from harness.runtime.watchdog import Watchdog
from harness.state.capture import State
from harness.state.parts import Progress
from harness.storage.store import open_store
from harness.telemetry import crashes
from harness.telemetry.crashes import Crash
from harness.telemetry.events import EventLog, metrics_in_words
from harness.training import resume
from harness.training.checkpointing import Checkpointing
from harness.training.course import Place
from harness.training.hangs import NoWatchdog
from harness.training.resume import NEW, Resumed
from harness.training.run_context import RunContext
from harness.training.saves import Saves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """Where an attempt tells what happens, how it saves, how it remembers a crash, and which attempt follows a rollback."""

    events: EventLog
    place: Callable[[], Place] = lambda: Place(here.rank, 0, 0, [])
    saves: Saves = field(default_factory=Saves)
    record_crash: Callable[[Crash], None] = lambda _crash: None
    next: "Callable[[], Attempt] | None" = None  # where there is something to roll back to

    def keep(self, why: str, seconds: float | None = None) -> None:
        """Keeps the last step boundary, since the process is about to end. Any thread may call it; raises nothing."""
        self.saves.keeper.keep(why, seconds)

    def remember(self, error: BaseException) -> None:
        """Leaves a record of an error in the training code, or in a sample, for the attempts to come."""
        place = self.place()
        has_lost = has_lost_a_peer(error)  # what torch says of that has nothing to do with the training
        what = "lost contact with another rank" if has_lost else f"{type(error).__name__}: {error}".partition("\n")[0]
        self.events.emit("error", "", step=place.step, error=what)
        if has_lost and is_timeout(error):
            log.error(
                "rank %d timed out waiting for another rank, after %d calls of run.step() in this process (step "
                "%d); every rank must call run.step() equally often",
                *(place.rank, place.boundaries, place.step),
            )
        if isinstance(error, Exception) and not isinstance(error, HarnessError) and not has_lost:
            with contextlib.suppress(StoreError):  # the error that is under way matters more
                self.record_crash(Crash(place.step + 1, what, place.rank, place.samples))

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """The time until somebody else does it, and closes what is open."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                self.remember(error)
            self.events.close()
            raise

    def begin_here(self, step: int, steps_in_all: int | None) -> None:
        """A loop begins, or continues after a rollback."""
        self.saves.begin_here()
        self.events.show(step, steps_in_all)

    def finish(self, progress: Progress, describe_save: Callable[[], Mapping[str, Any]]) -> None:
        """Saves the end, if the newest checkpoint does not have it, and waits for the save. All ranks call it."""
        self.saves.wait()
        if not self.saves.has_end():
            self.saves.save(describe_save, must_succeed=True)
        self.saves.keeper.forget()
        self.events.emit("done", f"done: step {progress.step}  {metrics_in_words(progress.last)}", step=progress.step)
        self.events.flush()

    def stopped(self, step: int, reason: str) -> Stopped:
        """What ends the program after a stop, at a step that was saved if the run has a URL. ``reason`` is this rank's."""
        self.saves.keeper.forget()
        reason = outcome.stop_reason() or reason or "on another rank"
        self.events.emit("stop", "", step=step, reason=reason)  # how the program ends is logged when it does
        saved = "which is saved" if self.next is not None else "and nothing is saved: there is no checkpoint.url"
        return Stopped(f"asked to stop ({reason}) at step {step}, {saved}")

    def rolled_back(self, step: int) -> "Attempt":
        """Ends at a step, and begins the attempt that follows, at the newest checkpoint. All ranks call it.

        Raises ``NoCheckpoint`` if there is none.
        """
        if self.next is None or not self.saves.can_roll_back():
            raise NoCheckpoint("run.roll_back: there is no checkpoint to return to yet")
        self.saves.refuse_superseded()
        self.events.emit("rollback", "", step=step)
        self.events.close()
        return self.next()

    def end_soon(self, grace_seconds: float, watchdog: Watchdog | NoWatchdog) -> None:
        """Another rank has died, and the process leaves: a save under way is worth some time. Called in any thread."""
        self.keep("another rank has failed")
        self.saves.let_end(grace_seconds)
        self.events.flush()
        if watchdog.is_reporting:  # it ends the process when it is done
            time.sleep(grace_seconds)

    def close(self, grace_seconds: float, *, left_at: int | None = None) -> None:
        """Ends what is under way: a save that can be finished soon is worth it. ``left_at`` is the step at which the loop
        was left before its end."""
        self.saves.give_up_after(grace_seconds)
        self.saves.keeper.close()
        if left_at is not None:
            self.saves.warn_of_lost_steps(left_at)
        self.events.close()


def first_of(context: RunContext, *, fresh: bool, reopen: bool) -> Attempt:
    """Begins the run's next attempt, or its first. ``fresh`` refuses a URL that holds a run; with ``reopen`` the run trains
    on that an earlier attempt has ended early. All ranks call it."""
    world, config, state = context.world, context.config, context.state
    checkpoint = config.checkpoint
    if checkpoint.url is None:
        state.sharded.is_sharded_anywhere(world.all_gather)
        events = EventLog(config, active=world.rank == 0)
        events.emit("start", "no checkpoint.url: this run is not saved", step=state.progress.step)
        _start_anew(context, events)
        resume.check_lockstep(world, state, context.about, resumed=False)
        return Attempt(events, context.course.place)
    catalog = Catalog(open_store(checkpoint.url, checkpoint.storage_options))
    if fresh and checkpoint.must_exist:
        raise ConfigError(
            "checkpoint.must_exist requires a run in checkpoint.url, and fresh an unused URL; set only one of them"
        )
    if fresh:
        resume.on_first(world, lambda: resume.refuse_to_reuse(catalog, launch_id()))
    if checkpoint.must_exist:
        resume.on_first(world, lambda: resume.refuse_to_begin(catalog))
    is_looping = resume.on_first(world, lambda: crashes.is_looping(catalog, config.crash_loop.same_failures))
    memory = HostMemory(pinned=device.of(world.device).is_async)
    attempt = _begin(context, catalog, memory, skip_newest=is_looping)
    if reopen:
        state.progress.finished_loops = 0
    if world.rank == 0:
        _log_differences(config, state)
    return attempt


def _begin(
    context: RunContext, catalog: Catalog, memory: HostMemory, *, skip_newest: bool = False, is_rollback: bool = False
) -> Attempt:
    """Claims an attempt, resumes, and makes sure that all ranks hold the same. A rollback goes to what is durable."""
    world, config, state = context.world, context.config, context.state
    about: dict[str, Any] = {"launch": launch_id(), "world_size": world.size, "host": platform.node()}
    about |= {"pid": os.getpid(), "began": began(), "restarts": restarts(), "launcher_began": launcher_began()}
    claimed, first, url = resume.on_first(
        world, lambda: (catalog.attempts.claim(about, resumes=True), catalog.attempts.first, where(catalog.store))
    )
    place = _kept_place(config.checkpoint, url, first, world)
    events = EventLog(config, active=world.rank == 0, attempt=claimed.id, store=catalog.store)
    attempt = Attempt(
        events,
        context.course.place,
        record_crash=functools.partial(crashes.record_crash, catalog, claimed),
        next=functools.partial(_begin, context, catalog, memory, is_rollback=True),
    )
    with attempt.remembering():
        if place is not None and is_first_of_node():
            remove_rubbish(place)
            if is_rollback:
                place.forget()
        how, found_in = config.checkpoint.restore, None if is_rollback else place
        resumed = resume.resume(world, catalog, state, how=how, skip_newest=skip_newest, place=found_in)
        if resumed is NEW:
            _start_anew(context, events)
        elif config.checkpoint.random == "derived" and resumed.random_keys is not None:
            # With other ranks the streams start anew.
            state.progress.random_keys = resumed.random_keys if state.random_to_restore else []
        resume.check_lockstep(world, state, context.about, resumed=resumed is not NEW)
        saves = Checkpointing(context, claimed, catalog, resumed, events, memory, place)
        _log_begin(events, claimed.number, resumed, catalog.store.url, world, state.progress.step)
    if world.rank == 0 and not context.policy.has_intervals:
        log.warning(
            "nothing is saved before the end of the run, so a death loses all progress. Set every_steps, "
            "every_seconds or every_epochs (checkpoint.every_… in a configuration)"
        )
    return replace(attempt, saves=saves)


def _log_begin(events: EventLog, number: int, resumed: Resumed, url: str, world: World, step: int) -> None:
    for directory, why in resumed.skipped.items():
        events.emit("fallback", "", directory=directory, why=why)  # which was logged when it was found
    if kept := resumed.kept:
        who = f"rank {kept.get('rank')} on {kept.get('host')}"
        about = {name: kept[name] for name in ("rank", "host", "why") if name in kept}
        events.emit("kept", f"step {resumed.step}  kept by {who}: {kept.get('why')}", step=resumed.step, **about)
    outcome.resumed(step)
    is_new = resumed is NEW
    what = f"starting in {url}" if is_new else f"resuming from {resumed.directory}"
    events.emit(
        "start" if is_new else "resume",
        f"attempt {number}: {what}, {world.size} x {world.device.type} ({world.backend}), step {step}",
        step=step,
        directory=resumed.directory or None,
        lineage=[(ancestor.attempt, ancestor.until_step) for ancestor in resumed.lineage],
        world_size=world.size,
    )


def _kept_place(checkpoint: CheckpointConfig, url: str, first: AttemptId, world: World) -> KeptPlace | None:
    """Where this machine keeps states of the run, if it does."""
    if checkpoint.keep is None or (checkpoint.keep == "auto" and world.size == 1 and not is_under_torchrun()):
        return None
    return KeptPlace.of(MEMORY if checkpoint.keep == "auto" else checkpoint.keep, url, first)


def _log_differences(config: RunConfig, state: State) -> None:
    """Says what somebody has edited in the program since the checkpoint, and whose word counts."""
    for each in state.edits.differences:
        is_task = isinstance(config, Config)
        how = f"train.reset_options=[{each.name}]" if is_task else f'Run(..., reset_options=["{each.name}"])'
        log.warning("%s%s", each, f". To use the program's: {how}" if each.who_counts == "checkpoint" else "")


def _start_anew(context: RunContext, events: EventLog) -> None:
    """Gives a new run what it is to begin with."""
    context.state.progress.random_keys = [] if context.config.checkpoint.random == "derived" else None
    if what := context.initialize():
        events.emit("init", what)
