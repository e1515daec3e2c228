"""What this program says of learning rates and schedules, and what the checkpoint says.

At a resume the checkpoint counts. Whoever has edited the program since is to know that, and may have it the other way
(``reset_options``). A value that a schedule or a loop has moved says nothing of an edit, so each checkpoint has, beside the
values, how the objects were *built*: what one program has built is compared with what the other has.
"""

import bisect
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from harness import torch_private
from harness.errors import ConfigError
from harness.torch_private import schedulers_within

Built = dict[str, Any]  # options and their plain values; of an optimizer, a list of those of its groups

# Where a schedule stands, which is no setting; and what follows from settings that are compared themselves.
_POSITION = {"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "base_lrs", "scale"}
# Settings that torch keeps under names of its own.
_PRIVATE = {"_milestones", "_schedule_phases", "_anneal_func_type"}
# Options of a group that a schedule makes of others.
_DERIVED = {"params", "param_names", "initial_lr", "min_lr", "base_momentum", "max_momentum"}
# What goes along with an option.
_TOGETHER = {
    "lr": ("initial_lr", "max_lr", "min_lr"),
    "max_lr": ("lr", "initial_lr", "min_lr"),
    "betas": ("base_momentum", "max_momentum"),
    "momentum": ("base_momentum", "max_momentum"),
    "total_steps": ("_schedule_phases",),
}
# Those whose ``get_lr`` says the rate at a position whatever the rate was before.
_BY_POSITION = (lr_scheduler.LambdaLR, lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)


@dataclass(frozen=True)
class Difference:
    """An option that this program builds with one value, and the checkpoint's with another."""

    part: str
    option: str
    here: Any
    there: Any
    who_counts: str  # the checkpoint or the program
    scheduled: str = ""  # what that means for a schedule

    def __str__(self) -> str:
        values = f"{_shown(self.here)} in this program, {_shown(self.there)} in the checkpoint"
        return f"{self.part}: {self.option}: {values}; using the {self.who_counts}'s{self.scheduled}"

    @property
    def name(self) -> str:
        """What ``reset_options`` calls it."""
        return self.option.rpartition(".")[2]


def _shown(value: Any) -> str:
    """A list with one value for each group is told as that value, where it is always the same."""
    is_one = isinstance(value, list) and value and all(each == value[0] for each in value)
    return f"{value[0] if is_one else value!r:.200}"


def differences(part: str, here: Built, there: Built) -> Iterator[Difference]:
    """What differs, of what both have. Groups that only one has are told of by those who compare the parts."""
    for option, value in here.items():
        old = there.get(option, value)
        lengths = {len(each) for each in (value, old) if isinstance(each, list)}
        length = option.replace("schedule_phases", "total_steps")  # from which the phases follow
        follows = length != option and here.get(length) != there.get(length)
        if old != value and len(lengths) < 2 and not follows:
            yield Difference(part, option, value, old, "checkpoint", _climbs(option, value, old))


def _climbs(option: str, here: Any, there: Any) -> str:
    if option.rpartition(".")[2] == "T_max" and isinstance(there, int | float) and here > there:
        return f", and its learning rate rises again after {there} of the scheduler's steps"
    return ""


def plain(value: Any) -> Any:
    """A setting as it can be kept and compared. Raises ``TypeError`` for what is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key if type(key) is str else repr(key): plain(item) for key, item in value.items()}
    raise TypeError(type(value).__name__)


def plain_items(values: Mapping[str, Any]) -> Built:
    """Those of the values that are plain, or can be told as such."""
    found = {}
    for key, value in values.items():
        try:
            found[key] = plain(value)
        except TypeError:  # code, or tensors: state
            continue
    return found


# --- optimizers ------------------------------------------------------------------------------------------------------


def built_groups(groups: Sequence[Mapping[str, Any]]) -> Built:
    """The options of an optimizer's groups. Under a schedule the rate is the one that it begins with."""
    found: Built = {}
    for group in groups:
        options = plain_items({key: value for key, value in group.items() if key not in _DERIVED})
        if "initial_lr" in group:
            options |= plain_items({"lr": group["initial_lr"]})
        for key, value in options.items():
            found.setdefault(key, []).append(value)
    return {key: values for key, values in found.items() if len(values) == len(groups)}


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group as they are now, in tensors of their own."""
    return [{key: _own(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def reset_groups(optimizer: Optimizer, built: Sequence[Mapping[str, Any]], names: Collection[str]) -> None:
    """Gives an optimizer those options with which the program has built it."""
    for group, options in zip(optimizer.param_groups, built, strict=False):
        for name in _with_others(names) & options.keys() & group.keys():
            if isinstance(group[name], torch.Tensor) and isinstance(options[name], torch.Tensor):
                group[name].copy_(options[name])  # a compiled step has the tensor
            else:
                group[name] = _own(options[name])


def _with_others(names: Collection[str]) -> set[str]:
    return {*names, *(other for name in names for other in _TOGETHER.get(name, ()))}


# --- schedules -------------------------------------------------------------------------------------------------------


def built_schedule(scheduler: LRScheduler) -> Built:
    """The settings of a schedule; those of the schedulers within it under their numbers: ``1.T_max``."""
    return saved_schedule(scheduler.state_dict())


def saved_schedule(state: Mapping[str, Any]) -> Built:
    """The same of a scheduler's saved state, which an older checkpoint has in place of what was built."""
    own = _settings(state)
    for number, each in enumerate(state.get("_schedulers", ())):
        own |= {f"{number}.{key}": value for key, value in saved_schedule(each).items()}
    return own


def _settings(state: Mapping[str, Any]) -> Built:
    kept = {key: value for key, value in state.items() if key in _PRIVATE or not key.startswith("_")}
    return plain_items({key.removeprefix("_"): value for key, value in kept.items() if key not in _POSITION})


def attributes_of(scheduler: LRScheduler) -> list[dict[str, Any]]:
    """The attributes of a schedule, and of each within it, as they are now."""
    own = {key: copy.deepcopy(value) for key, value in scheduler.state_dict().items() if key != "_schedulers"}
    return [own, *(each for part in schedulers_within(scheduler) for each in attributes_of(part))]


def reset_schedule(
    scheduler: LRScheduler,
    built: Sequence[Mapping[str, Any]],
    names: Collection[str],
    restored: Sequence[tuple[float, float | None]],
) -> None:
    """Gives a schedule those settings with which the program has built it, and the optimizer the rate that they mean here.

    ``restored`` has the rate of each group and the one that its schedule began with, as the checkpoint has them. Raises
    ``ConfigError`` where this torch does not let a schedule be moved.
    """
    torch_private.require(torch_private.SCHEDULES)
    wanted = _with_others(names) | {f"_{name}" for name in names}
    if {"lr", "max_lr"} & {*names}:
        wanted |= {"base_lrs"}
    for each, attributes in zip(_all(scheduler), built, strict=True):
        for key in wanted & attributes.keys() & vars(each).keys():
            if key == "lr_lambdas":  # of the functions that are objects, their attributes
                for function, own in zip(vars(each)[key], attributes[key], strict=True):
                    vars(function).update(copy.deepcopy(own or {}))
            else:
                setattr(each, key, copy.deepcopy(attributes[key]))
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        rates = None  # there is no position: the program's rate it is
    elif (rates := _rates(scheduler)) is None:
        rates = _scaled(scheduler, restored)
    groups = scheduler.optimizer.param_groups
    for group, rate in zip(groups, rates or [group["lr"] for group in groups], strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    for each in _all(scheduler):
        torch_private.set_last_rates(each, [_own(group["lr"]) for group in groups])


def _all(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for each in schedulers_within(scheduler):
        yield from _all(each)


def _rates(scheduler: LRScheduler) -> Sequence[Any] | None:
    """The rates at the position where a schedule is; None where they follow from the rates before."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        return _rates(
            schedulers_within(scheduler)[bisect.bisect_right(torch_private.milestones(scheduler), scheduler.last_epoch)]
        )
    if isinstance(scheduler, lr_scheduler.CosineAnnealingWarmRestarts):
        scheduler.step(scheduler.last_epoch)  # finds its cycle by the position
        return [group["lr"] for group in scheduler.optimizer.param_groups]
    if (rates := torch_private.rates_at_position(scheduler)) is not None:
        return rates
    return torch_private.rates_by_get_lr(scheduler) if isinstance(scheduler, _BY_POSITION) else None


def _scaled(scheduler: LRScheduler, restored: Sequence[tuple[float, float | None]]) -> list[Any]:
    """The restored rates, in the ratio of what the schedule begins with to what it began with."""
    found = []
    for group, (rate, began) in zip(scheduler.optimizer.param_groups, restored, strict=True):
        begins = group.get("initial_lr", group["lr"])
        found.append(rate * float(begins) / began if began else begins)
    return found


def check_length(name: str, scheduler: LRScheduler, steps: int) -> None:
    """Raises ``ConfigError`` where a schedule that ends with an error would end before so many steps of its own."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"{name}: OneCycleLR ends after {scheduler.total_steps} steps, and this run has {steps}; make the schedule as "
            "long as the run. To use the program's length in place of the checkpoint's: reset_options with 'total_steps'"
        )
    begins = [0] * len(schedulers_within(scheduler))
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        begins = [0, *torch_private.milestones(scheduler)]
    for each, begin in zip(schedulers_within(scheduler), begins, strict=False):
        check_length(name, each, steps - begin)


def position(scheduler: LRScheduler) -> int:
    """How often a scheduler was stepped."""
    while not hasattr(scheduler, "last_epoch") and (within := schedulers_within(scheduler)):
        scheduler = within[0]  # all of them at once
    return getattr(scheduler, "last_epoch", 0)
