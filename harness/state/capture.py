"""Capture and restore: modules, optimizers, schedulers, whatever else has a state, random states, progress.

Restoring checks everything first and touches the live objects last. It is strict both ways: what the checkpoint has must be
consumed, and what is live must be filled.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness import torch_private
from harness.checkpoint import commit, dtensors
from harness.checkpoint.dtensors import address_of
from harness.checkpoint.format import Manifest
from harness.data.loader import Loader
from harness.data.nested import tensors_in
from harness.data.seeding import restore_random_state
from harness.data.streams import states_beside
from harness.errors import Mismatch
from harness.runtime.gc_pause import without_collections
from harness.state.contents import Contents, attributes
from harness.state.ddp_buckets import bucket_orders
from harness.state.edits import Edits
from harness.state.modules import listed, module_versions
from harness.state.optimizers import plain_optimizer
from harness.state.parts import RANDOM, TRAINING, DataLoaderPart, ModulePart, Part, Progress, SchedulerPart, part_of
from harness.state.saved_names import SavedNames
from harness.state.sharded import ShardedState

log = logging.getLogger(__name__)

# Called before a checkpoint is compared, with its step, its epoch, and dtype and shape of each tensor of each part.
Adapt = Callable[[int, int, Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]], None]


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
        self._adapt = adapt
        self._warn: Callable[[str], None] = log.warning if speaks else _say_nothing
        plain = {name: plain_optimizer(each) for name, each in objects.items()}
        self.modules = {name: each for name, each in plain.items() if isinstance(each, nn.Module)}
        self.optimizers = {name: each for name, each in plain.items() if isinstance(each, Optimizer)}
        # Modules come first, here as in each capture: then fully_shard takes back the parameters that it has put together
        # for an evaluation, and the optimizers' are the models' again.
        order = sorted(plain, key=lambda name: name not in self.modules)
        made = {name: part_of(name, plain[name], self.modules, device, self._warn) for name in order}
        self._parts = {name: made[name] for name in plain}
        self.epochs = [part.epochs for part in self._parts.values() if isinstance(part, DataLoaderPart)]
        self.contents = Contents(self._parts)
        self.sharded = ShardedState(self._parts, self.modules)
        self.gradients = bucket_orders(self.modules)
        self._names = SavedNames(self._parts)
        self.edits = Edits(self._parts, reset_options)

    # --- saving ---

    def capture(self) -> dict[str, dict[str, Any]]:
        """The parts that are the same on every rank. Tensors are the live ones, not copies."""
        captured = self._captured(per_rank=False)
        if self._adapt is None:
            self._names.warn_of_changes(captured, self._warn)
        training = {
            "module_versions": {name: module_versions(module) for name, module in self.modules.items()},
            "gradient_order": {name: gradients.order for name, gradients in self.gradients.items()},
            "epoch": self.progress.epoch,
            "last": self.progress.last,
            "best": self.progress.best,
            "finished_loops": self.progress.finished_loops,
            **self.edits.described(),
        }
        return {**captured, TRAINING: training}

    def capture_rank(self, rank: int) -> dict[str, Any]:
        """What is a rank's own: the states of its generators, where these do not follow from its keys and the step, and of
        the objects that differ between ranks."""
        keys = self.progress.random_keys[rank] if self.progress.random_keys else None
        return {RANDOM: states_beside(keys, self.progress.step, self.device), **self._captured(per_rank=True)}

    @without_collections()
    def _captured(self, *, per_rank: bool) -> dict[str, dict[str, Any]]:
        wanted = [part for part in self._parts.values() if part.per_rank == per_rank]
        found = {part.name: part.capture() for part in sorted(wanted, key=lambda part: not isinstance(part, ModulePart))}
        return {part.name: found[part.name] for part in wanted}

    def is_steady(self) -> Callable[[torch.Tensor], bool]:
        """Tells the tensors that nothing changes but an optimizer's step: its parameters, and its own state.

        A frozen parameter in an optimizer's groups is moved by somebody else, if at all: a momentum encoder. So is the
        weight of an embedding with ``max_norm``, by its forward pass.
        """
        places = set()
        for optimizer in self.optimizers.values():
            parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
            places |= {address_of(tensor) for tensor in tensors_in([parameters, *optimizer.state.values()])}
        places -= _renormed(self.modules.values())
        return lambda tensor: address_of(tensor) in places

    def untrained(self) -> list[torch.Tensor]:
        """The parameters that no optimizer trains now, but for those that a forward pass changes."""
        is_steady, renormed = self.is_steady(), _renormed(self.modules.values())
        parameters = (each for model in self.modules.values() for each in model.parameters())
        found = (each for each in parameters if each.numel() and not is_steady(each))
        return [each for each in found if address_of(each) not in renormed]

    # --- comparing ---

    def is_that_of(self, manifest: Manifest, digests: Mapping[str, str] | None = None) -> bool:
        """Whether a checkpoint has this state, bit for bit, where it is the same on every rank. ``digests`` are those of a
        sharded state, which no rank can tell alone."""
        if manifest.parts[TRAINING].tree.get("finished_loops", 0) != self.progress.finished_loops:
            return False
        if digests is None:
            digests = {name: commit.digest_of(part, name) for name, part in self._captured(per_rank=False).items()}
        return all(digest == manifest.parts[name].digest for name, digest in digests.items())

    def agree(self, all_gather: Callable[[Any], list[Any]]) -> None:
        """Raises ``ConfigError`` where the data sets of the ranks' loaders are not the same. All ranks call it."""
        for loader in self.contents.loaders:
            if isinstance(loader, Loader):
                loader.fingerprint.agree(loader.dataset, all_gather)

    def digests(self) -> dict[str, Any]:
        """What must be the same on all ranks before they train together."""
        parts = self._captured(per_rank=False)
        for name, buffers in self.sharded.own_buffers().items():
            parts[name] = {key: value for key, value in parts[name].items() if key not in buffers}
        return {"step": self.progress.step, **{name: commit.digest_of(part, name) for name, part in parts.items()}}

    def steady_digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of each module's parameters and each optimizer's state on this rank, by part: what has to be the same on all ranks
        between two steps; and apart, the parameters that something else than an optimizer moves. Buffers may differ."""
        is_steady = self.is_steady()
        found, apart = {}, {}
        for name, part in sorted(self._parts.items(), key=lambda item: not isinstance(item[1], ModulePart)):
            values = {} if part.per_rank else dict(part.steady())
            if isinstance(part, ModulePart):
                is_moved = {key: is_steady(each) or dtensors.is_sharded(each) for key, each in values.items()}
                others = {key: values.pop(key) for key, moved in is_moved.items() if not moved}
                if others:
                    apart[name] = commit.digest_of(others, name)
            if values:
                found[name] = commit.digest_of(values, name)
        return found, apart

    # --- restoring ---

    def restore(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        step: int,
        rank: int = 0,
        epoch: int = 0,
        *,
        before_restoring: Callable[[Mismatch | None], None] | None = None,
    ) -> None:
        """Puts the parts of a checkpoint into the live objects. Raises ``Mismatch`` before it touches any of them.

        The generators are not touched: see ``restore_random``. ``before_restoring`` is called when all is checked, also with
        what was found.
        """
        if self._adapt is not None:
            self._adapt(step, epoch, {name: _shapes(part, name) for name, part in parts.items() if name not in _OUR_OWN})
            for each in self._parts.values():
                each.look_again()
        saved = self._of_rank(parts, rank)
        # Schedulers before optimizers, to whose options they add; modules first, whose differences explain the others.
        checked = {}
        problem: Mismatch | None = None
        try:
            for part in sorted(self._parts.values(), key=lambda part: part.checked):
                checked[part.name] = part.check(saved[part.name])
        except Mismatch as error:
            problem = error
        if before_restoring is not None:
            before_restoring(problem)
        if problem is not None:
            raise problem
        training = parts[TRAINING]
        self.edits.compare(saved, training)
        orders, restored = training["gradient_order"], _restored(self._parts.values())
        for name, gradients in self.gradients.items():  # before the rest: what a hook remembers of it is overwritten
            if why := gradients.settle(list(orders.get(name, [])), restored):
                self._warn(f"{name}: with three ranks or more the next step may differ in its last bits: {why}")
        for part in sorted(self._parts.values(), key=lambda part: part.restored):
            part.restore(checked[part.name], saved)
        self.edits.reset()
        last, best = dict(training["last"]), dict(training["best"])
        loops, half = int(training.get("finished_loops", 0)), training.get("half")
        self.progress = Progress(step - (half is not None), int(training["epoch"]), last, best, loops, half=half)

    def _of_rank(self, parts: Mapping[str, Mapping[str, Any]], rank: int) -> dict[str, Mapping[str, Any]]:
        """The parts of a checkpoint as a rank has them. Raises ``Mismatch`` where they are not those of this state."""
        lines = [
            f"{name}: not in the checkpoint; the run has {part}" for name, part in self._parts.items() if name not in parts
        ]
        lines += [
            f"{name}: not in the run; the checkpoint has it" for name in parts if name not in {*self._parts, *_OUR_OWN}
        ]
        if lines:
            problem = listed("the checkpoint does not fit the run's state", lines)
            raise Mismatch(f"{problem}\nresume with the state that the run began with, or begin a new run at another URL")
        found = {TRAINING: parts[TRAINING]}
        buffers = parts[TRAINING].get("buffers", {})
        for name, part in self._parts.items():
            saved = parts[name]
            if name in buffers and isinstance(part, ModulePart) and part.is_sharded:
                saved = {**saved, **buffers[name][str(rank % len(buffers[name]))]}
            if part.per_rank and str(rank) not in saved:
                count = f"the checkpoint has {len(saved)}, none of them for rank {rank}"
                raise Mismatch(f"{name}: each rank has a state of its own, and {count}; start with as many ranks as before")
            found[name] = saved[str(rank)] if part.per_rank else saved
        return found

    def restore_random(self) -> None:
        """Sets the generators to what a checkpoint has, once: whatever a program draws before its loop does not count."""
        states, self.random_to_restore = self.random_to_restore, {}
        if states:
            restore_random_state(states, self.device)

    # --- in a loop ---

    def after_first_step(self) -> None:
        """What the first step of this process has shown: the order of DDP's gradients, and what is frozen."""
        for gradients in self.gradients.values():
            gradients.stop_noting()
        self.edits.warn_of_frozen(self._warn)

    def check_lengths(self, total_steps: int | None, total_epochs: int | None, *, each_step: bool = False) -> None:
        """Raises ``ConfigError`` where a schedule would end, with an error, before the run does. ``each_step`` says that
        schedulers are stepped with each step."""
        for part in self._parts.values():
            if isinstance(part, SchedulerPart):
                part.check_length(self.progress, total_steps, total_epochs, each_step=each_step)


_OUR_OWN = (TRAINING, RANDOM)


def _restored(parts: Iterable[Part]) -> set[int]:
    """The objects that a restore changes, by id."""
    lives = [part.live for part in parts]
    # What a module has as an attribute is not in its state_dict(); with other objects, it is what they are there for.
    others = (value for live in lives if not isinstance(live, nn.Module) for value in attributes(live).values())
    return {id(each) for each in (*lives, *others)}


def _renormed(models: Iterable[nn.Module]) -> set[int]:
    """Where those weights are that a forward pass changes."""
    return {
        address_of(module.weight)
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }


def _say_nothing(_message: str) -> None:
    """Another rank warns."""


def _shapes(part: Mapping[str, Any], name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor of a part, by its path."""
    encoded = commit.encode({name: part})[name]
    infos = {path: encoded.info(path) for path in encoded.tensors}
    found = {path: (info.dtype, info.shape) for path, info in infos.items()}
    return found | {further: found[first] for further, first in encoded.aliases.items()}
