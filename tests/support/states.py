"""States: one with its objects at hand, a model that trains step by step, a save and a load, and comparing by every bit."""

import struct
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn, optim

from harness.checkpoint import commit, load
from harness.checkpoint.format import Attempt
from harness.checkpoint.tree import raw_bytes
from harness.state.capture import State
from harness.storage.store import open_store


class Training(State):
    """What a training usually has, as attributes and as a state on the CPU."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any = None, scaler: Any = None) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        super().__init__({name: each for name, each in objects.items() if each is not None}, torch.device("cpu"))


class Net(nn.Module):
    """Matrices, vectors, and a parameter that never has a gradient, so never a state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.second = nn.Linear(3, 4), nn.Linear(2, 2, bias=False), nn.Linear(4, 2)

    def loss(self, index: int) -> Any:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(index)).to(self.first.weight)
        return self.second(self.first(inputs).tanh().to(self.second.weight)).abs().square().mean()


def train(net: Any, optimizer: optim.Optimizer, steps: range) -> None:
    """Some steps; each depends on its index alone."""

    def closure(index: int) -> Any:
        optimizer.zero_grad()
        loss = net.loss(index)
        loss.backward()
        return loss

    for index in steps:
        optimizer.step(partial(closure, index))


def through_a_store(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What a later process would read of what is saved now."""
    store = open_store(f"memory://{uuid.uuid4()}")
    directory, manifest = commit.write(store, parts, step=1, attempt=Attempt.after([]))
    try:
        return load.read(store, directory, manifest)
    finally:
        store.filesystem.fs.rm(store.root, recursive=True)


def bits(value: Any) -> Any:
    """Everything that can be told of a value: equal if and only if types, dtypes, devices, shapes and all bits are."""
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), str(value.device), tuple(value.shape), b"".join(raw_bytes(value)))
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
