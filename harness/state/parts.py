"""The parts of a state: each object as a part of a checkpoint, by its kind.

A part captures its object, checks what is saved against it, and puts that in. ``State`` says in which order.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from harness import torch_private
from harness.checkpoint import dtensors, tree
from harness.checkpoint.format import check_part_name
from harness.data.loaders import Epochs
from harness.data.nested import tensors_in
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.state.modules import (
    check_is_whole,
    check_model,
    check_sharding,
    kind_of,
    model_state,
    plain_names,
    restore_model,
    unwrap,
)
from harness.state.optimizers import (
    Attributes,
    check_optimizer,
    check_scheduler,
    check_sharded_state,
    names_by_group,
    optimizer_state,
    parameter_names,
    plain_optimizer,
    restore_optimizer,
    saved_parameters,
    scheduler_state,
)
from harness.state.options import (
    Built,
    attributes_of,
    built_groups,
    built_schedule,
    check_length,
    options_of,
    plain_items,
    position,
    reset_groups,
    reset_schedule,
    saved_schedule,
)
from harness.state.to_device import sent

TRAINING, RANDOM = "training", "random"  # the parts that are made by harness itself

# The rate of each group of an optimizer, and the one that its schedule began with, by the ids of the optimizers.
Rates = Mapping[int, Sequence[tuple[float, float | None]]]


@dataclass
class Progress:
    """How far a run is: what a checkpoint's manifest says about it."""

    step: int = 0  # optimizer steps: the global step
    epoch: int = 0  # where no loader of ours counts them
    last: dict[str, float] = field(default_factory=dict)  # the newest metrics, the training loss among them
    best: dict[str, float] = field(default_factory=dict)  # the metrics and the step of the best evaluation
    finished_loops: int = 0  # of the program's loops, that are over although they have not come to their own end
    random_keys: list[list[int]] | None = None  # by rank; none yet where it is empty, None where states are carried on
    half: Mapping[str, float] | None = None  # the metrics of the next step, where that is trained, but not evaluated


def part_of(
    name: str, each: Any, modules: Mapping[str, nn.Module], device: torch.device, warn: Callable[[str], None]
) -> "Part":
    """An object of a state as a part of a checkpoint. ``modules`` are those of the state.

    Raises ``ConfigError`` for a name that is taken and for an object that has no state, ``Unsupported`` for one that cannot
    be saved.
    """
    check_part_name(name)
    if name in (TRAINING, RANDOM):
        raise ConfigError(f"state: {name!r} is the name of a part that harness writes; choose another one")
    if isinstance(each, nn.Module):
        return ModulePart(name, each, device, warn)
    if isinstance(each, Optimizer):
        return OptimizerPart(name, each, modules, device)
    if isinstance(each, LRScheduler):
        return SchedulerPart(name, each)
    if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
        advice = "put the value into an object that has both"
        if isinstance(each, DataLoader):
            advice = "harness.Loader and torchdata's StatefulDataLoader have them"
        raise ConfigError(f"state: {name} ({type(each).__name__}) has no state_dict and load_state_dict; {advice}")
    if isinstance(each, torch.amp.GradScaler):
        return ScalerPart(name, each)
    if type(each).__module__.startswith("torchdata.nodes."):
        return NodesPart(name, each)
    return DataLoaderPart(name, each) if isinstance(each, DataLoader) else OtherPart(name, each)


class Part:
    """An object of the state. ``checked`` and ``restored`` order the parts."""

    checked = restored = 3
    per_rank = False
    resets = False  # the checkpoint's settings count, unless they are reset
    is_named = False  # a program that builds it with other names cannot be resumed

    def __init__(self, name: str, live: Any) -> None:
        check_sharding(name, live)
        self.name = name
        self.live = live
        self.to_reset: set[str] = set()  # the settings of which the program's value counts
        self.built = self.described()

    def __str__(self) -> str:
        return type(self.live).__name__

    def described(self) -> Built:
        """The settings of the live object."""
        return {}

    def built_of(self, _saved: Mapping[str, Any]) -> Built:
        """The same of a saved state, as far as it has them."""
        return {}

    def names(self, _captured: Mapping[str, Any]) -> dict[str, str]:
        """What must be there before a captured state can be restored, and of what kind it is."""
        return {}

    def size(self, _captured: Mapping[str, Any]) -> Any:
        """Changes when those names do, nearly always, and costs little."""
        return None

    def steady(self) -> Mapping[str, Any]:
        """What nothing changes but an optimizer's step."""
        return {}

    def tensors(self) -> Iterator[torch.Tensor]:
        """The live tensors. One rank alone may ask for them: a capture has ``fully_shard`` take whole parameters back, which
        it then puts together again with all ranks."""
        return tensors_in(self.capture())

    def sharded(self) -> dict[str, torch.Tensor]:
        """The live tensors of which each rank has a part, by the paths that they have in a checkpoint."""
        captured = self.capture()
        found = {id(dtensors.local_of(each)): each for each in tensors_in(captured) if dtensors.is_sharded(each)}
        if not found:
            return {}
        encoded = tree.encode(captured, self.name)
        there = {path: found[id(encoded.tensors[path])] for path in encoded.placed}
        return there | {further: there[path] for further, path in encoded.aliases.items() if path in there}

    def landing(self, path: str, shape: tuple[int, ...], live: Mapping[str, torch.Tensor]) -> dtensors.Landing | None:
        """Where a tensor of a checkpoint goes, if only a part of it is for this rank. ``live`` is what ``sharded`` said."""
        like = live.get(path)
        return dtensors.Landing(like, path) if like is not None and tuple(like.shape) == shape else None

    def look_again(self) -> None:
        """The live object may have grown. Raises ``Unsupported`` as when the part was made."""

    def reset(self, rates: Rates, changed: Container[int]) -> None:
        """Puts in the program's values of ``to_reset``. ``rates`` are the checkpoint's; ``changed`` has the ids of those
        optimizers whose own rate is reset."""

    def capture(self) -> dict[str, Any]:
        raise NotImplementedError

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The saved state as ``restore`` takes it. Raises ``Mismatch`` where it does not fit; touches nothing."""
        raise NotImplementedError

    def restore(self, saved: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        """Puts in a saved state that was checked. ``checkpoint`` has all parts as this rank has them."""
        raise NotImplementedError


class ModulePart(Part):
    checked = restored = 0
    is_named = True

    def __init__(self, name: str, live: nn.Module, device: torch.device, warn: Callable[[str], None]) -> None:
        super().__init__(name, live)
        self.device = device
        self.warn = warn
        self.is_sharded = self.check_is_whole()

    def check_is_whole(self) -> bool:
        """Warns of what its state leaves out. Returns whether each rank has a part of it."""
        if what := check_is_whole(self.name, self.live):
            self.warn(what)
        return any(map(dtensors.is_sharded, model_state(self.live).values()))

    def look_again(self) -> None:
        check_sharding(self.name, self.live)
        self.is_sharded = self.check_is_whole()

    def names(self, captured: Mapping[str, Any]) -> dict[str, str]:
        return {name: kind_of(name, value) for name, value in captured.items()}

    def size(self, captured: Mapping[str, Any]) -> Any:
        return len(captured), sum(value.numel() for value in captured.values() if isinstance(value, torch.Tensor))

    def steady(self) -> Mapping[str, Any]:
        if self.is_sharded:
            self.live.state_dict()  # after an evaluation, fully_shard takes whole parameters back only now
        return dict(unwrap(self.live).named_parameters())

    def tensors(self) -> Iterator[torch.Tensor]:
        return chain(self.live.parameters(), self.live.buffers()) if self.is_sharded else super().tensors()

    def own_buffers(self) -> dict[str, torch.Tensor]:
        """What may differ between the ranks: nobody keeps the buffers of a sharded module alike, as DDP does."""
        if not self.is_sharded:
            return {}
        names = {name for name, _ in unwrap(self.live).named_buffers(remove_duplicate=False)}
        captured = self.capture() if names else {}
        plain = plain_names(unwrap(self.live), names)
        found = {plain[name]: captured[plain[name]] for name in names if plain[name] in captured}
        return {name: found[name] for name in sorted(found) if not dtensors.is_sharded(found[name])}

    def capture(self) -> dict[str, Any]:
        return model_state(self.live)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        check_model(self.live, saved, self.name)
        live = self.capture() if self.is_sharded else {}
        return {name: dtensors.as_live(value, live.get(name), name) for name, value in saved.items()}

    def restore(self, saved: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        restore_model(self.live, sent(saved, self.device), checkpoint[TRAINING]["module_versions"].get(self.name))


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _has_sharded(optimizer: Optimizer) -> bool:
    return any(map(dtensors.is_sharded, _parameters_of(optimizer)))


class OptimizerPart(Part):
    checked, restored = 2, 1
    is_named = resets = True

    def __init__(self, name: str, live: Optimizer, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        super().__init__(name, live)
        self.modules = modules
        self.device = device
        self.owner = owner_of(name, live, modules)
        self.options = options_of(live)
        self.option_names = [set(group) for group in live.param_groups]  # as they were when the run was made
        self.attributes = Attributes(live)

    def look_again(self) -> None:
        self.owner = owner_of(self.name, self.live, self.modules)
        self.built = self.described()
        self.options = options_of(self.live)
        self.option_names += [set(group) for group in self.live.param_groups[len(self.option_names) :]]

    def described(self) -> Built:
        return built_groups(self.live.param_groups)

    def built_of(self, saved: Mapping[str, Any]) -> Built:
        return built_groups(saved.get("param_groups", ()))  # one with a form of its own does not tell

    def names(self, captured: Mapping[str, Any]) -> dict[str, str]:
        groups = enumerate(names_by_group(captured))
        return {f"{name} of group {index}": "an optimizer's parameter" for index, names in groups for name in names}

    def size(self, captured: Mapping[str, Any]) -> Any:
        return [len(names) for names in names_by_group(captured)]

    def steady(self) -> Mapping[str, Any]:
        state = optimizer_state(self.live, self.owner)
        return {"state": state.get("state") or state.get("own")}

    def reset(self, _rates: Rates, _changed: Container[int]) -> None:
        reset_groups(self.live, self.options, self.to_reset)

    def capture(self) -> dict[str, Any]:
        attributes = self.attributes.changed()
        state = optimizer_state(self.live, self.owner)
        if _has_sharded(self.live):
            check_sharded_state(state, self.parameters())
        return {**state, **({"attributes": attributes} if attributes else {})}

    def tensors(self) -> Iterator[torch.Tensor]:
        return (
            tensors_in([_parameters_of(self.live), *self.live.state.values()])
            if _has_sharded(self.live)
            else super().tensors()
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those that the optimizer has, by their plain names."""
        names = parameter_names(self.live, self.owner)
        return dict(zip(names, _parameters_of(self.live), strict=True))

    def landing(self, path: str, shape: tuple[int, ...], live: Mapping[str, torch.Tensor]) -> dtensors.Landing | None:
        """State that has its parameter's shape goes where the parameter is: there may be none yet."""
        keys = path.split("/")
        if keys[0] == "inner":
            keys = keys[2:]
        is_parameters = len(keys) > 2 and keys[0] == "state" and keys[1] in live  # state/NAME/KEY
        return super().landing(path, shape, {path: live[keys[1]]}) if shape and is_parameters else None

    def sharded(self) -> dict[str, torch.Tensor]:
        """The parameters, by their names as they stand in a path."""
        return {tree.join((name,)): each for name, each in self.parameters().items() if dtensors.is_sharded(each)}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        checked = check_optimizer(self.live, self.owner, saved)
        parameters = _parameters_of(self.live)
        if not _has_sharded(self.live):
            return checked
        state = {
            key: {
                name: dtensors.as_live(each, parameters[key], name) if _dims(each) else each for name, each in values.items()
            }
            if isinstance(key, int) and isinstance(values, Mapping)
            else values
            for key, values in checked["state"].items()
        }
        return {**checked, "state": state}

    def restore(self, saved: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        there = sent(dict(saved), self.device)
        self.attributes.reset()
        restore_optimizer(self.live, there, saved_parameters(self.modules, checkpoint), self.option_names)
        self.attributes.restore(there.get("attributes", {}))


class SchedulerPart(Part):
    checked, restored = 1, 2
    resets = True

    def __init__(self, name: str, live: LRScheduler) -> None:
        super().__init__(name, live)
        self.attributes = attributes_of(live)

    def described(self) -> Built:
        return built_schedule(self.live)

    def built_of(self, saved: Mapping[str, Any]) -> Built:
        return saved_schedule(saved["state"])

    def reset(self, rates: Rates, changed: Container[int]) -> None:
        optimizer = id(plain_optimizer(self.live.optimizer))
        names = self.to_reset | ({"lr"} if optimizer in changed else set())
        if names:
            reset_schedule(self.live, self.attributes, names, rates.get(optimizer, []))

    def check_length(
        self, progress: Progress, total_steps: int | None, total_epochs: int | None, *, each_step: bool
    ) -> None:
        """Raises ``ConfigError`` where the schedule would end, with an error, before a run of this length does.

        Whether a scheduler is stepped with each step (``each_step``) or with each epoch is seen from where it is, if at all.
        """
        at, step, epoch = position(self.live), progress.step, progress.epoch
        if total_steps is not None and (each_step or (at == step and step > 0)):
            check_length(self.name, self.live, total_steps)
        elif total_epochs is not None and at == epoch and 0 < epoch < step:
            check_length(self.name, self.live, total_epochs)

    def capture(self) -> dict[str, Any]:
        return scheduler_state(self.live)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        check_scheduler(self.live, saved)
        return saved

    def restore(self, saved: Mapping[str, Any], _checkpoint: Mapping[str, Any]) -> None:
        self.live.load_state_dict(dict(saved["state"]))


class OtherPart(Part):
    """Anything that has ``state_dict`` and ``load_state_dict``."""

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = bool(getattr(live, "per_rank", False))

    def described(self) -> Built:
        """Of a loader: what a batch is."""
        places = (self.live, getattr(self.live, "schedule", None))
        keys = ("batch_size", "global_batch_size", "micro_batch_size", "drop_last")
        return plain_items({key: getattr(place, key) for key in keys for place in places if hasattr(place, key)})

    def capture(self) -> dict[str, Any]:
        return {"state": self.live.state_dict()}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if hasattr(self.live, "check_state_dict"):
            self.live.check_state_dict(saved["state"])
        return saved

    def restore(self, saved: Mapping[str, Any], _checkpoint: Mapping[str, Any]) -> None:
        self.live.load_state_dict(saved["state"])


class ScalerPart(OtherPart):
    resets = True

    def noted(self) -> Callable[[], dict[str, Any]]:
        """What ``capture`` gives, as it is now, for later: a device that has yet to compute the scale is not waited for."""
        scaler = self.live
        scale, growth = torch_private.scale_of(scaler), torch_private.growth_of(scaler)
        is_torchs = type(scaler).state_dict is torch.amp.GradScaler.state_dict
        if not (is_torchs and isinstance(scale, torch.Tensor) and isinstance(growth, torch.Tensor)):
            captured = self.capture()
            return lambda: captured
        scale, growth = scale.clone(), growth.clone()
        options = {
            "growth_factor": scaler.get_growth_factor(),
            "backoff_factor": scaler.get_backoff_factor(),
            "growth_interval": scaler.get_growth_interval(),
        }
        return lambda: {"state": {"scale": scale.item(), **options, "_growth_tracker": growth.item()}}

    def described(self) -> Built:
        state = self.live.state_dict()
        return plain_items({key: value for key, value in state.items() if key != "scale" and not key.startswith("_")})

    def reset(self, _rates: Rates, _changed: Container[int]) -> None:
        if self.to_reset:
            self.live.load_state_dict({**self.live.state_dict(), **{key: self.built[key] for key in self.to_reset}})

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if bool(saved["state"]) != self.live.is_enabled():
            raise Mismatch(
                f"{self.name}: either the checkpoint or the run has an enabled gradient scaler, not both; restore "
                "train.precision"
            )
        return saved

    def restore(self, saved: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        if saved["state"]:  # one that is not enabled takes no state
            super().restore(saved, checkpoint)


class DataLoaderPart(OtherPart):
    """A loader of torch's kind with a state, each rank its own.

    An iterator of it draws a number when it is made: after a resume that is in the middle of an epoch, where the run that
    never stopped drew none. So it gets a generator of its own to draw from, which is saved with those of its samplers.
    """

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = True
        self.epochs = Epochs(name, live)

    def capture(self) -> dict[str, Any]:
        captured = super().capture()
        if _has_lost_its_place(self.live.dataset, captured["state"]):
            raise ConfigError(
                f"{self.name}: {type(self.live.dataset).__name__} is iterable and has no state_dict and load_state_dict. "
                "torchdata reads it again after a restart, and counts wrong after a second one. Give it both, or use "
                "harness.integrations.position.Position around a DataLoader"
            )
        return {**captured, "generators": self.epochs.state_dict()}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        if "generators" in saved:  # which earlier checkpoints do not have
            self.epochs.check_state_dict(saved["generators"])
        return super().check(saved)

    def restore(self, saved: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        if "generators" in saved:
            self.epochs.load_state_dict(saved["generators"])
        super().restore(saved, checkpoint)


def _has_lost_its_place(dataset: Any, state: Any) -> bool:
    """Whether the state of a torchdata loader, in an epoch, has nothing of an iterable data set, nor of its iterator."""
    if not isinstance(dataset, IterableDataset) or hasattr(dataset, "state_dict") or not isinstance(state, Mapping):
        return False
    snapshot = state.get("_snapshot", {})
    yielded = snapshot.get("_snapshot_step") if snapshot else state.get("_num_yielded")
    workers = [*snapshot.get("_worker_snapshots", {}).values()] if snapshot else [state]
    fetchers = [worker.get("fetcher_state") or {} for worker in workers]
    known = [each.get("dataset_iter_state") for each in fetchers] + [worker.get("dataset_state") for worker in workers]
    return bool(yielded) and not state.get("_iterator_finished") and all(each is None for each in known)


class NodesPart(OtherPart):
    """A ``Loader`` of torchdata's nodes, each rank its own.

    Asked for its state before the first batch, it makes an iterator, and gives that one to the program, also where another
    state was loaded meanwhile. So the iterator is made here, with the loaded state.
    """

    def __init__(self, name: str, live: Any) -> None:
        super().__init__(name, live)
        self.per_rank = True

    def restore(self, saved: Mapping[str, Any], _checkpoint: Mapping[str, Any]) -> None:
        self.live._iter_for_state_dict = False
        self.live.load_state_dict(saved["state"])
        iter(self.live)
        self.live._iter_for_state_dict = True


def _dims(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) else 0


def owner_of(name: str, optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module whose parameters an optimizer has; of several, all of them as children of one.

    Raises ``Unsupported`` where it has none of theirs.
    """
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    having = {
        key: unwrap(module)
        for key, module in modules.items()
        if any(id(parameter) in wanted for parameter in module.parameters())
    }
    for module in having.values():
        if wanted <= {id(parameter) for parameter in module.parameters()}:
            return module
    if not having:
        raise Unsupported(f"{name}: none of its parameters belongs to a module in the state; add its model to the state")
    return nn.ModuleDict(having)
