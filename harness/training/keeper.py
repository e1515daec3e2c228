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

import contextlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import harness
from harness.checkpoint import commit, tree
from harness.checkpoint.format import Attempt
from harness.checkpoint.kept import KEPT, KeptPlace, Unusable
from harness.checkpoint.plan import SavePlan
from harness.data.loader import Loader
from harness.data.streams import stream_states
from harness.errors import HarnessError
from harness.runtime.environment import is_first_of_node, local_rank
from harness.state.parts import RANDOM, TRAINING, OtherPart, Part
from harness.telemetry.events import as_json
from harness.torch_private import version
from harness.training import resume
from harness.training.resume import Resumed
from harness.training.run_context import RunContext

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20  # of tensors, so many are copied at each boundary
SHARD_BYTES = 1 << 30
SLOW_SECONDS = 2e-3  # a note that takes longer,
_MOST_SLOW = 5  # so often in a row, is the last one
_MOST_WATCHED = 64  # tensors that only optimizers change: whoever else changes one changes many


class NoKeeper:
    """Where nothing is kept."""

    def touch(self) -> None:
        """An optimizer is about to change the state."""

    def note(self, *, evaluates_first: bool = False) -> None:
        """The body of a step is over; or all but its evaluation, with which a resume has to begin then."""

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


def keeper_for(context: RunContext, attempt: Attempt, resumed: Resumed, place: KeptPlace | None) -> NoKeeper:
    """The keeper of an attempt. Says once why a run cannot have one. All ranks call it."""
    if place is None:
        return NoKeeper()
    why = _why_not(context)
    if why and context.world.rank == 0:
        log.info("a rank that survives keeps nothing: %s", why)
    return NoKeeper() if why else Keeper(context, attempt, resumed, place)


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
    small: Mapping[str, Any]  # the small parts
    options: Sequence[tuple[dict[str, Any], dict[str, Any]]]  # of the optimizers' groups
    watched: Sequence[tuple[torch.Tensor, int]]  # tensors of the small parts, and their versions


class Keeper(NoKeeper):
    """Notes each boundary of an attempt, and keeps the last one."""

    def __init__(self, context: RunContext, attempt: Attempt, resumed: Resumed, place: KeptPlace) -> None:
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

    def note(self, *, evaluates_first: bool = False) -> None:
        self._notes += 1
        if self._notes == 2 and self._world.size > 1:  # on all ranks, whatever has become of one
            self._loose.compare()
        if self._is_off:
            return
        began = time.perf_counter()
        try:
            self._boundary = None
            self._loose.note()
            self._boundary = self._noted(evaluates_first=evaluates_first)
        except Exception as error:  # of an object of the program's, say: a save tells of it
            self._give_up(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._slow = self._slow + 1 if time.perf_counter() - began > SLOW_SECONDS else 0
        if self._slow > _MOST_SLOW:
            self._give_up(f"noting a step boundary takes more than {1000 * SLOW_SECONDS:g} ms")

    def _noted(self, *, evaluates_first: bool) -> _Boundary:
        progress, loader, watched = self._state.progress, self._context.loader, list[tuple[torch.Tensor, int]]()
        training: dict[str, Any] = {
            "epoch": progress.epoch,
            "last": dict(progress.last),
            "best": dict(progress.best),
            "finished_loops": progress.finished_loops,
        }
        if evaluates_first:
            training["evaluates_first"] = True
        return _Boundary(
            progress.step + evaluates_first,
            self._touches,
            progress.epoch if loader is None else loader.epoch,
            training,
            {part.name: _small(part, watched) for part in self._small},
            [(group, _options(group)) for each in self._state.optimizers.values() for group in each.param_groups],
            watched,
        )

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
        encoded = commit.encode(self._captured(boundary))
        plan = SavePlan(encoded, SHARD_BYTES)
        size_bytes = sum(shard.size_bytes for shard in plan.own_shards)
        self._place.check_room(size_bytes)
        store, directory = self._place.store, self._place.directory(self._attempt, boundary.step)
        receipt = commit.write_share(store, directory, plan, commit.streamed(plan, encoded))
        self._refuse_touched(boundary)
        header = commit.Header(boundary.step, self._attempt, self._lineage, self._meta(boundary, why))
        commit.publish(store, directory, plan, encoded, [receipt], header)
        return size_bytes

    def _captured(self, boundary: _Boundary) -> dict[str, Any]:
        """All parts, as they were at the boundary."""
        now = [(group, _options(group)) for group, _ in boundary.options]
        try:
            for group, options in boundary.options:
                group.update(options)
            parts: dict[str, Any] = self._state.capture()
        finally:
            for group, options in now:
                group.update(options)
        keys = self._state.progress.random_keys or []
        device = self._state.device
        states = {str(rank): {**stream_states(each, boundary.step, device), "keys": each} for rank, each in enumerate(keys)}
        training = {**parts[TRAINING], **boundary.training}
        return {**self._loose.put_into(parts), **boundary.small, TRAINING: training, RANDOM: states}

    def _meta(self, boundary: _Boundary, why: str) -> dict[str, Any]:
        training = boundary.training
        return {
            **self._context.about,
            "epoch": boundary.shown_epoch,
            "metrics": {"last": as_json(training["last"]), "best": as_json(training["best"])},
            **self._conditions,
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
    captured = part.capture()
    if type(part) is not OtherPart or isinstance(part.live, Loader):
        return captured
    encoded = tree.encode(captured, part.name)
    if sum(each.nbytes for each in encoded.tensors.values()) <= SMALL_BYTES:
        return replace(encoded, tensors={path: each.clone() for path, each in encoded.tensors.items()})
    watched += [(each, version(each)) for each in encoded.tensors.values()]
    return encoded


class Loose:
    """What a step changes of the modules outside of the optimizers: a copy of what is small, the versions of the rest."""

    def __init__(self, context: RunContext) -> None:
        self._world, self._state = context.world, context.state
        self._parts = [part for part in self._state.contents.parts.values() if isinstance(part.live, nn.Module)]
        self._places: dict[tuple[str, str], int] = {}  # of all tensors, by part and name: where they lie
        self._copied: list[tuple[str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._watched: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._of_first: list[_FirstsBuffers] = []
        self._own: dict[str, torch.Tensor] = {}  # that DDP does not give to all ranks
        self._own_at_first: list[int] = []  # their versions
        self._are_alike = self._world.rank == 0  # they, on all ranks
        self._refusal = ""
        self._ready: Any = None  # the event after which the copies are there, on a GPU

    def note(self) -> None:
        """A boundary."""
        if not self._places:
            self._look()
        if self._live:
            torch._foreach_copy_(self._copies, self._live)
        self._versions = [version(each) for _, each in self._watched]
        for given in self._of_first:
            given.note()
        self._record()

    def compare(self) -> None:
        """Whether what DDP does not give to all ranks is alike on them, now that a step has changed what steps change. All
        ranks call it."""
        found = self._world.all_gather(commit.digest_of(self._own, "own"))
        self._are_alike = self._are_alike or all(each == found[0] for each in found)

    def _look(self) -> None:
        """Finds the tensors, and who changes them."""
        is_steady, room = self._state.is_steady(), SMALL_BYTES
        groups = [group for each in self._state.optimizers.values() for group in each.param_groups]
        renormed = {each.data_ptr() for group in groups for each in group["params"] if each.requires_grad}
        lives = [part.live for part in self._parts if isinstance(part.live, DistributedDataParallel)]
        given = [each for each in lives if each.broadcast_buffers] if self._world.size > 1 else []
        given_places = {buffer.data_ptr() for each in given for buffer in each.module.buffers()}
        self._of_first = [_FirstsBuffers(each, self._record) for each in given] if self._world.rank else []
        steady: list[tuple[str, torch.Tensor]] = []
        captured = {(part.name, key): value for part in self._parts for key, value in part.capture().items()}
        for (part, key), value in sorted(captured.items(), key=lambda item: getattr(item[1], "nbytes", 0)):
            name = f"{part}.{key}"
            if not isinstance(value, torch.Tensor) or key.endswith("_extra_state"):
                self._refusal = f"{name} is made anew each time that it is asked for"
                continue
            self._places[part, key] = value.data_ptr()
            if is_steady(value):
                steady.append((name, value))
            elif value.numel():
                giver = next((each for each in self._of_first if each.has(value)), None)
                room -= value.nbytes
                if room >= 0:
                    self._copied.append((part, key))
                    self._live.append(value)
                    self._copies.append(torch.empty_like(value))
                    if giver is not None:
                        giver.copied.append((self._copies[-1], value))
                elif giver is not None:
                    giver.watched.append((name, value))
                else:
                    self._watched.append((name, value))
                if value.data_ptr() not in given_places:
                    self._own[name] = value
                    if self._world.rank and value.data_ptr() in renormed:
                        self._refusal = f"{name} is changed in the forward pass, on each rank in its own way"
        self._own_at_first = [version(each) for each in self._own.values()]
        self._watched += steady[:: max(1, len(steady) // _MOST_WATCHED)]

    def take_first_buffers(self) -> None:
        """The buffers are those of rank 0."""
        for given in self._of_first:
            given.take()

    def why_changed(self) -> str:
        """Why what is noted is not what a checkpoint would have; empty where it is."""
        if self._refusal:
            return self._refusal
        places = {(part.name, key): _place(value) for part in self._parts for key, value in part.capture().items()}
        if places != self._places:
            return "the modules have other tensors than at the step boundary"
        moved = [name for (name, each), before in zip(self._watched, self._versions, strict=True) if version(each) != before]
        if moved:
            return f"{', '.join(moved[:3])} changed outside of optimizer.step()"
        own = [version(each) for each in self._own.values()]
        if not self._are_alike and own != self._own_at_first:
            return f"{next(iter(self._own))} may differ from that of rank 0, which a checkpoint has"
        return next((why for each in self._of_first if (why := each.why_not())), "")

    def put_into(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts, with the copies in the places of what was copied."""
        found = {name: dict(part) if isinstance(part, Mapping) else part for name, part in parts.items()}
        for (part, key), copy in zip(self._copied, self._copies, strict=True):
            found[part][key] = copy
        return found

    def close(self) -> None:
        for given in self._of_first:
            given.close()

    # --- on a GPU ----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        if self._world.device.type == "cuda":
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    @contextlib.contextmanager
    def beside_the_training(self) -> Iterator[None]:
        """The time in which the state is read: on a GPU in a stream of its own, since the training's may hang for ever."""
        if self._ready is None:
            yield
            return
        stream = torch.cuda.Stream(self._world.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._ready)
        with torch.cuda.device(self._world.device), torch.cuda.stream(stream):
            yield


def _place(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0


class _FirstsBuffers:
    """On other ranks than the first: a module's buffers, which DDP overwrites with the first one's before a forward pass."""

    def __init__(self, module: DistributedDataParallel, on_take: Callable[[], None]) -> None:
        self._places = {each.data_ptr() for each in module.module.buffers()}
        self._on_take = on_take
        self.copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.watched: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._is_missing = self._is_about_to = False
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._begin),
            module.module.register_forward_pre_hook(self._given),
        ]

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self._places

    def note(self) -> None:
        """A boundary: until the next forward pass nobody here knows the first rank's."""
        self._is_missing = bool(self.copied or self.watched)

    def _begin(self, module: DistributedDataParallel, _inputs: object) -> None:
        self._is_about_to = self._is_missing and module.will_sync_module_buffers()  # type: ignore[no-untyped-call]

    def _given(self, _module: nn.Module, _inputs: object) -> None:
        if self._is_about_to:
            self.take()

    def take(self) -> None:
        """They are the first rank's now."""
        self._is_missing = self._is_about_to = False
        for copy, live in self.copied:
            copy.copy_(live)
        self._versions = [version(each) for _, each in self.watched]
        self._on_take()

    def why_not(self) -> str:
        """Why they are not known; empty where they are."""
        if self._is_missing:
            return "rank 0 has died before it gave its buffers (of BatchNorm, say) to the others"
        moved = [name for (name, each), before in zip(self.watched, self._versions, strict=True) if version(each) != before]
        return f"{moved[0]} changes in the forward pass, and is too large to be copied" if moved else ""

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module takes its hooks along: there they do nothing."""
        return _NoBuffers, ()


class _NoBuffers:
    def _begin(self, *_: object) -> None:
        """Nothing to do."""

    _given = _begin
