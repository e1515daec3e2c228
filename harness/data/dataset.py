"""What can be told of a data set from outside: whether it has changed, and whether its samples are still the same ones.

Loader workers have copies of a data set, and see nothing of what is changed in the training process later on. ``Attributes``
notices such a change.

``sketch`` makes a few numbers of a sample, and ``others`` compares those of several samples: another split, or other data,
has other ones. Numbers are compared loosely, since another processor or another version of a library rounds differently.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash

from harness import torch_private

# --- changes ---------------------------------------------------------------------------------------------------------

_MOST_VALUES = 256  # are looked at, those on top first
_LONGEST = 64  # what has more items counts as one value
_SMALL_BYTES = 1024  # an array that is not larger is compared byte by byte
_PLAIN = {bool, int, float, complex, str, bytes, type(None)}


class Attributes:
    """The attributes of an object, and of what it holds, as they were when this was made.

    Seen are other values and other objects in place of those before, tensors that were changed in place, and small arrays.
    Not seen are items of a long list or a large array that were changed in place, and what is no attribute at all.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._seen = list(_values(holder))

    def changed(self) -> str | None:
        """The name of an attribute that is not what it was; None where all are."""
        now = list(_values(self._holder))
        for seen, found in zip(self._seen, now, strict=False):
            if not all(map(_is_same, seen, found)):
                return seen[0]
        longest = max(self._seen, now, key=len)
        return longest[-1][0] if len(self._seen) != len(now) else None


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _PLAIN and one == other)


def _values(holder: Any) -> Iterator[tuple[str, *tuple[Any, ...]]]:
    """The name of each value, the value, and what else shows that it was changed; the holder's own attributes first."""
    waiting, met = deque([("", holder)]), set()
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        name, value = waiting.popleft()
        if type(value) in _PLAIN:
            yield name, value
            continue
        yield name, value, *_contents(value)
        if id(value) not in met:
            met.add(id(value))
            waiting.extend(_held(name, value))


def _contents(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) and not value.is_inference():
        yield torch_private.version(value)
    elif isinstance(value, np.ndarray) and value.nbytes <= _SMALL_BYTES and not value.dtype.hasobject:
        yield value.tobytes()
    elif isinstance(value, list | tuple | set | frozenset | Mapping):
        yield len(value)


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, dict) and len(value) <= _LONGEST:
        yield from ((f"{name}[{key!r}]", item) for key, item in list(value.items()))
    elif not isinstance(value, type | FunctionType | ModuleType | torch.Tensor | np.ndarray):
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{name}.{key}".lstrip("."), item) for key, item in list(attributes.items()))


# --- samples ---------------------------------------------------------------------------------------------------------

_MOST_LEAVES = 32  # of a sample
_MOST_ELEMENTS = 4096  # of an array, evenly spread
_TOLERANCE = 1e-3  # of the size of the numbers; what is only rounded in another way differs by less, another sample by more

Sketch = list[Any]  # of each leaf of a sample a word, which must be equal, or three numbers


def sketch(sample: Any) -> Sketch:
    """What a sample looks like, as plain values. Whatever is not made of numbers, texts and containers of them is passed
    over."""
    found: Sketch = []
    _draw(sample, found)
    return found[:_MOST_LEAVES]


def _draw(value: Any, found: Sketch) -> None:
    if len(found) >= _MOST_LEAVES:
        return
    if isinstance(value, str | bytes):
        found.append(xxhash.xxh3_64_hexdigest(value.encode() if isinstance(value, str) else value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            found.append(str(key))
            _draw(item, found)
    elif isinstance(value, list | tuple):
        for item in value[:_MOST_LEAVES]:
            _draw(item, found)
    elif isinstance(value, torch.Tensor):
        _draw_array(value.detach().reshape(-1)[:: -(-value.numel() // _MOST_ELEMENTS) or 1].cpu(), value.shape, found)
    elif isinstance(value, bool | int | float | np.generic | np.ndarray) or hasattr(value, "__array_interface__"):
        array = np.asarray(value)  # of a PIL image, too
        if array.dtype.kind in "biufc":
            flat = array.reshape(-1)[:: -(-array.size // _MOST_ELEMENTS) or 1]
            _draw_array(torch.from_numpy(np.array(flat)), array.shape, found)


def _draw_array(flat: torch.Tensor, shape: Sequence[int], found: Sketch) -> None:
    """The number itself where it is a single whole one; otherwise the shape, and three numbers that any change moves."""
    if len(flat) == 1 and not (flat.is_floating_point() or flat.is_complex()):
        found.append(str(flat.item()))
        return
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    found.append(str(tuple(shape)))
    numbers = np.clip(np.nan_to_num(flat.double().numpy(), nan=1.5), -1e100, 1e100)
    places = np.arange(len(numbers))
    size = math.sqrt(float(np.mean(numbers**2))) if len(numbers) else 0.0
    found.append([size, *(float(np.mean(numbers * wave(places))) if len(numbers) else 0.0 for wave in (np.cos, np.sin))])


def _differ(one: Sketch, other: Sketch) -> bool:
    if len(one) != len(other):
        return True
    for a, b in zip(one, other, strict=True):
        if isinstance(a, list) and isinstance(b, list):
            limit = _TOLERANCE * max(a[0], b[0])
            if any(abs(x - y) > limit for x, y in zip(a, b, strict=True)):
                return True
        elif a != b:
            return True
    return False


def others(saved: Sequence[Any], live: Sequence[Any]) -> list[int]:
    """The samples of those that both have, as pairs of an index and a sketch, which are not alike."""
    known = {index: drawn for index, drawn in live}  # noqa: C416  # pairs of any kind
    return [index for index, drawn in saved if index in known and _differ(drawn, known[index])]
