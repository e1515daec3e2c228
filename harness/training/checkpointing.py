"""How a run saves: when what one rank alone decides has to reach the others, who writes, and what is told of it."""

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import harness
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt as AttemptId
from harness.checkpoint.plan import Writers
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saved, Saver, SaveRequest
from harness.checkpoint.staging import HostMemory
from harness.config import RunConfig
from harness.distributed.world import World
from harness.runtime.environment import is_first_of_node, shutdown_grace_seconds
from harness.telemetry.events import EventLog
from harness.training import resume
from harness.training.resume import Resumed
from harness.training.run_context import RunContext
from harness.training.save_policy import SavePolicy
from harness.training.saves import Saves

log = logging.getLogger(__name__)

PROOFS = 2  # saves of an attempt that show whether only the optimizer changes what it owns


class Checkpointing(Saves):
    """The saves of one attempt at a URL. Ranks that do not write take part in what all have to agree on."""

    def __init__(
        self,
        context: RunContext,
        attempt: AttemptId,
        catalog: Catalog,
        resumed: Resumed,
        events: EventLog,
        memory: HostMemory,
    ) -> None:
        self._attempt, self._catalog, self._events = attempt, catalog, events
        self._loop, self._state, self._about = context.loop, context.state, context.about
        self._world, self._config = world, config = context.world, context.config
        self._policy = SavePolicy(config.checkpoint)
        self._writers = _writers(world, config)
        self._saver: Saver | _Bystander = _Bystander()
        if self._is_writer:
            self._saver = self._new_saver(resumed, memory)
        self._committed = resumed.step, resumed.directory
        self._save_seconds = resumed.save_seconds if world.rank == 0 else None  # what the last save took, on rank 0
        self._has_saved = False  # in this attempt
        self._has_warned = False
        self._last_time = time.monotonic()
        self._warn_if_slow()

    @property
    def _is_writer(self) -> bool:
        return self._world.rank in self._writers.ranks

    def _new_saver(self, resumed: Resumed, memory: HostMemory) -> Saver:
        checkpoint, store = self._config.checkpoint, self._catalog.store
        return Saver(
            catalog=self._catalog,
            attempt=self._attempt,
            lineage=resumed.lineage,
            retention=Retention(checkpoint.keep_last, checkpoint.keep_every_steps),
            shard_bytes=checkpoint.shard_bytes or store.shard_bytes,
            streams=checkpoint.streams or store.streams,
            writers=self._writers,
            failures_allowed=checkpoint.failures_allowed,
            memory=memory,
            memory_limit_bytes=checkpoint.memory_limit_bytes,
            before_commit=self._events.flush,
            on_failure=lambda step, error: self._events.emit("save_failed", "", step=step, error=error),
            proofs=PROOFS,
        )

    # --- a save under way --------------------------------------------------------------------------------------------

    def fence(self) -> None:
        self._saver.fence()

    def poll(self) -> None:
        self._log_saved(self._saver.poll())

    def wait(self) -> None:
        self._on_writers(lambda saver: self._log_saved(saver.wait()))

    def let_end(self, seconds: float) -> None:
        self._saver.let_end(seconds)

    def give_up_after(self, seconds: float) -> None:
        self._log_saved(self._saver.give_up_after(seconds))

    def _on_writers(self, function: Callable[[Saver], None]) -> None:
        """Calls it on each rank that writes. None goes on before rank 0 is done, nor without knowing its error."""
        saver = self._saver
        if self._world.rank != 0 and isinstance(saver, Saver):
            function(saver)
        resume.on_first(self._world, lambda: function(saver) if isinstance(saver, Saver) else None)

    # --- what there is -----------------------------------------------------------------------------------------------

    def warn_of_lost_steps(self, step: int) -> None:
        saved, _ = self._committed
        if saved < step and self._world.rank == 0:
            log.warning(
                "the loop was left before its end, at step %d: what came after step %d is not saved. Call run.finish() then",
                step,
                saved,
            )

    def has_end(self) -> bool:
        return bool(resume.on_first(self._world, self._has_end))

    def _has_end(self) -> bool:
        step, directory = self._committed
        if not directory or step != self._state.progress.step:
            return False
        return self._state.is_that_of(self._catalog.open(directory))

    def can_roll_back(self) -> bool:
        def is_there() -> bool:
            return any(entry.state == "whole" for entry in self._catalog.candidates())

        self.wait()
        return bool(resume.on_first(self._world, is_there))

    def refuse_superseded(self) -> None:
        resume.on_first(self._world, lambda: self._catalog.attempts.refuse_superseded(self._attempt))

    # --- saving ------------------------------------------------------------------------------------------------------

    def begin_here(self) -> None:
        self._last_time = time.monotonic()

    def is_wanted(self) -> bool:
        seconds = time.monotonic() - self._last_time
        return self._saver.must_repeat or (self._world.rank == 0 and self._policy.is_overdue(seconds))

    def save(self, *, must_succeed: bool) -> None:
        if not self._has_saved:
            resume.check_alike(self._world, self._state)
            self._has_saved = True
        meta = self._loop.describe_save()
        ranks = self._world.gather(self._state.capture_rank())
        self._last_time = time.monotonic()
        directory = self._choose_directory(must_succeed=must_succeed)
        if directory is None:
            return
        if must_succeed:
            self._on_writers(lambda saver: self._save_here(saver, directory, meta, ranks, must_succeed=True))
        elif isinstance(self._saver, Saver):
            self._save_here(self._saver, directory, meta, ranks, must_succeed=False)

    def _choose_directory(self, *, must_succeed: bool) -> str | None:
        """Where to save, as rank 0 says to all that need to know; None where this rank does not, or where the save before is
        still being written, and is not to be waited for."""

        def choose() -> str | None:
            assert isinstance(self._saver, Saver), "rank 0 writes"
            step = self._state.progress.step
            if self._saver.is_busy and self._config.checkpoint.when_busy == "skip" and not must_succeed:
                message = f"step {self._loop.shown(step)}  NOT saved: the save before is still being written"
                self._events.emit("skip", message, step=step)
                return None
            return self._saver.new_directory(step)

        if must_succeed or self._config.checkpoint.writers != "rank0":
            return resume.on_first(self._world, choose)  # type: ignore[no-any-return]
        return choose() if self._world.rank == 0 else None

    def _save_here(
        self, saver: Saver, directory: str, meta: Mapping[str, Any], ranks: Sequence[Any] | None, *, must_succeed: bool
    ) -> None:
        """Saves this rank's share. What is each rank's own, rank 0 has of all ``ranks``."""
        checkpoint, progress = self._config.checkpoint, self._state.progress
        self._log_saved(saver.wait())
        parts = self._state.capture()
        if ranks is not None:
            parts |= {name: {str(rank): each[name] for rank, each in enumerate(ranks)} for name in ranks[0]}
        best = int(progress.best["step"]) if checkpoint.keep_best and progress.best else None
        request = SaveRequest(progress.step, self._with_conditions(meta), best, directory, self._state.is_steady())
        self._events.emit("saving", "", step=progress.step)
        if must_succeed or checkpoint.mode == "sync":
            self._log_saved(saver.save(parts, request, must_succeed=must_succeed))
        else:
            saver.begin(parts, request, overlap=checkpoint.overlap, check=checkpoint.check_snapshots)

    def _with_conditions(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **meta,
            **self._about,
            **resume.conditions(self._world),
            "save_seconds": self._save_seconds,  # the save before this one; None at the first
            "python": platform.python_version(),
            "harness": harness.__version__,
        }

    def _log_saved(self, saved: Saved | None) -> None:
        """Logs a save that has been committed."""
        if saved is None:
            return
        self._committed = saved.step, saved.directory
        times = f"in {saved.seconds:.2f} s, of which training waited {saved.blocked_seconds:.3f} s"
        self._events.emit("save", f"step {self._loop.shown(saved.step)}  saved {saved.directory} {times}", **asdict(saved))
        self._save_seconds = saved.seconds
        self._warn_if_slow()

    def _warn_if_slow(self) -> None:
        """Says once, while there is time to act, that a save would not fit between a stop signal and the end."""
        stop = self._config.stop
        grace_seconds = min(stop.grace_seconds, shutdown_grace_seconds())
        if self._save_seconds is None or self._save_seconds <= grace_seconds or self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "the last save took %.2f s, and a stop has %g s: it would end before it is saved; raise stop.grace_seconds "
            "(%g) and what the launcher grants (torchrun: --shutdown-timeout)",
            *(self._save_seconds, grace_seconds, stop.grace_seconds),
        )


class _Bystander:
    """In place of a saver, on a rank that does not write."""

    must_repeat = False

    def fence(self) -> None:
        """Nothing is copied here."""

    def poll(self) -> None:
        """Nothing is written here."""

    wait = poll

    def let_end(self, seconds: float) -> None:
        """Nothing is under way here."""

    give_up_after = let_end


def _writers(world: World, config: RunConfig) -> Writers:
    """The ranks that write, as ``checkpoint.writers`` has it. All ranks call it."""
    which = config.checkpoint.writers
    is_one = world.rank == 0 or which == "all" or (which == "node" and is_first_of_node())
    ranks = tuple(rank for rank, writes in enumerate(world.all_gather(is_one)) if writes)
    return Writers(ranks, world.rank, 0.9 * config.world.timeout_seconds)  # before those who wait for rank 0 give it up
