"""Files that others wrote, to values: what ``torch.save`` writes, safetensors, torch's distributed checkpoints.

What a file is, its first bytes say, not its name. No code in a file is run: pickles go through ``torch.load`` with
``weights_only=True``, which builds tensors and plain values and refuses the rest. The exception is the metadata of a
distributed checkpoint, which torch unpickles without restraint; it is read only for a caller who says that it is trusted.

Tensors are mapped from the file where that is possible: a caller who keeps one, copies it.
"""

import functools
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Self

import torch
from fsspec.implementations.local import LocalFileSystem

from harness.checkpoint.boxes import Box, why_not_tiles
from harness.checkpoint.format import HEADER_LIMIT_BYTES, MANIFEST, MANIFEST_LIMIT_BYTES, decode_header
from harness.checkpoint.tree import dtype_name
from harness.errors import ConfigError, Corrupt, HarnessError, Mismatch, StoreError, Unsupported
from harness.interchange.disk_memory import on_disk
from harness.storage.store import open_store

DCP_METADATA = ".metadata"
NAMES = "harness.json"  # in the folder of an adapter: what its weights, and its base model's, were called in the run
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first until it wrote zip archives
_REFUSED = re.compile(r"GLOBAL (\S+)")  # in torch's message: the class or function that the pickle names
_SAFE_FORM = "save tensors and plain values alone: torch.save(model.state_dict(), PATH)"


class Place:
    """The files at a URL, as paths on this machine: local ones where they lie, others fetched when they are asked for."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.store = open_store(url, storage_options)
        self.url = self.store.url
        self._size_bytes = None if url.endswith("/") else self.store.stat("")  # a server has a page for each directory
        self.is_file = self._size_bytes is not None
        self._fetched: tempfile.TemporaryDirectory[str] | None = None

    @functools.cached_property
    def files(self) -> Mapping[str, int]:
        """The files with their sizes. Listed when they are first asked for: a run's are of no interest."""
        found = {"": self._size_bytes} if self._size_bytes is not None else self.store.list()
        if not found:
            raise ConfigError(f"{self.url}: expected a file or a directory with files, found nothing")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fetched is not None:
            self._fetched.cleanup()  # what is mapped stays until the last tensor of it is gone

    def shown(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.url}/{name}".rstrip("/")

    def path(self, name: str = "") -> str:
        """Where a file is on this machine."""
        if isinstance(self.store.filesystem.fs, LocalFileSystem):
            return os.path.join(self.store.root, name) if name else self.store.root
        return self._fetch(name)

    def directory(self) -> str:
        """Where the directory with all its files is on this machine."""
        if isinstance(self.store.filesystem.fs, LocalFileSystem):
            return self.store.root
        for name in self.files:
            self._fetch(name)
        assert self._fetched is not None, "there are files"
        return self._fetched.name

    def _fetch(self, name: str) -> str:
        if self._fetched is None:
            self._fetched = tempfile.TemporaryDirectory(prefix="harness-")
        steps = name.split("/") if name else ["file"]
        if {"", ".", ".."} & {*steps}:  # object stores allow such keys; they must not lead out of the directory
            raise Corrupt(f"{self.shown(name)}: not a name of a file")
        path = os.path.join(self._fetched.name, *steps)
        if os.path.exists(path):
            return path
        os.makedirs(os.path.dirname(path), exist_ok=True)

        def copy(stream: BinaryIO) -> None:
            with open(path, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)

        try:
            self.store.read(name, copy, self.files[name])
        except FileNotFoundError:
            raise StoreError(f"read {self.shown(name)}: it was there and is gone") from None
        if (found_bytes := os.path.getsize(path)) != self.files[name]:
            raise StoreError(f"read {self.shown(name)}: expected {self.files[name]} bytes, found {found_bytes}")
        return path


def read_file(path: str, shown: str) -> tuple[Any, str]:
    """The value in a file, and what the file is. ``shown`` is its name in messages."""
    try:
        size_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            return _read_safetensors(path, shown, size_bytes), "safetensors"
        if head.startswith(b"PK\x03\x04"):
            _check_archive(path, shown, size_bytes)
            return _unpickle_within(path, shown, size_bytes, mmap=True), "torch.save"
        if _LEGACY_MAGIC in head:
            return _unpickle_within(path, shown, size_bytes, mmap=False), "torch.save, old form"
    except OSError as error:
        raise StoreError(f"read {shown}: {error.strerror or error}") from None
    if head.startswith(b"\x80"):
        raise Unsupported(
            f"{shown}: expected a file of torch.save, found a bare pickle, which runs code when read; {_SAFE_FORM}"
        )
    raise Corrupt(f"{shown}: expected a file of torch.save or safetensors, found {size_bytes} bytes that are neither")


# --- torch.save ------------------------------------------------------------------------------------------------------


def _check_archive(path: str, shown: str, size_bytes: int) -> None:
    """torch never compares the checksums that it writes into its archives: a flipped bit would become a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename.rpartition("/")[2] for member in members}
            if "constants.pkl" in names:
                raise Unsupported(
                    f"{shown}: expected a state_dict, found a TorchScript program, which is code; {_SAFE_FORM}"
                )
            if "data.pkl" not in names:
                raise Mismatch(f"{shown}: expected a file of torch.save, found a zip archive of something else")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise Corrupt(f"{shown}: expected an archive that is not compressed, found a compressed one")
            if sum(member.file_size for member in members) > size_bytes:  # several names for one place
                raise Corrupt(f"{shown}: expected an archive of {size_bytes} bytes, found members of more")
            has_checksums = any(member.CRC for member in members)  # torch can be told to leave them out
            if has_checksums and (name := archive.testzip()) is not None:
                raise Corrupt(f"{shown}: {name}: expected the checksum in the archive, found another")
    except HarnessError:
        raise
    except Exception as error:  # zipfile has no bound on what it raises for broken archives
        raise Corrupt(f"{shown}: expected a whole file of torch.save, found a broken zip archive ({error})") from None


def _unpickle(path: str, shown: str, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old forms that it reads all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if (refused := _REFUSED.search(str(error))) is None:
            raise Corrupt(f"{shown}: expected a whole file of torch.save, found a broken pickle") from None
        raise Unsupported(
            f"{shown}: expected a state_dict, found a pickle that calls for {refused[1]}; reading it would run code of "
            f"the file's choice, so it is refused; where the file was made, {_SAFE_FORM}"
        ) from None
    except Exception as error:  # torch has no bound on what it raises for broken files
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise Corrupt(f"{shown}: expected a whole file of torch.save: {reason}") from None


# --- files that were made to do harm ---------------------------------------------------------------------------------

# A pickle names a value again in two bytes, and a tensor can show one number a billion times: a file of a kilobyte may stand
# for more than any disk holds. What a file may unfold to is bounded by its size, with room for what people really save:
# names, lists and masks that are shared, a tensor beside views of its parts.
_TEXT_FACTOR, _TEXT_SLACK_BYTES = 64, 16 << 20
_TENSOR_FACTOR, _TENSOR_SLACK_BYTES = 4, 64 << 20
_VALUES_SLACK = 10_000
_COPIES = {
    "collections.OrderedDict", "collections.Counter", "torch.Size", "_codecs.encode", "builtins.set", "builtins.bytearray",
}  # fmt: skip
_UNBOUNDED = {  # a copy of all that a tensor shows
    "torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
}  # fmt: skip
_OPCODES = (  # those that torch's own reader knows
    *(pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM),
    *(pickle.SETITEMS, pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE),
    *(pickle.NEWFALSE, pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING),
    *(pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.LONG1),
    *(pickle.PROTO, pickle.STOP),
)


class _Rehearsal(pickle._Unpickler):  # the one that is written in Python
    """Reads a pickle without doing what it says: classes and functions are stand-ins that count what they would copy."""

    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}  # noqa: RUF012

    def __init__(self, file: BinaryIO, left_bytes: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.left_bytes = left_bytes

    def find_class(self, module: str, name: str) -> type:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in _UNBOUNDED:
            raise _TooMuch(f"found a call of {full}, which can take any amount of memory")

        def stand_in(kind: type, *arguments: Any) -> Any:
            made: Any = object.__new__(kind)
            made.length = sum(_length(each) for each in arguments) if full in _COPIES else 0
            self.left_bytes -= made.length
            if self.left_bytes < 0:
                raise _TooMuch("found calls that make more than a file of its size can hold")
            return made

        def set_item(made: Any, *_: Any) -> None:
            made.length += 1

        accept = lambda *_: None
        body = {"__new__": stand_in, "__init__": accept, "__setstate__": accept, "__setitem__": set_item}
        return type(name, (), {**body, "__len__": lambda made: made.length})

    def persistent_load(self, identity: Any) -> Any:
        return identity


class _TooMuch(Exception):
    pass


def _length(argument: Any) -> int:
    if type(argument) is int:  # bytearray(10) has ten bytes
        return max(argument, 0)
    return len(argument) if hasattr(argument, "__len__") else 0


def _unpickle_within(path: str, shown: str, size_bytes: int, *, mmap: bool) -> Any:
    """The value in a file, which unfolds to no more than a file of its size can mean."""
    try:
        pickle_bytes = _rehearse(path, is_archive=mmap)
    except _TooMuch as error:
        raise Unsupported(f"{shown}: expected tensors and plain values, {error}; {_SAFE_FORM}") from None
    except Exception:  # broken, or of a kind that torch will not read: it says which
        pickle_bytes = None
    value = _unpickle(path, shown, mmap=mmap)
    if pickle_bytes is None:
        raise Corrupt(f"{shown}: expected a whole file of torch.save, found a pickle that only some can read")
    _check_extent(value, shown, size_bytes, pickle_bytes)
    return value


def _rehearse(path: str, *, is_archive: bool) -> int:
    """How many bytes of a file are pickles. Raises ``_TooMuch``, and anything for broken ones."""
    left_bytes = os.path.getsize(path) + _TEXT_SLACK_BYTES
    with open(path, "rb") as file:
        source: BinaryIO = io.BytesIO(torch._C.PyTorchFileReader(path).get_record("data.pkl")) if is_archive else file
        for _ in range(1 if is_archive else 5):  # the old form has the magic number, versions, and the storages' names
            rehearsal = _Rehearsal(source, left_bytes)
            rehearsal.load()
            left_bytes = rehearsal.left_bytes
        return source.tell()


def _check_extent(value: Any, shown: str, size_bytes: int, pickle_bytes: int) -> None:
    """Raises ``Corrupt`` for a value that is walked, or written, for much longer than the file is."""
    values, text_bytes = pickle_bytes + _VALUES_SLACK, _TEXT_FACTOR * pickle_bytes + _TEXT_SLACK_BYTES
    tensor_bytes = _TENSOR_FACTOR * size_bytes + _TENSOR_SLACK_BYTES
    seen: set[Any] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            if item.layout is torch.strided and not item.is_meta:  # the others are refused by their names
                form = (item.data_ptr(), item.dtype, item.shape, item.stride())
                tensor_bytes -= 0 if form in seen else item.nbytes
                seen.add(form)
        elif isinstance(item, str | bytes):
            text_bytes -= len(item)
        elif isinstance(item, Mapping | list | tuple | set | frozenset):
            values -= len(item)
            if values >= 0:
                stack.extend(item)
                stack.extend(item.values() if isinstance(item, Mapping) else ())
        if min(values, text_bytes, tensor_bytes) < 0:
            what = "values" if values < 0 else "text" if text_bytes < 0 else "numbers in its tensors"
            raise Corrupt(
                f"{shown}: expected what a file of {size_bytes} bytes can hold, found more {what}, by naming the same "
                "again and again; if that is meant, save copies: tensor.clone()"
            )


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: str, shown: str, size_bytes: int) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(HEADER_LIMIT_BYTES, size_bytes - 8):
            raise Corrupt(f"{shown}: a header of {header_bytes} bytes in a file of {size_bytes}")
        header = file.read(header_bytes)
    end = 8 + header_bytes
    try:
        infos = decode_header(header, size_bytes - end)
    except Corrupt as error:
        raise Corrupt(f"{shown}: {error}") from None
    everything = torch.from_file(path, shared=False, size=size_bytes, dtype=torch.uint8)
    tensors = {}
    for info in infos:
        raw = everything[end : end + info.nbytes]
        if end % info.itemsize:  # other writers need not align
            raw = raw.clone()
        end += info.nbytes
        dtype = getattr(torch, info.dtype)
        tensors[info.path] = (
            raw.view(dtype).reshape(info.shape) if info.nbytes else torch.empty(info.shape, dtype=dtype, device="cpu")
        )
    return tensors


# --- directories -----------------------------------------------------------------------------------------------------

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_directory(place: Place) -> tuple[Any, str]:
    """The value in a directory of Hugging Face's layout: one file, or several with an index."""
    names = sorted(name for name in place.files if "/" not in name)
    known = [name for name in _MODEL_FILES if name in names]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    single = [name for name in names if name.endswith(".safetensors")]
    name = next((found[0] for found in (known[:1], indexes, single) if len(found) == 1), None)
    if not known and MANIFEST in names:  # another part's index may be there
        raise Mismatch(f"{place.url}: a checkpoint whose model other programs cannot read as it lies; name the run's URL")
    if name is None:
        found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "no files, only directories"
        raise Mismatch(
            f"{place.url}: expected a run, a distributed checkpoint or one of {', '.join(_MODEL_FILES)}; found {found}"
        )
    if name.endswith(".index.json"):
        return _read_indexed(place, name), name
    return read_file(place.path(name), place.shown(name))[0], name


def read_adapters(place: Place) -> tuple[Any, str]:
    """The whole model of a folder that ``harness export`` has written: the base with its adapters, as the run had it."""
    try:
        called = json.loads(place.store.get(NAMES, MANIFEST_LIMIT_BYTES) or b"")
        folders = {file.rpartition("/")[0]: (file, {**names}) for file, names in called.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{place.shown(NAMES)}: expected JSON with the names of weights: {error}") from None
    if "base" not in folders:
        raise Mismatch(f"{place.url}: an adapter alone; expected its base model, too, in base/")
    values: dict[str, Any] = {}
    for file, names in folders.values():
        shards = f"{file}.safetensors.index.json"
        name = f"{file}.safetensors"
        if not {name, shards} & place.files.keys():
            raise Corrupt(f"{place.shown(name)}: missing; {NAMES} names it")
        found = _read_indexed(place, shards) if shards in place.files else read_file(place.path(name), place.shown(name))[0]
        if missing := names.keys() - found.keys():
            raise Corrupt(f"{place.shown(name)}: expected {min(missing)} in it, as {NAMES} says, found it is not there")
        values |= {names[key]: value for key, value in found.items() if key in names}
    return values, f"an adapter and its base, {NAMES}"


def _read_indexed(place: Place, index: str) -> dict[str, Any]:
    try:
        places = json.loads(place.store.get(index, MANIFEST_LIMIT_BYTES) or b"")["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, shard in places.items():
            shards.setdefault(shard, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{place.shown(index)}: expected JSON with a weight_map: {error}") from None
    values: dict[str, Any] = {}
    folder = index.rpartition("/")[0]
    for shard, expected in {f"{folder}/{shard}".lstrip("/"): names for shard, names in shards.items()}.items():
        if shard not in place.files:  # nor can an index name a file elsewhere
            raise Corrupt(f"{place.shown(shard)}: missing; {index} names it")
        found, _ = read_file(place.path(shard), place.shown(shard))
        if not isinstance(found, Mapping):
            raise Mismatch(f"{place.shown(shard)}: expected a state_dict, found {type(found).__name__}")
        if missing := expected - found.keys():
            raise Corrupt(f"{place.shown(shard)}: expected {min(missing)} in it, as {index} says, found it is not there")
        if twice := values.keys() & found.keys():
            raise Corrupt(f"{place.shown(shard)}: {min(twice)} is in another file, too")
        values |= found
    return values


def read_distributed(place: Place, *, trust: bool) -> Any:
    """The value in a directory of torch.distributed.checkpoint, put together from the parts of all ranks."""
    if not trust:
        raise ConfigError(
            f"{place.url}: a directory of torch.distributed.checkpoint; its {DCP_METADATA} is a pickle, and "
            "reading it can run any code: pass --trust if you trust its author"
        )
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415  # takes a second

    directory = place.directory()
    try:
        _check_boxes(directory, place.url)
        return _load_distributed(directory)
    except HarnessError:
        raise
    except (Exception, CheckpointException) as error:  # a BaseException, and no bound on the others
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise Corrupt(f"{place.url}: expected a whole distributed checkpoint: {reason}") from None


def _load_distributed(directory: str) -> dict[str, Any]:
    """Its value. The tensors are put together part by part on a disk: memory need not have room for them."""
    from torch.distributed.checkpoint import FileSystemReader, load  # type: ignore[attr-defined]  # noqa: PLC0415
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: PLC0415

    reader = FileSystemReader(directory)
    metadata = reader.read_metadata()
    forms = metadata.state_dict_metadata
    flat: dict[str, Any] = {**forms}
    for name, each in forms.items():
        if isinstance(each, TensorStorageMetadata):
            flat[name] = on_disk(name, each.size, dtype_name(each.properties.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other ranks
        load(flat, storage_reader=reader, no_dist=True)
    value: dict[str, Any] = {}
    for name, each in flat.items():
        _set(value, (metadata.planner_data or {}).get(name, (name,)), each)
    return value


def _set(root: Any, path: Sequence[str | int], value: Any) -> None:
    """Puts a value where a path leads to: names lead into dictionaries, numbers into lists."""
    for key, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(key, int) and len(root) <= key:
            root += [None] * (key + 1 - len(root))
        if following is None:
            root[key] = value
        elif isinstance(key, int):
            root[key] = root[key] or ([] if isinstance(following, int) else {})
        else:
            root.setdefault(key, [] if isinstance(following, int) else {})
        root = root[key]


def _check_boxes(directory: str, shown: str) -> None:
    """Raises ``Corrupt`` for a distributed checkpoint in which the parts of a tensor are not the whole of it, or whose bytes
    differ from the checksums beside them. torch looks at neither: it would leave holes, or take other values."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: PLC0415
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: PLC0415

    metadata = FileSystemReader(directory).read_metadata()
    for name, each in metadata.state_dict_metadata.items():
        if isinstance(each, TensorStorageMetadata):
            boxes = {Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in each.chunks}
            why = why_not_tiles(tuple(each.size), tuple(sorted(box for box in boxes if box.items)))
            if why is not None:
                raise Corrupt(f"{shown}: {name}: the parts in it are not the whole tensor: {why}")
    for index, info in metadata.storage_data.items():
        with open(os.path.join(directory, info.relative_path), "rb") as file:
            file.seek(info.offset)
            piece = io.BytesIO(file.read(info.length))
        if zipfile.is_zipfile(piece):
            with zipfile.ZipFile(piece) as archive:
                if any(member.CRC for member in archive.infolist()) and archive.testzip() is not None:
                    raise Corrupt(f"{shown}: {index.fqn}: expected the checksum in {info.relative_path}, found another")
