"""What of a state is sharded: which rank has which part of it, and which buffers are a rank's own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from harness.checkpoint import commit, dtensors, tree
from harness.checkpoint.format import Blocks, TensorInfo, checksum
from harness.checkpoint.places import Land
from harness.checkpoint.sharding import Key, Ranks, Sharding, agreed
from harness.checkpoint.tree import Encoded
from harness.data.nested import tensors_in
from harness.errors import HarnessError, Unsupported
from harness.state.modules import sharding_of
from harness.state.parts import TRAINING, ModulePart, Part

AllGather = Callable[[Any], list[Any]]
Capture = Callable[[], dict[str, dict[str, Any]]]  # all that is the same, or shared out, on every rank
FrozenAmong = Callable[[Mapping[str, Encoded]], frozenset[Key]]


class Gathering(Ranks, Protocol):
    """Ranks of which the first one collects."""

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere."""


class ShardedState:
    """The parts of a state of which each rank has a part. ``in_words`` says how the modules are sharded; empty where they
    are not."""

    def __init__(self, parts: Mapping[str, Part], modules: Mapping[str, nn.Module]) -> None:
        self.in_words = sharding_of(modules)
        # Modules come first: then fully_shard takes back the parameters that it has put together for an evaluation.
        self._parts = {part.name: part for part in sorted(parts.values(), key=lambda each: not isinstance(each, ModulePart))}
        self._sharding: Sharding | None = None  # as the ranks have agreed last
        self._frozen: tuple[tuple[str, ...], frozenset[Key]] = (), frozenset()  # likewise, and what each had said, in a word

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of something."""
        return any(map(dtensors.is_sharded, tensors_in(self._captured())))

    def _captured(self) -> dict[str, dict[str, Any]]:
        return {part.name: part.capture() for part in self._parts.values() if not part.per_rank}

    def is_sharded_anywhere(self, all_gather: AllGather) -> bool:
        """Whether a rank has a part of something. All ranks call it.

        Raises ``Unsupported``, on every rank, where one has a sharded tensor that has no place in the whole.
        """
        is_sharded, problem = True, ""
        try:
            captured = self._captured()
            if is_sharded := any(map(dtensors.is_sharded, tensors_in(captured))):
                commit.encode(captured)
        except HarnessError as error:
            problem = str(error)
        found = all_gather((is_sharded, problem))
        if (what := next((f"{each} (rank {rank})" for rank, (_, each) in enumerate(found) if each), None)) is not None:
            raise Unsupported(what)
        return any(is_sharded for is_sharded, _ in found)

    def encoded(self, capture: Capture, ranks: Ranks) -> tuple[dict[str, Encoded], Sharding]:
        """What ``capture`` gives, and which rank has which part of it. All ranks call it.

        Raises ``Unsupported``, on every rank, where one cannot be saved, or where what the ranks have is not the whole.
        """
        parts, sharding, _ = self._agreed(capture, ranks)
        return parts, sharding

    def parts(
        self, capture: Capture, world: Gathering, note: str, frozen_among: FrozenAmong
    ) -> tuple[dict[str, Encoded], Sharding, str, frozenset[Key]]:
        """``encoded``, with the buffers that are each rank's own, on rank 0; rank 0's note; and the sharded tensors that are
        frozen on every rank, as ``frozen_among`` says on each. All ranks call it."""
        own: dict[str, dict[str, Blocks]] = {}
        frozen = frozenset[Key]()

        def said(parts: Mapping[str, Encoded]) -> str:
            nonlocal frozen
            frozen = frozen_among(parts)
            own.update(commit.checksums({name: Encoded({}, each) for name, each in self.own_buffers().items()}))
            return f"{_word_of(own)} {_word_of(sorted(frozen))} {note}"

        parts, sharding, notes = self._agreed(capture, world, said)
        buffers, words, (note, *_) = zip(*(f"{each}  ".split(" ", 2) for each in notes), strict=True)
        if words != self._frozen[0]:
            is_alike = len({*words}) == 1
            self._frozen = words, frozen if is_alike else frozenset.intersection(*world.all_gather(frozen))
        if len({*buffers}) > 1:
            found = tree.encode({"buffers": self._gathered_buffers(world, own)}, TRAINING)
            training = parts[TRAINING]
            parts[TRAINING] = Encoded(
                training.tree | found.tree, training.tensors | found.tensors, training.aliases | found.aliases
            )
        return parts, sharding, note.strip(), self._frozen[1]

    def _agreed(
        self, capture: Capture, ranks: Ranks, note: Callable[[Mapping[str, Encoded]], str] = lambda _parts: ""
    ) -> tuple[dict[str, Encoded], Sharding, list[str]]:
        parts: dict[str, Encoded] | HarnessError
        said = ""
        try:
            parts = commit.encode(capture())
            said = note(parts)
        except HarnessError as error:
            parts = error
        self._sharding, notes = agreed(ranks, parts, self._sharding, said)
        assert not isinstance(parts, HarnessError), "it was raised"
        return parts, self._sharding, notes

    def check_replicas(self, capture: Capture, ranks: Ranks) -> list[str]:
        """The names of those sharded tensors of which two ranks have the same part, with other bytes. All ranks call it."""
        parts, sharding = self.encoded(capture, ranks)
        several = sharding.held_by_several
        own = {
            name: replace(part, tensors={path: each for path, each in part.tensors.items() if (name, path) in several})
            for name, part in parts.items()
        }
        found = ranks.all_gather(commit.checksums(own))
        return [
            f"{name}/{path}"
            for name, path in sorted(several)
            if any(
                found[rank][name][path] != found[ranks[0]][name][path]
                for ranks in sharding.boxes[name, path].values()
                for rank in ranks
            )
        ]

    def own_buffers(self) -> dict[str, dict[str, torch.Tensor]]:
        """The buffers of sharded modules, which may be each rank's own, by part."""
        found = {part.name: part.own_buffers() for part in self._parts.values() if isinstance(part, ModulePart)}
        return {name: buffers for name, buffers in found.items() if buffers}

    def _gathered_buffers(
        self, world: Gathering, own: Mapping[str, Mapping[str, Blocks]]
    ) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """The buffers that are not the same on all ranks, by part and rank: on rank 0. ``own`` has this rank's checksums."""
        checksums = world.all_gather(own)
        first = checksums[0]
        differing = {
            name: {key: each[key].cpu() for key in each if any(found[name][key] != first[name][key] for found in checksums)}
            for name, each in self.own_buffers().items()
        }
        found = world.gather({name: each for name, each in differing.items() if each}) or []
        return {name: {str(rank): each[name] for rank, each in enumerate(found)} for name in (found[0] if found else ())}

    def land(self) -> Land:
        """Says of which tensors of a checkpoint this rank wants a part."""
        live = {name: part.sharded() for name, part in self._parts.items() if not part.per_rank}

        def landing(name: str, info: TensorInfo) -> dtensors.Landing | None:
            return self._parts[name].landing(info.path, info.shape, live[name]) if live.get(name) else None

        return landing


def _word_of(value: dict[str, Any] | list[Any]) -> str:
    """What differs where the values do, in a few characters."""
    return checksum(repr(value).encode())[-16:] if value else "-"
