"""Reading for ranks that want different parts of a state: each byte leaves the storage once, and goes to those who want it.

Each file is read by one rank, from its beginning to its end, and verified there. The headers go round first, and with them
which box of each tensor each rank wants. From these all know what every piece of a file has for whom: a message between two
ranks is nothing but items. A round has a piece of each rank; a rank holds its own piece and what the others send it of
theirs. A byte for everybody says whether anything has gone wrong: after a round in which it has, nobody goes on.

In a round in which nobody has anything for another, as where the layout is that of the save, the ranks do not meet: each
goes on at its own pace. They still meet now and then, and at the end. A local file that nobody else wants anything of goes
through a little memory that stays in the processor's cache: fresh memory takes longer than to read into it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch

from harness.checkpoint import relay
from harness.checkpoint.boxes import Box
from harness.checkpoint.catalog import read_file
from harness.checkpoint.format import HEADER_LIMIT_BYTES, INDEX_SUFFIX, FileInfo, Hasher, TensorInfo, decode_header, hasher
from harness.checkpoint.places import ITEMS, Overlap, Place, Target, Wholes, overlaps
from harness.checkpoint.relay import Peers
from harness.errors import CheckpointError, Corrupt, HarnessError, StoreError
from harness.storage.store import Store

ROUND_BYTES = 64 << 20  # of all pieces of a round; a rank holds its own, and at most so much of what the others send it,
_PIECE_BYTES = 8 << 20  # however few they are
WINDOW_BYTES = 1 << 20  # of what is read alone
MEETS_EVERY = 16  # rounds at least: nobody waits for a slow rank for longer than these take it
_FLAG_BYTES = 16  # so that the items behind it are aligned
_HEADER_BYTES = 64 << 10  # of a file, that are asked for first
_OTHER_HEADER = "its header has just been another"


class Partners(Peers, Protocol):
    """Ranks of which each wants something else."""

    def hand_out(self, own: torch.Tensor, sizes: list[int], found: torch.Tensor, sizes_found: list[int]) -> None:
        """Gives each rank its part of ``own``, by rank, and fills ``found`` with what each has for this one."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""


class _Source(NamedTuple):
    """What a file has under a name: bytes of a place's source, from one on."""

    name: str
    place: Place
    start: int
    nbytes: int


class _File(NamedTuple):
    """A file, its header, and what follows it, in order."""

    info: FileInfo
    header: bytes
    part: str
    sources: list[_Source]


class _Stretch(NamedTuple):
    """A part of a source, and where its bytes begin in a piece."""

    part: str
    place: Place
    first: int  # its items, within the place's source
    stop: int
    at: int


class _Piece(NamedTuple):
    """Bytes of a file, and the whole items that they are."""

    file: _File
    start: int
    size_bytes: int
    stretches: list[_Stretch]


class _Share(NamedTuple):
    """What a rank wants of a stretch."""

    stretch: _Stretch
    overlap: Overlap

    @property
    def nbytes(self) -> int:
        return self.overlap.common.items * self.stretch.place.info.itemsize


def scattered(
    store: Store,
    directory: str,
    files: Sequence[FileInfo],
    parts: Mapping[str, str],
    wholes: Mapping[str, Wholes],
    peers: Partners,
) -> dict[str, dict[TensorInfo, torch.Tensor]]:
    """Reads files together with ``peers`` into the memory of ``wholes``, each of its part (``parts`` has them by file), and
    returns the further tensors of each part. All ranks call it alike.

    Raises ``Corrupt`` or ``StoreError`` where this rank has failed, ``RankFailure`` where another has.
    """
    headers = _headers(store, directory, files, peers)
    tensors: dict[str, dict[TensorInfo, torch.Tensor]] = {name: {} for name in wholes}
    found = []
    for info, header in zip(files, headers, strict=True):
        part = parts.get(info.name, "")
        try:
            sources = [*_sources(info, header, wholes[part], tensors[part])] if part else []
        except Corrupt as error:
            raise Corrupt(f"{info.path(directory)}: {error}") from None
        found.append(_File(info, header, part, sources))
    for part, each in wholes.items():
        if missing := each.places.keys() - {source.name for file in found if file.part == part for source in file.sources}:
            raise Corrupt(f"{directory}: {part}: {min(missing)} is not there")
    boxes = {(part, path): each.box for part, all_of in wholes.items() for path, each in all_of.landings.items()}
    wanted = peers.all_gather({key: (box.offset, box.shape) for key, box in boxes.items()})
    _Scatter(store, directory, found, wanted, peers).run()
    return tensors


def _sources(file: FileInfo, header: bytes, wholes: Wholes, tensors: dict[TensorInfo, torch.Tensor]) -> Iterator[_Source]:
    """Where what is in a file goes here; ``tensors`` gets what goes nowhere yet."""
    for info in decode_header(header[8:], file.bytes - len(header)):
        place, start, fresh = wholes.place_of(info)
        if fresh is not None and tensors.setdefault(info, fresh) is not fresh:
            raise Corrupt(f"{info.path} is in another shard too")
        yield _Source(info.path, place, start, info.nbytes)


# --- the headers -----------------------------------------------------------------------------------------------------


def _headers(store: Store, directory: str, files: Sequence[FileInfo], peers: Partners) -> list[bytes]:
    """The first bytes of each file, up to the first tensor's; each rank reads some. They are verified with the rest."""
    problem: HarnessError | None = None
    own: list[bytes] = []
    try:
        own = [_header(store, file.path(directory), file) for file in files[peers.rank :: peers.size]]
    except (CheckpointError, StoreError) as error:
        problem = error
    found = peers.all_gather((problem is not None, own))
    if problem is not None:
        raise problem
    relay.raise_for(rank for rank, (has_failed, _) in enumerate(found) if has_failed)
    return [found[index % peers.size][1][index // peers.size] for index in range(len(files))]


def _header(store: Store, name: str, file: FileInfo) -> bytes:
    if name.endswith(INDEX_SUFFIX):
        return b""
    try:
        first = store.read_range(name, 0, min(_HEADER_BYTES, file.bytes))
        size_bytes = int.from_bytes(first[:8], "little")
        if len(first) < 8 or size_bytes > min(HEADER_LIMIT_BYTES, file.bytes - 8):
            raise Corrupt(f"{name}: a header of {size_bytes} bytes in a file of {len(first)} or more; expected {file.bytes}")
        rest_bytes = max(8 + size_bytes - len(first), 0)
        text = first[: 8 + size_bytes] + store.read_range(name, len(first), rest_bytes)
    except FileNotFoundError:
        raise Corrupt(f"{name}: missing; expected {file.bytes} bytes") from None
    if len(text) < 8 + size_bytes:
        raise Corrupt(f"{name}: expected {file.bytes} bytes, found {len(text)}")
    return text


# --- who reads what --------------------------------------------------------------------------------------------------


def _readers(files: Iterable[_File], wanted: Sequence[Mapping[Any, Box]]) -> dict[str, int]:
    """The rank that reads each file: the one that has the least to do, if it counts what it would have to send away."""
    loads = [0.0] * len(wanted)
    found = {}
    for file in sorted(files, key=lambda each: (-each.info.bytes, each.info.name)):
        costs = [load + file.info.bytes * (1 - _affinity(file, boxes)) for load, boxes in zip(loads, wanted, strict=True)]
        found[file.info.name] = rank = costs.index(min(costs))
        loads[rank] += file.info.bytes
    return found


def _affinity(file: _File, boxes: Mapping[Any, Box]) -> float:
    """How much a rank wants of a file, judged by its largest tensor: from 0 to 1."""
    if not file.sources:
        return 0
    place = max(file.sources, key=lambda source: source.nbytes).place
    common = _target(boxes, file.part, place.info).common(place.source)
    return common.items / place.source.items if common is not None else 0


def _target(boxes: Mapping[Any, Box], part: str, info: TensorInfo) -> Box:
    return boxes.get((part, info.path)) or Box.whole(info.shape)


# --- the rounds ------------------------------------------------------------------------------------------------------


class _Scatter:
    """Files on their way to the ranks."""

    def __init__(
        self,
        store: Store,
        directory: str,
        files: Sequence[_File],
        wanted: Sequence[Mapping[Any, tuple[Any, Any]]],
        peers: Partners,
    ) -> None:
        self.store, self.directory, self.peers = store, directory, peers
        self.wanted = [{key: Box(*box) for key, box in each.items()} for each in wanted]
        readers = _readers(files, self.wanted)
        self.files = [[file for file in files if readers[file.info.name] == rank] for rank in range(peers.size)]
        self._patterns: dict[tuple[str, str], tuple[Box, ...]] = {}  # what each rank wants of a tensor, by rank
        self._known_patterns: dict[tuple[Box, ...], tuple[Box, ...]] = {}  # most tensors are cut as others are
        self._known: dict[tuple[int, Box], frozenset[int]] = {}
        self.piece_bytes = max(min(ROUND_BYTES // peers.size, _PIECE_BYTES) // 16 * 16, 16)  # of any items
        self.problem: HarnessError | None = None
        self._alone = _Alone(store, directory)

    def run(self) -> None:
        """Reads everything. Raises what this rank has failed of, or ``RankFailure``."""
        rank = self.peers.rank
        alone = {file.info.name for file in self.files[rank] if self.store.is_local and self._is_for(file, rank)}
        own = self._read(piece for piece in self._pieces(rank) if piece.file.info.name not in alone)
        for number, pieces in enumerate(itertools.zip_longest(*map(self._pieces, range(self.peers.size))), start=1):
            piece, data = pieces[rank], None
            if piece is not None:
                is_alone = piece.file.info.name in alone
                data = self._try(functools.partial(self._alone.read, piece) if is_alone else own.__next__)
            wanting = [self._wanting(piece) for piece in pieces]
            if number % MEETS_EVERY == 0 or any(each - {reader} for reader, each in enumerate(wanting)):
                self._exchange(pieces, data, wanting)
            elif data is not None:
                for share in self._shares(piece, rank):
                    _put(share, _items(data, share.stretch))
        nobody: list[Any] = [None] * self.peers.size
        self._exchange(nobody, None, [frozenset()] * self.peers.size)

    def _pieces(self, rank: int) -> Iterator[_Piece]:
        """What a rank reads, piece after piece."""
        for file in self.files[rank]:
            yield from _cut(file, self.piece_bytes)

    def _shares(self, piece: _Piece | None, rank: int) -> list[_Share]:
        """What a rank wants of a piece, in the order of its bytes."""
        return [
            _Share(stretch, overlap)
            for stretch in (piece.stretches if piece is not None else ())
            for overlap in overlaps(
                stretch.place.source,
                _target(self.wanted[rank], stretch.part, stretch.place.info),
                stretch.first,
                stretch.stop,
            )
        ]

    def _wanting(self, piece: _Piece | None) -> frozenset[int]:
        """The ranks that may want something of a piece: all that do are among them. The same on every rank."""
        return frozenset().union(*map(self._wanting_of, piece.stretches if piece is not None else ()))

    def _wanting_of(self, stretch: _Stretch) -> frozenset[int]:
        source, info = stretch.place.source, stretch.place.info
        pattern = self._patterns.get((stretch.part, info.path))
        if pattern is None:
            pattern = tuple(_target(boxes, stretch.part, info) for boxes in self.wanted)
            pattern = self._patterns[stretch.part, info.path] = self._known_patterns.setdefault(pattern, pattern)
        found = self._known.get((id(pattern), source))
        if found is None:
            found = frozenset(rank for rank, box in enumerate(pattern) if box.common(source) is not None)
            self._known[id(pattern), source] = found
        return found

    def _exchange(self, pieces: Sequence[_Piece | None], data: bytes | None, wanting: Sequence[frozenset[int]]) -> None:
        rank, ranks = self.peers.rank, range(self.peers.size)
        to = [self._shares(pieces[rank], other) if other in wanting[rank] else [] for other in ranks]
        of = [self._shares(pieces[other], rank) if other != rank and rank in wanting[other] else [] for other in ranks]
        own, to[rank] = to[rank], []
        sizes, sizes_found = ([_FLAG_BYTES + sum(share.nbytes for share in each) for each in both] for both in (to, of))
        sent, found = np.zeros(sum(sizes), np.uint8), np.empty(sum(sizes_found), np.uint8)
        if data is not None and self.problem is None:
            _pack(data, to, sent, sizes)
            for share in own:
                _put(share, _items(data, share.stretch))
        sent[_starts(sizes)] = self.problem is not None
        self.peers.hand_out(torch.from_numpy(sent), sizes, torch.from_numpy(found), sizes_found)
        if self.problem is not None:
            raise self.problem
        relay.raise_for(np.flatnonzero(found[_starts(sizes_found)]).tolist())
        for start, shares in zip(_starts(sizes_found), of, strict=True):
            at = start + _FLAG_BYTES
            for share in shares:
                common = share.overlap.common
                items: Any = found[at : at + share.nbytes].view(ITEMS[share.stretch.place.info.itemsize])
                share.stretch.place.items[common.within(share.stretch.place.target)] = items.reshape(common.shape)
                at += share.nbytes

    def _is_for(self, file: _File, rank: int) -> bool:
        """Whether nobody but a rank wants anything of a file."""
        return all(self._wanting(piece) <= {rank} for piece in _cut(file, file.info.bytes))

    def _try(self, read: Callable[[], bytes | None]) -> bytes | None:
        """This rank's next piece; None where it was read alone, or where something has gone wrong."""
        if self.problem is None:
            try:
                return read()
            except (CheckpointError, StoreError) as error:
                self.problem = error
        return None

    def _read(self, pieces: Iterable[_Piece]) -> Iterator[bytes]:
        """The bytes of pieces, the next ones on their way; a file's last piece comes when all of the file is verified."""
        pieces, coming = itertools.tee(pieces)
        ranges = ((self._name(each), each.start, each.size_bytes + _is_last(each)) for each in coming)
        found = self.store.pieces(ranges)
        for piece in pieces:
            info = piece.file.info
            if not piece.start:
                whole = hasher(info.algorithm)
            try:
                data = next(found)
            except FileNotFoundError:
                raise Corrupt(f"{self._name(piece)}: missing; expected {info.bytes} bytes") from None
            if len(data) != piece.size_bytes:
                there = "more" if len(data) > piece.size_bytes else piece.start + len(data)
                raise Corrupt(f"{self._name(piece)}: expected {info.bytes} bytes, found {there}")
            whole.update(data)
            if not piece.start and not data.startswith(piece.file.header):
                raise Corrupt(f"{self._name(piece)}: {_OTHER_HEADER}")
            if _is_last(piece) and (checksum := info.checksum_of(whole)) != info.checksum:
                raise Corrupt(f"{self._name(piece)}: expected {info.checksum}, found {checksum}")
            yield data

    def _name(self, piece: _Piece) -> str:
        return piece.file.info.path(self.directory)


class _Alone:
    """Files of which nobody else wants anything, piece after piece, on their way to this rank's memory."""

    def __init__(self, store: Store, directory: str) -> None:
        self.store, self.directory = store, directory
        self._whole: Hasher = hasher()  # of the file that is being read, up to here
        self._target = Target()

    def read(self, piece: _Piece) -> None:
        """Reads a piece and puts it where it goes. Raises ``Corrupt`` where that, or with it the whole file, is another."""
        info = piece.file.info
        self._whole = read_file(self.store, info.path(self.directory), info, lambda stream: self._consumed(stream, piece))

    def _consumed(self, stream: BinaryIO, piece: _Piece) -> Hasher:
        info, reader, buffer = piece.file.info, object(), memoryview(bytearray(WINDOW_BYTES))
        self._target.begin(reader)
        whole = self._whole.copy() if piece.start else hasher(info.algorithm)
        stream.seek(piece.start)
        for place, start, size_bytes in _windows(piece):
            window = buffer[:size_bytes] if place is not None else memoryview(bytearray(size_bytes))
            if stream.readinto(window) < size_bytes:  # type: ignore[attr-defined]
                raise Corrupt(f"expected {info.bytes} bytes, found {stream.tell()}")
            whole.update(window)
            if place is not None:
                self._target.put(reader, place, start, window)
            elif not piece.start and not bytes(window).startswith(piece.file.header):
                raise Corrupt(_OTHER_HEADER)
        if _is_last(piece) and stream.read(1):
            raise Corrupt(f"expected {info.bytes} bytes, found more")
        if _is_last(piece) and (found := info.checksum_of(whole)) != info.checksum:
            raise Corrupt(f"expected {info.checksum}, found {found}")
        return whole


def _windows(piece: _Piece) -> Iterator[tuple[Place | None, int, int]]:
    """A piece's bytes, a few at a time: where they go, the first one's number in that place's source, and how many they
    are. A header, and an index, go nowhere."""
    yield None, 0, piece.stretches[0].at if piece.stretches else piece.size_bytes
    for stretch in piece.stretches:
        itemsize = stretch.place.info.itemsize
        stop = stretch.stop * itemsize
        for start in range(stretch.first * itemsize, stop, WINDOW_BYTES):
            yield stretch.place, start, min(WINDOW_BYTES, stop - start)


def _is_last(piece: _Piece) -> bool:
    return piece.start + piece.size_bytes == piece.file.info.bytes


def _cut(file: _File, most_bytes: int) -> Iterator[_Piece]:
    """A file in pieces of about this size, none of which ends within an item. The first one has the header, too."""
    start, at = 0, len(file.header)
    stretches: list[_Stretch] = []
    if not file.sources and len(file.header) < file.info.bytes:  # an index
        at = file.info.bytes
    for source in file.sources:
        itemsize, done = source.place.info.itemsize, 0
        while done < source.nbytes:
            if at - start >= most_bytes:
                yield _Piece(file, start, at - start, stretches)
                start, stretches = at, []
            room = max((most_bytes - (at - start)) // 16 * 16, 16)
            count = min(source.nbytes - done, room)
            first = (source.start + done) // itemsize
            stretches.append(_Stretch(file.part, source.place, first, first + count // itemsize, at - start))
            done, at = done + count, at + count
    yield _Piece(file, start, at - start, stretches)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)][:-1]


def _items(data: bytes, stretch: _Stretch) -> Any:
    """Those of a stretch in a piece."""
    return np.frombuffer(data, ITEMS[stretch.place.info.itemsize], stretch.stop - stretch.first, stretch.at)


def _put(share: _Share, items: Any) -> None:
    """What this rank wants of its own piece."""
    place, common = share.stretch.place, share.overlap.common
    place.items[common.within(place.target)] = share.overlap.of(items)


def _pack(data: bytes, to: Sequence[Sequence[_Share]], sent: Any, sizes: Sequence[int]) -> None:
    """What the others want of a piece."""
    for start, shares in zip(_starts(sizes), to, strict=True):
        at = start + _FLAG_BYTES
        for share in shares:
            there = sent[at : at + share.nbytes].view(ITEMS[share.stretch.place.info.itemsize])
            there.reshape(share.overlap.common.shape)[...] = share.overlap.of(_items(data, share.stretch))
            at += share.nbytes
