"""Capture and restore: model, optimizer, scheduler, scaler, random states, progress.

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
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness.checkpoint import commit, tree
from harness.data import Cursor
from harness.errors import Mismatch, Unsupported


@dataclass
class Progress:
    """How far a run is: what a checkpoint's manifest says about it."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    last: dict[str, float] = field(default_factory=dict)  # the newest metrics, the training loss among them
    best: dict[str, float] = field(default_factory=dict)  # the metrics and the step of the best evaluation
    passed_over: list[Cursor] = field(default_factory=list)  # where the batches begin that were not trained: see nonfinite


@dataclass
class TrainingState:
    """Everything that a step changes."""

    model: nn.Module  # the plain one
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def capture(self) -> dict[str, dict[str, Any]]:
        """The parts of a checkpoint, without the ranks' random states. Tensors are the live ones, not copies."""
        return {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.optimizer, self.model),
            "training": {
                "scheduler": scheduler_state(self.scheduler),
                "scaler": self.scaler.state_dict(),
                "module_versions": module_versions(self.model),
                "last": self.progress.last,
                "best": self.progress.best,
            },
        }

    def restore(self, parts: Mapping[str, Mapping[str, Any]], step: int, cursor: Cursor) -> None:
        """Puts the parts of a checkpoint into the live objects. Raises ``Mismatch`` before it touches any of them."""
        training = parts["training"]
        check_model(self.model, parts["model"])
        check_scheduler(self.scheduler, training["scheduler"])  # before the options that it adds to the optimizer's
        state = check_optimizer(self.optimizer, self.model, parts["optimizer"])
        if bool(training["scaler"]) != self.scaler.is_enabled():
            raise Mismatch("train.precision: one of the checkpoint and the configuration has a gradient scaler for fp16")
        restore_model(self.model, sent(parts["model"], self.device), training["module_versions"])
        restore_optimizer(self.optimizer, {**state, "state": sent(state["state"], self.device)})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(dict(training["scheduler"]["state"]))
        if training["scaler"]:
            self.scaler.load_state_dict(dict(training["scaler"]))
        self.progress = Progress(step, cursor, dict(training["last"]), dict(training["best"]))

    def is_steady(self) -> Callable[[torch.Tensor], bool]:
        """Tells the tensors that nothing changes but the optimizer's step: its parameters, and its own state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        places = {tensor.data_ptr() for tensor in tensors_in([parameters, *self.optimizer.state.values()])}
        return lambda tensor: tensor.data_ptr() in places

    def digests(self) -> dict[str, Any]:
        """What must be the same on all ranks before they train together."""
        parts = self.capture()
        states = {name: commit.digest_of(parts[name], name) for name in ("model", "optimizer")}
        return {"step": self.progress.step, **asdict(self.progress.cursor), **states}


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


def check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises ``Mismatch`` with every name, shape and dtype that differs between a model and a saved state."""
    live = model_state(model)
    old = {name: _kind(name, value) for name, value in saved.items()}
    new = {name: _kind(name, value) for name, value in live.items()}
    lines = [f"{name}: not in the checkpoint; the model has {new[name]}" for name in new if name not in old]
    lines += [f"{name}: not in the model; the checkpoint has {old[name]}" for name in old if name not in new]
    lines += [
        f"{name}: the checkpoint has {old[name]}, the model has {new[name]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if not lines:  # the model can hold one of two values that it ties, and would lose the other
        lines = [
            f"{name}: one tensor with {first} in the model, two different ones in the checkpoint"
            for first, name in _ties(live)
            if not _same_bytes(saved[first], saved[name])
        ]
    if lines:
        raise Mismatch(_listed("the checkpoint does not fit the model", lines))


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


def scheduler_state(scheduler: LRScheduler | None) -> dict[str, Any] | None:
    """The scheduler's ``state_dict()`` and what kind it is.

    Functions (of ``LambdaLR``, of ``CyclicLR``) are code, and torch leaves them out; the attributes of callable objects are
    state.
    """
    return None if scheduler is None else {"class": _class_of(scheduler), "state": scheduler.state_dict()}


def check_scheduler(scheduler: LRScheduler | None, saved: Mapping[str, Any] | None) -> None:
    """Raises ``Mismatch`` for a state of another kind of scheduler, which ``load_state_dict`` would take in silence."""
    old = "none" if saved is None else saved["class"]
    new = "none" if scheduler is None else _class_of(scheduler)
    if old != new:
        raise Mismatch(f"scheduler: the checkpoint has {old}, the task has {new}")


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
