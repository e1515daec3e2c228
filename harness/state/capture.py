"""Capture and restore: modules, optimizers, schedulers, whatever else has a state, random states, progress.

Restoring checks everything first and touches the live objects last. It is strict both ways: what the checkpoint has must be
consumed, and what is live must be filled.
"""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from harness import torch_private
from harness.checkpoint import commit, tree
from harness.checkpoint.format import Manifest, check_part_name, span
from harness.checkpoint.tree import is_composed
from harness.data.loader import Loader
from harness.data.loaders import Epochs
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.runtime.gc_pause import without_collections
from harness.state.ddp_buckets import bucket_orders
from harness.state.modules import (
    check_is_whole,
    check_model,
    check_not_sharded,
    frozen,
    kind_of,
    listed,
    model_state,
    module_versions,
    restore_model,
    some,
    unwrap,
)
from harness.state.optimizers import (
    Attributes,
    check_optimizer,
    check_scheduler,
    names_by_group,
    optimizer_state,
    plain_optimizer,
    restore_optimizer,
    saved_parameters,
    scheduler_state,
    tensors_in,
    with_step_hooks,
)
from harness.state.options import (
    Built,
    Difference,
    attributes_of,
    built_groups,
    built_schedule,
    check_length,
    differences,
    options_of,
    plain_items,
    position,
    reset_groups,
    reset_schedule,
    saved_schedule,
)

log = logging.getLogger(__name__)

# Called before a checkpoint is compared, with its step, its epoch, and dtype and shape of each tensor of each part.
Adapt = Callable[[int, int, Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]], None]


@dataclass
class Progress:
    """How far a run is: what a checkpoint's manifest says about it."""

    step: int = 0  # optimizer steps: the global step
    epoch: int = 0  # where no loader of ours counts them
    last: dict[str, float] = field(default_factory=dict)  # the newest metrics, the training loss among them
    best: dict[str, float] = field(default_factory=dict)  # the metrics and the step of the best evaluation
    finished_loops: int = 0  # of the program's loops, that are over although they have not come to their own end


class State:
    """Everything that a step changes: objects by name, each of which is a part of a checkpoint under that name.

    Modules, optimizers and schedulers are known, and checked against what is saved, name by name and shape by shape.
    Anything else needs ``state_dict`` and ``load_state_dict``; where it has ``check_state_dict``, too, that is called
    before anything is touched, and may raise ``Mismatch``. An object whose state differs between the ranks says so by
    ``per_rank = True``; torch's ``DataLoader`` is taken for one (torchdata's ``StatefulDataLoader`` has a state). Two
    further parts are made here: ``training`` has the versions of the modules, the order of DDP's gradients and the progress,
    ``random`` each rank's generators.

    ``reset_options`` names options of optimizers and settings of schedules of which, at a resume, the program's values count
    and not the checkpoint's. ``adapt`` is called before a checkpoint is compared, and may give the live objects what it has.
    Only one rank ``speaks``, that is, warns.

    Raises ``ConfigError`` for an object that has no state, an option that none has, or a torch that lacks what a run needs,
    ``Unsupported`` for an optimizer of foreign parameters, for a model whose ``state_dict()`` leaves out what is trained,
    and for what the ranks share out.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        device: torch.device,
        *,
        reset_options: Sequence[str] = (),
        adapt: Adapt | None = None,
        speaks: bool = True,
    ) -> None:
        torch_private.require()
        self.device = device
        self.progress = Progress()
        self.random_to_restore: Mapping[str, Any] = {}  # this rank's, when the loop begins; empty where there is none for it
        self._speaks = speaks
        self._adapt = adapt
        self._objects = {name: plain_optimizer(each) for name, each in objects.items()}
        self.modules = {name: each for name, each in self._objects.items() if isinstance(each, nn.Module)}
        self.optimizers = {name: each for name, each in self._objects.items() if isinstance(each, Optimizer)}
        self._parts = {name: self._part(name, each) for name, each in self._objects.items()}
        self.gradients = bucket_orders(self.modules)
        self.differences: list[Difference] = []  # between this program and the one that wrote the checkpoint
        self._built = {name: part.built for name, part in self._parts.items()}  # as the next checkpoint tells it
        self._reset_options = sorted({*reset_options})
        self._was_frozen: dict[str, list[str]] | None = None  # in the checkpoint, where this program builds it otherwise
        found = {name: part.capture() for name, part in self._parts.items() if part.is_named}
        self._names, self._sizes = self._names_in(found), self._sizes_of(found)
        self._check_reset_options()

    @property
    def objects(self) -> list[Any]:
        """What was given."""
        return [part.live for part in self._parts.values()]

    def _part(self, name: str, each: Any) -> "_Part":
        check_part_name(name)
        if name in (TRAINING, RANDOM):
            raise ConfigError(f"state: {name!r} is the name of a part that harness writes; choose another one")
        check_not_sharded(name, each)
        if isinstance(each, nn.Module):
            self._warn(check_is_whole(name, each))
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

    def _adapted(self, part: "_Part") -> "_Part":
        """A part whose object may have grown."""
        if not isinstance(part, _Module | _Optimizer):
            return part
        adapted = self._part(part.name, part.live)
        if isinstance(adapted, _Optimizer) and isinstance(part, _Optimizer):
            adapted.keep(part)
        return adapted

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

    def _warn(self, message: str | None) -> None:
        if message and self._speaks:
            log.warning("%s", message)

    def stepping(self) -> list[Optimizer]:
        """The optimizers that call hooks before they step. Raises ``ConfigError`` for one that neither does nor has one that
        does: nobody could know when it changes the parameters."""
        found = {name: list(with_step_hooks(optimizer)) for name, optimizer in self.optimizers.items()}
        for name, hooked in found.items():
            if not hooked:
                kind = type(self.optimizers[name]).__name__
                raise ConfigError(
                    f"{name}: {kind} calls no step hooks; have its __init__ call torch.optim.Optimizer.__init__"
                )
        return list({id(each): each for hooked in found.values() for each in hooked}.values())

    def without_scheduler(self) -> list[str]:
        """The names of those optimizers whose learning rate is a scheduler's that no object of the state is, or has.

        torch's schedulers, and those of others that follow them, note the rate that they begin with in the optimizer.
        """
        others = [part.live for part in self._parts.values() if not isinstance(part.live, nn.Module | Optimizer)]
        held = [each for other in others for each in (other, *_attributes(other).values())]
        scheduled = {id(plain_optimizer(_attributes(each).get("optimizer"))) for each in held}
        return [
            name
            for name, optimizer in self.optimizers.items()
            if id(optimizer) not in scheduled and any("initial_lr" in group for group in optimizer.param_groups)
        ]

    # --- saving ---

    def capture(self) -> dict[str, dict[str, Any]]:
        """The parts that are the same on every rank. Tensors are the live ones, not copies."""
        captured = self._captured(per_rank=False)
        self._notice_changed_names(captured)
        return {**captured, TRAINING: self._training()}

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
            "finished_loops": self.progress.finished_loops,
            "built": self._built,
            "reset_options": self._reset_options,
            "frozen": {name: frozen(module) for name, module in self.modules.items()},
        }

    def _notice_changed_names(self, captured: Mapping[str, Mapping[str, Any]]) -> None:
        """Says at the first save that has other names than the run was made with that the next start will be refused."""
        sizes = self._sizes_of(captured)
        if sizes == self._sizes or self._adapt is not None:
            return
        before, now = self._names, self._names_in(captured)
        lines = [f"{key}: new, {now[key]}" for key in now if key not in before]
        lines += [f"{key}: gone" for key in before if key not in now]
        lines += [f"{key}: {before[key]} before, now {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        self._names, self._sizes = now, sizes
        if lines:
            what = "what is saved has other names and shapes than when Run was made"
            self._warn(
                f"{listed(what, lines, 10)}\nA program that builds what this one has built cannot be resumed from it: build "
                "it like this before Run, or in a function that Run(..., adapt=...) calls with the checkpoint's names"
            )

    def _names_in(self, captured: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """The entries of the modules and the parameters of the optimizers' groups, and what kind each is."""
        parts = [part for part in self._parts.values() if part.is_named]
        return {f"{part.name}: {key}": kind for part in parts for key, kind in part.names(captured[part.name]).items()}

    def _sizes_of(self, captured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {name: part.size(captured[name]) for name, part in self._parts.items() if part.is_named}

    @property
    def epochs(self) -> list[Epochs]:
        """The epochs of the loaders of torch's kind."""
        return [part.epochs for part in self._parts.values() if isinstance(part, _DataLoader)]

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
        """Tells the tensors that nothing changes but an optimizer's step: its parameters, and its own state.

        A frozen parameter in an optimizer's groups is moved by somebody else, if at all: a momentum encoder. So is the
        weight of an embedding with ``max_norm``, by its forward pass.
        """
        renormed = {
            module.weight.data_ptr()
            for model in self.modules.values()
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        }
        places = set()
        for optimizer in self.optimizers.values():
            parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
            places |= {tensor.data_ptr() for tensor in tensors_in([parameters, *optimizer.state.values()])}
        places -= renormed
        return lambda tensor: tensor.data_ptr() in places

    def is_that_of(self, manifest: Manifest) -> bool:
        """Whether a checkpoint has this state, bit for bit, where it is the same on every rank."""
        if manifest.parts[TRAINING].tree.get("finished_loops", 0) != self.progress.finished_loops:
            return False
        parts = self._captured(per_rank=False)
        return all(commit.digest_of(part, name) == manifest.parts[name].digest for name, part in parts.items())

    def marks(self) -> dict[str, Any]:
        """By part, what shows that something has changed it, at little cost: plain values, and the versions of tensors.

        Modules, optimizers and loaders are left out, which change in each step.
        """
        found = {}
        for name, part in self._parts.items():
            if not isinstance(part, _Module | _Optimizer | _DataLoader) and not isinstance(part.live, Loader):
                encoded = tree.encode(part.capture(), name)
                versions = {
                    path: (tensor.data_ptr(), torch_private.version(tensor)) for path, tensor in encoded.tensors.items()
                }
                found[name] = (json.dumps(encoded.tree, sort_keys=True), versions)
        return found

    def holds(self) -> tuple[set[int], set[int]]:
        """What is in the state: the identities of objects, those that they have as attributes included, and the addresses of
        tensors."""
        lives = [part.live for part in self._parts.values()]
        held = [each for live in lives for each in (live, *_attributes(live).values())]
        held += [item for each in held if isinstance(each, list | tuple) for item in each]
        tensors = tensors_in([part.capture() for part in self._parts.values()])
        return {id(each) for each in held}, {tensor.data_ptr() for tensor in tensors}

    def steady_digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of each module's parameters and each optimizer's state on this rank, by part: what has to be the same on all ranks
        between two steps; and apart, the parameters that something else than an optimizer moves. Buffers may differ."""
        is_steady = self.is_steady()
        found, apart = {}, {}
        for name, part in self._parts.items():
            values = {} if part.per_rank else dict(part.steady())
            if isinstance(part, _Module):
                others = {key: values.pop(key) for key, each in [*values.items()] if not is_steady(each)}
                if others:
                    apart[name] = commit.digest_of(others, name)
            if values:
                found[name] = commit.digest_of(values, name)
        return found, apart

    def digests(self) -> dict[str, Any]:
        """What must be the same on all ranks before they train together."""
        parts = self._captured(per_rank=False)
        return {"step": self.progress.step, **{name: commit.digest_of(part, name) for name, part in parts.items()}}

    # --- restoring ---

    def restore(self, parts: Mapping[str, Mapping[str, Any]], step: int, rank: int = 0, epoch: int = 0) -> None:
        """Puts the parts of a checkpoint into the live objects. Raises ``Mismatch`` before it touches any of them.

        The generators are not touched: see ``restore_random``.
        """
        saved = {name: part for name, part in parts.items() if name not in (TRAINING, RANDOM)}
        if self._adapt is not None:
            self._adapt(step, epoch, {name: _shapes(part, name) for name, part in saved.items()})
            self._parts = {name: self._adapted(part) for name, part in self._parts.items()}
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
        self._compare(own, training)
        self._settle(training["gradient_order"])  # before the rest: what a hook remembers of it is overwritten
        for part in sorted(self._parts.values(), key=lambda part: part.restored):
            if isinstance(part, _Optimizer):
                part.saved_parameters = saved_parameters(self.modules, own)
            part.restore(checked[part.name], training)
        self._reset()
        last, best = dict(training["last"]), dict(training["best"])
        self.progress = Progress(step, int(training["epoch"]), last, best, int(training.get("finished_loops", 0)))

    def restore_random(self) -> None:
        """Sets the generators to what a checkpoint has, once: whatever a program draws before its loop does not count."""
        states, self.random_to_restore = self.random_to_restore, {}
        if states:
            restore_random_state(states, self.device)

    def _settle(self, orders: Mapping[str, Any]) -> None:
        lives = [part.live for part in self._parts.values()]
        restored = {id(live) for live in lives}
        # What a module has as an attribute is not in its state_dict(); with other objects, it is what they are there for.
        restored |= {id(value) for live in lives if not isinstance(live, nn.Module) for value in _attributes(live).values()}
        for name, gradients in self.gradients.items():
            if why := gradients.settle(list(orders.get(name, [])), restored):
                self._warn(f"{name}: with three ranks or more the next step may differ in its last bits: {why}")

    # --- what the program says, and the checkpoint ---

    def _check_reset_options(self) -> None:
        known = {key.rpartition(".")[2] for part in self._parts.values() if part.resets for key in part.built}
        for name in self._reset_options:
            if name not in known:
                raise ConfigError(
                    f"reset_options: no optimizer or scheduler has the option {name!r}; there are {', '.join(sorted(known))}"
                )

    def _compare(self, own: Mapping[str, Mapping[str, Any]], training: Mapping[str, Any]) -> None:
        """Notes what this program says otherwise than the one that wrote the checkpoint, and what the next one is to say."""
        was_built, was_reset = training.get("built", {}), training.get("reset_options", [])
        self.differences = []
        for name, part in self._parts.items():
            there = was_built[name] if name in was_built else part.built_of(own[name])
            found = list(differences(name, part.built, there))
            # Once: an automatic restart of the same program must not undo what has become of the option since.
            part.to_reset = {
                key
                for option in part.built
                if part.resets and (key := option.rpartition(".")[2]) in self._reset_options
                if key not in was_reset or any(each.name == key for each in found)
            }
            for each in found:
                wins = not part.resets or each.name in part.to_reset
                self.differences.append(replace(each, who_counts="program", scheduled="") if wins else each)
            # What an older checkpoint has may be where a schedule was: it is told once, and not kept as what was built.
            kept = {each.option for each in found if part.resets and name in was_built and each.name not in part.to_reset}
            self._built[name] = {key: there[key] if key in kept else here for key, here in part.built.items()}
        was_frozen = training.get("frozen", {})
        now_frozen = {name: frozen(module) for name, module in self.modules.items()}
        self._was_frozen = was_frozen if was_frozen and was_frozen != now_frozen else None

    def _reset(self) -> None:
        """Gives optimizers and schedules those of the program's settings that are to count."""
        rates = {
            id(optimizer): [
                (float(group["lr"]), group.get("initial_lr")) for group in optimizer.param_groups if "lr" in group
            ]
            for optimizer in self.optimizers.values()
        }
        changed = {id(part.live) for part in self._parts.values() if {"lr", "max_lr"} & part.to_reset}
        for part in sorted(self._parts.values(), key=lambda part: part.restored):
            if isinstance(part, _Scheduler):
                optimizer = id(plain_optimizer(part.live.optimizer))
                part.reset(rates.get(optimizer, []), moves_rate=optimizer in changed)
            elif part.to_reset:
                part.reset_own()

    def after_first_step(self) -> None:
        """What the first step of this process has shown: the order of DDP's gradients, and what is frozen."""
        for gradients in self.gradients.values():
            gradients.stop_noting()
        self._check_frozen()

    def _check_frozen(self) -> None:
        """After the first step of a resumed run: warns where other parameters are trained than when the checkpoint was
        written, since ``requires_grad`` is restored by nobody but the program."""
        if self._was_frozen is None:
            return
        for name, module in self.modules.items():
            now, before = {*frozen(module)}, {*self._was_frozen.get(name, [])}
            lines = [f"{some(sorted(now - before))}: trained then, frozen now"] if now - before else []
            lines += [f"{some(sorted(before - now))}: frozen then, trained now"] if before - now else []
            if lines:
                advice = "requires_grad is not restored; set it before Run as the training has it at this step"
                self._warn(f"{name}: other parameters are trained than in the checkpoint: {'; '.join(lines)}. {advice}")

    def check_lengths(self, total_steps: int | None, total_epochs: int | None, *, each_step: bool = False) -> None:
        """Raises ``ConfigError`` where a schedule would end, with an error, before the run does.

        Whether a scheduler is stepped with each step (``each_step``) or with each epoch is seen from where it is, if at all.
        """
        for name, part in self._parts.items():
            if isinstance(part, _Scheduler):
                at, step, epoch = position(part.live), self.progress.step, self.progress.epoch
                if total_steps is not None and (each_step or (at == step and step > 0)):
                    check_length(name, part.live, total_steps)
                elif total_epochs is not None and at == epoch and 0 < epoch < step:
                    check_length(name, part.live, total_epochs)


TRAINING, RANDOM = "training", "random"


class _Part:
    """An object of the state. ``checked`` and ``restored`` order the parts."""

    checked = restored = 3
    per_rank = False
    resets = False  # the checkpoint's settings count, unless they are reset
    is_named = False  # a program that builds it with other names cannot be resumed

    def __init__(self, name: str, live: Any) -> None:
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

    def reset_own(self) -> None:
        """Puts in the program's values of ``to_reset``."""

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
    is_named = True

    def __init__(self, name: str, live: nn.Module, device: torch.device) -> None:
        super().__init__(name, live)
        self.device = device

    def names(self, captured: Mapping[str, Any]) -> dict[str, str]:
        return {name: kind_of(name, value) for name, value in captured.items()}

    def size(self, captured: Mapping[str, Any]) -> Any:
        return len(captured), sum(value.numel() for value in captured.values() if isinstance(value, torch.Tensor))

    def steady(self) -> Mapping[str, Any]:
        return dict(unwrap(self.live).named_parameters())

    def capture(self) -> dict[str, Any]:
        return model_state(self.live)

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        check_model(self.live, saved, self.name)
        return saved

    def restore(self, saved: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        restore_model(self.live, sent(saved, self.device), training["module_versions"].get(self.name))


class _Optimizer(_Part):
    checked, restored = 2, 1
    saved_parameters: Mapping[int, torch.Tensor]  # of the checkpoint that is restored, by the ids of the live ones
    is_named = resets = True

    def __init__(self, name: str, live: Optimizer, owner: nn.Module, device: torch.device) -> None:
        super().__init__(name, live)
        self.owner = owner
        self.device = device
        self.options = options_of(live)
        self.option_names = [set(group) for group in live.param_groups]
        self.attributes = Attributes(live)

    def keep(self, before: "_Optimizer") -> None:
        """Takes over what the optimizer was like when the run was made."""
        self.attributes = before.attributes
        self.option_names = [*before.option_names, *self.option_names[len(before.option_names) :]]

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

    def reset_own(self) -> None:
        reset_groups(self.live, self.options, self.to_reset)

    def capture(self) -> dict[str, Any]:
        attributes = self.attributes.changed()
        return {**optimizer_state(self.live, self.owner), **({"attributes": attributes} if attributes else {})}

    def check(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        return check_optimizer(self.live, self.owner, saved)

    def restore(self, saved: Mapping[str, Any], _training: Mapping[str, Any]) -> None:
        there = sent(dict(saved), self.device)
        self.attributes.reset()
        restore_optimizer(self.live, there, self.saved_parameters, self.option_names)
        self.attributes.restore(there.get("attributes", {}))


class _Scheduler(_Part):
    checked, restored = 1, 2
    resets = True

    def __init__(self, name: str, live: LRScheduler) -> None:
        super().__init__(name, live)
        self.attributes = attributes_of(live)

    def described(self) -> Built:
        return built_schedule(self.live)

    def built_of(self, saved: Mapping[str, Any]) -> Built:
        return saved_schedule(saved["state"])

    def reset(self, rates: Sequence[tuple[float, float | None]], *, moves_rate: bool) -> None:
        """Puts in the program's settings, and the rate that follows from them; ``rates`` are the checkpoint's."""
        if self.to_reset or moves_rate:
            reset_schedule(self.live, self.attributes, self.to_reset | ({"lr"} if moves_rate else set()), rates)

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

    def restore(self, saved: Mapping[str, Any], _training: Mapping[str, Any]) -> None:
        self.live.load_state_dict(saved["state"])


class _Scaler(_Other):
    resets = True

    def described(self) -> Built:
        state = self.live.state_dict()
        return plain_items({key: value for key, value in state.items() if key != "scale" and not key.startswith("_")})

    def reset_own(self) -> None:
        self.live.load_state_dict({**self.live.state_dict(), **{key: self.built[key] for key in self.to_reset}})

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


def _shapes(part: Mapping[str, Any], name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor of a part, by its path."""
    encoded = commit.encode({name: part})[name]
    found = {
        path: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for path, tensor in encoded.tensors.items()
    }
    return found | {further: found[first] for further, first in encoded.aliases.items()}


def _attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that has a dictionary of them."""
    return getattr(value, "__dict__", {})


# --- to the device ---------------------------------------------------------------------------------------------------

_LARGE_BYTES = 1 << 20  # smaller tensors go where torch puts them, if anywhere: an optimizer's count of steps stays here
_STAGE_BYTES = 16 << 20


def sent(value: Any, device: torch.device) -> Any:
    """A value with its large tensors on a CUDA device. On the CPU they are left where they are."""
    return value if device.type != "cuda" else _sent(value, _Stage(device))


def _sent(value: Any, stage: "_Stage") -> Any:
    if isinstance(value, dict):
        return {key: _sent(item, stage) for key, item in value.items()}
    is_plain = isinstance(value, torch.Tensor) and not is_composed(value)
    is_large = is_plain and value.device.type == "cpu" and value.nbytes >= _LARGE_BYTES
    return stage.send(value) if is_large else value


class _Stage:
    """Two pieces of pinned memory: one is filled while the other travels. What is not pinned travels at half the speed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.halves = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self.arrived = [torch.cuda.Event() for _ in self.halves]  # type: ignore[no-untyped-call]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (places := span(tensor.shape, tensor.stride())):
            tensor = tensor.contiguous()
            places = tensor.numel()
        target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        flat = (each.detach().as_strided((places,), (1,)).view(torch.uint8) for each in (tensor, target))
        pieces = (torch.split(each, _STAGE_BYTES) for each in flat)
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
