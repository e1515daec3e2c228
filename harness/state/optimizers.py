"""The states of optimizers and of learning rate schedulers, and back into live ones.

Optimizer state is filed under the names of the parameters, not under their numbers, so that it cannot be given to the wrong
one. An optimizer whose ``state_dict()`` has a form of its own keeps it, and goes by the order of its parameters.
"""

import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness import torch_private
from harness.checkpoint import dtensors, tree
from harness.checkpoint.format import row_major
from harness.data.nested import like, mapped, tensors_in
from harness.data.seeding import GENERATORS, set_state, state_of
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.state.modules import kind_of, listed, plain_names, unwrap

log = logging.getLogger(__name__)


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
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
                raise Unsupported(
                    f"{where} does not belong to the model, so its value would be lost; register it in the model"
                )
            found.append(names[id(parameter)])
    return found


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's class and ``state_dict()``, with the names of the parameters in place of their numbers.

    A ``state_dict()`` of another form than torch's is under ``own`` as it is, beside the names of each group's ``params``.
    Optimizers within this one whose state it leaves out are under ``inner``, by their attributes.
    """
    names = parameter_names(optimizer, unwrap(model))
    state = optimizer.state_dict()
    found: dict[str, Any] = {"class": type(optimizer).__name__}
    if inner := {name: optimizer_state(each, model) for name, each in _left_out(optimizer, state)}:
        found["inner"] = inner
    if not _has_torchs_form(state, optimizer):
        left = iter(names)
        params = [[next(left) for _ in group["params"]] for group in optimizer.param_groups]
        return {**found, "own": state, "params": params}
    # Optimizers may file state that is no parameter's under keys of their own.
    named = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    if len(named) != len(state["state"]):
        own = sorted(key for key in state["state"] if key in names)
        raise Unsupported(f"optimizer/state: {', '.join(own)} are names of parameters and keys of the optimizer's own state")
    groups = [_named_group(group, names) for group in state["param_groups"]]
    return {**state, **found, "state": named, "param_groups": groups}


def _left_out(optimizer: Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[str, Optimizer]]:
    """The attributes of an optimizer that are optimizers whose state is not in its ``state_dict()``: SAM's, for one."""
    inner = [(name, each) for name, each in vars(optimizer).items() if isinstance(each, Optimizer) and each is not optimizer]
    held = {id(tensor) for tensor in tensors_in(state)} if inner else set()
    for name, each in inner:
        values = dict(each.state)
        if values and each.state is not optimizer.state and not {id(tensor) for tensor in tensors_in(values)} <= held:
            yield name, each


def _has_torchs_form(state: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Whether a ``state_dict()`` has states by the numbers of parameters, and groups with these numbers in order."""
    groups, values = state.get("param_groups"), state.get("state")
    if not isinstance(values, Mapping) or not isinstance(groups, list):
        return False
    numbers = [number for group in groups for number in group["params"]]
    counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in optimizer.param_groups]
    return counts[0] == counts[1] and numbers == list(range(len(numbers)))


def _named_group(group: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A group with names for numbers. torch's own ``param_names`` say the same, in the words of the wrappers."""
    options = {key: value for key, value in group.items() if key != "param_names"}
    return {**options, "params": [names[number] for number in group["params"]]}


def check_sharded_state(state: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]) -> None:
    """Raises ``Unsupported`` for a state of sharded parameters that could be saved and not be loaded again."""
    if "own" in state:
        raise Unsupported(
            f"optimizer: the state_dict() of {state['class']} has a form of its own, which does not say what belongs to "
            "which sharded parameter; use an optimizer with torch's form"
        )
    for name, values in state["state"].items():
        shape = parameters[name].shape if name in parameters else None
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if dtensors.is_sharded(value) and value.shape != shape:
                what = f"a sharded tensor of shape {list(value.shape)}, which is not its parameter's"
                advice = "use an optimizer whose state has the parameters' shapes"
                raise Unsupported(f"optimizer/state/{name}/{key}: {what}; {advice}")


def check_optimizer(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as ``restore_optimizer`` takes it. Raises ``Mismatch`` where the two do not fit.

    Options of the groups need not be the same: an optimizer may make some in its first step, and a newer version has more.
    """
    live = optimizer_state(optimizer, unwrap(model))
    lines = []
    if saved["class"] != live["class"]:  # AdamW would take Adam's state in silence
        lines.append(f"class: the checkpoint has {saved['class']}, the task has {live['class']}")
    elif ("own" in saved) != ("own" in live):
        lines.append("state_dict: it had another form when the checkpoint was written")
    old_groups, new_groups = names_by_group(saved), names_by_group(live)
    if len(old_groups) != len(new_groups):
        counts = f"the checkpoint has {len(old_groups)}, the optimizer has {len(new_groups)}"
        advice = "add the groups of add_param_group before Run is made, or in Run(..., adapt=...)"
        lines.append(f"parameter groups: {counts}; {advice}")
    for index, (old, new) in enumerate(zip(old_groups, new_groups, strict=False)):
        for name in sorted({*old} ^ {*new}):
            lines += [f"group {index}: {name} is only in the {'checkpoint' if name in old else 'optimizer'}"]
    if not lines and old_groups != new_groups and (what := _where_numbers_are(saved)) is not None:
        lines.append(
            f"{what}: goes by the order of the parameters, which has changed; build them in the order of the checkpoint"
        )
    if lines:
        raise Mismatch(listed(f"the checkpoint does not fit the optimizer {type(optimizer).__name__}", lines))
    checked = {**saved, "inner": _checked_inner(optimizer, model, saved)}
    if "own" in saved:
        return checked
    names = [name for group in new_groups for name in group]
    numbers = {name: number for number, name in enumerate(names)}
    # The order of the parameters within a group may have changed; each state follows its name.
    pairs = zip(saved["param_groups"], new_groups, strict=True)
    ordered = [{**old, "params": [numbers[name] for name in new]} for old, new in pairs]
    state = {numbers.get(key, key): value for key, value in saved["state"].items()}
    return {**checked, "state": state, "param_groups": ordered}


def _checked_inner(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, each in saved.get("inner", {}).items():
        if not isinstance(inner := getattr(optimizer, name, None), Optimizer):
            where = f"{type(optimizer).__name__}.{name}"
            raise Mismatch(f"{where}: the checkpoint has the state of {each['class']}, the program has no optimizer there")
        found[name] = check_optimizer(inner, model, each)
    return found


def names_by_group(state: Mapping[str, Any]) -> list[list[str]]:
    """The names of the parameters in each group of a state as ``optimizer_state`` gives it."""
    return state["params"] if "own" in state else [group["params"] for group in state["param_groups"]]


def _where_numbers_are(saved: Mapping[str, Any]) -> str | None:
    """What of a saved state has numbers of parameters that nobody has put names for."""
    if "own" in saved:
        return "state_dict"
    names = {name for group in saved["param_groups"] for name in group["params"]}
    others = {key: value for key, value in saved["state"].items() if key not in names}
    more = {
        key: value for key, value in saved.items() if key not in ("class", "state", "param_groups", "inner", "attributes")
    }
    return next((str(key) for key, value in {**others, **more}.items() if _has_numbers(value)), None)


def _has_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(type(key) in (int, tuple) or _has_numbers(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_has_numbers, value))


def restore_optimizer(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    saved_parameters: Mapping[int, torch.Tensor] | None = None,
    keep_options: Sequence[Collection[str]] | None = None,
) -> None:
    """Loads a state as ``check_optimizer`` returns it, bit for bit.

    ``Optimizer.load_state_dict`` puts the state where it belongs and casts it: floating-point tensors to the parameter's
    dtype (fp32 moments of bf16 parameters would lose half their bits), strings to ``<generator object …>``. What it has
    changed is put back as it was saved. ``saved_parameters`` are the parameters' values in the checkpoint by the ids of the
    live ones: what lay in memory as its parameter did is to lie as that does now. ``keep_options`` are those of each group
    that are kept where the checkpoint lacks them (None: all); others have come in training, and go.
    """
    shares_groups = {
        name: each.param_groups is optimizer.param_groups
        for name, each in vars(optimizer).items()
        if isinstance(each, Optimizer)
    }
    saved = {key: value for key, value in state.items() if key not in ("class", "params", "inner", "attributes")}
    if "own" in saved:
        optimizer.load_state_dict(saved["own"])
        _warn_of_changes(optimizer, saved["own"])
    else:
        _restore(optimizer, saved, saved_parameters or {}, keep_options)
    for name, inner in _left_out(optimizer, optimizer.state_dict()):
        if name not in state.get("inner", {}):  # the checkpoint is older than its first step
            inner.state.clear()
    for name, each in state.get("inner", {}).items():
        inner = getattr(optimizer, name)
        restore_optimizer(inner, each, saved_parameters)
        if shares_groups[name]:
            inner.param_groups = optimizer.param_groups


def _restore(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    saved_parameters: Mapping[int, torch.Tensor],
    keep_options: Sequence[Collection[str]] | None,
) -> None:
    before = optimizer.param_groups
    parameters = [parameter for group in before for parameter in group["params"]]
    values = {key: _following(each, key, parameters, saved_parameters) for key, each in saved["state"].items()}
    groups = _completed(optimizer, saved["param_groups"], keep_options)
    # NumPy's arrays make load_state_dict fail, which calls the type of every iterable anew.
    castable = mapped(lambda leaf: None if isinstance(leaf, np.ndarray) else leaf, values)
    optimizer.load_state_dict({**saved, "state": castable, "param_groups": groups})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, each in values.items():
        place = parameters[key] if isinstance(key, int) else key
        optimizer.state[place] = _as_saved(each, optimizer.state[place])
    for old, group in zip(before, optimizer.param_groups, strict=True):
        for option, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(old.get(option), torch.Tensor):
                group[option] = value.to(old[option].device)
            elif isinstance(value, torch.device):  # where this rank computes is its own affair
                group[option] = old.get(option, value)
    _warn_of_changes(optimizer, {**saved, "state": values})


def saved_parameters(
    modules: Mapping[str, nn.Module], saved: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """The parameters in a checkpoint of some modules, by the ids of the live ones."""
    found: dict[int, torch.Tensor] = {}
    for key, module in modules.items():
        plain = plain_names(inner := unwrap(module))
        found |= {id(each): saved[key][plain[name]] for name, each in inner.named_parameters() if plain[name] in saved[key]}
    return found


def _completed(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], keep_options: Sequence[Collection[str]] | None
) -> list[dict[str, Any]]:
    """The saved groups, and what an older version of the optimizer had no option for."""
    found, missing = [], set[str]()
    kept = [*(keep_options or ()), *optimizer.param_groups[len(keep_options or ()) :]]
    for old, live, names in zip(groups, optimizer.param_groups, kept, strict=True):
        more = {key: live[key] for key in live if key not in old and key in names and key != "param_names"}
        missing |= more.keys()
        found.append({**more, **old})
    if missing:
        what = f"the checkpoint has no option {', '.join(sorted(missing))}"
        log.warning("%s: %s; using the value of this program", type(optimizer).__name__, what)
    return found


def _following(
    values: Any, key: Any, parameters: Sequence[torch.Tensor], saved_parameters: Mapping[int, torch.Tensor]
) -> Any:
    """A parameter's state; what lay in memory as the parameter did lies as that does now.

    An older checkpoint says nothing of strides, and has all in row-major order.
    """
    if not isinstance(key, int):
        return values
    parameter = parameters[key]
    was = saved_parameters.get(id(parameter))
    strides = row_major(parameter.shape) if was is None else was.stride()
    if parameter.stride() == strides:
        return values

    def laid(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (value.shape, value.stride()) != (parameter.shape, strides):
            return value
        if tree.is_composed(value):  # only its class knows how its parts belong to the parameter
            return value
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)

    return mapped(laid, values)


def _as_saved(saved: Any, live: Any) -> Any:
    """A saved value, its tensors where those of the live value are.

    What an optimizer's own ``load_state_dict`` or ``__setstate__`` has added, or made a tensor of, stands.
    """
    if isinstance(saved, torch.Tensor):
        is_as_saved = not isinstance(live, torch.Tensor) or live.dtype == saved.dtype
        return live if is_as_saved else saved.to(live.device)
    if type(saved) is dict:
        return {**live, **{key: _as_saved(item, live[key]) for key, item in saved.items() if key in live}}
    if isinstance(saved, list | tuple | deque):
        if not isinstance(live, list | tuple | deque) or len(live) != len(saved):
            return live
        return like(saved, (_as_saved(*items) for items in zip(saved, live, strict=True)))
    return live if isinstance(live, torch.Tensor) else saved


def _warn_of_changes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Tells what an optimizer has made something else of, when it was given its state back."""
    if changed := sorted(_changes(saved, optimizer.state_dict())):
        what = f"{', '.join(changed[:5])}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}"
        advice = "the resumed run may differ from an uninterrupted one in its last bits"
        log.warning("%s: its load_state_dict changed the saved values (%s); %s", type(optimizer).__name__, what, advice)


def _changes(saved: Any, live: Any, path: str = "") -> Iterator[str]:
    """Where two states differ, but for what only the live one has. Tensors that were taken as they are cost nothing."""
    if saved is live or isinstance(saved, torch.device):
        return
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        for key, item in saved.items():
            if key not in live:
                yield f"{path}{key}"
            else:
                yield from _changes(item, live[key], f"{path}{key}/")
    elif isinstance(saved, list | tuple | deque) and type(saved) is type(live) and len(saved) == len(live):
        for index, (item, other) in enumerate(zip(saved, live, strict=True)):
            yield from _changes(item, other, f"{path}{index}/")
    elif not _same(saved, live):
        yield path.removesuffix("/")


def _same(saved: Any, live: Any) -> bool:
    if not isinstance(saved, torch.Tensor) or not isinstance(live, torch.Tensor):
        return repr(saved) == repr(live)  # of a NaN, too
    if tree.is_composed(saved):
        return type(saved) is type(live) and all(
            _same(getattr(saved, name), getattr(live, name))
            for name in saved.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        )
    if saved.dtype != live.dtype or saved.shape != live.shape:
        return False
    saved, live = dtensors.local_of(saved), dtensors.local_of(live)
    return all(one == other for one, other in zip(tree.raw_bytes(saved), tree.raw_bytes(live), strict=True))


# --- what no state_dict has ------------------------------------------------------------------------------------------

_ABSENT = object()


class Attributes:
    """What an optimizer keeps outside of its ``state_dict()``: numbers and tensors that change in training, and generators.

    torch's own optimizers keep nothing there. A flag that changes (``initialized``) belongs to the process.

    What it was like at first is noted when this is made, before anything is restored.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._first = dict(self._found())
        self._empty = {name for name, value in vars(optimizer).items() if value is None}

    def _found(self) -> Iterator[tuple[str, Any]]:
        if type(self._optimizer).__module__.startswith("torch.optim."):
            return
        parameters = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        for name, value in vars(self._optimizer).items():
            is_number = isinstance(value, int | float | complex | np.number) and not isinstance(value, bool)
            if type(value) in GENERATORS:
                yield name, state_of(value)
            elif name == "_step_count":  # which schedulers of an older torch put there
                continue
            elif is_number or (isinstance(value, torch.Tensor) and id(value) not in parameters):
                yield name, value

    def changed(self) -> dict[str, Any]:
        """Those that are not what they were at first, and all tensors, which may have changed in place."""
        return {
            name: value
            for name, value in self._found()
            if isinstance(value, torch.Tensor) or not _same(self._first.get(name, _ABSENT), value)
        }

    def reset(self) -> None:
        """Makes them what they were at first, but for tensors."""
        for name, value in list(self._found()):
            if name not in self._first:
                setattr(self._optimizer, name, None) if name in self._empty else delattr(self._optimizer, name)
            elif not isinstance(value, torch.Tensor):
                self._set(name, self._first[name])

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Puts back those that had changed when the checkpoint was written."""
        for name, value in saved.items():
            self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        live = getattr(self._optimizer, name, None)
        if type(live) in GENERATORS:
            set_state(live, value)
        elif (
            isinstance(live, torch.Tensor)
            and isinstance(value, torch.Tensor)
            and (live.shape, live.dtype) == (value.shape, value.dtype)
        ):
            live.detach().copy_(value)  # which may be the memory of something else, too
        else:
            setattr(self._optimizer, name, value)


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
    inner = ", ".join(_class_of(each) for each in torch_private.schedulers_within(scheduler))
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


def stepping(optimizers: Mapping[str, Optimizer]) -> list[Optimizer]:
    """The optimizers that call hooks before they step. Raises ``ConfigError`` for one that neither does nor has one that
    does: nobody could know when it changes the parameters."""
    found = {name: list(_with_step_hooks(optimizer)) for name, optimizer in optimizers.items()}
    for name, hooked in found.items():
        if not hooked:
            kind = type(optimizers[name]).__name__
            raise ConfigError(f"{name}: {kind} calls no step hooks; have its __init__ call torch.optim.Optimizer.__init__")
    return list({id(each): each for hooked in found.values() for each in hooked}.values())


def _with_step_hooks(optimizer: Any) -> Iterator[Optimizer]:
    """Those of an optimizer, and of the optimizers within it, whose ``step`` calls hooks."""
    if torch_private.calls_step_hooks(optimizer):
        yield optimizer
    for each in vars(optimizer).values():
        if isinstance(each, Optimizer):
            yield from _with_step_hooks(each)
