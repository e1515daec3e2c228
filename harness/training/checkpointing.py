"""How a run saves: when what one rank alone decides has to reach the others, and who writes."""

import functools
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import harness
from harness import torch_private
from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.dtensors import address_of
from harness.checkpoint.format import Attempt as AttemptId
from harness.checkpoint.frozen import IsFrozen, nothing_is_frozen, sharded_worth_it
from harness.checkpoint.kept import KeptPlace
from harness.checkpoint.plan import IsSteady, Writers
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saver, SaveRequest
from harness.checkpoint.sharding import Key, Sharding
from harness.checkpoint.staging import HostMemory
from harness.checkpoint.tree import Encoded
from harness.config import RunConfig
from harness.distributed.world import World
from harness.runtime.environment import is_first_of_node
from harness.state.parts import RANDOM, TRAINING
from harness.telemetry.events import EventLog
from harness.training import observer, resume
from harness.training.interval import Deaths, Interval, deaths_before
from harness.training.keeper import keeper_for
from harness.training.resume import Resumed
from harness.training.run_context import RunContext
from harness.training.save_log import SaveLog
from harness.training.saves import Saves

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
        place: KeptPlace | None = None,
    ) -> None:
        self._attempt, self._catalog = attempt, catalog
        self._state, self._about, self._policy = context.state, context.about, context.policy
        self._world, self._config = world, config = context.world, context.config
        self._is_auto = config.checkpoint.every_seconds == "auto" and world.rank == 0
        self._auto = Interval(deaths_before(catalog, attempt, resumed) if self._is_auto else Deaths())
        self._log = SaveLog(context, resumed, events, self._auto if self._is_auto else None)
        self._is_sharded = context.state.sharded.is_sharded
        checkpoint, store, writers = config.checkpoint, catalog.store, _writers(world, config, all_of_them=self._is_sharded)
        self._is_writer = world.rank in writers.ranks  # else nothing is ever under way here
        self._saver = Saver(
            catalog=catalog,
            attempt=attempt,
            lineage=resumed.lineage,
            retention=Retention(checkpoint.keep_last, checkpoint.keep_every_steps),
            shard_bytes=checkpoint.shard_bytes or store.shard_bytes,
            streams=checkpoint.streams or store.streams,
            writers=writers,
            failures_allowed=checkpoint.failures_allowed,
            memory=memory,
            memory_limit_bytes=checkpoint.memory_limit_bytes,
            before_commit=events.flush,
            on_failure=self._log.failed,
            proofs=PROOFS,
        )
        self.keeper = keeper_for(context, attempt, resumed, place, lambda: self._auto.deaths)
        self.is_first_due = bool(resumed.kept)
        self._has_saved = False  # in this attempt
        untrained = context.state.untrained() if checkpoint.incremental else []
        self._untrained = [(each, address_of(each), torch_private.version(each)) for each in untrained]
        self._last_time = time.monotonic()

    # --- a save under way --------------------------------------------------------------------------------------------

    def fence(self) -> None:
        self._saver.fence()

    def poll(self) -> None:
        if self._is_auto:
            self._auto.step(is_saving=self._saver.is_busy)
        self._log.committed(self._saver.poll())

    @property
    def settled(self) -> int:
        return self._log.settled

    def wait(self) -> None:
        _on_writers(self._world, self._is_writer, lambda: self._log.committed(self._saver.wait()))

    def let_end(self, seconds: float) -> None:
        self._saver.let_end(seconds)

    def give_up_after(self, seconds: float) -> None:
        self._log.committed(self._saver.give_up_after(seconds))

    # --- what there is -----------------------------------------------------------------------------------------------

    def warn_of_lost_steps(self, step: int) -> None:
        self._log.warn_of_lost_steps(step)

    def has_end(self) -> bool:
        def is_this_step() -> bool:
            return bool(self._log.directory) and self._log.step == self._state.progress.step

        def is_saved(digests: Mapping[str, str] | None = None) -> bool:
            return is_this_step() and self._state.is_that_of(self._catalog.open(self._log.directory), digests)

        if not self._is_sharded:
            return bool(resume.on_first(self._world, is_saved))
        if not resume.on_first(self._world, is_this_step):
            return False
        parts, sharding = self._state.sharded.encoded(self._state.capture, self._world)
        digests = commit.digests(self._world.all_gather, parts, sharding)
        digests = {name: each for name, each in digests.items() if name != TRAINING}
        return bool(resume.on_first(self._world, functools.partial(is_saved, digests)))

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
        return self._saver.must_repeat or (self._world.rank == 0 and self._policy.is_overdue(seconds, self._auto.seconds))

    def save(self, describe: Callable[[], Mapping[str, Any]], *, must_succeed: bool) -> None:
        if not self._has_saved:
            resume.check_alike(self._world, self._state)
            self._has_saved = True
        meta = describe()
        ranks = self._world.gather(self._state.capture_rank(self._world.rank))
        self._last_time = time.monotonic()
        if self._config.checkpoint.when_busy == "wait":  # or else rank 0 alone knows whether one begins
            self.keeper.saving(self._state.progress.step)
        agreed = self._agreed(must_succeed=must_succeed)
        if not agreed.directory:
            return
        share = functools.partial(self._save_share, agreed, meta, ranks, must_succeed=must_succeed)
        if must_succeed:
            _on_writers(self._world, self._is_writer, share)
        elif self._is_writer:
            share()

    def _agreed(self, *, must_succeed: bool) -> "_Agreed":
        """Where to save, as rank 0 says to all that need to know, and what, if it is sharded: the ranks meet once for both.
        Nowhere where this rank does not save, or where the save before is still being written and not to be waited for."""

        def choose() -> str:
            step = self._state.progress.step
            if self._saver.is_busy and self._config.checkpoint.when_busy == "skip" and not must_succeed:
                self._log.skipped(step)
                return ""
            return self._saver.new_directory(step)

        own = choose() if self._world.rank == 0 else ""
        if self._is_sharded:
            own += f" {self._saver.base()}" if own and self._untrained else ""
            found = self._state.sharded.parts(self._state.capture, self._world, own, self._frozen_among)
            parts, sharding, note, frozen = found
            directory, _, base = note.partition(" ")
            return _Agreed(directory, parts, sharding, sharded_worth_it(frozen, parts, sharding) if frozen else frozen, base)
        if must_succeed or self._config.checkpoint.writers != "rank0":
            own = self._world.all_gather_text(own)[0]
        return _Agreed(own)

    def _frozen_among(self, parts: Mapping[str, Encoded]) -> frozenset[Key]:
        """The sharded tensors that are frozen for all that this rank knows."""
        if not self._untrained:
            return frozenset()
        return self._saver.frozen.sharded_among(parts, _is_frozen(self._untrained, self._state.is_steady()))

    def _save_share(
        self,
        agreed: "_Agreed",
        meta: Mapping[str, Any],
        ranks: Sequence[Any] | None,
        *,
        must_succeed: bool,
    ) -> None:
        """Saves this rank's share. What is each rank's own, rank 0 has of all ``ranks``."""
        checkpoint, progress, saver = self._config.checkpoint, self._state.progress, self._saver
        self._log.committed(saver.wait())
        parts: dict[str, Any] = {**(self._state.capture() if agreed.parts is None else agreed.parts)}
        if ranks is not None:
            parts |= {name: {str(rank): each[name] for rank, each in enumerate(ranks)} for name in ranks[0]}
            for rank, keys in enumerate(progress.random_keys or ()):
                parts[RANDOM][str(rank)]["keys"] = keys
        best = int(progress.best["step"]) if checkpoint.keep_best and progress.best else None
        whole = {
            **self._about,
            **meta,
            **resume.conditions(self._world, self._state),
            "deaths": self._auto.deaths.as_json(),
            "save_seconds": self._log.seconds,  # the save before this one; None at the first
            "python": platform.python_version(),
            "harness": harness.__version__,
        }
        is_steady = self._state.is_steady()
        request = SaveRequest(
            progress.step,
            whole,
            best,
            agreed.directory,
            is_steady,
            agreed.sharding,
            is_frozen=_is_frozen(self._untrained, is_steady),
            frozen=agreed.frozen,
            base=agreed.base,
        )
        self._log.begun(progress.step)
        observer.current.saving(agreed.directory)
        if must_succeed or checkpoint.mode == "sync":
            self._log.committed(saver.save(parts, request, must_succeed=must_succeed))
        else:
            overlap = checkpoint.overlap and self.sees_optimizers  # or nobody would hold an optimizer up
            saver.begin(parts, request, overlap=overlap, check=checkpoint.check_snapshots)


@dataclass(frozen=True)
class _Agreed:
    """What the ranks have agreed on for a save: where it goes, and of a sharded state what this rank has, who has which
    part, which tensors are frozen, and the checkpoint that has these."""

    directory: str
    parts: dict[str, Encoded] | None = None
    sharding: Sharding | None = None
    frozen: frozenset[Key] = frozenset()
    base: str = ""


def _is_frozen(untrained: Iterable[tuple[torch.Tensor, int, int]], is_steady: IsSteady) -> IsFrozen:
    """Tells those parameters that nothing has trained or changed since this attempt began: each with its address and version
    then. What writes past the version counters, the saver finds."""
    places = {
        place
        for each, place, version in untrained
        if place and (address_of(each), torch_private.version(each)) == (place, version) and not is_steady(each)
    }
    return (lambda tensor: address_of(tensor) in places) if places else nothing_is_frozen


def _on_writers(world: World, is_writer: bool, function: Callable[[], None]) -> None:
    """Calls it on each rank that writes. None continues before rank 0 is done, nor without knowing its error."""
    if world.rank != 0 and is_writer:
        function()
    resume.on_first(world, function)


def _writers(world: World, config: RunConfig, *, all_of_them: bool) -> Writers:
    """The ranks that write, as ``checkpoint.writers`` has it; all of them where each has a part. All ranks call it."""
    which = "all" if all_of_them else config.checkpoint.writers
    is_one = world.rank == 0 or which == "all" or (which == "node" and is_first_of_node())
    ranks = tuple(rank for rank, writes in enumerate(world.all_gather(is_one)) if writes)
    return Writers(ranks, world.rank, 0.9 * config.world.timeout_seconds)  # before those who wait for rank 0 give it up
