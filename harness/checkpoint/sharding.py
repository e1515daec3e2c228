"""Which rank has which box of which tensor: what each rank says of its own, gathered once for a layout.

From the mesh of a tensor alone nobody could tell: one rank's mesh does not know of others beside it. What was gathered is
checked: all ranks have the same tensors, and the boxes of each make it up. So what nobody has thought of is refused.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from harness.checkpoint import tree
from harness.checkpoint.boxes import Box, why_not_tiles
from harness.checkpoint.format import checksum
from harness.checkpoint.tree import Encoded
from harness.errors import HarnessError, Unsupported
from harness.runtime.gc_pause import without_collections

Key = tuple[str, str]  # a part, and the path of a tensor in it


class Ranks(Protocol):
    """The ranks that have something of a state; ``harness.distributed.world.World`` is one."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    def all_gather_text(self, text: str) -> list[str]:
        """Every rank's short text, by rank, on every rank."""


@dataclass(frozen=True, eq=False)
class Sharding:
    """The boxes of all sharded tensors, and the ranks that have each. Empty boxes are left out."""

    boxes: Mapping[Key, Mapping[Box, tuple[int, ...]]]
    aliases: frozenset[tuple[str, str, str]]  # rank 0's further names: part, name, path
    said: tuple[str, ...]  # by each rank, in a word

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sharding) and self.said == other.said

    __hash__ = None  # type: ignore[assignment]

    @functools.cached_property
    def held_by_several(self) -> set[Key]:
        """The tensors with a box that several ranks have."""
        return {key for key, boxes in self.boxes.items() if any(len(ranks) > 1 for ranks in boxes.values())}

    def is_whole(self, key: Key, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is written as one that is not sharded: by rank 0, which has all of it, or because it is empty."""
        boxes = self.boxes[key]
        return not boxes or 0 in boxes.get(Box.whole(shape), ())

    def name_alike(self, parts: Mapping[str, Encoded]) -> None:
        """Gives shards that are empty here, and so have no address, the further names that they have on rank 0."""
        for name, further, path in self.aliases:
            tensors, placed = parts[name].tensors, parts[name].placed
            if further in placed and not tensors[further].numel():
                del tensors[further], placed[further]
                parts[name].aliases[further] = path


def agreed(
    ranks: Ranks, parts: Mapping[str, Encoded] | HarnessError, before: Sharding | None = None, note: str = ""
) -> tuple[Sharding, list[str]]:
    """The boxes of all ranks, which are those of ``before`` where nobody has others now; and what each rank notes, in a few
    characters. All ranks call it, one that has no parts with its error.

    Raises ``Unsupported``, on every rank, where one has an error, where the ranks do not have the same tensors, and where
    the boxes of one are not the whole of it.
    """
    mine = None if isinstance(parts, HarnessError) else _Own.of(parts)
    said = [each.partition(" ") for each in ranks.all_gather_text(f"{mine.checksum if mine else ''} {note}")]
    words = tuple(word for word, _, _ in said)
    if not all(words):
        problems = ranks.all_gather("" if mine is not None else str(parts))
        raise Unsupported(next(f"{what} (rank {rank})" for rank, what in enumerate(problems) if what))
    assert mine is not None
    assert not isinstance(parts, HarnessError)
    if before is None or before.said != words:
        before = _combined(ranks.all_gather(mine), words)
    before.name_alike(parts)
    return before, [each for _, _, each in said]


@dataclass(frozen=True)
class _Own:
    """What a rank says: its tensors, and their boxes, offset and shape, as one row of numbers."""

    names: tuple[tuple[str, str, str, tuple[int, ...]], ...]  # part, path, dtype, shape of the whole
    boxes: bytes  # of 64-bit numbers: one object is sent faster than thousands
    aliases: frozenset[tuple[str, str, str]]

    @classmethod
    def of(cls, parts: Mapping[str, Encoded]) -> "_Own":
        names, numbers = [], []
        for part, encoded in parts.items():
            for path, placed in sorted(encoded.placed.items()):
                names.append((part, path, tree.dtype_name(encoded.tensors[path].dtype), placed.shape))
                numbers += [*placed.box.offset, *placed.box.shape]
        aliases = {
            (part, further, path)
            for part, encoded in parts.items()
            for further, path in encoded.aliases.items()
            if path in encoded.placed
        }
        return cls(tuple(names), np.array(numbers, np.int64).tobytes(), frozenset(aliases))

    @functools.cached_property
    def checksum(self) -> str:
        return checksum(repr((self.names, sorted(self.aliases))).encode() + self.boxes)


@without_collections()  # of many ranks these are a million objects
def _combined(found: list[_Own], words: tuple[str, ...]) -> Sharding:
    first = found[0]
    further = {(part, name) for part, name, _ in first.aliases} - {each[:2] for each in first.names}
    for rank, own in enumerate(found):
        names = [each for each in own.names if each[:2] not in further]
        if names != [*first.names]:
            different = sorted({*names} ^ {*first.names})
            part, path, dtype, shape = different[0]
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise Unsupported(
                f"{part}/{path} ({dtype}{list(shape)}){more}: not sharded alike on rank 0 and on rank {rank}; every rank "
                "must have its part of each tensor"
            )
    boxes: dict[Key, Mapping[Box, tuple[int, ...]]] = {}
    known: dict[tuple[bytes, ...], Mapping[Box, tuple[int, ...]]] = {}  # most tensors are cut as others are
    for (part, path, _, shape), rows in zip(
        first.names, zip(*(_rows(own, further) for own in found), strict=True), strict=True
    ):
        key = (*rows, repr(shape).encode())
        if key not in known:
            known[key] = held = _held(rows)
            if held and (why := why_not_tiles(shape, tuple(held))) is not None:
                raise Unsupported(f"{part}/{path}: what the ranks have of it is not the whole tensor: {why}")
        boxes[part, path] = known[key]
    return Sharding(boxes, first.aliases, words)


def _rows(own: _Own, left_out: set[Key]) -> list[bytes]:
    """The numbers of each tensor, but for those that are further names of others."""
    start, found = 0, []
    for part, path, _, shape in own.names:
        stop = start + 2 * len(shape) * np.dtype(np.int64).itemsize
        if (part, path) not in left_out:
            found.append(own.boxes[start:stop])
        start = stop
    return found


def _held(rows: Sequence[bytes]) -> dict[Box, tuple[int, ...]]:
    """The boxes of a tensor, in order, and who has each."""
    held: dict[Box, list[int]] = {}
    for rank, row in enumerate(rows):
        numbers = np.frombuffer(row, np.int64).tolist()
        box = Box(tuple(numbers[: len(numbers) // 2]), tuple(numbers[len(numbers) // 2 :]))
        if box.items:
            held.setdefault(box, []).append(rank)
    return {box: tuple(held[box]) for box in sorted(held)}
