"""Nested values to JSON and named tensors, and back, without pickle.

``encode`` walks what a ``state_dict()`` returns. Tensors are taken out under their paths (see
``harness.checkpoint.format``); what is left is JSON. JSON knows fewer types than Python, so some values are written as an
object with one tagged key:

    (1, 2)            {"$tuple": [1, 2]}            {1, 2}              {"$set": [1, 2]}
    b"ab"             {"$bytes": "YWI="}            1+2j                {"$complex": "<32 hex digits>"}
    inf, -inf, nan    {"$float": "<16 hex digits>"} Counter({5: 1})     {"$counter": [[5, 1]]}
    numpy scalar      {"$numpy": [dtype, hex]}      numpy array         {"$array": dtype} and a tensor
    torch.float16    {"$dtype": "float16"}          torch.device("cpu") {"$device": "cpu"}, without a number
    deque([1], 5)    {"$deque": {"maxlen": 5, "items": [1]}}
    a tensor within a list                          {"$tensor": true}

A tensor of a subclass that consists of tensors (``__tensor_flatten__``) is written as these, and as ``{"$subclass": …}``
with its class, shape and whatever else it says; a member of an enumeration as ``{"$enum": [class, name]}``. Nothing is
imported for it: the class must be one of those that the program has declared safe to load, by
``torch.serialization.add_safe_globals``, as torchao does for its own.

Keys that are not text are written as ``$:`` and their JSON (of a tuple, a list's); a ``$`` at the beginning of a text key is
doubled. A tensor
in a dictionary leaves nothing behind in the JSON, nor does a dictionary that holds only tensors: the paths say it all, and
20,000 small tensors cost 20,000 header entries and no more. Dictionaries of all kinds come back as ``dict``, with the
keys in another order.
"""

import base64
import copy
import enum
import functools
import json
import math
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.checkpoint import dtensors
from harness.checkpoint.boxes import Box
from harness.checkpoint.format import DTYPES, BlockHasher, Blocks, TensorInfo, can_be_noted, row_major
from harness.errors import ConfigError, Corrupt, Unsupported

_CHUNK_BYTES = 1 << 20  # small enough that what was copied is still in the processor's cache when it is hashed and written


@dataclass(frozen=True)
class Placed:
    """Of a sharded tensor: the shape of the whole, and the part of it that is here."""

    shape: tuple[int, ...]
    box: Box


@dataclass
class Encoded:
    """A part without torch's and Python's own types: JSON, tensors by path, further names of tensors. Of a sharded tensor
    it has the local part; ``placed`` says where in the whole that is."""

    tree: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)

    def info(self, path: str) -> TensorInfo:
        """The whole tensor's path, dtype and shape."""
        if (placed := self.placed.get(path)) is not None:
            return TensorInfo(path, dtype_name(self.tensors[path].dtype), placed.shape)
        return info(path, self.tensors[path])


def encode(value: Mapping[str, Any], name: str) -> Encoded:
    """Takes the part ``name`` apart. Raises ``Unsupported``, with the path, for a value that has no form on disk."""
    encoder = _Encoder(name)
    encoder.out.tree = encoder.value_at((), dict(value), keep=True)
    return encoder.out


def info(path: str, tensor: torch.Tensor) -> TensorInfo:
    """A tensor's path, dtype and shape, and its strides, where they are worth a note."""
    return TensorInfo(path, dtype_name(tensor.dtype), tuple(tensor.shape), strides_to_note(tensor))


def strides_to_note(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides that a copy of a tensor is to have; None where they are row-major, as most are.

    They are the tensor's own, unless these let several items share a place, or leave very large gaps.
    """
    if tensor.is_contiguous() and (tensor.dim() < 2 or 1 not in tensor.shape):  # where a size is 1, any stride will do
        return None
    strides, usual = tensor.stride(), row_major(tensor.shape)
    if strides == usual or not tensor.numel():
        return None
    if not can_be_noted(tensor.shape, strides):
        strides = torch.empty_like(tensor, device="meta").stride()
    return None if strides == usual else strides


def laid_out(tensor: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """A row-major tensor of the CPU, or a copy of it with other strides."""
    if strides is None:
        return tensor
    found = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu")
    plain = _PLAIN[tensor.element_size()]  # torch copies items of some dtypes by their value, and of others not at all
    found.view(plain).copy_(tensor.view(plain))
    return found


_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, in pieces, with no more memory than a piece."""
    if tensor.numel() == 0:
        return
    if tensor.nbytes <= _CHUNK_BYTES or tensor.dim() == 0:
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        yield whole.reshape(-1).view(torch.uint8).numpy().data
    elif tensor.is_contiguous():
        items = _CHUNK_BYTES // tensor.element_size()
        for piece in torch.split(tensor.detach().view(-1), items):
            plain = piece.cpu().resolve_conj().resolve_neg()
            yield plain.view(torch.uint8).numpy().data
    else:  # a view with strides: row by row, so that the whole is never copied
        rows = max(1, _CHUNK_BYTES * tensor.shape[0] // tensor.nbytes)
        for piece in torch.split(tensor, rows):
            yield from raw_bytes(piece if rows > 1 else piece[0])


def blocks_of(tensor: torch.Tensor) -> Blocks:
    """The checksums of a tensor's blocks."""
    own = BlockHasher()
    for chunk in raw_bytes(tensor):
        own.update(chunk)
    return own.blocks()


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory has its bytes in row-major order, and nothing else."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a flat tensor, seen as bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def join(path: tuple[str, ...]) -> str:
    """The path of a tensor, of the keys on the way."""
    joined = "/".join(path)
    if "~" in joined or joined.count("/") >= len(path):  # there is something to escape, which is rare
        joined = "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)
    return joined


_ARRAY_DTYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"b1", "f2", "f4", "f8", "c8", "c16"}
_MOST_LEVELS = 100  # Python's recursion ends at 1000 calls; what was written must be readable with fewer of them left
_MOST_BITS = 10_000  # Python reads and writes no decimal number of more than 4300 digits
_TAKEN_OUT = object()  # stands for a value of which only tensors were to be kept


class _Encoder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.out = Encoded()
        self.above: set[int] = set()  # identities of the values that the one at hand is in
        self.places: dict[int, list[str]] = {}  # address → the paths of those that are stored and begin there

    def value_at(self, path: tuple[str, ...], value: Any, *, keep: bool = False) -> Any:
        """The JSON of a value; ``_TAKEN_OUT`` where nothing is left and its container need not keep its place."""
        kind = type(value)
        if len(path) > _MOST_LEVELS:
            raise self.unsupported(path, f"a value nested more than {_MOST_LEVELS} levels deep")
        if kind is int and value.bit_length() > _MOST_BITS:
            raise self.unsupported(path, "a number of thousands of digits")
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if isinstance(value, torch.Tensor):
            if is_composed(value):
                return self.subclass_at(path, value)
            self.tensor_at(path, value)
            return {"$tensor": True} if keep else _TAKEN_OUT
        if kind in (dict, OrderedDict, list, tuple, torch.Size):
            if id(value) in self.above:  # it would end after 2 to the power of the levels, where it is in it twice
                raise self.unsupported(path, "a value that contains itself")
            self.above.add(id(value))
            found = self.dict_at(path, value, keep) if kind in (dict, OrderedDict) else self.list_at(path, value)
            self.above.discard(id(value))
            return found
        return self.rare_at(path, value)

    def list_at(self, path: tuple[str, ...], value: Any) -> Any:
        items = [self.value_at((*path, str(index)), item, keep=True) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}

    def dict_at(self, path: tuple[str, ...], value: dict[Any, Any], keep: bool) -> Any:
        found = {}
        for key, item in value.items():
            written = self.key_at(path, key)
            left = self.value_at((*path, written), item)
            if left is not _TAKEN_OUT:
                found[written] = left
        return found if found or keep or not value else _TAKEN_OUT

    def key_at(self, path: tuple[str, ...], key: Any) -> str:
        if type(key) is str:
            return f"${key}" if key.startswith("$") else key
        if key is None or type(key) in (bool, int) or (type(key) is float and math.isfinite(key)):
            return f"$:{json.dumps(key)}"
        if type(key) is tuple and all(type(item) in (int, str) for item in key):
            return f"$:{json.dumps(key)}"
        raise self.unsupported(path, f"a key of type {_type_name(key)}")

    def rare_at(self, path: tuple[str, ...], value: Any) -> Any:
        kind = type(value)
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, enum.Enum):
            self.check_is_declared(path, value, "a member of the enumeration")
            return {"$enum": [_class_name(kind), value.name]}
        if kind is torch.dtype and dtype_name(value) in DTYPES:
            return {"$dtype": dtype_name(value)}
        if kind is torch.device:
            return {"$device": value.type}
        if kind is deque:
            items = [self.value_at((*path, str(index)), item, keep=True) for index, item in enumerate(value)]
            return {"$deque": {"maxlen": value.maxlen, "items": items}}
        if kind is complex:
            return {"$complex": struct.pack(">dd", value.real, value.imag).hex()}
        if kind in (set, frozenset):
            return {f"${kind.__name__}": [self.hashable_at(path, item) for item in sorted(value, key=repr)]}
        if kind is Counter:
            return {"$counter": [[self.hashable_at(path, key), self.hashable_at(path, n)] for key, n in value.items()]}
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {"$numpy": [value.dtype.str, value.tobytes().hex()]}
        if kind is np.ndarray and value.dtype.str[1:] in _ARRAY_DTYPES:
            self.tensor_at(path, torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C")))
            return {"$array": value.dtype.str}
        raise self.unsupported(path, f"a value of type {_type_name(value)}")

    def subclass_at(self, path: tuple[str, ...], value: Any) -> Any:
        self.check_is_declared(path, value, "a tensor of the subclass")
        names, context = value.__tensor_flatten__()
        inner = {name: getattr(value, name) for name in names}
        return {
            "$subclass": {
                "class": _type_name(value),
                "shape": list(value.shape),
                "strides": list(value.stride()),
                "context": self.hashable_at((*path, "context"), context),
                "tensors": self.dict_at(path, inner, keep=True),
            }
        }

    def check_is_declared(self, path: tuple[str, ...], value: Any, what: str) -> None:
        """Raises ``Unsupported`` for a value of a class that this program would not load again."""
        if type(value) not in torch.serialization.get_safe_globals():
            advice = f"torch.serialization.add_safe_globals([{type(value).__qualname__}])"
            raise Unsupported(
                f"{join((self.name, *path))}: {what} {_type_name(value)} could not be loaded after a restart; "
                f"declare its class safe before Run is made: {advice}"
            )

    def hashable_at(self, path: tuple[str, ...], value: Any) -> Any:
        count = len(self.out.tensors) + len(self.out.aliases)
        written = self.value_at(path, value, keep=True)
        if len(self.out.tensors) + len(self.out.aliases) > count:  # equal to nothing but itself, and at no path
            raise self.unsupported(path, "a tensor in a set")
        return written

    def tensor_at(self, path: tuple[str, ...], tensor: torch.Tensor) -> None:
        joined, placed = join(path), None
        if dtensors.is_sharded(tensor):
            placed = Placed(tuple(tensor.shape), dtensors.own_box(tensor, join((self.name, *path))))
            tensor = dtensors.local_of(tensor)
        if reason := _why_not(tensor) or _why_no_name(joined):
            raise self.unsupported(path, reason)
        # The same memory seen in the same way is one tensor under two names: tied weights. Empty tensors have no memory.
        stored = self.places.setdefault(tensor.data_ptr(), []) if tensor.numel() else []
        for first in stored:
            if _form(tensor) == _form(self.out.tensors[first]) and placed == self.out.placed.get(first):
                self.out.aliases[joined] = first
                return
        stored.append(joined)
        self.out.tensors[joined] = tensor
        if placed is not None:
            self.out.placed[joined] = placed

    def unsupported(self, path: tuple[str, ...], what: str) -> Unsupported:
        where = join((self.name, *path))
        return Unsupported(f"{where}: {what} cannot be written without pickle; keep it out of the state_dict")


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How memory is seen as a tensor, but for the address."""
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def _why_not(tensor: torch.Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"a tensor of layout {tensor.layout}, quantized {tensor.is_quantized}, nested {tensor.is_nested}"
    if tensor.is_meta:
        return "a tensor on the meta device, which has no bytes,"
    if type(tensor) not in _PLAIN_TENSORS:
        return f"a tensor of the subclass {_type_name(tensor)}"
    if dtype_name(tensor.dtype) not in DTYPES:
        return f"a tensor of dtype {tensor.dtype}"
    return None


def _why_no_name(path: str) -> str | None:
    if path == "__metadata__":  # a shard's header has something else under this key
        return "a tensor of this name"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "a tensor whose name is not Unicode"
    return None


def is_composed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that has its bytes in other tensors."""
    is_plain = type(tensor) in _PLAIN_TENSORS or dtensors.is_sharded(tensor)
    return not is_plain and hasattr(tensor, "__tensor_flatten__")


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _type_name(value: Any) -> str:
    return _class_name(type(value))


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that was encoded. Raises ``Corrupt`` where the JSON and the tensors' paths do not fit together."""
    unused = dict(tensors)
    try:
        value = _Decoder(tensors, unused).value_at((), _with_slots(tree, tensors))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError, struct.error) as error:
        raise Corrupt(f"the tree does not fit the tensors: {type(error).__name__}: {error}") from None
    if unused:
        raise Corrupt(f"tensors without a place in the tree: {', '.join(sorted(unused)[:5])}")
    return value


_NUMBERS = re.compile(r"[<>|][biufc]\d{1,2}")
_SLOT = object()  # a place in a dictionary from which a tensor was taken out


def _with_slots(tree: Any, paths: Iterable[str]) -> Any:
    """A copy of the tree with a slot for every tensor whose dictionary kept no trace of it."""
    tree = copy.deepcopy(tree)
    for path in paths:
        *parents, last = map(_unescape, path.split("/"))
        node = tree
        for key in parents:
            node = _items(node)
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node := _items(node), dict):
            node.setdefault(last, _SLOT)
    return tree


def _items(node: Any) -> Any:
    if not isinstance(node, dict) or len(node) != 1:
        return node
    match node:
        case {"$tuple": items} | {"$deque": {"items": items}} | {"$subclass": {"tensors": items}}:
            return items
    return node


def _unescape(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor], unused: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.unused = unused

    def value_at(self, path: tuple[str, ...], node: Any) -> Any:
        if node is _SLOT:
            return self.take(path)
        if type(node) is list:
            return self.list_at(path, node)
        if type(node) is not dict:
            return node
        if len(node) == 1 and (tag := next(iter(node))).startswith("$") and tag[1:2] not in ("$", ":"):
            return self.tagged_at(path, tag, node[tag])
        return {_key(key): self.value_at((*path, key), item) for key, item in node.items()}

    def list_at(self, path: tuple[str, ...], node: Any) -> list[Any]:
        if type(node) is not list:
            raise TypeError(f"expected a list, found {node!r}")
        return [self.value_at((*path, str(index)), item) for index, item in enumerate(node)]

    def tagged_at(self, path: tuple[str, ...], tag: str, body: Any) -> Any:
        match tag:
            case "$tensor":
                return self.take(path)
            case "$array":
                return _as_array(self.take(path).numpy(), _dtype(body))
            case "$tuple":
                return tuple(self.list_at(path, body))
            case "$dtype":
                return getattr(torch, body) if body in DTYPES else _unknown(body)
            case "$device":
                return torch.device(body)
            case "$deque":
                return deque(self.list_at(path, body["items"]), body["maxlen"])
            case "$subclass":
                return self.subclass_at(path, body)
            case "$enum":
                return _declared_class(path, body[0])[body[1]]
            case "$set":
                return set(self.list_at(path, body))
            case "$frozenset":
                return frozenset(self.list_at(path, body))
            case "$counter":
                return Counter(dict(self.list_at(path, body)))
            case "$bytes":
                return base64.b64decode(body, validate=True)
            case "$float":
                return struct.unpack(">d", bytes.fromhex(body))[0]
            case "$complex":
                return complex(*struct.unpack(">dd", bytes.fromhex(body)))
            case "$numpy":
                return np.frombuffer(bytes.fromhex(body[1]), _dtype(body[0]))[0]
        raise ValueError(f"unknown tag {tag}")

    def subclass_at(self, path: tuple[str, ...], body: dict[str, Any]) -> torch.Tensor:
        kind = _declared_class(path, body["class"])
        inner = {_key(key): self.value_at((*path, key), item) for key, item in body["tensors"].items()}
        context = self.value_at((*path, "context"), body["context"])
        built = kind.__tensor_unflatten__(inner, context, torch.Size(body["shape"]), tuple(body["strides"]))
        if not isinstance(built, torch.Tensor):
            raise TypeError(f"{body['class']} is no tensor")
        return built

    def take(self, path: tuple[str, ...]) -> torch.Tensor:
        joined = join(path)
        self.unused.pop(joined, None)
        return self.tensors[joined]


def _dtype(text: str) -> np.dtype[Any]:
    """A numpy dtype of numbers. numpy has many more, items of any size and of Python's objects among them."""
    if not _NUMBERS.fullmatch(text):
        raise ValueError(f"{text!r} is not a dtype of numbers")
    return np.dtype(text)


def _as_array(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if array.dtype != dtype.newbyteorder("="):
        raise ValueError(f"an array of {dtype} is stored as {array.dtype}")
    return array.astype(dtype, copy=False)


def _declared_class(path: tuple[str, ...], name: str) -> Any:
    known = {_class_name(each): each for each in torch.serialization.get_safe_globals() if isinstance(each, type)}
    if name not in known:
        advice = "import its library first, or declare it safe with torch.serialization.add_safe_globals"
        raise ConfigError(
            f"{join(path)}: the checkpoint holds a value of the class {name}, which this program does not know; {advice}"
        )
    return known[name]


def _unknown(text: str) -> Any:
    raise ValueError(f"{text!r} is not a dtype of tensors")


def _key(written: str) -> Any:
    if written.startswith("$:"):
        key = json.loads(written[2:])
        return tuple(key) if isinstance(key, list) else key
    return written.removeprefix("$")
