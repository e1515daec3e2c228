"""What a program has beside the state of its run: everything that its functions can reach, each by its name.

A value that a restart begins anew is found by it. Tensors, numbers, generators and what holds them are looked at; what is in
the state already, and what nobody could compare, is not.
"""

import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import torch_private
from harness.checkpoint.dtensors import local_of
from harness.drill.hashes import hash_of, hash_of_tensor
from harness.state.modules import unwrap

_MOST_VALUES, _MOST_ITEMS, _MOST_LEVELS = 4000, 200, 4
_LARGEST_BYTES = 64 << 20  # of a tensor that is not in the state: it is hashed whenever it has changed
_NOT_THE_USERS = ("harness.", "torch.", "runpy", "contextlib", "importlib", "threading", "concurrent.")
_NO_VALUES = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Reachable:
    """Looks through the variables of the functions that are under way, for values that are not in a state."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self._known = {id(each) for each in objects.values()}
        self._known |= {id(unwrap(each)) for each in objects.values() if isinstance(each, nn.Module)}
        for each in objects.values():
            if isinstance(each, nn.Module):
                self._known |= {id(tensor) for tensor in (*each.parameters(), *each.buffers())}
                self._known |= {id(module) for module in each.modules()}
        self._tensors: dict[int, tuple[int, int, str]] = {}  # by id: version, address and hash when it was seen last

    def values(self) -> dict[str, str]:
        """Each value in a word, by its name in the program."""
        found: dict[str, str] = {}
        for name, value in (*_variables(), *self._beside_the_state()):
            self._note(found, name, value, 0, set())
            if len(found) > _MOST_VALUES:
                break
        return found

    def _beside_the_state(self) -> Iterator[tuple[str, Any]]:
        """What the objects of the state have beside what they save: settings of modules, hooks, other attributes."""
        for name, each in self._objects.items():
            if not isinstance(each, nn.Module):
                if type(each).__module__.partition(".")[0] not in ("torch", "harness"):
                    yield from ((f"{name}.{key}", value) for key, value in getattr(each, "__dict__", {}).items())
                continue
            for path, module in unwrap(each).named_modules():
                where = f"{name}.{path}" if path else name
                for key, value in module.__dict__.items():
                    if isinstance(value, _PLAIN) and not key.startswith("_") and key != "training":
                        yield f"{where}.{key}", value
                yield f"{where}'s hooks", torch_private.hooks_in(module)

    def _note(self, found: dict[str, str], name: str, value: Any, level: int, above: set[int]) -> None:
        if id(value) in self._known or id(value) in above or len(found) > _MOST_VALUES:
            return
        if (word := self._word(value)) is not None:
            found[name] = word
        elif level < _MOST_LEVELS:
            for inner, each in _items(name, value):
                self._note(found, inner, each, level + 1, {*above, id(value)})

    def _word(self, value: Any) -> str | None:
        """A value in a word; None where it has parts with names of their own, or cannot be compared."""
        if isinstance(value, _PLAIN):
            return repr(value) if len(repr(value)) < 60 else hash_of(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return f"array {hash_of(value)}" if value.nbytes <= _LARGEST_BYTES else None
        if isinstance(value, torch.Generator):
            return f"generator {hash_of(value.get_state())}"
        if isinstance(value, random.Random):
            return f"generator {hash_of(value.getstate())}"
        if isinstance(value, np.random.Generator):
            return f"generator {hash_of(value.bit_generator.state)}"
        if isinstance(value, set | frozenset):
            return f"set of {len(value)} {hash_of(sorted(map(repr, value)))}"
        if isinstance(value, list | tuple | deque) and all(isinstance(each, _PLAIN) for each in value):
            return f"{type(value).__name__} of {len(value)} {hash_of([*value])}"
        return None

    def _tensor(self, tensor: torch.Tensor) -> str | None:
        local = local_of(tensor)
        if local.nbytes > _LARGEST_BYTES or local.layout != torch.strided or local.device.type == "meta":
            return None
        mark = torch_private.version(local), local.data_ptr()
        seen = self._tensors.get(id(tensor))
        if seen is None or seen[:2] != mark or local.nbytes < 4096:
            self._tensors[id(tensor)] = seen = (*mark, hash_of_tensor(tensor))
        return f"tensor {seen[2]}"


def _variables() -> Iterator[tuple[str, Any]]:
    """The variables of the functions that are under way, and of the modules that they are in."""
    frame: FrameType | None = sys._getframe(1)
    modules: set[int] = set()
    while frame is not None:
        names = frame.f_globals
        if not f"{names.get('__name__', '')}.".startswith(_NOT_THE_USERS):
            if frame.f_locals is not names:
                yield from ((f"{frame.f_code.co_name}: {key}", each) for key, each in [*frame.f_locals.items()])
            if id(names) not in modules:
                modules.add(id(names))
                yield from ((key, each) for key, each in [*names.items()] if not key.startswith("__"))
        frame = frame.f_back


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, where that can be compared."""
    if isinstance(value, _NO_VALUES) or type(value).__module__.startswith(("harness.", "torch.distributed")):
        return
    if isinstance(value, nn.Module):
        yield from ((f"{name}.{key}", each) for key, each in (*value.named_parameters(), *value.named_buffers()))
        yield from ((f"{name}.{key}", each) for key, each in value.__dict__.items() if isinstance(each, _PLAIN))
    elif isinstance(value, torch.optim.Optimizer):
        for index, group in enumerate(value.param_groups):
            yield from ((f"{name}.param_groups[{index}].{key}", each) for key, each in group.items() if key != "params")
        for index, state in enumerate(value.state.values()):
            yield from ((f"{name}.state[{index}].{key}", each) for key, each in state.items())
    elif isinstance(value, list | tuple | deque):
        yield from ((f"{name}[{index}]", each) for index, each in enumerate([*value][:_MOST_ITEMS]))
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", each) for key, each in [*value.items()][:_MOST_ITEMS])
    elif hasattr(value, "__dict__"):
        yield from ((f"{name}.{key}", each) for key, each in [*vars(value).items()][:_MOST_ITEMS])
