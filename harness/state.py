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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness.checkpoint import commit
from harness.data import Cursor
from harness.errors import Mismatch


@dataclass
class Progress:
    """How far a run is: what a checkpoint's manifest says about it."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    last: dict[str, float] = field(default_factory=dict)  # the newest metrics, the training loss among them
    best: dict[str, float] = field(default_factory=dict)  # the metrics and the step of the best evaluation


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
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "last": self.progress.last,
                "best": self.progress.best,
            },
        }

    def restore(self, parts: Mapping[str, Mapping[str, Any]], step: int, cursor: Cursor) -> None:
        """Puts the parts of a checkpoint into the live objects. Raises ``Mismatch`` before it touches any of them."""
        training = parts["training"]
        check_model(self.model, parts["model"])
        state = check_optimizer(self.optimizer, self.model, parts["optimizer"])
        if (training["scheduler"] is None) != (self.scheduler is None):
            saved, live = ("none", "one") if self.scheduler else ("one", "none")
            raise Mismatch(f"scheduler: the checkpoint has {saved}, the task has {live}")
        if bool(training["scaler"]) != self.scaler.is_enabled():
            raise Mismatch("train.precision: one of the checkpoint and the configuration has a gradient scaler for fp16")
        restore_model(self.model, parts["model"])
        restore_optimizer(self.optimizer, state)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(dict(training["scheduler"]))
        if training["scaler"]:
            self.scaler.load_state_dict(dict(training["scaler"]))
        self.progress = Progress(step, cursor, dict(training["last"]), dict(training["best"]))

    def digests(self) -> dict[str, Any]:
        """What must be the same on all ranks before they train together."""
        parts = self.capture()
        states = {name: commit.digest_of(parts[name], name) for name in ("model", "optimizer")}
        return {"step": self.progress.step, **asdict(self.progress.cursor), **states}


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


def _prefixes(module: nn.Module, raw: str = "", plain: str = "") -> Iterator[tuple[str, str]]:
    """For every module in the tree: the prefix of its entries in torch's ``state_dict()``, and in ours."""
    inner = _wrapped(module)
    yield raw, plain
    for name, child in module._modules.items():
        if child is not None:
            yield from _prefixes(child, f"{raw}{name}.", plain if name == inner else f"{plain}{name}.")


def _plain_names(module: nn.Module) -> dict[str, str]:
    """torch's names of the entries of ``state_dict()`` and of the parameters → plain names."""
    prefixes = dict(_prefixes(module))
    names = [*module.state_dict(), *(name for name, _ in module.named_parameters(remove_duplicate=False))]
    plain = {}
    for name in names:
        prefix = name[: name.rfind(".") + 1]
        plain[name] = prefixes.get(prefix, prefix) + name.removeprefix(prefix)
    return plain


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's ``state_dict()`` under plain names."""
    model = unwrap(model)
    plain = _plain_names(model)
    return {plain[name]: value for name, value in model.state_dict().items()}


def check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises ``Mismatch`` with every name, shape and dtype that differs between a model and a saved state."""
    live = model_state(model)
    lines = [f"{name}: not in the checkpoint; the model has {_kind(live[name])}" for name in live if name not in saved]
    lines += [f"{name}: not in the model; the checkpoint has {_kind(saved[name])}" for name in saved if name not in live]
    lines += [
        f"{name}: the checkpoint has {_kind(saved[name])}, the model has {_kind(live[name])}"
        for name in live
        if name in saved and _kind(saved[name]) != _kind(live[name])
    ]
    if lines:
        raise Mismatch(_listed("the checkpoint does not fit the model", lines))


def restore_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Copies a saved state that fits into the model, each tensor to where the model's own is."""
    model = unwrap(model)
    plain = _plain_names(model)
    model.load_state_dict({name: saved[plain[name]] for name in model.state_dict()}, strict=True)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "extra state"


def _listed(what: str, lines: list[str], limit: int = 20) -> str:
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([f"{what} ({len(lines)} differences)", *lines[:limit], *more])


# --- the optimizer ---------------------------------------------------------------------------------------------------


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order of its own numbering."""
    plain = _plain_names(model)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), plain[name])
    return [
        names.get(id(parameter), f"group {group_index}, parameter {index}")  # not one of this model's
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    ]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's ``state_dict()`` with the names of the parameters in place of their numbers."""
    names = _parameter_names(optimizer, unwrap(model))
    state = optimizer.state_dict()
    # Some optimizers (LBFGS) file state that is not a parameter's under other keys than numbers.
    named = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": named, "param_groups": groups}


def check_optimizer(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as ``optimizer.load_state_dict`` takes it. Raises ``Mismatch`` where the two do not fit."""
    live = optimizer_state(optimizer, unwrap(model))
    lines = []
    if len(saved["param_groups"]) != len(live["param_groups"]):
        counts = f"the checkpoint has {len(saved['param_groups'])}, the optimizer has {len(live['param_groups'])}"
        lines.append(f"parameter groups: {counts}")
    for index, (old, new) in enumerate(zip(saved["param_groups"], live["param_groups"], strict=False)):
        for name in sorted({*old["params"]} ^ {*new["params"]}):
            lines.append(f"group {index}: {name} is only in the {'checkpoint' if name in old['params'] else 'optimizer'}")
        for key in sorted(old.keys() ^ new.keys()):
            lines.append(f"group {index}: option {key!r} is only in the {'checkpoint' if key in old else 'optimizer'}")
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

    ``Optimizer.load_state_dict`` casts floating-point state to the parameter's dtype; fp32 moments of bf16 parameters
    would lose half their bits. What it cast is put back as it was saved.
    """
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        live = optimizer.state[parameters[number] if isinstance(number, int) else number]
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, torch.Tensor) and live[key].dtype != value.dtype:
                live[key] = value.to(live[key].device)


# --- random states ---------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators: Python's, NumPy's, torch's, and the device's own."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # the one that user code draws from
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets this process's generators. Done last: everything else that is restored may draw from them."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
