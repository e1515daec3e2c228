"""Who writes what: a state divided among the ranks that write it together, and into shards.

Only what is the same on all ranks, bit for bit, may be divided, and only the caller knows what is. The rest, all JSON
included, is the first writer's. Each writer computes the whole plan from names, dtypes and shapes, and asks nobody.

A tensor of more than a block (see ``harness.checkpoint.format``) can be cut between its blocks. It is where one writer's
share ends within it, and where it would be larger than a shard.

Of a sharded tensor each rank knows its own box. So the ranks say once which boxes they have (see
``harness.checkpoint.sharding``), and from that each again computes alone who writes what: each box is written once, by that
one of its holders that has the least.
"""

import functools
import heapq
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch

from harness.checkpoint import format as layout
from harness.checkpoint import tree
from harness.checkpoint.boxes import Box
from harness.checkpoint.format import (
    Blocks,
    Boxes,
    Receipt,
    Slices,
    TensorInfo,
    box_text,
    checksum,
    checksum_of_blocks,
    checksum_of_texts,
    encode_header,
    piece_name,
    plan_shards,
    shard_name,
)
from harness.checkpoint.sharding import Key, Sharding
from harness.checkpoint.tree import Encoded
from harness.errors import Unsupported
from harness.runtime.gc_pause import without_collections

IsSteady = Callable[[torch.Tensor], bool]
# Path, dtype, shape, strides to note, whether it can be cut, whether it may be divided.
_Form = tuple[str, torch.dtype, torch.Size, tuple[int, ...] | None, bool, bool]
Found = Mapping[str, Mapping[str, Blocks]]  # the checksums of what lies in shards, by part and name


def nothing_is_steady(_tensor: torch.Tensor) -> bool:
    """Nobody vouches for any tensor."""
    return False


@dataclass(frozen=True)
class Writers:
    """The ranks that write a checkpoint together, and the one that this is. The first of them commits; it waits for the
    others no longer than ``patience_seconds`` from the beginning of a save."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    patience_seconds: float = 600

    @property
    def is_first(self) -> bool:
        return self.rank == self.ranks[0]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A tensor, or a range of its raw bytes, as it lies in one shard."""

    part: str
    tensor: TensorInfo
    start: int
    stop: int
    can_be_cut: bool = False
    stored: TensorInfo = field(init=False)  # what the shard has

    def __post_init__(self) -> None:
        stored = self.tensor
        if self.nbytes < stored.nbytes:
            stored = TensorInfo(piece_name(stored.path, self.start), "uint8", (self.nbytes,))
        object.__setattr__(self, "stored", stored)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def cut(self, size_bytes: int) -> list["TensorSlice"]:
        """The piece in pieces of at most such a size."""
        starts = range(self.start, self.stop, size_bytes)
        return [replace(self, start=start, stop=min(start + size_bytes, self.stop)) for start in starts]


class BoxForm(NamedTuple):
    """What the boxes at one place have in common, whichever tensor they are of: most tensors are cut as others are."""

    box: Box
    nbytes: int
    text: str  # as it stands in a manifest
    suffix: str  # of its name in a shard

    @classmethod
    def of(cls, box: Box, itemsize: int) -> Self:
        return cls(box, box.items * itemsize, box_text(box), piece_name("", *box.offset))


class TensorBox(NamedTuple):  # of a large job there are hundreds of thousands
    """A box of a sharded tensor, as it lies in one shard."""

    part: str
    tensor: TensorInfo  # the whole one
    form: BoxForm
    name: str  # under which the shard has it

    @property
    def stored(self) -> TensorInfo:
        """What the shard has."""
        return TensorInfo(self.name, self.tensor.dtype, self.form.box.shape)


Piece = TensorSlice | TensorBox


@dataclass(frozen=True)
class Shard:
    """A file: its name, its part, and the tensors in it. Of a frozen one, an earlier save may have the bytes."""

    name: str
    part: str
    tensors: list[TensorInfo]
    is_frozen: bool = False

    @functools.cached_property
    def header(self) -> bytes:
        """The bytes before the first tensor's."""
        return encode_header(self.tensors)

    @functools.cached_property
    def data_bytes(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Those of the file."""
        return len(self.header) + self.data_bytes


def divide(pieces: Iterable[TensorSlice], count: int) -> list[list[TensorSlice]]:
    """So many shares of about as many bytes.

    The large tensors, laid end to end, are cut between blocks into stretches of the same length, so that few are cut at all;
    the others go, the largest first, to the rank that has the least.
    """
    order = sorted(pieces, key=lambda piece: (-piece.nbytes, piece.part, piece.tensor.path))
    shares: list[list[TensorSlice]] = [[] for _ in range(count)]
    large = [piece for piece in order if piece.can_be_cut]
    total, done = sum(piece.nbytes for piece in large), 0
    for piece in large:
        for block in piece.cut(layout.BLOCK_BYTES):
            share = shares[(2 * done + block.nbytes) * count // (2 * total)]  # where the middle of the block is
            if share and share[-1].tensor is block.tensor:
                share[-1] = replace(share[-1], stop=block.stop)
            else:
                share.append(block)
            done += block.nbytes
    least = [(sum(piece.nbytes for piece in share), index) for index, share in enumerate(shares)]
    heapq.heapify(least)
    for piece in order:
        if not piece.can_be_cut:
            size, index = least[0]
            shares[index].append(piece)
            heapq.heapreplace(least, (size + piece.nbytes, index))
    return shares


def _boxes_of(name: str, path: str, part: Encoded, sharding: Sharding | None) -> Mapping[Box, tuple[int, ...]]:
    """The boxes of a tensor and their holders; none where it is written as one that is whole.

    Raises ``Unsupported`` for a sharded one where nobody knows what the other ranks have.
    """
    if path not in part.placed:
        return {}
    if sharding is None:
        advice = "harness.Run saves it from all ranks; here, give tensor.full_tensor()"
        raise Unsupported(f"{name}/{path}: a DTensor, of which each rank has a part; {advice}")
    key = name, path
    return {} if sharding.is_whole(key, part.placed[path].shape) else sharding.boxes[key]


def _forms_with_holders(boxes: Mapping[Box, Sequence[int]], itemsize: int) -> list[tuple[BoxForm, Sequence[int]]]:
    return [(BoxForm.of(box, itemsize), holders) for box, holders in boxes.items()]


def _assigned(placed: Iterable[tuple[TensorBox, Sequence[int]]]) -> Iterator[tuple[int, TensorBox]]:
    """Who writes which box: its holder. Of several holders, for the largest first, the one that has the least so far."""
    sizes: dict[int, int] = {}
    several = []
    for box, holders in placed:
        nbytes = box.form.nbytes
        if len(holders) > 1:
            several.append((-nbytes, box.part, box.tensor.path, box.form.box.offset, box, holders))
            continue
        sizes[holders[0]] = sizes.get(holders[0], 0) + nbytes
        yield holders[0], box
    for *_, box, holders in sorted(several, key=operator.itemgetter(0, 1, 2, 3)):
        rank = min(holders, key=lambda rank: (sizes.get(rank, 0), rank))
        sizes[rank] = sizes.get(rank, 0) + box.form.nbytes
        yield rank, box


def _forms_of(
    parts: Mapping[str, Encoded], writers: Writers, is_steady: IsSteady, sharding: Sharding | None
) -> list[tuple[str, list[_Form]]]:
    """What a plan goes by of the tensors. Beside sharded ones, all others are the first writer's."""
    several = len(writers.ranks) > 1 and sharding is None
    return [
        (name, [_form(path, tensor, several and is_steady(tensor)) for path, tensor in part.tensors.items()])
        for name, part in parts.items()
    ]


def _form(path: str, tensor: torch.Tensor, may_be_divided: bool) -> _Form:
    strides = tree.strides_to_note(tensor)
    can_be_cut = tensor.nbytes > layout.BLOCK_BYTES and strides is None and tree.is_flat(tensor)
    return path, tensor.dtype, tensor.shape, strides, can_be_cut, may_be_divided


class SavePlan:
    """What each writer puts into which shards.

    It is the same on all of them as far as it concerns what may be divided: that for which ``is_steady``. What else there
    is, only the first of them knows. What is ``frozen`` gets shards of its own; of sharded tensors, all must say the same.
    """

    def __init__(
        self,
        parts: Mapping[str, Encoded],
        shard_bytes: int,
        writers: Writers | None = None,
        is_steady: IsSteady = nothing_is_steady,
        sharding: Sharding | None = None,
        frozen: Collection[Key] = (),
    ) -> None:
        self.writers = writers or Writers()
        self.tensors = {name: [part.info(path) for path in part.tensors] for name, part in parts.items()}
        self._shard_bytes, self._sharding, self._frozen = shard_bytes, sharding, frozen
        self._forms = _forms_of(parts, self.writers, is_steady, sharding)
        ranks = self.writers.ranks
        undivided: list[TensorSlice] = []
        divided: list[TensorSlice] = []
        placed: list[tuple[TensorBox, Sequence[int]]] = []
        known: dict[tuple[int, int], list[tuple[BoxForm, Sequence[int]]]] = {}
        for name, forms in self._forms:
            for info, (path, *_, can_be_cut, may_be_divided) in zip(self.tensors[name], forms, strict=True):
                boxes = _boxes_of(name, path, parts[name], sharding)
                if boxes:
                    key = id(boxes), info.itemsize
                    if key not in known:
                        known[key] = _forms_with_holders(boxes, info.itemsize)
                    placed += [(TensorBox(name, info, form, path + form.suffix), holders) for form, holders in known[key]]
                else:
                    (divided if may_be_divided else undivided).append(TensorSlice(name, info, 0, info.nbytes, can_be_cut))
        shares: list[list[Piece]] = [[*self._fitting(share)] for share in divide(divided, len(ranks))]
        self._shared_parts = {piece.part for piece in divided}
        self._agreed = dict(zip(ranks, shares, strict=True))
        for rank, box in _assigned(placed):
            self._agreed[rank].append(box)
        self.pieces = {**self._agreed, ranks[0]: [*self._fitting(undivided), *self._agreed[ranks[0]]]}

    def is_for(
        self,
        parts: Mapping[str, Encoded],
        shard_bytes: int,
        writers: Writers,
        is_steady: IsSteady = nothing_is_steady,
        sharding: Sharding | None = None,
        frozen: Collection[Key] = (),
    ) -> bool:
        """Whether the plan for these would be the same, which is found in a tenth of the time that a new one takes."""
        alike = (shard_bytes, writers, frozen) == (self._shard_bytes, self.writers, self._frozen)
        return alike and sharding == self._sharding and _forms_of(parts, writers, is_steady, sharding) == self._forms

    def _fitting(self, pieces: Iterable[TensorSlice]) -> list[TensorSlice]:
        """The same, and none that can be cut is larger than a shard."""
        limit = max(self._shard_bytes // layout.BLOCK_BYTES, 1) * layout.BLOCK_BYTES
        whole = max(self._shard_bytes, layout.BLOCK_BYTES)
        return [
            fitting
            for piece in pieces
            for fitting in (piece.cut(limit) if piece.can_be_cut and piece.nbytes > whole else [piece])
        ]

    @functools.cached_property
    def own_shards(self) -> list[Shard]:
        """Those of this rank."""
        return self._shards_of(self.writers.rank)

    @functools.cached_property
    def shards(self) -> dict[int, list[Shard]]:
        """The shards of each writer."""
        own = self.writers.rank
        with without_collections():  # of many ranks these are a million objects
            return {rank: self.own_shards if rank == own else self._shards_of(rank) for rank in self.pieces}

    def _shards_of(self, rank: int) -> list[Shard]:
        shards = []
        by_kind: dict[tuple[str, bool], list[TensorInfo]] = {}
        frozen: dict[tuple[str, bool], list[TensorInfo]] = {}
        for piece in self.pieces[rank]:
            is_frozen = bool(self._frozen) and (piece.part, piece.tensor.path) in self._frozen
            kinds = frozen if is_frozen else by_kind
            kinds.setdefault((piece.part, isinstance(piece, TensorBox)), []).append(piece.stored)
        for name in self.tensors:
            for are_boxes in (False, True):  # who needs no box of a file need not read it
                found = plan_shards(by_kind.get((name, are_boxes), ()), self._shard_bytes)
                suffix = rank if are_boxes or name in self._shared_parts else None
                still = plan_shards(frozen.get((name, are_boxes), ()), self._shard_bytes)
                count = len(still) + len(found)
                for index, each in enumerate([*still, *found]):
                    is_frozen = index < len(still)
                    file = shard_name(name, index, count, suffix, is_frozen=is_frozen)
                    shards.append(Shard(file, name, each, is_frozen))
        return shards

    @functools.cached_property
    def checksum(self) -> str:
        """What the writers must agree on, in a word."""
        lines = [
            f"{rank} {piece.part} {piece.tensor} {piece.stored}\n"
            for rank, pieces in self._agreed.items()
            for piece in pieces
            if isinstance(piece, TensorSlice)
        ]
        said = self._sharding.said if self._sharding else ()  # from which it follows who writes which box
        return checksum("".join([*lines, *said, f"{self._shard_bytes}"]).encode())

    def fits(self, receipt: Receipt) -> bool:
        """Whether a writer has followed this plan."""
        shards = self.shards[receipt.rank]
        expected = {(shard.part, info.path) for shard in shards for info in shard.tensors}
        found = {(part, path) for part, blocks in receipt.blocks.items() for path in blocks}
        files = len(receipt.files) == len(shards) and all(
            file.name == shard.name or (shard.is_frozen and file.base)
            for file, shard in zip(receipt.files, shards, strict=True)
        )
        return receipt.plan == self.checksum and files and found == expected

    def own(
        self, parts: Mapping[str, Encoded], is_steady: IsSteady = nothing_is_steady
    ) -> tuple[dict[str, Encoded], IsSteady]:
        """What this rank writes of the parts, by the names that it has in the shards, and what of that is steady."""
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parts}
        cut_places = set()
        for piece in self.pieces[self.writers.rank]:
            tensor = parts[piece.part].tensors[piece.tensor.path]
            if isinstance(piece, TensorSlice) and piece.stored is not piece.tensor:
                whole, tensor = tensor, tree.flat_bytes(tensor)[piece.start : piece.stop]
                if is_steady(whole):
                    cut_places.add(tensor.data_ptr())
            tensors[piece.part][piece.stored.path] = tensor
        own = {name: replace(part, tensors=tensors[name]) for name, part in parts.items()}
        return own, lambda tensor: is_steady(tensor) or tensor.data_ptr() in cut_places

    # --- when all is written ---

    @functools.cached_property
    def _cut(self) -> dict[tuple[str, str], list[TensorSlice]]:
        """The pieces of each tensor that lies in several, in order."""
        found: dict[tuple[str, str], list[TensorSlice]] = {}
        for pieces in self.pieces.values():
            for piece in pieces:
                if isinstance(piece, TensorSlice) and piece.stored is not piece.tensor:
                    found.setdefault((piece.part, piece.tensor.path), []).append(piece)
        return {key: sorted(pieces, key=lambda piece: piece.start) for key, pieces in found.items()}

    @functools.cached_property
    def _boxes(self) -> dict[Key, list[TensorBox]]:
        """The boxes of each tensor that lies in several, in order."""
        found: dict[Key, list[TensorBox]] = {}
        for pieces in self.pieces.values():
            for piece in pieces:
                if isinstance(piece, TensorBox):
                    found.setdefault((piece.part, piece.tensor.path), []).append(piece)
        for boxes in found.values():
            boxes.sort(key=lambda each: each.form.box.offset)
        return found

    def boxes(self, part: str) -> dict[str, Boxes]:
        """Where the boxes of the tensors are that lie in boxes."""
        return self._places.get(part, {})

    @functools.cached_property
    def _places(self) -> dict[str, dict[str, Boxes]]:
        """The same, of each part."""
        files: dict[str, dict[str, int]] = {name: {} for name in self.tensors}
        counts = dict.fromkeys(self.tensors, 0)
        for shard in itertools.chain(*self.shards.values()):
            files[shard.part] |= dict.fromkeys((info.path for info in shard.tensors), counts[shard.part])
            counts[shard.part] += 1
        found: dict[str, dict[str, Boxes]] = {}
        for (name, path), boxes in self._boxes.items():
            info, numbers = boxes[0].tensor, files[name]
            texts = [f"{each.form.text}@{numbers[each.name]}" for each in boxes]
            found.setdefault(name, {})[path] = Boxes(info.dtype, list(info.shape), texts)
        return found

    def blocks(self, found: Found) -> dict[str, dict[str, Blocks]]:
        """The checksums of the whole tensors' blocks, by part and path, from those of what was written."""
        whole: dict[str, dict[str, Blocks]] = {name: {} for name in self.tensors}
        for name, tensors in self.tensors.items():
            for tensor in tensors:
                if (boxes := self._boxes.get((name, tensor.path))) is not None:
                    each = {piece.form.text: checksum_of_blocks(found[name][piece.name]) for piece in boxes}
                    whole[name][tensor.path] = (checksum_of_texts(each),)
                    continue
                paths = [piece.stored.path for piece in self._cut.get((name, tensor.path), ())] or [tensor.path]
                whole[name][tensor.path] = tuple(block for path in paths for block in found[name][path])
        return whole

    def slices(self, part: str) -> dict[str, Slices]:
        """Where the pieces of the tensors are that lie in several."""
        return {
            path: Slices(pieces[0].tensor.dtype, list(pieces[0].tensor.shape), [piece.start for piece in pieces])
            for (name, path), pieces in self._cut.items()
            if name == part
        }


def planned(
    before: SavePlan | None,
    parts: Mapping[str, Encoded],
    shard_bytes: int,
    writers: Writers,
    is_steady: IsSteady,
    sharding: Sharding | None = None,
    frozen: Collection[Key] = (),
) -> SavePlan:
    """The plan of the save before, unless a tensor has come, gone or changed its form since."""
    given = parts, shard_bytes, writers, is_steady, sharding, frozen
    with without_collections():
        return before if before is not None and before.is_for(*given) else SavePlan(*given)
