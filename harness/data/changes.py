"""Notices that an object was changed: loader workers have copies of a data set, and see nothing of it."""

from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from harness import torch_private

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
