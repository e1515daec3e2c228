"""The tensors of modules that others than optimizers change, as they were at a step boundary.

See ``harness.training.keeper``: small ones are copied, of larger ones the version counters are noted. Of buffers that DDP
gives to all ranks, another rank than the first takes the copy when it has been given them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from harness.checkpoint import commit, tree
from harness.distributed import device
from harness.distributed.device import Device
from harness.torch_private import version
from harness.training.run_context import RunContext

SMALL_BYTES = 1 << 20  # of tensors, so many are copied at each boundary
_MOST_WATCHED = 64  # tensors that only optimizers change: whoever else changes one changes many


class Loose:
    """What a step changes of the modules outside of the optimizers: a copy of what is small, the versions of the rest."""

    def __init__(self, context: RunContext) -> None:
        self._world, self._state = context.world, context.state
        self._parts = [part for part in self._state.contents.parts.values() if isinstance(part.live, nn.Module)]
        self._places: dict[tuple[str, str], int] = {}  # of all tensors, by part and name: where they lie
        self._copied: list[tuple[str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._bytes = _Bytes()  # of both
        self._watched: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._of_first: list[_FirstsBuffers] = []
        self._own: dict[str, torch.Tensor] = {}  # that DDP does not give to all ranks
        self._own_at_first: list[int] = []  # their versions
        self._are_alike = self._world.rank == 0  # they, on all ranks
        self._refusal = ""
        self._device = device.of(self._world.device)
        self._ready = device.NOTHING  # the mark after which the copies are there
        device.beside([self._world.device], "keep")  # made now: while a collective hangs, that may take for ever

    def note(self) -> None:
        """A boundary."""
        if not self._places:
            self._look()
        if self._live:
            self._bytes.copy(self._device)
        self._versions = [version(each) for _, each in self._watched]
        for given in self._of_first:
            given.note()

    def compare(self) -> None:
        """Whether what DDP does not give to all ranks is alike on them, now that a step has changed what steps change. All
        ranks call it."""
        found = self._world.all_gather(commit.digest_of(self._own, "own"))
        self._are_alike = self._are_alike or all(each == found[0] for each in found)

    def _look(self) -> None:
        """Finds the tensors, and who changes them."""
        is_steady, room = self._state.is_steady(), SMALL_BYTES
        groups = [group for each in self._state.optimizers.values() for group in each.param_groups]
        renormed = {each.data_ptr() for group in groups for each in group["params"] if each.requires_grad}
        lives = [part.live for part in self._parts if isinstance(part.live, DistributedDataParallel)]
        given = [each for each in lives if each.broadcast_buffers] if self._world.size > 1 else []
        given_places = {buffer.data_ptr() for each in given for buffer in each.module.buffers()}
        self._of_first = [_FirstsBuffers(each, self._device, self.mark) for each in given] if self._world.rank else []
        steady: list[tuple[str, torch.Tensor]] = []
        captured = {(part.name, key): value for part in self._parts for key, value in part.capture().items()}
        for (part, key), value in sorted(captured.items(), key=lambda item: getattr(item[1], "nbytes", 0)):
            name = f"{part}.{key}"
            if not isinstance(value, torch.Tensor) or key.endswith("_extra_state"):
                self._refusal = f"{name} is made anew each time that it is asked for"
                continue
            self._places[part, key] = value.data_ptr()
            if is_steady(value):
                steady.append((name, value))
            elif value.numel():
                giver = next((each for each in self._of_first if each.has(value)), None)
                room -= value.nbytes
                if room >= 0:
                    self._copied.append((part, key))
                    self._live.append(value)
                    self._copies.append(torch.empty_like(value))
                    self._bytes.add(self._copies[-1], value)
                    if giver is not None:
                        giver.copied.add(self._copies[-1], value)
                elif giver is not None:
                    giver.watched.append((name, value))
                else:
                    self._watched.append((name, value))
                if value.data_ptr() not in given_places:
                    self._own[name] = value
                    if self._world.rank and value.data_ptr() in renormed:
                        self._refusal = f"{name} is changed in the forward pass, on each rank in its own way"
        self._own_at_first = [version(each) for each in self._own.values()]
        self._watched += steady[:: max(1, len(steady) // _MOST_WATCHED)]

    def take_first_buffers(self) -> None:
        """The buffers are those of rank 0."""
        for given in self._of_first:
            given.take()

    def why_changed(self) -> str:
        """Why what is noted is not what a checkpoint would have; empty where it is."""
        if self._refusal:
            return self._refusal
        places = {(part.name, key): _place(value) for part in self._parts for key, value in part.capture().items()}
        if places != self._places:
            return "the modules have other tensors than at the step boundary"
        moved = [name for (name, each), before in zip(self._watched, self._versions, strict=True) if version(each) != before]
        if moved:
            return f"{', '.join(moved[:3])} changed outside of optimizer.step()"
        own = [version(each) for each in self._own.values()]
        if not self._are_alike and own != self._own_at_first:
            return f"{next(iter(self._own))} may differ from that of rank 0, which a checkpoint has"
        return next((why for each in self._of_first if (why := each.why_not())), "")

    def put_into(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts, with the copies in the places of what was copied."""
        found = {name: dict(part) if isinstance(part, Mapping) else part for name, part in parts.items()}
        for (part, key), copy in zip(self._copied, self._copies, strict=True):
            found[part][key] = copy
        return found

    def close(self) -> None:
        for given in self._of_first:
            given.close()

    # --- on an accelerator -------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """All that was queued by now, in this thread, comes before what is read of a boundary."""
        self._ready = self._device.mark()

    @contextlib.contextmanager
    def beside_the_training(self) -> Iterator[None]:
        """The time in which one of our threads reads the state: on an accelerator in a stream of its own, since that of the
        training may hang for ever."""
        beside = device.beside([self._world.device], "keep")
        beside.adopt()
        beside.follow(self._ready)
        with beside.within():
            yield


def _place(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0


class _Bytes:
    """Pairs of tensors of which one is copied to the other, all in one go: on a device only for tensors of one dtype."""

    def __init__(self) -> None:
        self._targets: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # flat ones, as bytes; and others
        self._sources: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        is_flat = tree.is_flat(source) and tree.is_flat(target)
        self._targets[is_flat].append(tree.flat_bytes(target) if is_flat else target)
        self._sources[is_flat].append(tree.flat_bytes(source) if is_flat else source)

    def copy(self, device: Device) -> None:
        for is_flat, sources in self._sources.items():
            if sources:
                device.copy_each(self._targets[is_flat], sources)

    def __bool__(self) -> bool:
        return any(self._sources.values())


class _FirstsBuffers:
    """On other ranks than the first: a module's buffers, which DDP overwrites with the first one's before a forward pass."""

    def __init__(self, module: DistributedDataParallel, device: Device, on_take: Callable[[], None]) -> None:
        self._places = {each.data_ptr() for each in module.module.buffers()}
        self._device, self._on_take = device, on_take
        self.copied = _Bytes()
        self.watched: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._is_missing = self._is_about_to = False
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._begin),
            module.module.register_forward_pre_hook(self._given),
        ]

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self._places

    def note(self) -> None:
        """A boundary: until the next forward pass nobody here knows the first rank's."""
        self._is_missing = bool(self.copied or self.watched)

    def _begin(self, module: DistributedDataParallel, _inputs: object) -> None:
        self._is_about_to = self._is_missing and module.will_sync_module_buffers()  # type: ignore[no-untyped-call]

    def _given(self, _module: nn.Module, _inputs: object) -> None:
        if self._is_about_to:
            self.take()

    def take(self) -> None:
        """They are the first rank's now."""
        self._is_missing = self._is_about_to = False
        self.copied.copy(self._device)
        self._versions = [version(each) for _, each in self.watched]
        self._on_take()

    def why_not(self) -> str:
        """Why they are not known; empty where they are."""
        if self._is_missing:
            return "rank 0 has died before it gave its buffers (of BatchNorm, say) to the others"
        moved = [name for (name, each), before in zip(self.watched, self._versions, strict=True) if version(each) != before]
        return f"{moved[0]} changes in the forward pass, and is too large to be copied" if moved else ""

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module takes its hooks along: there they do nothing."""
        return _NoBuffers, ()


class _NoBuffers:
    def _begin(self, *_: object) -> None:
        """Nothing to do."""

    _given = _begin
