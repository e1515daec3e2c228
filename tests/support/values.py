"""Comparing nested values by every bit of them, and a state with its objects at hand."""

import struct
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch

from harness.checkpoint.tree import raw_bytes
from harness.state.capture import State


class Training(State):
    """What a training usually has, as attributes and as a state on the CPU."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any = None, scaler: Any = None) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        super().__init__({name: each for name, each in objects.items() if each is not None}, torch.device("cpu"))


def bits(value: Any) -> Any:
    """Everything that can be told of a value: equal if and only if types, dtypes, shapes and all bits are."""
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), b"".join(raw_bytes(value)))
    if isinstance(value, np.ndarray | np.generic):
        return (type(value).__name__, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict):
        kind = dict if type(value) is OrderedDict else type(value)
        return (kind.__name__, {repr(bits(key)): bits(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return ("tuple" if isinstance(value, tuple) else "list", [bits(item) for item in value])
    if isinstance(value, deque):
        return ("deque", value.maxlen, [bits(item) for item in value])
    if isinstance(value, set | frozenset):
        return (type(value).__name__, sorted(map(repr, map(bits, value))))
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, complex):
        return ("complex", struct.pack(">dd", value.real, value.imag))
    return (type(value).__name__, value)
