"""Boxes: which part of a tensor a rank has, and how parts that were cut in one way fill those that were cut in another.

A *box* is an offset and a shape within a whole tensor. Whatever a device mesh does to a tensor, each rank has one box of it;
that of an empty shard has no items. Nothing here knows torch.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

Numbers = tuple[int, ...]

_MOST_CELLS = 64  # for each box: those of a mesh have few; a manifest may say anything


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A part of a tensor: where it begins in the whole, and its shape."""

    offset: Numbers
    shape: Numbers

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Self:
        """All of a tensor of this shape."""
        sizes = tuple(shape)
        return cls((0,) * len(sizes), sizes)

    @property
    def items(self) -> int:
        """How many items it has."""
        return math.prod(self.shape)

    def is_within(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has the box."""
        fits = len(self.offset) == len(self.shape) == len(shape)
        return fits and all(
            start >= 0 and size >= 0 and start + size <= most
            for start, size, most in zip(self.offset, self.shape, shape, strict=True)
        )

    def shifted(self, by: Sequence[int]) -> "Box":
        """The same box, further on by so much."""
        return Box(tuple(start + more for start, more in zip(self.offset, by, strict=True)), self.shape)

    def common(self, other: "Box") -> "Box | None":
        """What two boxes have in common; None where that is nothing."""
        starts = tuple(map(max, self.offset, other.offset))
        sizes = tuple(
            min(one + size, another + length) - start
            for one, size, another, length, start in zip(
                *(self.offset, self.shape, other.offset, other.shape, starts), strict=True
            )
        )
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, other: "Box") -> tuple[slice, ...]:
        """Where this box is in one that has all of it, as an index."""
        places = zip(self.offset, other.offset, self.shape, strict=True)
        return tuple(slice(start - first, start - first + size) for start, first, size in places)

    def __str__(self) -> str:
        return f"[{', '.join(f'{start}:{start + size}' for start, size in zip(self.offset, self.shape, strict=True))}]"


# --- what a mesh does to a tensor ------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """One dimension of a mesh cuts a dimension of a tensor: by ``torch.chunk``, after later dimensions of the mesh that cut
    the same one, and whose sizes multiply to ``after``, have done so."""

    dim: int
    after: int = 1


def box_of(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut | None], coordinate: Sequence[int]) -> Box:
    """The box of the rank at a coordinate of a mesh. ``cuts`` has one entry for each dimension of the mesh; None leaves the
    tensor whole there.

    torch's own offsets are wrong where two dimensions of a mesh cut one of the tensor unevenly. Raises ``ValueError`` for
    cuts that no order explains.
    """
    offset, sizes = [0] * len(shape), list(shape)
    for dimension, dim in _order(tuple(mesh), tuple(cuts)):
        each = -(-sizes[dim] // mesh[dimension])
        start = min(each * coordinate[dimension], sizes[dim])
        offset[dim] += start
        sizes[dim] = min(each, sizes[dim] - start)
    return Box(tuple(offset), tuple(sizes))


@functools.lru_cache(4096)
def _order(mesh: Numbers, cuts: tuple[Cut | None, ...]) -> list[tuple[int, int]]:
    """The dimensions of the mesh that cut, each with the tensor's, in the order in which they have done so."""
    waits = {index: _earlier(index, mesh, cuts) for index, cut in enumerate(cuts) if cut is not None}
    order: list[tuple[int, int]] = []
    while waits:
        ready = next((index for index, before in waits.items() if not before & waits.keys()), None)
        if ready is None:
            raise ValueError(f"cuts {cuts} of a mesh {mesh} wait for each other")
        del waits[ready]
        order.append((ready, cuts[ready].dim))  # type: ignore[union-attr]
    return order


def _earlier(index: int, mesh: Numbers, cuts: tuple[Cut | None, ...]) -> set[int]:
    """The later dimensions of the mesh that have cut before one of them."""
    own, found, size = cuts[index], set[int](), 1
    assert own is not None
    for other in range(index + 1, len(cuts)):
        if size == own.after:
            break
        cut = cuts[other]
        if cut is not None and cut.dim == own.dim:
            found.add(other)
            size *= mesh[other]
    if size != own.after:
        raise ValueError(f"cuts {cuts} of a mesh {mesh}: none multiply to {own.after}")
    return found


# --- boxes together --------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def why_not_tiles(shape: Numbers, boxes: tuple[Box, ...]) -> str | None:
    """None where boxes, none of them empty, cover a tensor of this shape, each item once; else what is wrong with them."""
    for box in boxes:
        if not box.items or not box.is_within(shape):
            return f"{box} is not in a tensor of shape {list(shape)}"
    numbers = [{bound: number for number, bound in enumerate(bounds)} for bounds in _bounds(boxes, len(shape))]
    covered: dict[Numbers, Box] = {}
    for box in boxes:
        ranges = [
            range(number[start], number[start + size])
            for number, start, size in zip(numbers, box.offset, box.shape, strict=True)
        ]
        if len(covered) + math.prod(map(len, ranges)) > _MOST_CELLS * len(boxes):
            return "they are too irregular to be those of a mesh"
        for cell in itertools.product(*ranges):
            if (other := covered.setdefault(cell, box)) is not box:
                return f"{other} and {box} overlap"
    missing = math.prod(shape) - sum(box.items for box in boxes)
    return f"{missing} items are in none of them" if missing else None


def _bounds(boxes: Sequence[Box], dims: int) -> Iterator[list[int]]:
    """Of each dimension, where boxes begin and end."""
    for dim in range(dims):
        yield sorted({bound for box in boxes for bound in (box.offset[dim], box.offset[dim] + box.shape[dim])})


def spans(shape: Numbers, start: int, stop: int) -> Iterator[Box]:
    """The items ``start`` to ``stop`` of a tensor in row-major order, as boxes that follow each other in this order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, spans(shape[1:], head, tail))
        return
    if head:
        yield from _in_row(first, spans(shape[1:], head, row))
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if tail:
        yield from _in_row(last, spans(shape[1:], 0, tail))


def _in_row(row: int, boxes: Iterable[Box]) -> Iterator[Box]:
    return (Box((row, *box.offset), (1, *box.shape)) for box in boxes)
