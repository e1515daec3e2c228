"""The format of a checkpoint: bytes to values and back. No I/O, no torch.

One URL is one run. It holds::

    attempts/000002-1f3a9c2e.json                 one per start of the run (see ``Attempt``)
    step-000000001200-000002-1f3a9c2e-5d0c77ab/   one per save, never modified afterwards
        model.safetensors                         or model-00001-of-00003.safetensors … and model.safetensors.index.json
        optimizer.safetensors                     one or more files for each part that has tensors
        random.safetensors
        manifest.json                             written last; valid = committed
        receipt-3.json                            where several ranks write, until it is committed (see ``Receipt``)

What else lies there (``attempts/*.crash-*.json``, ``hangs/``) is for people, and decides nothing about checkpoints.

**Directories.** ``step-<global step, 12 digits>-<id of the attempt>-<8 hex digits>``. The last ones differ between all saves
of an attempt, and rise: of two saves of the same step in one attempt the later one has the larger.
What exists is decided by the manifest alone; a directory without a valid one is rubbish or still being written.

**Parts.** A checkpoint is a few named *parts*, each a nested value (a ``state_dict``). The tensors of a part lie in its
shards under their *paths*: the keys on the way, joined with ``/`` (``~`` and ``/`` within a key are written ``~0`` and
``~1``, as in RFC 6901). The rest of the value is JSON in the manifest (``tree``; see ``harness.checkpoint.tree``).
Tensors that are the same memory are stored once; ``aliases`` maps each further path to the stored one.

**Shards** are safetensors files (https://github.com/huggingface/safetensors: 8 bytes little-endian header length, JSON
header, raw bytes). The header ends with so many spaces that the raw bytes begin at a multiple of ``DATA_ALIGNMENT_BYTES``:
a disk can then fetch them from memory that begins on a page. Within a shard, tensors are sorted by falling item size, then
by path, so that each is aligned. A dtype that safetensors cannot name is stored as ``U8`` with one more dimension, of the
item's size; its real name is in the header's ``__metadata__`` under ``dtype:<path>``.

**Layout.** The bytes of a tensor are in row-major order, whatever its strides were. Where these were others, they are in the
header's ``__metadata__`` under ``strides:<path>``, in items, separated by commas: some kernels go through memory and not
through indices. A reader lays the tensor out like that, or leaves it in row-major order. Strides put no two items in one
place, and span at most ``MOST_SPREAD`` times the tensor's items; a tensor whose strides do not is noted with those that
torch gives its copies. Digests do not depend on strides.

**Slices.** A large tensor may lie in several *pieces*, ranges of its raw bytes in row-major order that follow each other and
begin at multiples of ``BLOCK_BYTES``. Each is a ``U8`` tensor of one dimension in some shard of the part, under
``<path>~2<offset>``, a name that no path can have; ``slices`` has the whole tensor's dtype and shape, and the offsets.

**Boxes.** Of a sharded tensor, each rank of a job has a *box*, an offset and a shape within the whole. Where it has several,
each is a tensor of its own in some shard of the part, under ``<path>~2<offset,offset,…>``. ``boxes`` has the whole tensor's
dtype and shape, and for each box the text ``<offsets>:<sizes>@<index in the part's files>``. The boxes tile the tensor. A
checkpoint in which nothing is sharded has no ``boxes``, and a tensor that is whole on rank 0 lies there like any other.

**Frozen shards.** Parameters that nothing trains may lie in shards of their own, ``<part>-frozen…safetensors``. A later
checkpoint whose shard would have the same bytes does not have it, and names it as ``../<directory>/<file>``, in the
directory that really has it: of an earlier save of the run. Such a manifest has ``version`` 2, all others have 1. What was
deleted of an earlier save but such files is their *base*: a directory without a manifest.

**Checksums** are ``<algorithm>:<hex>``. ``files`` in the manifest has one per object, over all its bytes. The manifest's own
is its last line and covers every byte before that line.

**Digests** compare states whatever their shard layout. The digest of a part is the checksum of a text with one line for
each tensor (aliases included), sorted by path — ``<path> <dtype> <shape as JSON> <checksum of the raw bytes>`` — and a
last line with the part's ``tree`` as JSON with sorted keys and without spaces. Of raw bytes that are more than
``BLOCK_BYTES``, it is the checksum of a text with one line for each block of so many of them (the last may be shorter): the
checksum of the block. So it can be told by those who have each seen some of the blocks. Of a tensor that lies in boxes, it
is the checksum of a text with one line for each box, sorted: ``<offsets>:<sizes> <checksum of the box's raw bytes>``. Such
digests are equal for equal boxes, no matter which rank wrote which.

**Lineage.** ``lineage`` lists, oldest first, every attempt whose steps this checkpoint stands on, with the last step it
took from each; the writer itself is not in it. A step that an attempt wrote beyond that belongs to a line that was left.
"""

import functools
import itertools
import json
import math
import operator
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

import xxhash

from harness.checkpoint.boxes import Box, why_not_tiles
from harness.errors import Corrupt, UnknownFormat, Unsupported

FORMAT = "harness-checkpoint"
VERSION = 1
VERSION_OF_REFERENCES = 2  # of a manifest that names files of earlier saves
MANIFEST = "manifest.json"
INDEX_SUFFIX = ".safetensors.index.json"
MANIFEST_LIMIT_BYTES = 256 << 20
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors reference implementation
CHECKSUM = "xxh3_128"
BLOCK_BYTES = 16 << 20
DATA_ALIGNMENT_BYTES = 4096  # of the first tensor in a shard: a page, and a block of every disk
MOST_SPREAD = 4  # how many times its items a tensor with gaps may span: what a file asks for stays in bounds

# torch's name of a dtype → safetensors' name and the bytes of an item. None: no name there, stored as U8.
DTYPES: Mapping[str, tuple[str | None, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e8m0fnu": (None, 1),
    "float4_e2m1fn_x2": (None, 1),
    "complex32": (None, 4),
    "complex64": ("C64", 8),
    "complex128": (None, 16),
}
_NAME_OF_CODE = {code: name for name, (code, _) in DTYPES.items() if code is not None} | {"F8_E8M0": "float8_e8m0fnu"}


class Hasher(Protocol):
    """What a checksum algorithm offers, as in ``hashlib``."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> "Hasher": ...


_HASHERS = {"xxh3_128": xxhash.xxh3_128}


def hasher(algorithm: str = CHECKSUM) -> Hasher:
    """A fresh hasher. Raises ``UnknownFormat`` for an algorithm that this program does not know."""
    if algorithm not in _HASHERS:
        raise UnknownFormat(f"checksum algorithm {algorithm!r}: expected one of {', '.join(sorted(_HASHERS))}")
    return _HASHERS[algorithm]()


def checksum(data: bytes) -> str:
    """The checksum of some bytes, as it stands in a manifest."""
    digest = hasher()
    digest.update(data)
    return f"{CHECKSUM}:{digest.hexdigest()}"


Blocks = tuple[str, ...]  # the checksums of the blocks of a tensor's raw bytes; an empty one has one block, too


class BlockHasher:
    """Takes the raw bytes of a tensor, or of a piece of one, and has the checksums of its blocks."""

    def __init__(self, algorithm: str = CHECKSUM) -> None:
        self._algorithm = algorithm
        self._done: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._block, self._room = hasher(self._algorithm), BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        while len(data) > self._room:
            self._block.update(data[: self._room])
            data = data[self._room :]
            self._done.append(self._found())
            self._begin()
        self._block.update(data)
        self._room -= len(data)

    def _found(self) -> str:
        return f"{self._algorithm}:{self._block.hexdigest()}"

    def blocks(self) -> Blocks:
        return (*self._done, self._found())


def checksum_of_blocks(blocks: Blocks) -> str:
    """The checksum of a tensor's raw bytes."""
    return blocks[0] if len(blocks) == 1 else checksum("".join(f"{block}\n" for block in blocks).encode())


# --- names -----------------------------------------------------------------------------------------------------------

_DIRECTORY = re.compile(r"step-([0-9]{12})-([0-9]{6}-[0-9a-f]{8})-([0-9a-f]{8})")
_STEPS = 10**12  # as many as the name of a directory can tell apart
_ATTEMPT_ID = re.compile(r"[0-9]{6}-[0-9a-f]{8}")
_UP = "../"
_STRIDES = re.compile(r"[0-9]{1,15}(,[0-9]{1,15})*")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_FROZEN_NAME = re.compile(rf"{_FILE_NAME.pattern}-frozen(-rank[0-9]+)?(-[0-9]{{5,}}-of-[0-9]{{5,}})?\.safetensors")


@dataclass(frozen=True, order=True)
class Attempt:
    """One start of a run. Attempts are numbered in the store, beside the checkpoints; two that started at the same
    moment may share a number, and their ids still differ."""

    id: str

    @classmethod
    def after(cls, attempts: Iterable["Attempt"]) -> Self:
        """A new attempt, numbered after all of these."""
        number = max((attempt.number for attempt in attempts), default=0) + 1
        return cls(f"{number:06}-{secrets.token_hex(4)}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls(text) if _ATTEMPT_ID.fullmatch(text) else None

    @property
    def number(self) -> int:
        return int(self.id[:6])


def check_step(step: Any) -> int:
    """A step as a number. Raises ``Unsupported`` for what a name of a directory cannot hold."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number < _STEPS:
        raise Unsupported(f"step: expected a whole number from 0 to {_STEPS - 1}, found {step!r:.100}")
    return number


def check_meta(meta: Any) -> dict[str, Any]:
    """``meta`` as it will be read again. Raises ``Unsupported`` for what is not JSON, or changes its meaning there."""
    if not isinstance(meta, Mapping):
        raise Unsupported(f"meta: expected a dictionary, found {type(meta).__name__}")
    try:
        return _strict_json(json.dumps(dict(meta), allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError, Corrupt) as error:
        advice = "give numbers, texts, lists and dictionaries with keys that differ as texts: float(x), str(x), None for NaN"
        raise Unsupported(f"meta: expected JSON: {error}; {advice}") from None


def new_directory(step: int, attempt: Attempt, number: int = 0) -> str:
    """A name for the directory of one save, that no other save has had; ``number`` counts those of its attempt."""
    return f"step-{step:012}-{attempt.id}-{number % (1 << 20):05x}{secrets.token_hex(2)[:3]}"


def parse_directory(name: str) -> tuple[int, Attempt] | None:
    """The step and the attempt in a directory's name, or None where it is not one of ours."""
    found = _DIRECTORY.fullmatch(name)
    return (int(found[1]), Attempt(found[2])) if found else None


def check_part_name(name: str) -> None:
    """Raises ``Unsupported`` for a name of a part that cannot be the beginning of a file's name."""
    if not _FILE_NAME.fullmatch(shard_name(name, 99_998, 99_999, 99_999, is_frozen=True)):
        raise Unsupported(f"part {name!r}: expected letters, digits, '.', '_' and '-'")


def is_sharable(name: str) -> bool:
    """Whether later checkpoints may refer to the file of this name, whatever directory it is in."""
    return "-frozen" in name and _FROZEN_NAME.fullmatch(name.rpartition("/")[2]) is not None


def shard_name(part: str, index: int, count: int, rank: int | None = None, *, is_frozen: bool = False) -> str:
    """The name of a part's shard, in Hugging Face's layout; ``index`` counts from 0. Where several ranks have shards of
    the part, each counts its own."""
    if is_frozen:
        part = f"{part}-frozen"
    if rank is not None:
        part = f"{part}-rank{rank}"
    return f"{part}.safetensors" if count == 1 and rank is None else f"{part}-{index + 1:05}-of-{count:05}.safetensors"


def piece_name(path: str, *offset: int) -> str:
    """The name of a piece of a tensor, or of a box of it."""
    return f"{path}~2{','.join(map(str, offset))}"


# --- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its bytes: path, torch's name of the dtype, shape; its strides, where they are not row-major."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = field(default=None, repr=False, compare=False)  # how it lies, not what it is
    nbytes: int = field(init=False, repr=False, compare=False)  # asked for ten times in a save

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * self.itemsize)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]


@functools.lru_cache(4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose items lie in row-major order without gaps, as torch has them."""
    strides = list(itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), operator.mul, initial=1))
    return tuple(reversed(strides)) if shape else ()


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many places there are from a tensor's first item to its last; 0 where two items may lie in the same place."""
    extent = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < extent:
                return 0
            extent += (size - 1) * stride
    return extent


@functools.lru_cache(4096)
def can_be_noted(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a file may ask for these strides."""
    return 0 < span(shape, strides) <= MOST_SPREAD * math.prod(shape)


def plan_shards(tensors: Iterable[TensorInfo], limit_bytes: int) -> list[list[TensorInfo]]:
    """Divides tensors into shards of at most ``limit_bytes`` (one tensor alone may be larger)."""
    shards: list[list[TensorInfo]] = []
    room = 0
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.itemsize, tensor.path)):
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def encode_header(tensors: Sequence[TensorInfo]) -> bytes:
    """The first bytes of a shard, up to the first tensor's."""
    metadata = {"format": "pt"}
    entries = []  # as text: a dictionary for each would keep the garbage collector busier than anything else in a save
    offset = 0
    for tensor in tensors:
        code, itemsize = DTYPES[tensor.dtype]
        shape, end = tensor.shape, offset + tensor.nbytes
        if code is None:
            code, shape = "U8", (*shape, itemsize)
            metadata[f"dtype:{tensor.path}"] = tensor.dtype
        if tensor.strides is not None:
            metadata[f"strides:{tensor.path}"] = ",".join(map(str, tensor.strides))
        sizes = ",".join(map(str, shape))
        entries.append(f'{json.dumps(tensor.path)}:{{"dtype":"{code}","shape":[{sizes}],"data_offsets":[{offset},{end}]}}')
        offset = end
    first = f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}'
    text = f"{{{','.join([first, *entries])}}}".encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise Unsupported(f"{len(tensors)} tensors in a shard: their header has {len(text)} bytes; set smaller shards")
    return len(text).to_bytes(8, "little") + text


def decode_header(text: bytes, data_bytes: int) -> list[TensorInfo]:
    """The tensors that a shard's header declares, in the order of their bytes.

    ``text`` is the header without the eight bytes of its length, ``data_bytes`` what follows it. Raises ``Corrupt`` unless
    the tensors fill the data exactly, without holes and overlaps: nothing in a header can ask for more memory than there
    are bytes.
    """
    try:
        header = _strict_json(text)
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        tensors, end = [], 0
        for path, entry in entries:
            tensor = _decode_entry(path, entry, metadata)
            if entry["data_offsets"] != [end, end + tensor.nbytes]:
                raise Corrupt(f"{path}: bytes {entry['data_offsets']}, expected {[end, end + tensor.nbytes]}")
            end += tensor.nbytes
            tensors.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"not a safetensors header: {type(error).__name__}: {error}") from None
    if end != data_bytes:
        raise Corrupt(f"the tensors have {end} bytes, the file has {data_bytes}")
    return tensors


def _decode_entry(path: str, entry: Mapping[str, Any], metadata: Mapping[str, str]) -> TensorInfo:
    path.encode()  # JSON can spell text that is none
    if (dtype := _NAME_OF_CODE.get(entry["dtype"])) is None:
        raise Corrupt(f"{path}: unknown dtype {entry['dtype']!r}")
    shape = entry["shape"]
    _check_shape(path, shape)
    if (real := metadata.get(f"dtype:{path}")) is not None:
        if dtype != "uint8" or not shape or shape[-1] != DTYPES[real][1]:
            raise Corrupt(f"{path}: {real} cannot be stored as {entry['dtype']} {shape}")
        dtype, shape = real, shape[:-1]
    noted = metadata.get(f"strides:{path}")
    return TensorInfo(path, dtype, tuple(shape), None if noted is None else _decode_strides(path, shape, noted))


def _decode_strides(path: str, shape: list[int], text: str) -> tuple[int, ...]:
    if not _STRIDES.fullmatch(text) or len(strides := tuple(map(int, text.split(",")))) != len(shape):
        raise Corrupt(f"{path}: impossible strides {text!r:.200} of {shape}")
    if max(strides) >= 1 << 48 or not can_be_noted(tuple(shape), strides):
        raise Corrupt(f"{path}: impossible strides {text!r:.200} of {shape}")
    return strides


def _check_shape(path: str, shape: Any) -> None:
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise Corrupt(f"{path}: impossible shape {shape}")
    if len(shape) > 64 or math.prod(size or 1 for size in shape) >= 1 << 48:  # an empty tensor, too, has strides
        raise Corrupt(f"{path}: impossible shape {shape}")


# --- digests ---------------------------------------------------------------------------------------------------------


def digest(tensors: Mapping[TensorInfo, str], tree: Any) -> str:
    """The digest of a part: of its tensors, each with the checksum of its raw bytes, and of the rest of its value."""
    lines = [
        f"{tensor.path} {tensor.dtype} {list(tensor.shape)} {found}\n"  # a list of numbers is JSON
        for tensor, found in sorted(tensors.items(), key=lambda item: item[0].path)
    ]
    rest = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return checksum("".join([*lines, rest]).encode())


# --- the manifest ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileInfo:
    """An object of a checkpoint: its name within the directory, its size, its checksum. One of an earlier save is named from
    there, ``../<directory>/<file>``."""

    name: str
    bytes: int
    checksum: str

    @property
    def base(self) -> str:
        """The directory of the earlier save that has it; empty where the checkpoint has it itself."""
        return self.name.split("/")[1] if self.name.startswith(_UP) else ""

    @property
    def algorithm(self) -> str:
        """That of its checksum."""
        return self.checksum.partition(":")[0]

    def checksum_of(self, whole: Hasher) -> str:
        """What its checksum should be, by a hasher of this algorithm that has had all bytes."""
        return f"{self.algorithm}:{whole.hexdigest()}"

    def path(self, directory: str) -> str:
        """Its name in the store, for a checkpoint in a directory."""
        return self.name.removeprefix(_UP) if self.base else f"{directory}/{self.name}"

    def seen_from_later(self, directory: str) -> "FileInfo":
        """The same, as later checkpoints name it: by the directory that really has it."""
        return replace(self, name=f"{_UP}{self.path(directory)}")

    def check(self) -> None:
        name = self.name
        if type(name) is str and name.startswith(_UP):
            base, _, name = name.removeprefix(_UP).partition("/")
            if not parse_directory(base) or not is_sharable(name):
                raise Corrupt(f"{MANIFEST}: {self.name!r} is no file that a checkpoint may have in an earlier one")
        if not (type(name) is str and _FILE_NAME.fullmatch(name)) or name == MANIFEST:
            raise Corrupt(f"{MANIFEST}: {self.name!r} is not a name of a file in this directory")
        if type(self.bytes) is not int or not 0 <= self.bytes < 1 << 48:
            raise Corrupt(f"{MANIFEST}: {self.name}: impossible size {self.bytes!r}")
        if type(self.checksum) is not str:
            raise Corrupt(f"{MANIFEST}: {self.name}: impossible checksum {self.checksum!r}")


@dataclass(frozen=True)
class Slices:
    """A tensor that lies in pieces: what it is when they are put together, and where each of them begins."""

    dtype: str
    shape: list[int]
    offsets: list[int]

    @property
    def nbytes(self) -> int:
        return TensorInfo("", self.dtype, tuple(self.shape)).nbytes

    def pieces(self, path: str) -> list[tuple[str, int, int]]:
        """The name of each piece of the tensor at a path, and its first byte and the one after its last."""
        ends = [*self.offsets[1:], self.nbytes]
        return [(piece_name(path, start), start, stop) for start, stop in zip(self.offsets, ends, strict=True)]

    def check(self, path: str) -> None:
        if type(self.dtype) is not str or self.dtype not in DTYPES:
            raise Corrupt(f"{path}: unknown dtype {self.dtype!r}")
        _check_shape(path, self.shape)
        offsets = self.offsets
        if type(offsets) is not list or not offsets or not all(type(offset) is int for offset in offsets):
            raise Corrupt(f"{path}: impossible offsets {offsets!r:.200}")
        rises = all(one < other for one, other in itertools.pairwise([*offsets, self.nbytes]))
        if offsets[0] != 0 or not rises or any(offset % BLOCK_BYTES for offset in offsets):
            raise Corrupt(f"{path}: {self.nbytes} bytes cannot lie in pieces that begin at {offsets!r:.200}")


@dataclass(frozen=True)
class Boxes:
    """A tensor that lies in boxes: what it is when they are put together, and each box with the number of its file."""

    dtype: str
    shape: list[int]
    boxes: list[str]

    def info(self, path: str) -> TensorInfo:
        """The whole tensor's."""
        return TensorInfo(path, self.dtype, tuple(self.shape))

    @functools.cached_property
    def places(self) -> dict[Box, int]:
        """The boxes, in order, and the number of the file of each."""
        found = {}
        for text in self.boxes:
            box, _, file = text.partition("@")
            found[_box_of(box)] = int(file)
        return found

    def check(self, path: str, files: int) -> None:
        if type(self.dtype) is not str or self.dtype not in DTYPES:
            raise Corrupt(f"{path}: unknown dtype {self.dtype!r}")
        _check_shape(path, self.shape)
        if type(self.boxes) is not list or not all(type(text) is str and _BOX.fullmatch(text) for text in self.boxes):
            raise Corrupt(f"{path}: impossible boxes {self.boxes!r:.200}")
        problem = why_not_tiles(tuple(self.shape), tuple(self.places))
        if problem or len(self.places) != len(self.boxes) or not all(file < files for file in self.places.values()):
            raise Corrupt(f"{path}: impossible boxes {self.boxes!r:.200}: {problem or 'twice there, or in no file'}")


_BOX = re.compile(r"[0-9]{1,15}(,[0-9]{1,15})*:[0-9]{1,15}(,[0-9]{1,15})*@[0-9]{1,9}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@functools.lru_cache(1 << 16)  # most tensors are cut as others are
def _box_of(text: str) -> Box:
    offset, _, shape = text.partition(":")
    return Box(_numbers(offset), _numbers(shape))


@functools.lru_cache(1 << 16)
def box_text(box: Box) -> str:
    """A box as it stands in a manifest."""
    return f"{','.join(map(str, box.offset))}:{','.join(map(str, box.shape))}"


def checksum_of_boxes(found: Mapping[Box, str]) -> str:
    """The checksum of a tensor that lies in boxes, from those of the boxes' raw bytes."""
    return checksum_of_texts({box_text(box): each for box, each in sorted(found.items())})


def checksum_of_texts(found: Mapping[str, str]) -> str:
    """The same of boxes as they stand in a manifest, in order."""
    return checksum("".join(f"{text} {each}\n" for text, each in found.items()).encode())


@dataclass(frozen=True)
class Part:
    """A part: the names of its shards, the rest of its value, tensors that are others under a further name, tensors that
    lie in pieces, and those that lie in boxes."""

    files: list[str]
    tree: Any
    aliases: dict[str, str]
    digest: str
    slices: dict[str, Slices] = field(default_factory=dict)
    boxes: dict[str, Boxes] = field(default_factory=dict)

    @classmethod
    def of(cls, slices: Mapping[str, Any] | None = None, boxes: Mapping[str, Any] | None = None, **values: Any) -> Self:
        """The part that stands in a manifest."""
        return cls(
            **values,
            slices={path: Slices(**each) for path, each in (slices or {}).items()},
            boxes={path: Boxes(**each) for path, each in (boxes or {}).items()},
        )

    def check(self, name: str) -> None:
        if type(self.tree) is not dict or type(self.files) is not list or type(self.aliases) is not dict:
            raise Corrupt(f"{MANIFEST}: part {name!r}: impossible tree, files or aliases")
        if not all(type(text) is str for text in (*self.files, *self.aliases.values(), self.digest)):
            raise Corrupt(f"{MANIFEST}: part {name!r}: impossible files, aliases or digest")
        for path, slices in self.slices.items():
            slices.check(f"{MANIFEST}: {name}: {path}")
        for path, boxes in self.boxes.items():
            boxes.check(f"{MANIFEST}: {name}: {path}", len(self.files))
            if path in self.slices:
                raise Corrupt(f"{MANIFEST}: {name}: {path} lies in pieces, and in boxes")


@dataclass(frozen=True)
class Ancestor:
    """An attempt that a checkpoint stands on, and the last step that was taken from it."""

    attempt: str
    until_step: int


@dataclass(frozen=True)
class Manifest:
    """The record that makes a save a checkpoint."""

    step: int
    attempt: str
    files: list[FileInfo]
    parts: dict[str, Part]
    lineage: list[Ancestor] = field(default_factory=list)
    created: str = ""  # UTC, ISO 8601
    meta: dict[str, Any] = field(default_factory=dict)  # what the trainer says: epoch, world size, metrics …

    def encode(self) -> bytes:
        body = {"format": FORMAT, "version": self._version, **asdict(self)}
        for part in body["parts"].values():
            if not part["boxes"]:  # of which harness 0.2 knows nothing
                del part["boxes"]
        return _sealed(MANIFEST, body)

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """Raises ``Corrupt`` for bytes that are not a whole manifest, ``UnknownFormat`` for one of another version."""
        value = _unsealed(MANIFEST, text)
        version = value.pop("version", None)
        if value.pop("format", None) != FORMAT or version not in (VERSION, VERSION_OF_REFERENCES):
            raise UnknownFormat(f"{MANIFEST}: expected {FORMAT} version {VERSION} or {VERSION_OF_REFERENCES}")
        try:
            value["files"] = [FileInfo(**file) for file in value["files"]]
            value["parts"] = {name: Part.of(**part) for name, part in value["parts"].items()}
            value["lineage"] = [Ancestor(**ancestor) for ancestor in value["lineage"]]
            manifest = cls(**value)
        except (TypeError, KeyError, AttributeError) as error:
            raise Corrupt(f"{MANIFEST}: {error}") from None
        manifest._check()
        if version == VERSION and manifest.bases:
            raise Corrupt(f"{MANIFEST}: version {VERSION} has no files in other directories, found {min(manifest.bases)}")
        return manifest

    def _check(self) -> None:
        """A checksum says that the bytes are the writer's; these say that the writer was sane and meant no harm."""
        if not _is_step(self.step) or not _is_attempt(self.attempt):
            raise Corrupt(f"{MANIFEST}: impossible step {self.step!r} or attempt {self.attempt!r}")
        if type(self.created) is not str or type(self.meta) is not dict:
            raise Corrupt(f"{MANIFEST}: impossible created {self.created!r} or meta {self.meta!r}")
        for ancestor in self.lineage:
            if not _is_attempt(ancestor.attempt) or not _is_step(ancestor.until_step):
                raise Corrupt(f"{MANIFEST}: impossible {ancestor}")
        for file in self.files:
            file.check()
        for name, part in self.parts.items():
            part.check(name)
        names = [file.name for file in self.files]
        used = [name for part in self.parts.values() for name in part.files]
        expected = sorted(name for name in names if not name.endswith(INDEX_SUFFIX))
        if sorted(used) != expected or len(set(names)) != len(names):
            raise Corrupt(f"{MANIFEST}: the parts use {sorted(used)}, the checkpoint has {expected}")

    @property
    def bytes(self) -> int:
        """The bytes of all objects that the manifest names."""
        return sum(file.bytes for file in self.files)

    @property
    def shared_bytes(self) -> int:
        """Those of the objects that earlier saves have."""
        return sum(file.bytes for file in self.files if file.base)

    @property
    def bases(self) -> set[str]:
        """The directories of the earlier saves that have some of the objects."""
        return {file.base for file in self.files if file.base}

    @property
    def _version(self) -> int:
        return VERSION_OF_REFERENCES if self.bases else VERSION


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < _STEPS


def _is_attempt(value: Any) -> bool:
    return type(value) is str and Attempt.parse(value) is not None


# --- receipts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Receipt:
    """What a writer leaves beside its shards when they are durable, or when it has failed, for the one who commits.

    It is rubbish once that has read it, and tells no reader anything.
    """

    rank: int
    plan: str = ""  # the checksum of the plan that it has followed
    files: list[FileInfo] = field(default_factory=list)
    blocks: dict[str, dict[str, Blocks]] = field(default_factory=dict)  # of each tensor or piece, by part and name
    problem: str = ""  # why it has failed
    is_of_storage: bool = False  # whether that is the storage's doing
    is_torn: bool = False  # whether its state has changed while it was copied

    @property
    def name(self) -> str:
        return receipt_name(self.rank)

    def encode(self) -> bytes:
        return _sealed(self.name, asdict(self))

    @classmethod
    def decode(cls, name: str, text: bytes) -> Self:
        """Raises ``Corrupt``."""
        value = _unsealed(name, text)
        try:
            value["files"] = [FileInfo(**file) for file in value["files"]]
            value["blocks"] = {
                part: {path: tuple(each) for path, each in found.items()} for part, found in value["blocks"].items()
            }
            return cls(**value)
        except (TypeError, KeyError, AttributeError) as error:
            raise Corrupt(f"{name}: {error}") from None


def receipt_name(rank: int) -> str:
    """The name of a writer's receipt in the directory of a save."""
    return f"receipt-{rank}.json"


# --- JSON with a checksum --------------------------------------------------------------------------------------------


def _sealed(name: str, body: Mapping[str, Any]) -> bytes:
    """JSON whose last line is the checksum of what comes before it."""
    try:
        text = json.dumps(body, indent=1, allow_nan=False).removesuffix("\n}").encode() + b",\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise Unsupported(f"{name}: {error}") from None
    if len(text) + 100 > MANIFEST_LIMIT_BYTES:
        raise Unsupported(f"{name}: {len(text)} bytes of values that are no tensors, at most {MANIFEST_LIMIT_BYTES}")
    return text + _last_line(text)


def _unsealed(name: str, text: bytes) -> dict[str, Any]:
    body, newline, last = text[:-2].rpartition(b"\n")
    if not newline or not text.endswith(b"\n}") or last + b"\n}" != _last_line(body + newline):
        raise Corrupt(f"{name}: the checksum in its last line does not fit the {len(text)} bytes")
    value = _strict_json(text)
    value.pop("checksum", None)
    return value


def _last_line(text: bytes) -> bytes:
    return f' "checksum": "{checksum(text)}"\n}}'.encode()


def _strict_json(text: bytes) -> dict[str, Any]:
    """A JSON object; a key that stands twice, NaN and infinities are errors rather than surprises."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def no_constants(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=no_twins, parse_constant=no_constants)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Corrupt("not a JSON object")
    return value
