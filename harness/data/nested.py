"""Walks through nested values: batches, and the states of optimizers."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def leaves(value: Any) -> Iterator[Any]:
    """What is within dictionaries, lists, tuples and deques, and is none of these itself."""
    if isinstance(value, torch.Tensor):  # as most are: the next question takes longer
        yield value
    elif isinstance(value, Mapping | list | tuple | deque):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(item)
    else:
        yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same dictionaries, lists, tuples and deques, with what a function makes of each leaf."""
    if isinstance(value, dict):
        return type(value)({key: mapped(function, item) for key, item in value.items()})
    if isinstance(value, list | tuple | deque):
        return like(value, (mapped(function, item) for item in value))
    return function(value)


def like(sequence: Any, items: Iterator[Any]) -> Any:
    """A list, tuple or deque like another one, of other items."""
    if isinstance(sequence, deque):
        return deque(items, sequence.maxlen)
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors within a nested value."""
    return (each for each in leaves(value) if isinstance(each, torch.Tensor))


def to_device(value: Any, device: torch.device) -> Any:
    """A batch on a device: its tensors are moved, everything else stays. Loaders make them on the CPU."""
    if device.type == "cpu":
        return value
    return mapped(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, value)
