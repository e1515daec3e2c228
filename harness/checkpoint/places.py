"""Where what is in a file goes: to its place in a tensor that lies in several files, or of which only a part is wanted."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from harness.checkpoint import tree
from harness.checkpoint.boxes import Box, spans
from harness.checkpoint.format import FileInfo, Part, TensorInfo, piece_name
from harness.errors import Corrupt

ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # numbers that are copied as they are


class Landing(Protocol):
    """The part of a tensor that is wanted."""

    box: Box

    def holding(self, local: torch.Tensor) -> torch.Tensor:
        """What stands for the tensor, given the part of it."""


Land = Callable[[str, TensorInfo], Landing | None]  # by part and tensor; None for all of it
Memory = Callable[[str, Sequence[int], str], torch.Tensor]  # for a tensor, by its path, shape and dtype


def whole(_part: str, _tensor: TensorInfo) -> None:
    """All of every tensor."""


def empty(path: str, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Memory for a tensor. Raises ``Corrupt`` where this machine has not so much: a hole in a file costs no disk."""
    try:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
    except RuntimeError:
        size_bytes = TensorInfo(path, dtype, tuple(shape)).nbytes
        raise Corrupt(f"{path}: expected a tensor that fits into this machine's memory, found {size_bytes} bytes") from None


class Place:
    """Memory for a part of a tensor, the target, and a box of the tensor, the source, from whose bytes in row-major order it
    takes what it needs."""

    def __init__(self, info: TensorInfo, source: Box, target: Box, memory: torch.Tensor) -> None:
        self.info = info
        self.source, self.target = source, target
        self.memory = bytes_of(memory)
        self.is_direct = source == target  # each byte has the same place in both
        self.is_needed = source.common(target) is not None

    def put(self, start: int, data: memoryview) -> None:
        """Takes bytes of the source, from its byte ``start`` on: whole items."""
        if not self.is_needed:
            return
        if self.is_direct:
            place = self.memory[start : start + len(data)]
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data, np.uint8))
            return
        itemsize = self.info.itemsize
        items: Any = np.frombuffer(data, ITEMS[itemsize])
        target, first = self.items, start // itemsize
        for each in overlaps(self.source, self.target, first, first + len(items)):
            target[each.common.within(self.target)] = each.of(items)

    @property
    def items(self) -> Any:
        """The memory, as an array of the target's shape."""
        return np.frombuffer(self.memory, ITEMS[self.info.itemsize]).reshape(self.target.shape)


class Overlap(NamedTuple):
    """What some of a box's items, in row-major order, have in common with another box."""

    first: int  # of these items: where a box of them begins
    span: Box  # that box, within the whole
    common: Box

    def of(self, items: Any) -> Any:
        """The common ones of these items, in the shape that they have together."""
        found = items[self.first : self.first + self.span.items].reshape(self.span.shape)
        return found[self.common.within(self.span)]


def overlaps(source: Box, target: Box, first: int, stop: int) -> Iterator[Overlap]:
    """What the items ``first`` to ``stop`` of a source have in common with a target."""
    done = 0
    for span in spans(source.shape, first, stop):
        there = span.shifted(source.offset)
        if (common := there.common(target)) is not None:
            yield Overlap(done, there, common)
        done += span.items


class Wholes:
    """The tensors of a part that lie in pieces or in boxes, or that land in one, and the place of each piece in them.

    Raises ``Corrupt`` before it takes memory for more bytes than the part's files have.
    """

    def __init__(
        self, directory: str, name: str, part: Part, files: Mapping[str, FileInfo], land: Land, memory: Memory
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.landings: dict[str, Landing] = {}
        self.places: dict[str, tuple[Place, TensorInfo, int]] = {}  # by the piece's name, with where it begins in the source
        self.memory = memory
        self._where, self._name, self._land = f"{directory}: {name}", name, land
        self._lock = threading.Lock()
        infos = {path: TensorInfo(path, each.dtype, tuple(each.shape)) for path, each in (part.slices | part.boxes).items()}
        needed_bytes = sum(info.nbytes for info in infos.values())
        if needed_bytes > (there_bytes := sum(files[file].bytes for file in part.files)):
            raise Corrupt(f"{directory}: {name}: pieces of {needed_bytes} bytes in files of {there_bytes}")
        for path, slices in part.slices.items():
            box, tensor = self._begin(infos[path])
            place = Place(infos[path], Box.whole(infos[path].shape), box, tensor)
            for piece, start, stop in slices.pieces(path):
                self.places[piece] = place, TensorInfo(piece, "uint8", (stop - start,)), start
        used = set()
        for path, boxes in part.boxes.items():
            box, tensor = self._begin(infos[path])
            for source, file in boxes.places.items():
                piece = piece_name(path, *source.offset)
                place = Place(infos[path], source, box, tensor)
                self.places[piece] = place, TensorInfo(piece, boxes.dtype, source.shape), 0
                if place.is_needed:
                    used.add(file)
        of_boxes = {file for boxes in part.boxes.values() for file in boxes.places.values()}
        self.not_needed = [part.files[file] for file in of_boxes - used]  # they have nothing else

    def _begin(self, info: TensorInfo) -> tuple[Box, torch.Tensor]:
        """The part of a tensor that is wanted, and memory for it."""
        landing = self._land(self._name, info)
        box = Box.whole(info.shape) if landing is None else landing.box
        tensor = self.memory(f"{self._where}: {info.path}", box.shape, info.dtype)
        with self._lock:
            self.tensors[info.path], self.infos[info.path] = tensor, info
            if landing is not None:
                self.landings[info.path] = landing
        return box, tensor

    def place_of(self, info: TensorInfo) -> tuple[Place, int, torch.Tensor | None]:
        """Where what a file has under a name goes: its place, the first of the bytes there, and the tensor that it is all
        of, or lands in. Raises ``Corrupt`` where it is not what the manifest says."""
        if (known := self.known(info)) is not None:
            return *known, None
        if (landed := self.landed(info)) is not None:
            return landed[0], 0, landed[1]
        tensor = self.memory(info.path, info.shape, info.dtype)
        return Place(info, Box.whole(info.shape), Box.whole(info.shape), tensor), 0, tensor

    def known(self, info: TensorInfo) -> tuple[Place, int] | None:
        """The place of a piece or a box, and the first of the bytes there."""
        if info.path not in self.places:
            return None
        place, expected, start = self.places[info.path]
        if info != expected:
            what = f"{expected.dtype} {list(expected.shape)}"
            raise Corrupt(f"{info.path}: expected {what}, found {info.dtype} {list(info.shape)}")
        return place, start

    def landed(self, info: TensorInfo) -> tuple[Place, torch.Tensor] | None:
        """For a tensor that lies in one file, whole: the memory for the part of it that is wanted, if it is but a part."""
        if self._land(self._name, info) is None:
            return None
        box, tensor = self._begin(info)
        return Place(info, Box.whole(info.shape), box, tensor), tensor


class Target:
    """Where the pieces in a file go: into memory that other files go to as well, and that stays when a try has failed.

    A try that hung and was given up may wake up later. It must not write over what its successor has verified.
    """

    def __init__(self, wholes: Wholes | None = None) -> None:
        self.wholes = wholes
        self._lock = threading.Lock()
        self._reader: object = None

    def begin(self, reader: object) -> None:
        """From here on only this reader may write."""
        with self._lock:
            self._reader = reader

    def put(self, reader: object, place: Place, start: int, data: memoryview) -> None:
        with self._lock:
            if self._reader is not reader:
                raise TimeoutError("cancelled: nothing waits for the result")
            place.put(start, data)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor that is contiguous."""
    return tree.flat_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")
