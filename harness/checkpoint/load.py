"""Reading a checkpoint back: every byte is verified before a value leaves this module.

A file is read once: a shard's header is parsed under bounds, each tensor's bytes go straight to their place in fresh
memory, and both checksums, the file's and the tensor's, are computed a piece at a time and in order, while the piece is
still in a core's cache. Only when they agree with the manifest are the tensors handed out. Nothing is executed:
there is no pickle on this path.

The pieces of a tensor that lies in several go to their places in the whole. A local file is read by several threads, each a
stretch of it, whose pages it has the kernel give first (``harness.checkpoint.prefault``), and hashed by them in turn.

Ranks that read together (``peers``) read each byte once between them: of every round of pieces each rank reads one, and
gets all. Each computes the checksums of all that it was given.

A tensor can *land* in a part of it, a box, as a sharded one does, whatever boxes it was saved in: what is read goes to its
places in the box, stretch by stretch, and the rest of it nowhere. A rank that reads for itself leaves files out that have
nothing for it.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch

from harness.checkpoint import tree
from harness.checkpoint.boxes import Box, spans
from harness.checkpoint.catalog import check_bytes, read_file
from harness.checkpoint.format import (
    HEADER_LIMIT_BYTES,
    INDEX_SUFFIX,
    BlockHasher,
    Blocks,
    Boxes,
    FileInfo,
    Hasher,
    Manifest,
    Part,
    Slices,
    TensorInfo,
    checksum_of_blocks,
    checksum_of_boxes,
    decode_header,
    digest,
    hasher,
    piece_name,
)
from harness.checkpoint.prefault import Pages, cut
from harness.errors import CheckpointError, Corrupt, HarnessError, RankFailure, StoreError
from harness.runtime.gc_pause import without_collections
from harness.runtime.threads import InTurn, in_order, threads_for
from harness.storage.direct_io import Buffer
from harness.storage.filesystem import joined
from harness.storage.store import RANGE_BYTES, Store

ROUND_BYTES = 16 << 20  # of all pieces that ranks hand on at once: they hold them all,
SMALLEST_PIECE_BYTES = 64 << 10  # however many they are
STRETCH_BYTES = 2 << 20  # of what lands in a part of a tensor: whole items

_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # numbers that are copied as they are


class Shard(NamedTuple):
    """What is in a file: whole tensors, and those that land in a box; what each is; the checksums of all blocks, by name."""

    tensors: dict[str, torch.Tensor]
    infos: dict[str, TensorInfo]
    blocks: dict[str, Blocks]


class Landing(Protocol):
    """The part of a tensor that is wanted."""

    box: Box

    def holding(self, local: torch.Tensor) -> torch.Tensor:
        """What stands for the tensor, given the part of it."""


Land = Callable[[str, TensorInfo], Landing | None]  # by part and tensor; None for all of it


def whole(_part: str, _tensor: TensorInfo) -> None:
    """All of every tensor."""


class Peers(Protocol):
    """The ranks that read together; ``harness.distributed.world.World`` is one."""

    rank: int
    size: int

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Fills ``found`` with every rank's bytes, by rank. All have the same size."""


def read(
    store: Store,
    directory: str,
    manifest: Manifest,
    parts: Iterable[str] | None = None,
    *,
    peers: Peers | None = None,
    land: Land = whole,
) -> dict[str, Any]:
    """The parts of a checkpoint (all of them, or those named) as they were given to ``commit.write``, on the CPU.

    Tensors are fresh; tied ones are the same object. ``land`` says which of them are wanted in part. Raises ``Corrupt`` with
    the file's name, what was expected and what was found, or ``StoreError``. With ``peers`` all of them call this alike, and
    when one fails the others raise ``RankFailure``, unless it has failed after the last byte.
    """
    names = manifest.parts if parts is None else parts
    with without_collections():
        return {name: part.value() for name, part in _read(store, directory, manifest, names, peers, land).items()}


def digests(store: Store, directory: str, manifest: Manifest) -> dict[str, str]:
    """The digests of the parts when all boxes are put together: the same however a state was sharded. Of a part that has
    no boxes it is the manifest's. One part at a time is read, and verified; raises what ``read`` raises."""
    found = {}
    for name, part in manifest.parts.items():
        found[name] = part.digest
        if part.boxes:
            found[name] = _read(store, directory, manifest, [name], None, whole)[name].digest()
    return found


def _read(
    store: Store, directory: str, manifest: Manifest, parts: Iterable[str], peers: Peers | None, land: Land
) -> dict[str, "_Verified"]:
    wanted = {name: manifest.parts[name] for name in parts}
    files = {file.name: file for file in manifest.files}
    in_pieces = peers is not None or store.has_ranges
    with without_collections():
        wholes = {name: _Wholes(directory, name, part, files, land) for name, part in wanted.items()}
        left_out = set() if peers is not None else {file for each in wholes.values() for file in each.not_needed}
        # An index is not needed here, but what is corrupt is not called whole.
        names = [file for name, part in wanted.items() for file in (f"{name}{INDEX_SUFFIX}", *part.files) if file in files]
        needed = [files[name] for name in names if name not in left_out]
        pages = Pages(sum(file.bytes for file in needed))
        targets = {file: _Target(wholes[name]) for name, part in wanted.items() for file in part.files}
        if in_pieces:
            shards = _read_in_pieces(store, directory, needed, targets, pages, peers)
        else:
            shards = {
                each.name: read_shard(store, f"{directory}/{each.name}", each, targets.get(each.name), pages)
                for each in needed
            }
        return {name: _assemble(directory, name, part, shards, wholes[name]) for name, part in wanted.items()}


@dataclass(frozen=True)
class _Verified:
    """A part whose bytes are those that were written."""

    tree: Any
    tensors: Mapping[str, torch.Tensor]
    infos: Mapping[str, TensorInfo]
    landings: Mapping[str, Landing]

    def value(self) -> Any:
        """As it was given to be saved."""
        landed = {id(self.tensors[path]): landing.holding(self.tensors[path]) for path, landing in self.landings.items()}
        return tree.decode(self.tree, {path: landed.get(id(tensor), tensor) for path, tensor in self.tensors.items()})

    def digest(self) -> str:
        """That of whole tensors."""
        checksums = {path: checksum_of_blocks(tree.blocks_of(tensor)) for path, tensor in self.tensors.items()}
        return digest({self.infos[path]: checksum for path, checksum in checksums.items()}, self.tree)


def _assemble(directory: str, name: str, part: Part, shards: dict[str, Shard], wholes: "_Wholes") -> _Verified:
    """A part whose shards have been read, and with them the pieces of ``wholes``.

    Of a part of which files were left out, those that were read have the checksums that the manifest has of them. That says
    as much as the digest, for which all of them are needed.
    """
    tensors: dict[str, torch.Tensor] = {}
    infos: dict[str, TensorInfo] = {}
    blocks: dict[str, Blocks] = {}
    for file in part.files:
        if file not in shards:
            continue
        found = shards[file]
        if twice := blocks.keys() & found.blocks.keys():
            raise Corrupt(f"{directory}/{file}: {min(twice)} is in another shard too")
        tensors |= found.tensors
        infos |= found.infos
        blocks |= found.blocks
    is_complete = all(file in shards for file in part.files)
    for path in (*part.slices, *part.boxes):
        if path in tensors:
            raise Corrupt(f"{directory}: {name}: {path} is stored in pieces and as a tensor of its own")
        tensors[path], infos[path] = wholes.tensors[path], wholes.infos[path]
    for path, slices in part.slices.items():
        blocks[path] = _joined_blocks(directory, name, path, slices, blocks)
    for path, boxes in part.boxes.items():
        blocks[path] = _blocks_of_boxes(directory, name, path, boxes, blocks, {*shards}, part.files)
    try:
        for further, stored in part.aliases.items():
            if further in tensors:
                raise Corrupt(
                    f"{directory}: {name}: {further!r} is an alias of {stored!r}, but is stored as a tensor of its own"
                )
            infos[further] = replace(infos[stored], path=further)
            tensors[further], blocks[further] = tensors[stored], blocks[stored]
    except (KeyError, TypeError):
        raise Corrupt(f"{directory}: {name}: {further!r} is an alias of {stored!r}, which is missing") from None
    if is_complete:
        try:
            computed = digest({infos[path]: checksum_of_blocks(blocks[path]) for path in tensors}, part.tree)
        except (ValueError, RecursionError) as error:  # text that is none, a number beyond all, too many levels
            raise Corrupt(f"{directory}: {name}: {type(error).__name__}: {error}") from None
        if computed != part.digest:
            raise Corrupt(f"{directory}: {name}: expected digest {part.digest}, found {computed}")
    return _Verified(part.tree, tensors, infos, wholes.landings)


def _joined_blocks(directory: str, name: str, path: str, slices: Slices, blocks: dict[str, Blocks]) -> Blocks:
    """The checksums of a whole tensor's blocks, of which each piece has some."""
    found: list[str] = []
    for piece, start, stop in slices.pieces(path):
        if piece not in blocks:
            raise Corrupt(f"{directory}: {name}: bytes {start} to {stop} of {path} are missing")
        found += blocks.pop(piece)
    return tuple(found)


def _blocks_of_boxes(
    directory: str, name: str, path: str, boxes: Boxes, blocks: dict[str, Blocks], read_files: set[str], files: Sequence[str]
) -> Blocks:
    """The checksum of a tensor that lies in boxes, as if it were that of one block: of those boxes whose files were read."""
    found = {}
    for box, file in boxes.places.items():
        piece = piece_name(path, *box.offset)
        if files[file] in read_files and piece not in blocks:
            raise Corrupt(f"{directory}: {name}: the box {box} of {path} is not there")
        if piece in blocks:
            found[box] = checksum_of_blocks(blocks.pop(piece))
    return (checksum_of_boxes(found),)


# --- tensors in pieces -----------------------------------------------------------------------------------------------


class _Place:
    """Memory for a part of a tensor, the target, and a box of the tensor, the source, from whose bytes in row-major order it
    takes what it needs."""

    def __init__(self, info: TensorInfo, source: Box, target: Box, memory: torch.Tensor) -> None:
        self._info = info
        self._source, self._target = source, target
        self.memory = _bytes_of(memory)
        self.is_direct = source == target == Box.whole(info.shape)  # each byte has the same place in both
        self.is_needed = source.common(target) is not None

    def put(self, start: int, data: memoryview) -> None:
        """Takes bytes of the source, from its byte ``start`` on: whole items."""
        if not self.is_needed:
            return
        if self.is_direct:
            place = self.memory[start : start + len(data)]
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data, np.uint8))
            return
        itemsize = self._info.itemsize
        items: Any = np.frombuffer(data, _ITEMS[itemsize])
        target: Any = np.frombuffer(self.memory, _ITEMS[itemsize]).reshape(self._target.shape)
        first, done = start // itemsize, 0
        for span in spans(self._source.shape, first, first + len(items)):
            there, own = span.shifted(self._source.offset), items[done : done + span.items]
            done += span.items
            if (common := there.common(self._target)) is not None:
                target[common.within(self._target)] = own.reshape(span.shape)[common.within(there)]


class _Wholes:
    """The tensors of a part that lie in pieces or in boxes, or that land in one, and the place of each piece in them.

    Raises ``Corrupt`` before it takes memory for more bytes than the part's files have.
    """

    def __init__(self, directory: str, name: str, part: Part, files: Mapping[str, FileInfo], land: Land) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.landings: dict[str, Landing] = {}
        self.places: dict[
            str, tuple[_Place, TensorInfo, int]
        ] = {}  # by the piece's name, with where it begins in the source
        self._where, self._name, self._land = f"{directory}: {name}", name, land
        self._lock = threading.Lock()
        infos = {path: TensorInfo(path, each.dtype, tuple(each.shape)) for path, each in (part.slices | part.boxes).items()}
        needed_bytes = sum(info.nbytes for info in infos.values())
        if needed_bytes > (there_bytes := sum(files[file].bytes for file in part.files)):
            raise Corrupt(f"{directory}: {name}: pieces of {needed_bytes} bytes in files of {there_bytes}")
        for path, slices in part.slices.items():
            box, tensor = self._begin(infos[path])
            place = _Place(infos[path], Box.whole(infos[path].shape), box, tensor)
            for piece, start, stop in slices.pieces(path):
                self.places[piece] = place, TensorInfo(piece, "uint8", (stop - start,)), start
        used = set()
        for path, boxes in part.boxes.items():
            box, tensor = self._begin(infos[path])
            for source, file in boxes.places.items():
                piece = piece_name(path, *source.offset)
                place = _Place(infos[path], source, box, tensor)
                self.places[piece] = place, TensorInfo(piece, boxes.dtype, source.shape), 0
                if place.is_needed:
                    used.add(file)
        of_boxes = {file for boxes in part.boxes.values() for file in boxes.places.values()}
        self.not_needed = [part.files[file] for file in of_boxes - used]  # they have nothing else

    def _begin(self, info: TensorInfo) -> tuple[Box, torch.Tensor]:
        """The part of a tensor that is wanted, and memory for it."""
        landing = self._land(self._name, info)
        box = Box.whole(info.shape) if landing is None else landing.box
        tensor = _empty(f"{self._where}: {info.path}", box.shape, info.dtype)
        with self._lock:
            self.tensors[info.path], self.infos[info.path] = tensor, info
            if landing is not None:
                self.landings[info.path] = landing
        return box, tensor

    def landed(self, info: TensorInfo) -> tuple[_Place, torch.Tensor] | None:
        """For a tensor that lies in one file, whole: the memory for the part of it that is wanted, if it is but a part."""
        if self._land(self._name, info) is None:
            return None
        box, tensor = self._begin(info)
        return _Place(info, Box.whole(info.shape), box, tensor), tensor


class _Target:
    """Where the pieces in a file go: into memory that other files go to as well, and that stays when a try has failed.

    A try that hung and was given up may wake up later. It must not write over what its successor has verified.
    """

    def __init__(self, wholes: _Wholes | None = None) -> None:
        self.wholes = wholes
        self._lock = threading.Lock()
        self._reader: object = None

    def begin(self, reader: object) -> None:
        """From here on only this reader may write."""
        with self._lock:
            self._reader = reader

    def put(self, reader: object, place: _Place, start: int, data: memoryview) -> None:
        with self._lock:
            if self._reader is not reader:
                raise TimeoutError("cancelled: nothing waits for the result")
            place.put(start, data)


# --- file by file ----------------------------------------------------------------------------------------------------


def read_shard(store: Store, name: str, file: FileInfo, target: _Target | None = None, pages: Pages | None = None) -> Shard:
    """What is in a file, verified against the manifest's entry for it. An index has no tensors."""
    threads = threads_for(file.bytes) if store.is_local else 1
    return read_file(store, name, file, lambda stream: _consume(stream, file, target, pages or Pages(file.bytes), threads))


def _consume(stream: BinaryIO, file: FileInfo, target: _Target | None, pages: Pages, threads: int = 1) -> Shard:
    if file.name.endswith(INDEX_SUFFIX):
        check_bytes(stream, file)
        return Shard({}, {}, {})
    return _Reader(stream, file, target or _Target(), pages, threads).tensors()


class _Stretch(NamedTuple):
    """Bytes of a file, and where they go: to ``memory``, and from there to a place that other files go to, too."""

    start: int
    memory: memoryview
    hashers: Sequence[Hasher | BlockHasher]
    place: _Place | None = None
    offset: int = 0  # in the place's source


class _Source(NamedTuple):
    """What a file has under a name, and where it goes."""

    info: TensorInfo
    memory: memoryview | None  # that has each of its bytes at last; None where only some of them are wanted
    place: _Place | None = None
    offset: int = 0

    def stretches(self) -> Iterator[tuple[int, memoryview]]:
        """Memory for its bytes, one stretch after the other, each with where that begins."""
        if self.memory is not None:
            yield from cut(self.memory)
            return
        for start in range(0, self.info.nbytes, STRETCH_BYTES):
            yield start, memoryview(bytearray(min(STRETCH_BYTES, self.info.nbytes - start)))


class _Reader:
    """A shard on its way in, stretch by stretch: several are read side by side, and hashed in order."""

    def __init__(self, stream: BinaryIO, file: FileInfo, target: _Target, pages: Pages, threads: int) -> None:
        self.stream = stream
        self.pages = pages
        self.target = target
        self.threads = threads
        self.size_bytes, self.expected = file.bytes, file.checksum
        self.algorithm = file.checksum.partition(":")[0]
        self.whole = hasher(self.algorithm)

    def tensors(self) -> Shard:
        self.target.begin(self)
        infos, start = self.header()
        tensors: dict[str, torch.Tensor] = {}
        sources = [self.source(info, tensors) for info in infos]
        own = [BlockHasher(self.algorithm) for _ in infos]
        hashing = InTurn(self.hash)

        def read(numbered: tuple[int, _Stretch]) -> None:
            self.fill(numbered[1])
            hashing.bring(*numbered)

        stretches = enumerate(self.stretches(start, sources, own))
        for _ in in_order(self.threads, read, stretches, ahead=2 * self.threads):
            pass
        if self.read_at(self.size_bytes, memoryview(bytearray(1))):
            raise Corrupt(f"expected {self.size_bytes} bytes, found more")
        if (found := f"{self.algorithm}:{self.whole.hexdigest()}") != self.expected:
            raise Corrupt(f"expected {self.expected}, found {found}")
        for source in sources:  # one by one, so that there are never two copies of all
            path, strides = source.info.path, source.info.strides
            if strides is not None and source.place is None:
                tensors[path] = tree.laid_out(tensors[path], strides)
        there = {info.path: info for info in infos if info.path in tensors}
        return Shard(tensors, there, {info.path: each.blocks() for info, each in zip(infos, own, strict=True)})

    def header(self) -> tuple[list[TensorInfo], int]:
        """The tensors, and where the first one begins."""
        header_bytes = int.from_bytes(self.bytes_at(0, 8), "little")
        if header_bytes > min(HEADER_LIMIT_BYTES, self.size_bytes - 8):
            raise Corrupt(f"a header of {header_bytes} bytes in a file of {self.size_bytes}")
        start = 8 + header_bytes
        return decode_header(self.bytes_at(8, header_bytes), self.size_bytes - start), start

    def bytes_at(self, start: int, count: int) -> bytes:
        """The next bytes of the file, and the file's checksum goes on."""
        stretch = _Stretch(start, memoryview(bytearray(count)), [self.whole])
        self.fill(stretch)
        self.hash(stretch)
        return bytes(stretch.memory)

    def source(self, info: TensorInfo, tensors: dict[str, torch.Tensor]) -> _Source:
        """Where what is stored under a name goes: into a new tensor, or to its place in a whole one, or in a part of one."""
        wholes = self.target.wholes
        if wholes is not None and (known := wholes.places.get(info.path)) is not None:
            place, expected, offset = known
            if info != expected:
                what = f"{expected.dtype} {list(expected.shape)}"
                raise Corrupt(f"{info.path}: expected {what}, found {info.dtype} {list(info.shape)}")
            memory = place.memory[offset : offset + info.nbytes] if place.is_direct else None
            return _Source(info, memory, place, offset)
        if wholes is not None and (landed := wholes.landed(info)) is not None:
            place, tensors[info.path] = landed
            return _Source(info, place.memory if place.is_direct else None, place)
        tensors[info.path] = tensor = _empty(info.path, info.shape, info.dtype)
        return _Source(info, _bytes_of(tensor))

    def stretches(self, start: int, sources: Sequence[_Source], own: Sequence[BlockHasher]) -> Iterator[_Stretch]:
        for source, blocks in zip(sources, own, strict=True):
            for offset, memory in source.stretches():
                yield _Stretch(start + offset, memory, (self.whole, blocks), source.place, source.offset + offset)
            start += source.info.nbytes

    def fill(self, stretch: _Stretch) -> None:
        memory, place = stretch.memory, stretch.place
        if place is None or place.is_direct:
            self.pages.give(memory)
            memory = memory if place is None else memoryview(bytearray(len(memory)))
        done_bytes = 0
        while done_bytes < len(memory):
            count = self.read_at(stretch.start + done_bytes, memory[done_bytes:])
            if not count:
                raise Corrupt(f"expected {self.size_bytes} bytes, found {stretch.start + done_bytes}")
            done_bytes += count
        if place is not None:
            self.target.put(self, place, stretch.offset, memory)

    def hash(self, stretch: _Stretch) -> None:
        for each in stretch.hashers:
            each.update(stretch.memory)

    def read_at(self, start: int, place: memoryview) -> int:
        """Reads as many bytes as come at once. A single thread asks for one after the other: a stream has no other order."""
        if self.threads > 1:
            return os.preadv(self.stream.fileno(), [place], start)
        return self.stream.readinto(place)  # type: ignore[attr-defined,no-any-return]


def _empty(path: str, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Memory for a tensor. Raises ``Corrupt`` where this machine has not so much: a hole in a file costs no disk."""
    try:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
    except RuntimeError:
        size_bytes = TensorInfo(path, dtype, tuple(shape)).nbytes
        raise Corrupt(f"{path}: expected a tensor that fits into this machine's memory, found {size_bytes} bytes") from None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor that is contiguous."""
    return tree.flat_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")


# --- in pieces -------------------------------------------------------------------------------------------------------


def _read_in_pieces(
    store: Store,
    directory: str,
    files: Sequence[FileInfo],
    targets: Mapping[str, _Target],
    pages: Pages,
    peers: Peers | None,
) -> dict[str, Shard]:
    """Reads files, the next one's first pieces beside the last ones of the one before; with ``peers`` each byte once between
    all ranks, and whatever goes wrong on one of them, all stop after the same round."""
    relay = _Relay(store, directory, files, peers)
    pieces = relay.pieces()
    found: dict[str, Shard] = {}
    for file in files:
        try:
            found[file.name] = _consume(joined(islice(pieces, relay.count(file))), file, targets.get(file.name), pages)
        except CheckpointError as error:
            relay.problem = relay.problem or type(error)(f"{directory}/{file.name}: {error}")
            for _ in pieces:  # the others learn of it with the next round, if there is one
                pass
            raise relay.problem from None
    return found


@dataclass(frozen=True)
class _Piece:
    """A piece of a file; the last one is read with one byte more, which must not be there."""

    file: FileInfo
    name: str
    start: int
    size_bytes: int

    @property
    def is_last(self) -> bool:
        return self.start + self.size_bytes == self.file.bytes

    def check(self, data: bytes) -> None:
        if len(data) != self.size_bytes:
            found = "more" if len(data) > self.size_bytes else self.start + len(data)
            raise Corrupt(f"{self.name}: expected {self.file.bytes} bytes, found {found}")


class _Relay:
    """Files in pieces, of which each rank reads its share and hands it on; one rank alone reads them all.

    A round has a piece of each rank. What a rank sends begins with a byte that says whether anything has gone wrong there;
    after a round in which it has, nobody goes on.
    """

    def __init__(self, store: Store, directory: str, files: Iterable[FileInfo], peers: Peers | None) -> None:
        self.store = store
        self.peers = peers
        share_bytes = ROUND_BYTES // (peers.size if peers else 1)
        self.piece_bytes = max(min(share_bytes, RANGE_BYTES), SMALLEST_PIECE_BYTES)
        self.schedule = [
            _Piece(file, f"{directory}/{file.name}", start, min(self.piece_bytes, file.bytes - start))
            for file in files
            for start in range(0, file.bytes, self.piece_bytes)
        ]
        self.problem: HarnessError | None = None

    def count(self, file: FileInfo) -> int:
        """How many pieces a file has."""
        return -(-file.bytes // self.piece_bytes)

    def pieces(self) -> Iterator[Buffer]:
        """All pieces of all files, in order. Raises what this rank has failed of, or ``RankFailure`` when another has."""
        if self.peers is None:
            yield from self._own(self.schedule)
            return
        rank, size = self.peers.rank, self.peers.size
        own = self._own(self.schedule[rank::size])
        sent = torch.zeros(1 + self.piece_bytes, dtype=torch.uint8, device="cpu")
        found = torch.empty((size, 1 + self.piece_bytes), dtype=torch.uint8, device="cpu")
        for start in range(0, len(self.schedule), size):
            pieces = self.schedule[start : start + size]
            try:
                if rank < len(pieces) and self.problem is None:
                    data = next(own)
                    sent.numpy()[1 : 1 + len(data)] = np.frombuffer(data, np.uint8)
            except (CheckpointError, StoreError) as error:
                self.problem = error
            sent[0] = self.problem is not None
            width = 1 + max(piece.size_bytes for piece in pieces)
            self.peers.exchange(sent[:width], [row[:width] for row in found])
            if self.problem is not None:
                raise self.problem
            if failed := found[:, 0].nonzero().flatten().tolist():
                raise RankFailure(
                    f"ranks {failed} could not read their share of the checkpoint, or found it corrupt; see their messages"
                )
            for piece, row in zip(pieces, found, strict=False):
                yield row[1 : 1 + piece.size_bytes].numpy().data

    def _own(self, share: Sequence[_Piece]) -> Iterator[bytes]:
        ranges = ((piece.name, piece.start, piece.size_bytes + piece.is_last) for piece in share)
        found = self.store.pieces(ranges)
        for piece in share:
            try:
                data = next(found)
            except FileNotFoundError:
                raise Corrupt(f"{piece.name}: missing; expected {piece.file.bytes} bytes") from None
            piece.check(data)
            yield data
