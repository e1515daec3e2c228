"""The states of optimizers and of learning rate schedulers, and back into live ones.

Optimizer state is filed under the names of the parameters, not under their numbers, so that it cannot be given to the wrong
one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness.errors import Mismatch, Unsupported
from harness.modules import kind_of, listed, plain_names, unwrap


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order of its own numbering.

    Raises ``Unsupported`` for a parameter that is not the model's: its value would not be in the checkpoint.
    """
    plain = plain_names(model)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Of a tied parameter's names the first in the alphabet: the order of the modules may change.
        names[id(parameter)] = min(plain[name], names.get(id(parameter), plain[name]))
    found = []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                where = f"optimizer: parameter {index} of group {group_index} ({kind_of('', parameter)})"
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
        raise Mismatch(listed(f"the checkpoint does not fit the optimizer {type(optimizer).__name__}", lines))
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


# --- optimizers within others ----------------------------------------------------------------------------------------


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer within a wrapper that has no state of its own, as Accelerate's; anything else as it is."""
    while isinstance(within := getattr(optimizer, "optimizer", None), Optimizer) and not isinstance(optimizer, LRScheduler):
        has_own_state = getattr(optimizer, "state", None) is not within.state
        if has_own_state or optimizer.state_dict().keys() != within.state_dict().keys():
            break  # it remembers more than the one within: Lookahead's slow weights, say
        optimizer = within
    return optimizer


def with_step_hooks(optimizer: Any) -> Iterator[Optimizer]:
    """Those of an optimizer, and of the optimizers within it, whose ``step`` calls hooks."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False):
        yield optimizer
    for each in vars(optimizer).values():
        if isinstance(each, Optimizer):
            yield from with_step_hooks(each)
