"""Reading a checkpoint back: every byte is verified before a value leaves this module.

A file is read once: a shard's header is parsed under bounds, each tensor's bytes go straight to their place in fresh
memory, and both checksums, the file's and the tensor's, are computed a piece at a time and in order, while the piece is
still in a core's cache. Only when they agree with the manifest are the tensors handed out. Nothing is executed:
there is no pickle on this path.

The pieces of a tensor that lies in several go to their places in the whole. A local file is read by several threads, each a
stretch of it, whose pages it has the kernel give first (``harness.checkpoint.prefault``), and hashed by them in turn.

Ranks that read together (``peers``) read each byte once between them: of every round of pieces each rank reads one, and
gets all. Each computes the checksums of all that it was given.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch

from harness.checkpoint import tree
from harness.checkpoint.catalog import check_bytes, read_file
from harness.checkpoint.format import (
    HEADER_LIMIT_BYTES,
    INDEX_SUFFIX,
    BlockHasher,
    Blocks,
    FileInfo,
    Hasher,
    Manifest,
    Part,
    Slices,
    TensorInfo,
    checksum_of_blocks,
    decode_header,
    digest,
    hasher,
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

Shard = tuple[dict[str, torch.Tensor], dict[str, Blocks]]  # whole tensors, and the checksums of all blocks, by name


class Peers(Protocol):
    """The ranks that read together; ``harness.distributed.world.World`` is one."""

    rank: int
    size: int

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Fills ``found`` with every rank's bytes, by rank. All have the same size."""


def read(
    store: Store, directory: str, manifest: Manifest, parts: Iterable[str] | None = None, *, peers: Peers | None = None
) -> dict[str, Any]:
    """The parts of a checkpoint (all of them, or those named) as they were given to ``commit.write``, on the CPU.

    Tensors are fresh; tied ones are the same object. Raises ``Corrupt`` with the file's name, what was expected and what was
    found, or ``StoreError``. With ``peers`` all of them call this alike, and when one fails the others raise
    ``RankFailure``, unless it has failed after the last byte.
    """
    wanted = manifest.parts if parts is None else {name: manifest.parts[name] for name in parts}
    files = {file.name: file for file in manifest.files}
    # An index is not needed here, but what is corrupt is not called whole.
    names = [file for name, part in wanted.items() for file in (f"{name}{INDEX_SUFFIX}", *part.files) if file in files]
    needed = [files[name] for name in names]
    in_pieces = peers is not None or store.has_ranges
    pages = Pages(sum(file.bytes for file in needed))
    with without_collections():
        wholes = {name: _Wholes(directory, name, part, files) for name, part in wanted.items()}
        targets = {file: _Target(wholes[name].places) for name, part in wanted.items() for file in part.files}
        if in_pieces:
            shards = _read_in_pieces(store, directory, needed, targets, pages, peers)
        else:
            shards = {
                each.name: read_shard(store, f"{directory}/{each.name}", each, targets.get(each.name), pages)
                for each in needed
            }
        return {name: _assemble(directory, name, part, shards, wholes[name].tensors) for name, part in wanted.items()}


def _assemble(directory: str, name: str, part: Part, shards: dict[str, Shard], wholes: Mapping[str, torch.Tensor]) -> Any:
    """The value of a part whose shards have been read, and with them the pieces of ``wholes``."""
    tensors: dict[str, torch.Tensor] = {}
    blocks: dict[str, Blocks] = {}
    for file in part.files:
        found, found_blocks = shards[file]
        if twice := blocks.keys() & found_blocks.keys():
            raise Corrupt(f"{directory}/{file}: {min(twice)} is in another shard too")
        tensors |= found
        blocks |= found_blocks
    for path, slices in part.slices.items():
        if path in tensors:
            raise Corrupt(f"{directory}: {name}: {path} is stored in pieces and as a tensor of its own")
        tensors[path], blocks[path] = wholes[path], _joined_blocks(directory, name, path, slices, blocks)
    try:
        for further, stored in part.aliases.items():
            if further in tensors:
                raise Corrupt(
                    f"{directory}: {name}: {further!r} is an alias of {stored!r}, but is stored as a tensor of its own"
                )
            tensors[further], blocks[further] = tensors[stored], blocks[stored]
    except (KeyError, TypeError):
        raise Corrupt(f"{directory}: {name}: {further!r} is an alias of {stored!r}, which is missing") from None
    try:
        infos = {tree.info(path, tensor): checksum_of_blocks(blocks[path]) for path, tensor in tensors.items()}
        computed = digest(infos, part.tree)
    except (ValueError, RecursionError) as error:  # text that is none, a number beyond all, too many levels
        raise Corrupt(f"{directory}: {name}: {type(error).__name__}: {error}") from None
    if computed != part.digest:
        raise Corrupt(f"{directory}: {name}: expected digest {part.digest}, found {computed}")
    return tree.decode(part.tree, tensors)


def _joined_blocks(directory: str, name: str, path: str, slices: Slices, blocks: dict[str, Blocks]) -> Blocks:
    """The checksums of a whole tensor's blocks, of which each piece has some."""
    found: list[str] = []
    for piece, start, stop in slices.pieces(path):
        if piece not in blocks:
            raise Corrupt(f"{directory}: {name}: bytes {start} to {stop} of {path} are missing")
        found += blocks.pop(piece)
    return tuple(found)


# --- tensors in pieces -----------------------------------------------------------------------------------------------


class _Wholes:
    """The tensors of a part that lie in pieces, and the place of each piece in them, by its name.

    Raises ``Corrupt`` before it takes memory for more bytes than the part's files have.
    """

    def __init__(self, directory: str, name: str, part: Part, files: Mapping[str, FileInfo]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.places: dict[str, memoryview] = {}
        needed_bytes = sum(slices.nbytes for slices in part.slices.values())
        if needed_bytes > (there_bytes := sum(files[file].bytes for file in part.files)):
            raise Corrupt(f"{directory}: {name}: pieces of {needed_bytes} bytes in files of {there_bytes}")
        for path, slices in part.slices.items():
            self.tensors[path] = tensor = _empty(f"{directory}: {name}: {path}", slices.shape, slices.dtype)
            for piece, start, stop in slices.pieces(path):
                self.places[piece] = _bytes_of(tensor)[start:stop]


class _Target:
    """Where the pieces in a file go: into memory that other files go to as well, and that stays when a try has failed.

    A try that hung and was given up may wake up later. It must not write over what its successor has verified.
    """

    def __init__(self, places: Mapping[str, memoryview]) -> None:
        self.places = places
        self._lock = threading.Lock()
        self._reader: object = None

    def begin(self, reader: object) -> None:
        """From here on only this reader may write."""
        with self._lock:
            self._reader = reader

    def put(self, reader: object, place: memoryview, data: memoryview) -> None:
        with self._lock:
            if self._reader is not reader:
                raise TimeoutError("cancelled: nothing waits for the result")
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data, np.uint8))


# --- file by file ----------------------------------------------------------------------------------------------------


def read_shard(store: Store, name: str, file: FileInfo, target: _Target | None = None, pages: Pages | None = None) -> Shard:
    """What is in a file, verified against the manifest's entry for it. An index has no tensors."""
    threads = threads_for(file.bytes) if store.is_local else 1
    return read_file(store, name, file, lambda stream: _consume(stream, file, target, pages or Pages(file.bytes), threads))


def _consume(stream: BinaryIO, file: FileInfo, target: _Target | None, pages: Pages, threads: int = 1) -> Shard:
    if file.name.endswith(INDEX_SUFFIX):
        check_bytes(stream, file)
        return {}, {}
    return _Reader(stream, file, target or _Target({}), pages, threads).tensors()


class _Stretch(NamedTuple):
    """Bytes of a file, and where they go."""

    start: int
    place: memoryview
    is_shared: bool  # with other files' bytes, see ``_Target``
    hashers: Sequence[Hasher | BlockHasher]


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
        places = [self.place(info, tensors) for info in infos]
        own = [BlockHasher(self.algorithm) for _ in infos]
        hashing = InTurn(self.hash)

        def read(numbered: tuple[int, _Stretch]) -> None:
            self.fill(numbered[1])
            hashing.bring(*numbered)

        stretches = enumerate(self.stretches(start, infos, places, own))
        for _ in in_order(self.threads, read, stretches, ahead=2 * self.threads):
            pass
        if self.read_at(self.size_bytes, memoryview(bytearray(1))):
            raise Corrupt(f"expected {self.size_bytes} bytes, found more")
        if (found := f"{self.algorithm}:{self.whole.hexdigest()}") != self.expected:
            raise Corrupt(f"expected {self.expected}, found {found}")
        for info in infos:  # one by one, so that there are never two copies of all
            if info.strides is not None and info.path in tensors:
                tensors[info.path] = tree.laid_out(tensors[info.path], info.strides)
        return tensors, {info.path: each.blocks() for info, each in zip(infos, own, strict=True)}

    def header(self) -> tuple[list[TensorInfo], int]:
        """The tensors, and where the first one begins."""
        header_bytes = int.from_bytes(self.bytes_at(0, 8), "little")
        if header_bytes > min(HEADER_LIMIT_BYTES, self.size_bytes - 8):
            raise Corrupt(f"a header of {header_bytes} bytes in a file of {self.size_bytes}")
        start = 8 + header_bytes
        return decode_header(self.bytes_at(8, header_bytes), self.size_bytes - start), start

    def bytes_at(self, start: int, count: int) -> bytes:
        """The next bytes of the file, and the file's checksum goes on."""
        stretch = _Stretch(start, memoryview(bytearray(count)), is_shared=False, hashers=[self.whole])
        self.fill(stretch)
        self.hash(stretch)
        return bytes(stretch.place)

    def place(self, info: TensorInfo, tensors: dict[str, torch.Tensor]) -> memoryview:
        """The memory for what is stored under a name: a new tensor's, or the piece's within the whole."""
        if (place := self.target.places.get(info.path)) is None:
            tensors[info.path] = tensor = _empty(info.path, info.shape, info.dtype)
            return _bytes_of(tensor)
        if (info.dtype, info.shape) != ("uint8", (len(place),)):
            raise Corrupt(f"{info.path}: expected {len(place)} bytes, found {info.dtype} {list(info.shape)}")
        return place

    def stretches(
        self, start: int, infos: Sequence[TensorInfo], places: Sequence[memoryview], own: Sequence[BlockHasher]
    ) -> Iterator[_Stretch]:
        for info, place, blocks in zip(infos, places, own, strict=True):
            is_shared = info.path in self.target.places
            for offset, piece in cut(place):
                yield _Stretch(start + offset, piece, is_shared, (self.whole, blocks))
            start += len(place)

    def fill(self, stretch: _Stretch) -> None:
        self.pages.give(stretch.place)
        place = memoryview(bytearray(len(stretch.place))) if stretch.is_shared else stretch.place
        done_bytes = 0
        while done_bytes < len(place):
            count = self.read_at(stretch.start + done_bytes, place[done_bytes:])
            if not count:
                raise Corrupt(f"expected {self.size_bytes} bytes, found {stretch.start + done_bytes}")
            done_bytes += count
        if stretch.is_shared:
            self.target.put(self, stretch.place, place)

    def hash(self, stretch: _Stretch) -> None:
        for each in stretch.hashers:
            each.update(stretch.place)

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
