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
nothing for it. Of ranks that read together, each file is read and verified by one (``harness.checkpoint.scatter``).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from harness.checkpoint import tree
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
from harness.checkpoint.places import Land, Landing, Memory, Place, Target, Wholes, bytes_of, empty, whole
from harness.checkpoint.prefault import Pages, cut
from harness.checkpoint.relay import Peers, Relay
from harness.checkpoint.scatter import Partners, scattered
from harness.errors import CheckpointError, Corrupt
from harness.runtime.gc_pause import without_collections
from harness.runtime.threads import InTurn, side_by_side, threads_for
from harness.storage.filesystem import joined
from harness.storage.store import Store

STRETCH_BYTES = 2 << 20  # of what lands in a part of a tensor: whole items


class Shard(NamedTuple):
    """What is in a file: whole tensors, and those that land in a box; what each is; the checksums of all blocks, by name."""

    tensors: dict[str, torch.Tensor]
    infos: dict[str, TensorInfo]
    blocks: dict[str, Blocks]


def read(
    store: Store,
    directory: str,
    manifest: Manifest,
    parts: Iterable[str] | None = None,
    *,
    peers: Peers | None = None,
    land: Land = whole,
    memory: Memory = empty,
) -> dict[str, Any]:
    """The parts of a checkpoint (all of them, or those named) as they were given to ``commit.write``, on the CPU.

    Tensors are fresh, made by ``memory``; tied ones are the same object. ``land`` says which of them are wanted in part;
    peers are ``Partners`` then. Raises ``Corrupt`` with the file's name, what was expected and what was found, or
    ``StoreError``. With ``peers`` all call this alike, and when one fails the others raise ``RankFailure``, unless it has
    failed after the last byte.
    """
    names = manifest.parts if parts is None else parts
    with without_collections():
        return {name: part.value() for name, part in _read(store, directory, manifest, names, peers, land, memory).items()}


def digests(store: Store, directory: str, manifest: Manifest, memory: Memory = empty) -> dict[str, str]:
    """The digests of the parts when all boxes are put together: the same however a state was sharded. Of a part that has
    no boxes it is the manifest's. One part at a time is read, and verified; raises what ``read`` raises."""
    found = {}
    for name, part in manifest.parts.items():
        found[name] = part.digest
        if part.boxes:
            found[name] = _read(store, directory, manifest, [name], None, whole, memory)[name].digest()
    return found


def _read(
    store: Store,
    directory: str,
    manifest: Manifest,
    parts: Iterable[str],
    peers: Peers | None,
    land: Land,
    memory: Memory,
) -> dict[str, "_Verified"]:
    wanted = {name: manifest.parts[name] for name in parts}
    files = {file.name: file for file in manifest.files}
    in_pieces = peers is not None or store.has_ranges
    with without_collections():
        wholes = {name: Wholes(directory, name, part, files, land, memory) for name, part in wanted.items()}
        left_out = set() if peers is not None else {file for each in wholes.values() for file in each.not_needed}
        # An index is not needed here, but what is corrupt is not called whole.
        names = [file for name, part in wanted.items() for file in (f"{name}{INDEX_SUFFIX}", *part.files) if file in files]
        needed = [files[name] for name in names if name not in left_out]
        pages = Pages(sum(file.bytes for file in needed))
        if peers is not None and land is not whole:
            return _read_scattered(store, directory, needed, wanted, wholes, cast("Partners", peers))
        targets = {file: Target(wholes[name]) for name, part in wanted.items() for file in part.files}
        if in_pieces:
            shards = _read_in_pieces(store, directory, needed, targets, pages, peers)
        else:
            shards = {
                each.name: read_shard(store, each.path(directory), each, targets.get(each.name), pages) for each in needed
            }
        return {name: _assemble(directory, name, part, shards, wholes[name]) for name, part in wanted.items()}


def _read_scattered(
    store: Store,
    directory: str,
    files: Sequence[FileInfo],
    wanted: Mapping[str, Part],
    wholes: Mapping[str, Wholes],
    peers: Partners,
) -> dict[str, "_Verified"]:
    """The parts of each rank, from files that are read once. The files have the checksums that the manifest says: that says
    as much as the digests, for which each rank would need all bytes."""
    parts = {file: name for name, part in wanted.items() for file in part.files}
    found = scattered(store, directory, files, parts, wholes, peers)
    verified = {}
    for name, part in wanted.items():
        tensors = {
            info.path: tensor
            if info.strides is None or info.path in wholes[name].landings
            else tree.laid_out(tensor, info.strides)
            for info, tensor in found[name].items()
        }
        infos = {info.path: info for info in found[name]} | wholes[name].infos
        tensors |= wholes[name].tensors
        _add_aliases(directory, name, part, tensors, infos)
        verified[name] = _Verified(part.tree, tensors, infos, wholes[name].landings)
    return verified


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


def _assemble(directory: str, name: str, part: Part, shards: dict[str, Shard], wholes: Wholes) -> _Verified:
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
    _add_aliases(directory, name, part, tensors, infos)
    for further, stored in part.aliases.items():
        blocks[further] = blocks[stored]
    if is_complete:
        try:
            computed = digest({infos[path]: checksum_of_blocks(blocks[path]) for path in tensors}, part.tree)
        except (ValueError, RecursionError) as error:  # text that is none, a number beyond all, too many levels
            raise Corrupt(f"{directory}: {name}: {type(error).__name__}: {error}") from None
        if computed != part.digest:
            raise Corrupt(f"{directory}: {name}: expected digest {part.digest}, found {computed}")
    return _Verified(part.tree, tensors, infos, wholes.landings)


def _add_aliases(
    directory: str, name: str, part: Part, tensors: dict[str, torch.Tensor], infos: dict[str, TensorInfo]
) -> None:
    """Gives tensors their further names."""
    try:
        for further, stored in part.aliases.items():
            if further in tensors:
                raise Corrupt(
                    f"{directory}: {name}: {further!r} is an alias of {stored!r}, but is stored as a tensor of its own"
                )
            infos[further] = replace(infos[stored], path=further)
            tensors[further] = tensors[stored]
    except (KeyError, TypeError):
        raise Corrupt(f"{directory}: {name}: {further!r} is an alias of {stored!r}, which is missing") from None


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


# --- file by file ----------------------------------------------------------------------------------------------------


def read_shard(store: Store, name: str, file: FileInfo, target: Target | None = None, pages: Pages | None = None) -> Shard:
    """What is in a file, verified against the manifest's entry for it. An index has no tensors."""
    threads = threads_for(file.bytes) if store.is_local else 1
    return read_file(store, name, file, lambda stream: _consume(stream, file, target, pages or Pages(file.bytes), threads))


def _consume(stream: BinaryIO, file: FileInfo, target: Target | None, pages: Pages, threads: int = 1) -> Shard:
    if file.name.endswith(INDEX_SUFFIX):
        check_bytes(stream, file)
        return Shard({}, {}, {})
    return _Reader(stream, file, target or Target(), pages, threads).tensors()


class _Stretch(NamedTuple):
    """Bytes of a file, and where they go: to ``memory``, and from there to a place that other files go to, too."""

    start: int
    memory: memoryview
    hashers: Sequence[Hasher | BlockHasher]
    place: Place | None = None
    offset: int = 0  # in the place's source


class _Source(NamedTuple):
    """What a file has under a name, and where it goes."""

    info: TensorInfo
    memory: memoryview | None  # that has each of its bytes at last; None where only some of them are wanted
    place: Place | None = None
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

    def __init__(self, stream: BinaryIO, file: FileInfo, target: Target, pages: Pages, threads: int) -> None:
        self.stream = stream
        self.pages = pages
        self.target = target
        self.threads = threads
        self.file, self.size_bytes = file, file.bytes
        self.whole = hasher(file.algorithm)

    def tensors(self) -> Shard:
        self.target.begin(self)
        infos, start = self.header()
        tensors: dict[str, torch.Tensor] = {}
        sources = [self.source(info, tensors) for info in infos]
        own = [BlockHasher(self.file.algorithm) for _ in infos]
        hashing = InTurn(self.hash)

        def read(numbered: tuple[int, _Stretch]) -> None:
            self.fill(numbered[1])
            hashing.bring(*numbered)

        side_by_side(self.threads, read, enumerate(self.stretches(start, sources, own)))
        if self.read_at(self.size_bytes, memoryview(bytearray(1))):
            raise Corrupt(f"expected {self.size_bytes} bytes, found more")
        if (found := self.file.checksum_of(self.whole)) != self.file.checksum:
            raise Corrupt(f"expected {self.file.checksum}, found {found}")
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
        if wholes is not None and (known := wholes.known(info)) is not None:
            place, offset = known
            memory = place.memory[offset : offset + info.nbytes] if place.is_direct else None
            return _Source(info, memory, place, offset)
        if wholes is not None and (landed := wholes.landed(info)) is not None:
            place, tensors[info.path] = landed
            return _Source(info, place.memory if place.is_direct else None, place)
        memory_of = empty if wholes is None else wholes.memory
        tensors[info.path] = tensor = memory_of(info.path, info.shape, info.dtype)
        return _Source(info, bytes_of(tensor))

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


# --- in pieces -------------------------------------------------------------------------------------------------------


def _read_in_pieces(
    store: Store,
    directory: str,
    files: Sequence[FileInfo],
    targets: Mapping[str, Target],
    pages: Pages,
    peers: Peers | None,
) -> dict[str, Shard]:
    """Reads files, the next one's first pieces beside the last ones of the one before; with ``peers`` each byte once between
    all ranks, and whatever goes wrong on one of them, all stop after the same round."""
    relay = Relay(store, directory, files, peers)
    pieces = relay.pieces()
    found: dict[str, Shard] = {}
    for file in files:
        try:
            found[file.name] = _consume(joined(islice(pieces, relay.count(file))), file, targets.get(file.name), pages)
        except CheckpointError as error:
            relay.problem = relay.problem or type(error)(f"{file.path(directory)}: {error}")
            for _ in pieces:  # the others learn of it with the next round, if there is one
                pass
            raise relay.problem from None
    return found
