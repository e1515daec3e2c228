"""A survivor keeps the step boundary.

In data-parallel training every rank holds the whole state. When one dies, the others are, nearly always, within the next
forward and backward pass: what they hold is, bit for bit, what a checkpoint of the last boundary would have. So on its way
out a rank writes it, as a checkpoint, into the memory of its machine, and a restart loses nothing. Steps that go well pay
for a few references. (The idea is that of Just-In-Time Checkpointing, EuroSys 2024; there the device's calls are replayed.)

Exact or nothing. The state counts as touched from the moment an optimizer is about to step until the body of the step is
over. Small parts (scaler, schedules, the loader's position, options of optimizers) are noted at the boundary, since they
change before that. So are small tensors that others than the optimizers change: statistics of BatchNorm, in the forward
pass. Of larger ones, and of some parameters, the version counters are noted, and a state whose counters have moved is not
kept. A checkpoint has the buffers of rank 0, which DDP gives to all ranks at the next forward pass: another rank takes them
there, or keeps nothing. Random states are those that every rank derives from its keys and the step, the dead ones' too.

What cannot be known here: what a program keeps outside of its state, and changes through ``.data``.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import harness
from harness.checkpoint import commit, tree
from harness.checkpoint.format import Attempt
from harness.checkpoint.kept import KEPT, KeptPlace, Unusable
from harness.checkpoint.plan import SavePlan
from harness.data.loader import Loader
from harness.errors import HarnessError
from harness.launcher import outcome
from harness.runtime.environment import is_first_of_node, local_rank
from harness.state.capture import State
from harness.state.parts import RANDOM, TRAINING, OtherPart, Part, ScalerPart
from harness.telemetry.events import as_json
from harness.torch_private import version
from harness.training import resume
from harness.training.interval import Deaths
from harness.training.loose import SMALL_BYTES, Loose
from harness.training.resume import Resumed
from harness.training.run_context import RunContext

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
SLOW_SECONDS = 2e-3  # a note that takes longer,
_MOST_SLOW = 5  # so often in a row, is the last one


class NoKeeper:
    """Where nothing is kept."""

    def touch(self) -> None:
        """An optimizer is about to change the state."""

    def note(self, half: Mapping[str, float] | None = None, *, is_seen: bool = True) -> None:
        """The body of a step is over; or all but its evaluation, with which a resume has to begin then. In that case,
        ``half`` has the metrics of the step, as far as all ranks know them. Unless ``is_seen``, an optimizer may change the
        state without a call of ``touch``: then nothing is kept."""

    def took_first_buffers(self) -> None:
        """The buffers of the modules are rank 0's now."""

    def keep(self, why: str, seconds: float | None = None) -> None:
        """Keeps the last boundary, on the way out, in ``seconds`` at most (None: ``stop.grace_seconds``). Any thread may
        call it; raises nothing."""

    def saving(self, step: int) -> None:
        """A save begins. All ranks call it."""

    def settled(self, step: int, is_durable: int) -> None:
        """A save of this attempt has ended, as all ranks know now."""

    def forget(self) -> None:
        """What is kept is not needed any more. All ranks call it."""

    def close(self) -> None:
        """Takes the hooks away."""


def keeper_for(
    context: RunContext, attempt: Attempt, resumed: Resumed, place: KeptPlace | None, deaths: Callable[[], Deaths]
) -> NoKeeper:
    """The keeper of an attempt. Says once why a run cannot have one. All ranks call it."""
    if place is None:
        return NoKeeper()
    why = _why_not(context)
    if why and context.world.rank == 0:
        log.info("a rank that survives keeps nothing: %s", why)
    return NoKeeper() if why else Keeper(context, attempt, resumed, place, deaths)


def _why_not(context: RunContext) -> str:
    state = context.state
    if state.progress.random_keys is None:
        return "random states are carried on (checkpoint.random), and those of a dead rank are lost with it"
    if state.sharded.is_sharded:
        return "the model is sharded, so each rank has only a part of it"
    own = [name for name, part in state.contents.parts.items() if part.per_rank]
    return f"{own[0]} has a state of its own on each rank, which dies with it" if own else ""


@dataclass(frozen=True)
class _Boundary:
    """What is noted of a boundary, besides the tensors that a step leaves alone."""

    step: int
    touches: int  # of the state, so far
    shown_epoch: int
    training: Mapping[str, Any]  # of the part of this name, what changes
    small: Mapping[str, Any]  # the small parts, or what gives them
    options: Sequence[tuple[dict[str, Any], dict[str, Any]]]  # of the optimizers' groups
    watched: Sequence[tuple[torch.Tensor, int]]  # tensors of the small parts, and their versions


class Keeper(NoKeeper):
    """Notes each boundary of an attempt, and keeps the last one."""

    def __init__(
        self,
        context: RunContext,
        attempt: Attempt,
        resumed: Resumed,
        place: KeptPlace,
        deaths: Callable[[], Deaths],
    ) -> None:
        self._deaths = deaths
        self._context, self._attempt, self._place = context, attempt, place
        self._lineage, self._stands_on = resumed.lineage, resumed.stands_on
        self._world, self._state = context.world, context.state
        self._conditions = resume.conditions(context.world, context.state)  # another thread has other numbers of threads
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._notes = self._touches = 0
        self._saving: int | None = None  # the step of the save of which nobody here knows the end
        self._settled = (-1, 0)
        self._boundary: _Boundary | None = None
        self._kept: _Boundary | None = None  # or tried to
        self._slow = 0  # notes in a row that took long
        self._is_off = False
        parts = self._state.contents.parts.values()
        self._small = [part for part in parts if not isinstance(part.live, nn.Module | Optimizer)]
        self._loose = Loose(context)

    def touch(self) -> None:
        self._touches += 1

    def note(self, half: Mapping[str, float] | None = None, *, is_seen: bool = True) -> None:
        self._notes += 1
        if self._notes == 2 and self._world.size > 1:  # on all ranks, whatever has become of one
            self._loose.compare()
        if self._is_off or not is_seen:
            self._boundary = None
            return
        began = time.perf_counter()
        try:
            self._boundary = None
            self._loose.note()
            boundary = _noted(self._context, self._small, self._touches, half)
            self._loose.mark()  # what was noted may be copies that a device has yet to make
            self._boundary = boundary
        except Exception as error:  # of an object of the program's, say: a save tells of it
            self._give_up(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._slow = self._slow + 1 if time.perf_counter() - began > SLOW_SECONDS else 0
        if self._slow > _MOST_SLOW:
            self._give_up(f"noting a step boundary takes more than {1000 * SLOW_SECONDS:g} ms")

    def _give_up(self, why: str) -> None:
        self._boundary, self._is_off = None, True
        log.warning("a rank that survives keeps nothing: %s", why)

    def took_first_buffers(self) -> None:
        self._loose.take_first_buffers()

    def saving(self, step: int) -> None:
        self._saving = step

    def settled(self, step: int, is_durable: int) -> None:
        if (step, is_durable) <= self._settled:
            return
        self._settled = step, is_durable
        self._saving = None if self._saving == step else self._saving
        if is_durable:
            self._stands_on = (self._attempt.id, step)
        if is_durable and is_first_of_node():
            threading.Thread(target=self._forget, args=(self._attempt,), name="harness-forget", daemon=True).start()

    def forget(self) -> None:
        self._boundary = None
        if is_first_of_node():
            self._forget()

    def _forget(self, before: Attempt | None = None) -> None:
        try:
            self._place.forget(before)
        except OSError as error:
            log.warning("could not delete %s: %s", self._place.path, error.strerror)

    def close(self) -> None:
        self._loose.close()

    # --- on the way out ----------------------------------------------------------------------------------------------

    def keep(self, why: str, seconds: float | None = None) -> None:
        if os.getpid() != self._pid or self._boundary is None:
            return
        limit_seconds = self._context.config.stop.grace_seconds if seconds is None else seconds
        deadline = time.monotonic() + limit_seconds
        if not self._lock.acquire(timeout=limit_seconds):  # another thread is at it
            return
        try:
            boundary = self._boundary
            if boundary is None or boundary is self._kept:
                return
            self._kept = boundary
            worker = threading.Thread(target=self._keep, args=(boundary, why), name="harness-keeper", daemon=True)
            worker.start()
            worker.join(max(deadline - time.monotonic(), 0.0))
            if worker.is_alive():
                log.warning("step %d is not kept: it takes more than %g s", boundary.step, limit_seconds)
        except RuntimeError as error:  # Python is about to end, and starts no thread
            log.warning("nothing is kept: %s", error)
        finally:
            self._lock.release()

    def _keep(self, boundary: _Boundary, why: str) -> None:
        began = time.monotonic()
        try:
            self._refuse_touched(boundary)
            self._place.make()
            if self._place.claim(self._attempt, boundary.step):
                with self._loose.beside_the_training():
                    size_bytes = self._write(boundary, why)
                outcome.kept(self._place.path)
                seconds = time.monotonic() - began
                about = boundary.step, size_bytes / 1e6, self._place.root, seconds
                log.log(_level(), "kept step %d (%.1f MB) in %s, in %.2f s", *about)
        except (Unusable, HarnessError, OSError) as error:
            if local_rank() <= 1:  # the first may be the one that has died
                log.log(_level(), "step %d is not kept, the last checkpoint counts: %s", boundary.step, error)
        except Exception:
            log.exception("step %d is not kept, the last checkpoint counts", boundary.step)

    def _refuse_touched(self, boundary: _Boundary) -> None:
        """Raises ``Unusable`` where the state is not that of a boundary any more."""
        if self._boundary is not boundary or self._touches != boundary.touches:
            raise Unusable("an optimizer has begun its next step, and the body of that step was not over")
        if any(version(tensor) != before for tensor, before in boundary.watched):
            raise Unusable("an object in the state has changed its tensors since the step boundary")
        if why := self._loose.why_changed():
            raise Unusable(why)

    def _write(self, boundary: _Boundary, why: str) -> int:
        """Commits the state, and returns its size. What has changed it meanwhile is found before the commit."""
        encoded = commit.encode(_captured(self._state, self._loose, boundary))
        plan = SavePlan(encoded, SHARD_BYTES)
        size_bytes = sum(shard.size_bytes for shard in plan.own_shards)
        self._place.check_room(size_bytes)
        store, directory = self._place.store, self._place.directory(self._attempt, boundary.step)
        receipt = commit.write_share(store, directory, plan, commit.streamed(plan, encoded))
        self._refuse_touched(boundary)
        header = commit.Header(boundary.step, self._attempt, self._lineage, self._meta(boundary, why))
        commit.publish(store, directory, plan, encoded, [receipt], header)
        return size_bytes

    def _meta(self, boundary: _Boundary, why: str) -> dict[str, Any]:
        training = boundary.training
        return {
            **self._context.about,
            "epoch": boundary.shown_epoch,
            "metrics": {"last": as_json(training["last"]), "best": as_json(training["best"])},
            **self._conditions,
            "deaths": self._deaths().as_json(),
            "python": platform.python_version(),
            "harness": harness.__version__,
            KEPT: {
                "rank": self._world.rank,
                "host": platform.node(),
                "why": why,
                "url": self._place.url,
                "stands_on": self._stands_on and [*self._stands_on],
                "saving": self._saving,
                "tells": self._context.config.metrics.every_seconds is not None,  # before it commits that
            },
        }


def _noted(context: RunContext, small: Sequence[Part], touches: int, half: Mapping[str, float] | None) -> _Boundary:
    state, loader, watched = context.state, context.loader, list[tuple[torch.Tensor, int]]()
    progress = state.progress
    training: dict[str, Any] = {
        "epoch": progress.epoch,
        "last": dict(progress.last),
        "best": dict(progress.best),
        "finished_loops": progress.finished_loops,
    }
    if half is not None:
        training["half"] = dict(half)
    return _Boundary(
        progress.step + (half is not None),
        touches,
        progress.epoch if loader is None else loader.epoch,
        training,
        {part.name: _small(part, watched) for part in small},
        [(group, _options(group)) for each in state.optimizers.values() for group in each.param_groups],
        watched,
    )


def _captured(state: State, loose: Loose, boundary: _Boundary) -> dict[str, Any]:
    """All parts, as they were at the boundary."""
    now = [(group, _options(group)) for group, _ in boundary.options]
    try:
        for group, options in boundary.options:
            group.update(options)
        parts: dict[str, Any] = state.capture()
    finally:
        for group, options in now:
            group.update(options)
    states = {str(rank): {"keys": keys} for rank, keys in enumerate(state.progress.random_keys or [])}
    training = {**parts[TRAINING], **boundary.training}
    small = {name: part() if callable(part) else part for name, part in boundary.small.items()}
    return {**loose.put_into(parts), **small, TRAINING: training, RANDOM: states}


def _level() -> int:
    """What is seen, though the rank that speaks for this machine may have died."""
    return logging.WARNING if is_first_of_node() else logging.ERROR


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group of an optimizer, as they are now."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items() if key != "params"
    }


def _small(part: Part, watched: list[tuple[torch.Tensor, int]]) -> Any:
    """A part as it is now: what torch and harness make is made anew each time, of others nobody knows. Tensors that are too
    large to be copied are watched."""
    if isinstance(part, ScalerPart):
        return part.noted()
    captured = part.capture()
    if type(part) is not OtherPart or isinstance(part.live, Loader):
        return captured
    encoded = tree.encode(captured, part.name)
    if sum(each.nbytes for each in encoded.tensors.values()) <= SMALL_BYTES:
        return replace(encoded, tensors={path: each.clone() for path, each in encoded.tensors.items()})
    watched += [(each, version(each)) for each in encoded.tensors.values()]
    return encoded
