"""Finds what a loop does that no checkpoint would show, while there is time to mend it.

A restart starts over what is not in the state, and skips what was fetched too early. Neither raises an error, and the run
ends with other weights. So rank 0 looks at the first step, and at the end of the first epoch, for optimizers, modules,
schedulers, gradient scalers and loaders that the loop uses and the state lacks. It looks through the variables of the
functions that are under way, and through what these hold, some thousand objects at most. What hides elsewhere is not found.
"""

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, SequentialSampler

from harness import torch_private
from harness.checkpoint.dtensors import address_of, local_of
from harness.data.loader import Loader
from harness.data.loaders import INTO_THE_STATE, warn_of_single_samples
from harness.state.capture import State
from harness.training.stragglers import OwnWork

log = logging.getLogger(__name__)

_MOST_STEPS = 200  # in which an optimizer is seen: a hook for all of them costs each step a microsecond
_MOST_FRAMES, _MOST_OBJECTS, _MOST_LEVELS, _MOST_ITEMS = 12, 5000, 3, 100
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.Tensor)
_AHEAD = "{}: batches seem to be fetched ahead, and a restart would skip one. Fetch each batch in the step that trains it"


class Omissions:
    """Looks at a loop for a state, where ``is_active``; each finding is logged once."""

    def __init__(self, state: State, own_work: OwnWork, loader: Loader | None, *, is_active: bool) -> None:
        self._state = state
        self._own_work = own_work
        self._loader = loader
        self._is_active = is_active
        self._said: set[str] = set()
        self._seeing = contextlib.ExitStack()  # has the optimizers' steps seen until it is closed
        self._stepped: dict[int, Optimizer] = {}  # those that have taken a step
        self._versions: dict[int, int] = {}  # of the modules that the state has not, when they were seen first
        self._has_ended_epoch = False
        self._began = 0.0  # the loop, by the performance counter
        self._boundaries: int | None = None  # since the epoch began, where no loader of ours counts them
        self._fetched = [0]  # batches in all: before the loop, at its first boundary, and at the newest one
        self._forwards = 0  # at the last boundary
        self._looked = 0  # at so many boundaries of this loop
        self._still = Stillness([] if state.contents.has_scaler or not state.optimizers else [*state.modules.values()])
        self._marks: tuple[int, Mapping[str, Any]] | None = None  # of the save that was begun in ``step``, and its step

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """The time of a loop."""
        self._fetched = self._fetched[-1:]
        self._began = time.perf_counter()
        self._looked = 0
        if not self._is_active:
            yield
            return
        self._seeing.callback(register_optimizer_step_pre_hook(self._note).remove)
        self._modules_that_changed(_found())  # none yet
        try:
            yield
        finally:
            self._seeing.close()
            self._stepped.clear()

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        self._stepped[id(optimizer)] = optimizer

    def _say(self, message: str, about: str = "") -> None:
        if (about or message) not in self._said:
            self._said.add(about or message)
            log.warning("%s", message)

    # --- what the state lacks ----------------------------------------------------------------------------------------

    def after_first_step(self) -> None:
        """What the first step of this process has shown."""
        self.warn()
        if self._loader is not None and self._is_active:
            warn_of_single_samples(self._loader, self._state.modules.items())

    def warn(self) -> None:
        """Names what the loop has used so far and the state lacks."""
        if not self._is_active:
            return
        if any(each.used_at >= self._began for each in Loader.in_use) and not self._state.contents.loaders:
            self._say(
                "the Loader is not in the run's state; after a restart its epoch would start over. "
                'Add it: state={..., "loader": loader}'
            )
        for name in self._state.contents.without_scheduler():
            self._say(
                f"{name} has a learning rate scheduler, which is not in the run's state: after a restart its schedule would "
                'start over. Add it: state={..., "scheduler": scheduler}'
            )
        for name, each in self._lacking():
            what = f"{name} ({type(each).__name__})" if name else type(each).__name__
            if issubclass(type(each), DataLoader):
                self._say(
                    f"{what} is not in the run's state, which has no loader: after a restart an epoch would start "
                    f"over; {INTO_THE_STATE}"
                )
            else:
                self._say(
                    f"{what} is used in training and is not in the run's state: after a restart it would start over. "
                    f'Add it: state={{..., "{name.rpartition(".")[2] or "name"}": {name or "…"}}}'
                )

    def _lacking(self) -> Iterator[tuple[str, Any]]:
        """What the loop has used and the state lacks, each with its name in the program; empty where that is not known."""
        found = _found()
        objects = self._state.contents.objects()
        own = {id(parameter) for each in self._state.optimizers.values() for parameter in _parameters_of(each)}
        for optimizer in self._stepped.values():  # one that another has wrapped has the same parameters
            if id(optimizer) not in objects and not own.issuperset(map(id, _parameters_of(optimizer))):
                yield next((name for name, each in found if each is optimizer), ""), optimizer
        for module in self._modules_that_changed(found):
            yield next(name for name, each in found if each is module), module
        named = {id(self._state.optimizers[name]) for name in self._state.contents.without_scheduler()}
        unnamed = {id(optimizer) for optimizer in self._state.optimizers.values()} - named
        shuffles = any(issubclass(type(each), DataLoader) and _shuffles(each) for _, each in found)
        for name, each in found:
            is_used = (
                (issubclass(type(each), LRScheduler) and id(getattr(each, "optimizer", None)) in unnamed)
                or (issubclass(type(each), torch.amp.GradScaler) and torch_private.scale_of(each) is not None)
                or (issubclass(type(each), DataLoader) and not self._state.contents.may_have_position)
            )
            if is_used and shuffles and issubclass(type(each), DataLoader) and not _shuffles(each):
                continue  # another one is trained from; this one has the validation's samples
            if is_used and id(each) not in objects:
                yield name, each

    def _modules_that_changed(self, there: list[tuple[str, Any]]) -> list[nn.Module]:
        """Modules with tensors that the state has not, and that have changed since they were seen first; outermost ones."""
        places = self._state.contents.places()
        found, inner = [], set()
        for _, module in there:
            version = _version(module, places) if issubclass(type(module), nn.Module) else None
            if version is not None and self._versions.setdefault(id(module), version) != version:
                found.append(module)
                inner |= {id(child) for child in module.modules() if child is not module}
        return [module for module in found if id(module) not in inner]

    # --- batches that are fetched ahead ------------------------------------------------------------------------------

    def at_boundary(self) -> None:
        """Looks whether each step has had its batch."""
        if not self._is_active:
            return
        self._forwards = self._own_work.forwards
        self._looked += 1
        if self._still.is_found(self._looked):
            self._say(
                f"no parameter of {', '.join(self._state.modules)} has changed in {Stillness.STEPS} steps. See that "
                "optimizer.step() is called before run.step(), and that the optimizer has the model's parameters"
            )
        if self._looked == _MOST_STEPS:
            self._seeing.close()
        if self._boundaries is not None:
            self._boundaries += 1
        if (loader := self._loader) is None:
            return
        fetched, now = self._fetched, loader.taken
        if now == fetched[-1] > 0:
            self._say(
                "run.step() was called again before another batch was fetched: a step has no batch of its own, "
                "or batches are fetched ahead. A restart continues after the batch that was fetched last. Fetch "
                "each batch in the step that trains it"
            )
        if len(fetched) == 3:
            fetched[-1] = now
            return
        fetched.append(now)
        if len(fetched) == 3 and loader.cursor.offset and (fetched[1] - fetched[0]) - (now - fetched[1]) == 1:
            self._say(_AHEAD.format("the first step of this loop had one batch more than the second"))

    def at_next_batch(self) -> None:
        """Looks whether the step before is over when its successor's batch is fetched."""
        if self._is_active and self._own_work.forwards != self._forwards:
            self._say(_AHEAD.format("a batch was fetched after the model had begun the next step"))

    # --- a position that nobody keeps --------------------------------------------------------------------------------

    def at_epoch_begin(self) -> None:
        self._boundaries = 0

    def at_save(self, epoch: int) -> None:
        """Looks whether a restart would know how far the epoch is."""
        if (
            self._boundaries
            and not self._state.contents.may_have_position
            and not any("DataLoader" in message for message in self._said)
        ):
            self._say(
                f"epoch {epoch} was saved midway, but the state holds no position in the data: a restart would "
                f"repeat the whole epoch; {INTO_THE_STATE}",
                about="position",
            )

    # --- what comes after a boundary ---------------------------------------------------------------------------------

    def after_save(self, step: int) -> None:
        """A save was begun in ``step``, before the end of the loop's body is known."""
        self._marks = step, self._state.contents.marks()

    def at_optimizer(self) -> None:
        """The first optimizer's step after a save: what has changed until now is not in that save."""
        if self._marks is None:
            return
        (step, before), self._marks = self._marks, None
        now = self._state.contents.marks()
        for name in sorted(name for name in before if before[name] != now[name]):
            self._say(
                f"{name} changed after run.step(): the checkpoint of step {step} lacks the change, and a restart "
                "would lose it. Call run.step() at the end of each step",
                about=name,
            )

    def at_epoch_end(self) -> None:
        """Looks once more: some things are used at the end of an epoch."""
        self._boundaries = None
        if not self._has_ended_epoch:
            self._has_ended_epoch = True
            self.warn()


class Stillness:
    """Looks whether the first steps of a loop change any parameter at all, by the first numbers of each.

    A scaler of gradients may pass over these steps, so nobody looks then.
    """

    STEPS = 2
    _NUMBERS = 1024

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._before: list[torch.Tensor] = []

    def is_found(self, boundary: int) -> bool:
        """Whether nothing has changed from the first boundary of a loop to this one, which is the last to be looked at."""
        if boundary == 1:
            self._before = self._some()
        if boundary != 1 + self.STEPS or not self._before:
            return False
        before, self._before = self._before, []
        return all(torch.equal(*pair) for pair in zip(before, self._some(), strict=False))

    def _some(self) -> list[torch.Tensor]:
        trained = [each for module in self._modules for each in module.parameters() if each.requires_grad]
        own = [local_of(each.detach()) for each in trained]  # of a sharded one: no other rank is asked, since none looks
        return [each.flatten()[: self._NUMBERS].clone() for each in own if each.numel()]


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _version(module: nn.Module, known: set[int]) -> int | None:
    """A number that changes with the tensors of a module; None where all of them are known, or nobody can say."""
    try:
        tensors = [each for each in chain(module.parameters(), module.buffers()) if address_of(each) not in known]
        return sum(map(torch_private.version, tensors)) if tensors else None
    except (RuntimeError, ValueError):  # one that has no memory yet, or was made in inference mode
        return None


def _shuffles(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives its samples in another order than that of the data set."""
    is_in_order = isinstance(loader.sampler, SequentialSampler) or getattr(loader.sampler, "shuffle", True) is False
    return not is_in_order


def _found() -> list[tuple[str, Any]]:
    """What the functions that are under way have in their variables, and what that holds, with names: ``self.average``."""
    frame: FrameType | None = sys._getframe()
    waiting: deque[tuple[str, Any, int]] = deque()
    frames = 0
    while frame is not None and frames < _MOST_FRAMES:
        if not str(frame.f_globals.get("__name__", "")).startswith(("harness.", "contextlib")):
            waiting.extend((name, value, 0) for names in (frame.f_locals, frame.f_globals) for name, value in names.items())
            frames += 1
        frame = frame.f_back
    found: dict[int, tuple[str, Any]] = {}
    while waiting and len(found) < _MOST_OBJECTS:
        name, value, level = waiting.popleft()
        if issubclass(type(value), _PLAIN) or id(value) in found or name.startswith("__"):
            continue
        found[id(value)] = name, value
        if level < _MOST_LEVELS:
            waiting.extend((inner, each, level + 1) for inner, each in _items_of(name, value))
    return list(found.values())


def _items_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """What an object holds: items of plain containers, attributes of others."""
    if type(value) in (list, tuple):
        return [(f"{name}[{index}]", each) for index, each in enumerate(value[:_MOST_ITEMS])]
    if type(value) is dict:
        return [(f"{name}[{key!r}]", each) for key, each in islice(value.items(), _MOST_ITEMS)]
    if issubclass(type(value), nn.Module) and not hasattr(value, "module"):
        return []  # its children are its own
    try:
        attributes = object.__getattribute__(value, "__dict__")  # whatever a proxy would do when it is asked
    except AttributeError:
        return []
    return [(f"{name}.{key}", each) for key, each in islice(attributes.items(), _MOST_ITEMS)]
