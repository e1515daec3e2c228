"""Finds what a loop does that no checkpoint would show, while there is time to mend it.

A restart begins anew what is not in the state, and skips what was fetched too early. Neither raises an error, and the run
ends with other weights. So rank 0 looks at the first step, and at the end of the first epoch, for optimizers, modules,
schedulers, gradient scalers and loaders that the loop uses and the state lacks. It looks through the objects that Python's
garbage collector knows: tens of milliseconds, twice in a process.
"""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from harness.data import Loader, _Seeded
from harness.state import State

log = logging.getLogger(__name__)

_KINDS = (nn.Module, LRScheduler, torch.amp.GradScaler, DataLoader, _BaseDataLoaderIter)


_AHEAD = "{}: batches seem to be fetched ahead, and a restart would skip one. Fetch each batch in the step that trains it"


class Omissions:
    """Looks at a loop for a state, where ``is_active``; each finding is logged once."""

    def __init__(self, state: State, *, is_active: bool) -> None:
        self._state = state
        self._is_active = is_active
        self._said: set[str] = set()
        self._stepped: dict[int, Optimizer] = {}  # those that have taken a step
        self._versions: dict[int, int] = {}  # of the modules that the state has not, when they were seen first
        self._has_ended_epoch = False
        self._fetched: list[
            int
        ] = []  # batches in all: before the loop, and at the first two boundaries; then the last one's
        self._forwards = 0  # at the last boundary
        self._marks: tuple[int, Mapping[str, Any]] | None = None  # of the save that was begun in ``step``, and its step

    @contextlib.contextmanager
    def looking(self, loader: Loader | None) -> Iterator[None]:
        """The time of a loop."""
        self._fetched = [loader.handed_out] if loader else []
        if not self._is_active:
            yield
            return
        hook = register_optimizer_step_pre_hook(self._note)
        self._modules_that_changed(_alive())  # none yet
        try:
            yield
        finally:
            hook.remove()
            self._stepped.clear()

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        self._stepped[id(optimizer)] = optimizer

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)

    # --- what the state lacks ----------------------------------------------------------------------------------------

    def warn(self) -> None:
        """Names what the loop has used so far and the state lacks."""
        if not self._is_active:
            return
        if Loader.in_use and not any(isinstance(each, Loader) for each in self._state.objects):
            self._say(
                "a harness.Loader hands out batches and is not in the run's state: after a restart its epoch would start "
                'over. Add it: state={..., "loader": loader}'
            )
        for name in self._state.without_scheduler():
            self._say(
                f"{name} has a learning rate scheduler, which is not in the run's state: after a restart its schedule would "
                'start over. Add it: state={..., "scheduler": scheduler}'
            )
        for each in self._lacking():
            name, kind = _name_of(each), type(each).__name__
            what = f"{name} ({kind})" if name else kind
            if isinstance(each, DataLoader):
                self._say(
                    f"{what} hands out batches and is not in the run's state: after a restart its epoch would start over. "
                    "Use harness.Loader, or torchdata's StatefulDataLoader, and add it to the state"
                )
            else:
                self._say(
                    f"{what} is used in training and is not in the run's state: after a restart it would start over. "
                    f'Add it: state={{..., "{name or "name"}": {name or "…"}}}'
                )

    def _lacking(self) -> Iterator[Any]:
        alive = _alive()
        objects, _ = self._state.holds()
        own = {id(parameter) for each in self._state.optimizers.values() for parameter in _parameters_of(each)}
        for optimizer in self._stepped.values():  # one that another has wrapped has the same parameters
            if id(optimizer) not in objects and not own.issuperset(map(id, _parameters_of(optimizer))):
                yield optimizer
        yield from self._modules_that_changed(alive)
        named = {id(self._state.optimizers[name]) for name in self._state.without_scheduler()}
        unnamed = {id(optimizer) for optimizer in self._state.optimizers.values()} - named
        yield from (
            each
            for each in alive[LRScheduler]
            if id(each) not in objects and id(getattr(each, "optimizer", None)) in unnamed
        )
        yield from (
            each
            for each in alive[torch.amp.GradScaler]
            if id(each) not in objects and getattr(each, "_scale", None) is not None
        )
        for iterator in alive[_BaseDataLoaderIter]:
            if not isinstance(iterator._dataset, _Seeded):  # else it is one of a harness.Loader
                sampler = iterator._index_sampler
                loaders = [each for each in alive[DataLoader] if each._index_sampler is sampler and id(each) not in objects]
                yield from loaders

    def _modules_that_changed(self, alive: Mapping[type, list[Any]]) -> list[nn.Module]:
        """Modules with tensors that the state has not, and that have changed since they were seen first; outermost ones."""
        _, places = self._state.holds()
        found, inner = [], set()
        for module in alive[nn.Module]:
            version = _version(module, places)
            if version is not None and self._versions.setdefault(id(module), version) != version:
                found.append(module)
                inner |= {id(child) for child in module.modules() if child is not module}
        return [module for module in found if id(module) not in inner]

    # --- batches that are fetched ahead ------------------------------------------------------------------------------

    def at_boundary(self, loader: Loader | None, forwards: int) -> None:
        """Looks whether each step has had its batch."""
        self._forwards = forwards
        if loader is None:
            return
        fetched, now = self._fetched, loader.handed_out
        if now == fetched[-1] and loader.is_under_way:
            self._say(
                "run.step() was called again before another batch was fetched: a step has no batch of its own, or batches "
                "are fetched ahead. A restart goes on after the batch that was fetched last. Fetch each batch in the step "
                "that trains it"
            )
        if len(fetched) == 3:
            fetched[-1] = now
            return
        fetched.append(now)
        if len(fetched) == 3 and loader.cursor.offset and (fetched[1] - fetched[0]) - (now - fetched[1]) == 1:
            self._say(_AHEAD.format("the first step of this loop had one batch more than the second"))

    def at_next_batch(self, forwards: int) -> None:
        """Looks whether the step before is over when its successor's batch is fetched."""
        if forwards != self._forwards:
            self._say(_AHEAD.format("a batch was fetched after the model had begun the next step"))

    # --- what comes after a boundary ---------------------------------------------------------------------------------

    def after_save(self, step: int) -> None:
        """A save was begun in ``step``, before the end of the loop's body is known."""
        self._marks = step, self._state.marks()

    def at_optimizer(self) -> None:
        """The first optimizer's step after a save: what has changed until now is not in that save."""
        if self._marks is None:
            return
        (step, before), self._marks = self._marks, None
        now = self._state.marks()
        for name in sorted(name for name in before if before[name] != now[name]):
            self._say(
                f"{name} changed after run.step(): the checkpoint of step {step} is without it, and after a restart it "
                "would be lost. Call run.step() last in a step"
            )

    def at_epoch_end(self) -> None:
        """Looks once more: some things are used at the end of an epoch."""
        if not self._has_ended_epoch:
            self._has_ended_epoch = True
            self.warn()


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _version(module: nn.Module, known: set[int]) -> int | None:
    """A number that changes with the tensors of a module; None where all of them are known, or nobody can say."""
    try:
        tensors = [each for each in chain(module.parameters(), module.buffers()) if each.data_ptr() not in known]
        return sum(each._version for each in tensors) if tensors else None
    except (RuntimeError, ValueError):  # one that has no memory yet, or was made in inference mode
        return None


def _alive() -> dict[type, list[Any]]:
    """The objects of some classes, by class. Their type counts: some objects claim to be of another class."""
    found: dict[type, list[Any]] = {kind: [] for kind in _KINDS}
    kinds: dict[type, type | None] = {}
    for each in gc.get_objects():
        own = type(each)
        if own not in kinds:
            kinds[own] = next((kind for kind in _KINDS if issubclass(own, kind)), None)
        if (kind := kinds[own]) is not None:
            found[kind].append(each)
    return found


def _name_of(value: Any) -> str:
    """What the program calls an object: in the functions that are under way, or in their modules. Empty: nobody knows."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith("harness."):
            for names in (frame.f_locals, frame.f_globals):
                for name, each in list(names.items()):
                    if each is value:
                        return name
        frame = frame.f_back
    return ""
