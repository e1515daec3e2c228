"""Short hashes of what a step has, for comparison between two runs."""

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash

from harness.checkpoint import tree
from harness.checkpoint.dtensors import local_of
from harness.checkpoint.format import checksum_of_blocks


def hash_of_tensor(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes; of a sharded tensor, those that this rank has."""
    local = local_of(tensor)
    return f"{tree.dtype_name(local.dtype)}{list(local.shape)} {checksum_of_blocks(tree.blocks_of(local))}"


def hash_of(value: Any) -> str:
    """Of a value of Python's or NumPy's, or of nested ones with tensors in them."""
    if isinstance(value, torch.Tensor):
        return hash_of_tensor(value)
    if isinstance(value, Mapping):
        value = {repr(key): hash_of(each) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        value = [hash_of(each) if isinstance(each, torch.Tensor | Mapping | list | tuple) else each for each in value]
    try:
        return xxhash.xxh3_64_hexdigest(pickle.dumps(value, protocol=4))
    except Exception:  # whatever it is, it cannot be compared
        return "?"


def of_parts(parts: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each tensor, and each other value in a word, by part and path."""
    return {path: word for name, part in parts.items() for path, word in _of_part(name, part)}


def _of_part(name: str, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    encoded = tree.encode(part, name)
    for path, tensor in encoded.tensors.items():
        yield f"{name}/{path}", hash_of_tensor(tensor)
    yield from _leaves(name, encoded.tree)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{path}/{key}", each)
    elif isinstance(value, list) and len(value) <= 16:
        for index, each in enumerate(value):
            yield from _leaves(f"{path}/{index}", each)
    else:
        yield path, repr(value) if len(repr(value)) < 60 else hash_of(value)
