"""Capture and restore: modules, optimizers, schedulers, whatever else has a state, random states, progress.

Names are the plain module's. DDP wraps a model as ``module``, ``torch.compile`` as ``_orig_mod``, at the top or around any
child; those steps are left out by looking at the wrappers, never by cutting strings: a model may own a child that is
really called ``module``. Optimizer state is filed under the names of the parameters, not under their numbers, so that it
cannot be given to the wrong one.

Restoring checks everything first and touches the live objects last. It is strict both ways: what the checkpoint has must be
consumed, and what is live must be filled.
"""

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from harness.buckets import GradientOrder
from harness.checkpoint import commit, tree
from harness.checkpoint.collector import without_collections
from harness.checkpoint.format import check_part_name
from harness.errors import ConfigError, Mismatch, Unsupported


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
            raise Mismatch(_listed("the checkpoint does not fit the run's state", lines))
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
    never stopped drew none. So it gets a generator of its own to draw from.
    """

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = True
        live.generator = live.generator or torch.Generator().manual_seed(torch.initial_seed())
        if getattr(live.sampler, "generator", live.generator) is None:
            live.sampler.generator = live.generator


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


# --- the model -------------------------------------------------------------------------------------------------------


def unwrap(module: nn.Module) -> nn.Module:
    """The plain module within DDP, DataParallel and ``torch.compile``."""
    while inner := _wrapped(module):
        module = getattr(module, inner)
    return module


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps the module that it wraps; None for a module that is no wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    # Only a program that has compiled something has imported this, and importing it takes seconds.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def _prefixes(module: nn.Module, raw: str = "", plain: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Every module in the tree, with the prefix of its entries in torch's ``state_dict()``, and in ours."""
    inner = _wrapped(module)
    yield module, raw, plain
    for name, child in module._modules.items():
        if child is not None:
            yield from _prefixes(child, f"{raw}{name}.", plain if name == inner else f"{plain}{name}.")


def _plain_names(module: nn.Module, state: Iterable[str] = ()) -> dict[str, str]:
    """torch's names of the parameters and of the entries of a ``state_dict()`` → plain names."""
    prefixes = {raw: plain for _, raw, plain in _prefixes(module)}
    names: dict[str, str] = {}  # plain → torch's
    for name in dict.fromkeys([*state, *(name for name, _ in module.named_parameters(remove_duplicate=False))]):
        prefix = name[: name.rfind(".") + 1]
        while prefix not in prefixes:  # a module may write entries with dots of its own
            prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
        plain = prefixes[prefix] + name.removeprefix(prefix)
        if (first := names.setdefault(plain, name)) != name:
            raise Unsupported(f"model/{plain}: without the wrappers this is both {first} and {name}; rename one of them")
    return {name: plain for plain, name in names.items()}


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's ``state_dict()`` under plain names. Raises ``Unsupported`` for what could be saved and not be loaded."""
    model = unwrap(model)
    state = model.state_dict()
    plain = _plain_names(model, state)
    for name, value in state.items():
        if _is_expanded(value) and not _is_extra(name):
            raise Unsupported(
                f"model/{plain[name]}: nothing can be loaded into an expanded tensor; register a clone() of it"
            )
    return {plain[name]: value for name, value in state.items()}


def module_versions(model: nn.Module) -> dict[str, int | None]:
    """The versions of the modules, but for those that have torch's default, 1. Modules load older states by them."""
    return {plain: module._version for module, _, plain in _prefixes(unwrap(model)) if module._version != 1}


def check_model(model: nn.Module, saved: Mapping[str, Any], what: str = "model") -> None:
    """Raises ``Mismatch`` with every name, shape and dtype that differs between a model and a saved state."""
    live = model_state(model)
    old = {name: _kind(name, value) for name, value in saved.items()}
    new = {name: _kind(name, value) for name, value in live.items()}
    lines = [f"{name}: not in the checkpoint; the {what} has {new[name]}" for name in new if name not in old]
    lines += [f"{name}: not in the {what}; the checkpoint has {old[name]}" for name in old if name not in new]
    lines += [
        f"{name}: the checkpoint has {old[name]}, the {what} has {new[name]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if not lines:  # the model can hold one of two values that it ties, and would lose the other
        lines = [
            f"{name}: one tensor with {first} in the {what}, two different ones in the checkpoint"
            for first, name in _ties(live)
            if not _same_bytes(saved[first], saved[name])
        ]
    if lines:
        raise Mismatch(_listed(f"the checkpoint does not fit the {what}", lines))


def restore_model(model: nn.Module, saved: Mapping[str, Any], versions: Mapping[str, int | None] | None = None) -> None:
    """Copies a saved state that fits into the model, each tensor to where the model's own is.

    ``versions`` are the modules' as ``module_versions`` gave them; None where nobody knows.
    """
    model = unwrap(model)
    names = list(model.state_dict())
    plain = _plain_names(model, names)
    state = OrderedDict((name, saved[plain[name]]) for name in names)
    if versions is not None:  # without them, modules that have changed since take the state for one of their oldest version
        metadata = {raw.removesuffix("."): {"version": versions.get(plain, 1)} for _, raw, plain in _prefixes(model)}
        state._metadata = metadata  # type: ignore[attr-defined]  # where torch keeps it
    model.load_state_dict(state, strict=True)


def _is_extra(name: str) -> bool:
    """Whether this is what a module's ``get_extra_state()`` returned, shape and all its own affair."""
    return name.rpartition(".")[2] == "_extra_state"


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor with memory and strides."""
    has_strides = isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value) and value.layout is torch.strided
    return has_strides and value.device.type != "meta"


def _is_expanded(value: Any) -> bool:
    return _is_dense(value) and any(
        size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )


def _kind(name: str, value: Any) -> str:
    if not isinstance(value, torch.Tensor) or _is_extra(name):
        return "extra state"
    if nn.parameter.is_lazy(value):
        return "an uninitialized parameter (run the model once before it is trained)"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _ties(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each name whose tensor is the same memory as an earlier one's, after that one."""
    firsts: dict[Any, str] = {}
    for name, value in state.items():
        if _is_dense(value):
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if (first := firsts.setdefault(place, name)) != name:
                yield first, name


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = zip(tree.raw_bytes(one), tree.raw_bytes(other), strict=True)
    return one is other or all(left == right for left, right in pairs)


def _listed(what: str, lines: list[str], limit: int = 20) -> str:
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([f"{what} ({len(lines)} differences)", *lines[:limit], *more])


# --- the optimizer ---------------------------------------------------------------------------------------------------


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order of its own numbering.

    Raises ``Unsupported`` for a parameter that is not the model's: its value would not be in the checkpoint.
    """
    plain = _plain_names(model)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Of a tied parameter's names the first in the alphabet: the order of the modules may change.
        names[id(parameter)] = min(plain[name], names.get(id(parameter), plain[name]))
    found = []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                where = f"optimizer: parameter {index} of group {group_index} ({_kind('', parameter)})"
                raise Unsupported(f"{where} is not one of the model's, so that its value would be lost; make it one")
            found.append(names[id(parameter)])
    return found


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's class and ``state_dict()``, with the names of the parameters in place of their numbers."""
    names = _parameter_names(optimizer, unwrap(model))
    state = optimizer.state_dict()
    # Optimizers may file state that is no parameter's under keys of their own.
    named = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    if len(named) != len(state["state"]):
        own = sorted(key for key in state["state"] if key in names)
        raise Unsupported(f"optimizer/state: {', '.join(own)} are names of parameters and keys of the optimizer's own state")
    groups = [_named_group(group, names) for group in state["param_groups"]]
    return {**state, "class": type(optimizer).__name__, "state": named, "param_groups": groups}


def _named_group(group: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A group with names for numbers. torch's own ``param_names`` say the same, in the words of the wrappers."""
    options = {key: value for key, value in group.items() if key != "param_names"}
    return {**options, "params": [names[number] for number in group["params"]]}


def check_optimizer(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as ``optimizer.load_state_dict`` takes it. Raises ``Mismatch`` where the two do not fit."""
    live = optimizer_state(optimizer, unwrap(model))
    lines = []
    if saved["class"] != live["class"]:  # AdamW would take Adam's state in silence
        lines.append(f"class: the checkpoint has {saved['class']}, the task has {live['class']}")
    if len(saved["param_groups"]) != len(live["param_groups"]):
        counts = f"the checkpoint has {len(saved['param_groups'])}, the optimizer has {len(live['param_groups'])}"
        lines.append(f"parameter groups: {counts}")
    for index, (old, new) in enumerate(zip(saved["param_groups"], live["param_groups"], strict=False)):
        for what, in_old, in_new in (("", old["params"], new["params"]), ("option ", old, new)):
            for key in sorted({*in_old} ^ {*in_new}):
                lines += [f"group {index}: {what}{key} is only in the {'checkpoint' if key in in_old else 'optimizer'}"]
    if lines:
        raise Mismatch(_listed(f"the checkpoint does not fit the optimizer {type(optimizer).__name__}", lines))
    names = _parameter_names(optimizer, unwrap(model))
    numbers = {name: number for number, name in enumerate(names)}
    # The order of the parameters within a group may have changed; each state follows its name.
    ordered = [{**old, "params": [numbers[name] for name in new["params"]]} for old, new in _pairs(saved, live)]
    state = {numbers.get(key, key): value for key, value in saved["state"].items()}
    return {**saved, "state": state, "param_groups": ordered}


def _pairs(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    return zip(saved["param_groups"], live["param_groups"], strict=True)


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state as ``check_optimizer`` returns it, bit for bit.

    ``Optimizer.load_state_dict`` puts the state where it belongs and casts it: floating-point tensors to the parameter's
    dtype (fp32 moments of bf16 parameters would lose half their bits), strings to ``<generator object …>``. What it has
    changed is put back as it was saved.
    """
    before = optimizer.param_groups
    optimizer.load_state_dict({**state, "state": {key: _castable(values) for key, values in state["state"].items()}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, values in state["state"].items():
        place = parameters[key] if isinstance(key, int) else key
        optimizer.state[place] = _as_saved(values, optimizer.state[place])
    for old, group in zip(before, optimizer.param_groups, strict=True):
        for option, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(old.get(option), torch.Tensor):
                group[option] = value.to(old[option].device)


def _castable(value: Any) -> Any:
    """A value without NumPy's arrays, at which ``load_state_dict`` fails: it calls the type of every iterable anew."""
    if isinstance(value, dict):
        return {key: _castable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_castable(item) for item in value)
    return None if isinstance(value, np.ndarray) else value


def _as_saved(saved: Any, live: Any) -> Any:
    """A saved value, its tensors where those of the live value are.

    What an optimizer's own ``load_state_dict`` or ``__setstate__`` has added, or made a tensor of, stands.
    """
    if isinstance(saved, torch.Tensor):
        return live if live.dtype == saved.dtype else saved.to(live.device)
    if type(saved) is dict:
        return {**live, **{key: _as_saved(item, live[key]) for key, item in saved.items() if key in live}}
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(*items) for items in zip(saved, live, strict=True))
    return live if isinstance(live, torch.Tensor) else saved


# --- the scheduler ---------------------------------------------------------------------------------------------------


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """The scheduler's ``state_dict()`` and what kind it is.

    Functions (of ``LambdaLR``, of ``CyclicLR``) are code, and torch leaves them out; the attributes of callable objects are
    state.
    """
    return {"class": _class_of(scheduler), "state": scheduler.state_dict()}


def check_scheduler(scheduler: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Raises ``Mismatch`` for a state of another kind of scheduler, which ``load_state_dict`` would take in silence."""
    if saved["class"] != (live := _class_of(scheduler)):
        raise Mismatch(f"scheduler: the checkpoint has {saved['class']}, the task has {live}")


def _class_of(scheduler: LRScheduler) -> str:
    """``StepLR``, or ``SequentialLR(LinearLR, StepLR)``."""
    inner = ", ".join(_class_of(each) for each in getattr(scheduler, "_schedulers", ()))
    return f"{type(scheduler).__name__}({inner})" if inner else type(scheduler).__name__


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
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
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
