"""Capture and restore: modules, optimizers, schedulers, whatever else has a state, random states, progress.

Restoring checks everything first and touches the live objects last. It is strict both ways: what the checkpoint has must be
consumed, and what is live must be filled.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from harness.buckets import GradientOrder
from harness.checkpoint import commit
from harness.checkpoint.collector import without_collections
from harness.checkpoint.format import check_part_name
from harness.data import Loader
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.loaders import Epochs
from harness.modules import check_model, listed, model_state, module_versions, restore_model, unwrap
from harness.optimizers import (
    check_optimizer,
    check_scheduler,
    optimizer_state,
    restore_optimizer,
    scheduler_state,
)


@dataclass
class Progress:
    """How far a run is: what a checkpoint's manifest says about it."""

    step: int = 0  # optimizer steps: the global step
    epoch: int = 0  # where no loader of ours counts them
    last: dict[str, float] = field(default_factory=dict)  # the newest metrics, the training loss among them
    best: dict[str, float] = field(default_factory=dict)  # the metrics and the step of the best evaluation


class State:
    """Everything that a step changes: objects by name, each of which is a part of a checkpoint under that name.

    Modules, optimizers and schedulers are known, and checked against what is saved, name by name and shape by shape.
    Anything else needs ``state_dict`` and ``load_state_dict``; where it has ``check_state_dict``, too, that is called
    before anything is touched, and may raise ``Mismatch``. An object whose state differs between the ranks says so by
    ``per_rank = True``; torch's ``DataLoader`` is taken for one (torchdata's ``StatefulDataLoader`` has a state). Two
    further parts are made here: ``training`` has the versions of the modules, the order of DDP's gradients and the progress,
    ``random`` each rank's generators.

    Raises ``ConfigError`` for an object that has no state, ``Unsupported`` for an optimizer of foreign parameters.
    """

    def __init__(self, objects: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.progress = Progress()
        self.modules = {name: each for name, each in objects.items() if isinstance(each, nn.Module)}
        self.optimizers = {name: each for name, each in objects.items() if isinstance(each, Optimizer)}
        self.gradients = {
            name: GradientOrder(each)
            for name, module in self.modules.items()
            for each in module.modules()
            if isinstance(each, nn.parallel.DistributedDataParallel)
        }
        self._parts = {name: self._part(name, each) for name, each in objects.items()}

    def _part(self, name: str, each: Any) -> "_Part":
        check_part_name(name)
        if name in (TRAINING, RANDOM):
            raise ConfigError(f"state: {name!r} is the name of a part that harness writes; choose another one")
        if isinstance(each, nn.Module):
            return _Module(name, each, self.device)
        if isinstance(each, Optimizer):
            return _Optimizer(name, each, self._owner(name, each), self.device)
        if isinstance(each, LRScheduler):
            return _Scheduler(name, each)
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            advice = "; harness.Loader and torchdata's StatefulDataLoader have one" if isinstance(each, DataLoader) else ""
            raise ConfigError(f"state: {name} ({type(each).__name__}) has no state_dict and load_state_dict{advice}")
        if isinstance(each, torch.amp.GradScaler):
            return _Scaler(name, each)
        return _DataLoader(name, each) if isinstance(each, DataLoader) else _Other(name, each)

    def _owner(self, name: str, optimizer: Optimizer) -> nn.Module:
        """The module whose parameters an optimizer has; of several, all of them as children of one."""
        wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        having = {
            key: unwrap(module)
            for key, module in self.modules.items()
            if any(id(parameter) in wanted for parameter in module.parameters())
        }
        for module in having.values():
            if wanted <= {id(parameter) for parameter in module.parameters()}:
                return module
        if not having:
            raise Unsupported(f"{name}: none of its parameters is one of a module in the state; put its model there, too")
        return nn.ModuleDict(having)

    def without_scheduler(self) -> list[str]:
        """The names of those optimizers whose learning rate is a scheduler's that no object of the state is, or has.

        torch's schedulers, and those of others that follow them, note the rate that they begin with in the optimizer.
        """
        others = [part.live for part in self._parts.values() if not isinstance(part.live, nn.Module | Optimizer)]
        held = [each for other in others for each in (other, *_attributes(other).values())]
        scheduled = {id(_attributes(each).get("optimizer")) for each in held}
        return [
            name
            for name, optimizer in self.optimizers.items()
            if id(optimizer) not in scheduled and any("initial_lr" in group for group in optimizer.param_groups)
        ]

    # --- saving ---

    def capture(self) -> dict[str, dict[str, Any]]:
        """The parts that are the same on every rank. Tensors are the live ones, not copies."""
        return {**self._captured(per_rank=False), TRAINING: self._training()}

    def capture_rank(self) -> dict[str, Any]:
        """What is this rank's own: the states of its generators, and of the objects that differ between ranks."""
        return {RANDOM: random_state(self.device), **self._captured(per_rank=True)}

    @without_collections()
    def _captured(self, *, per_rank: bool) -> dict[str, dict[str, Any]]:
        return {name: part.capture() for name, part in self._parts.items() if part.per_rank == per_rank}

    def _training(self) -> dict[str, Any]:
        return {
            "module_versions": {name: module_versions(module) for name, module in self.modules.items()},
            "gradient_order": {name: gradients.order for name, gradients in self.gradients.items()},
            "epoch": self.progress.epoch,
            "last": self.progress.last,
            "best": self.progress.best,
        }

    @property
    def loaders(self) -> list[Any]:
        """The objects of the state that are known to keep a position in data."""
        return [part.live for part in self._parts.values() if isinstance(part.live, Loader | DataLoader)]

    @property
    def may_have_position(self) -> bool:
        """Whether there is an object of the program's own, which may keep one."""
        return any(type(part) is _Other for part in self._parts.values())

    def agree(self, all_gather: Callable[[Any], list[Any]]) -> None:
        """Raises ``ConfigError`` where the data sets of the ranks' loaders are not the same. All ranks call it."""
        for loader in self.loaders:
            if isinstance(loader, Loader):
                loader.agree(all_gather)

    def is_steady(self) -> Callable[[torch.Tensor], bool]:
        """Tells the tensors that nothing changes but an optimizer's step: its parameters, and its own state."""
        places = set()
        for optimizer in self.optimizers.values():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            places |= {tensor.data_ptr() for tensor in tensors_in([parameters, *optimizer.state.values()])}
        return lambda tensor: tensor.data_ptr() in places

    def digests(self) -> dict[str, Any]:
        """What must be the same on all ranks before they train together."""
        parts = self._captured(per_rank=False)
        return {"step": self.progress.step, **{name: commit.digest_of(part, name) for name, part in parts.items()}}

    # --- restoring ---

    def restore(self, parts: Mapping[str, Mapping[str, Any]], step: int, rank: int = 0) -> None:
        """Puts the parts of a checkpoint into the live objects. Raises ``Mismatch`` before it touches any of them.

        The generators are not touched: see ``restore_random_state``.
        """
        saved = {name: part for name, part in parts.items() if name not in (TRAINING, RANDOM)}
        lines = [
            f"{name}: not in the checkpoint; the run has {part}" for name, part in self._parts.items() if name not in saved
        ]
        lines += [f"{name}: not in the run; the checkpoint has it" for name in saved if name not in self._parts]
        if lines:
            raise Mismatch(listed("the checkpoint does not fit the run's state", lines))
        for name, part in self._parts.items():
            if part.per_rank and str(rank) not in saved[name]:
                count = f"the checkpoint has it for {len(saved[name])} ranks, and none for rank {rank}"
                raise Mismatch(f"{name}: its state is each rank's own; {count}; start with as many ranks as before")
        own = {name: saved[name][str(rank)] if part.per_rank else saved[name] for name, part in self._parts.items()}
        training = parts[TRAINING]
        # Schedulers before optimizers, to whose options they add; modules first, whose differences explain the others.
        checked = {}
        for part in sorted(self._parts.values(), key=lambda part: part.checked):
            checked[part.name] = part.check(own[part.name])
        for part in sorted(self._parts.values(), key=lambda part: part.restored):
            part.restore(checked[part.name], training)
        for name, gradients in self.gradients.items():
            gradients.settle(list(training["gradient_order"].get(name, [])))
        self.progress = Progress(step, int(training["epoch"]), dict(training["last"]), dict(training["best"]))


TRAINING, RANDOM = "training", "random"


class _Part:
    """An object of the state. ``checked`` and ``restored`` order the parts."""

    checked = restored = 3
    per_rank = False

    def __init__(self, name: str, live: Any) -> None:
        self.name = name
        self.live = live

    def __str__(self) -> str:
        return type(self.live).__name__

    def capture(self) -> dict[str, Any]:
        raise NotImplementedError

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The saved state as ``restore`` takes it. Raises ``Mismatch`` where it does not fit; touches nothing."""
        raise NotImplementedError

    def restore(self, saved: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Puts in a saved state that was checked."""
        raise NotImplementedError


class _Module(_Part):
    checked = restored = 0

    def __init__(self, name: str, live: nn.Module, device: torch.device) -> None:
        super().__init__(name, live)
        self.device = device

    def capture(self) -> dict[str, Any]:
        return model_state(self.live)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        check_model(self.live, saved, self.name)
        return saved

    def restore(self, saved: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        restore_model(self.live, sent(saved, self.device), training["module_versions"].get(self.name))


class _Optimizer(_Part):
    checked, restored = 2, 1

    def __init__(self, name: str, live: Optimizer, owner: nn.Module, device: torch.device) -> None:
        super().__init__(name, live)
        self.owner = owner
        self.device = device

    def capture(self) -> dict[str, Any]:
        return optimizer_state(self.live, self.owner)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        return check_optimizer(self.live, self.owner, saved)

    def restore(self, saved: Mapping[str, Any], _training: Mapping[str, Any]) -> None:
        restore_optimizer(self.live, {**saved, "state": sent(saved["state"], self.device)})


class _Scheduler(_Part):
    checked, restored = 1, 2

    def capture(self) -> dict[str, Any]:
        return scheduler_state(self.live)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        check_scheduler(self.live, saved)
        return saved

    def restore(self, saved: Mapping[str, Any], _training: Mapping[str, Any]) -> None:
        self.live.load_state_dict(dict(saved["state"]))


class _Other(_Part):
    """Anything that has ``state_dict`` and ``load_state_dict``."""

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = bool(getattr(live, "per_rank", False))

    def capture(self) -> dict[str, Any]:
        return {"state": self.live.state_dict()}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if hasattr(self.live, "check_state_dict"):
            self.live.check_state_dict(saved["state"])
        return saved

    def restore(self, saved: Mapping[str, Any], _training: Mapping[str, Any]) -> None:
        self.live.load_state_dict(saved["state"])


class _Scaler(_Other):
    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if bool(saved["state"]) != self.live.is_enabled():
            raise Mismatch(
                f"{self.name}: one of the checkpoint and the run has a gradient scaler that is enabled (train.precision)"
            )
        return saved

    def restore(self, saved: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        if saved["state"]:  # one that is not enabled takes no state
            super().restore(saved, training)


class _DataLoader(_Other):
    """A loader of torch's kind with a state, each rank its own.

    An iterator of it draws a number when it is made: after a resume that is in the middle of an epoch, where the run that
    never stopped drew none. So it gets a generator of its own to draw from, which is saved with those of its samplers.
    """

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = True
        self.epochs = Epochs(name, live)

    def capture(self) -> dict[str, Any]:
        return {**super().capture(), "generators": self.epochs.state_dict()}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if "generators" in saved:  # which earlier checkpoints do not have
            self.epochs.check_state_dict(saved["generators"])
        return super().check(saved)

    def restore(self, saved: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        if "generators" in saved:
            self.epochs.load_state_dict(saved["generators"])
        super().restore(saved, training)


def _attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that has a dictionary of them."""
    return getattr(value, "__dict__", {})


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors within lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


# --- to the device ---------------------------------------------------------------------------------------------------

_LARGE_BYTES = 1 << 20  # smaller tensors go where torch puts them, if anywhere: an optimizer's count of steps stays here
_STAGE_BYTES = 16 << 20


def sent(value: Any, device: torch.device) -> Any:
    """A value with its large tensors on a CUDA device. On the CPU they are left where they are."""
    return value if device.type != "cuda" else _sent(value, _Stage(device))


def _sent(value: Any, stage: "_Stage") -> Any:
    if isinstance(value, dict):
        return {key: _sent(item, stage) for key, item in value.items()}
    is_large = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes >= _LARGE_BYTES
    return stage.send(value) if is_large else value


class _Stage:
    """Two pieces of pinned memory: one is filled while the other travels. What is not pinned travels at half the speed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.halves = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.arrived = [torch.cuda.Event() for _ in self.halves]  # type: ignore[no-untyped-call]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        pieces = (torch.split(each.view(-1).view(torch.uint8), _STAGE_BYTES) for each in (tensor, target))
        for number, (here, there) in enumerate(zip(*pieces, strict=True)):
            half, arrived = self.halves[number % 2][: len(here)], self.arrived[number % 2]
            arrived.synchronize()  # at once, where nothing is on its way
            half.copy_(here)
            there.copy_(half, non_blocking=True)
            arrived.record()
        return target


# --- random states ---------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators: Python's, NumPy's, torch's, and the device's own."""
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": torch.from_numpy(np.array(words, dtype=np.int64)), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  # the one that user code draws from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets this process's generators. Done last: everything else that is restored may draw from them."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
