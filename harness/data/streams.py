"""Random streams that are derived anew at each step boundary: from a key of each generator and the step.

So a rank that has the keys knows the state of every generator at a boundary: one that survives knows the streams of those
that have died. A key is a hash of the generator's own state when the run began. Ranks whose generators were alike then
draw alike for ever, and others do not: a program may rely on either.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from harness.data.seeding import DEVICE, PROCESS, mix, random_state, state_of
from harness.distributed import device as devices

Keys = Sequence[int]  # of a rank's generators, in this order: Python's, NumPy's, torch's, the device's


def keys_here(device: torch.device) -> list[int]:
    """The keys of this process's generators as they are now."""
    states = [random.getstate(), PROCESS["numpy"].get_state(), torch.default_generator.get_state()]
    own = devices.of(device).random_state()
    states += [] if own is None else [own]
    return [xxhash.xxh3_64_intdigest(_bytes_of(state)) >> 1 for state in states]


def _bytes_of(state: Any) -> bytes:
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    return b"".join(each.tobytes() if isinstance(each, np.ndarray) else repr(each).encode() for each in state)


def seed_streams(keys: Keys, step: int, device: torch.device) -> None:
    """Begins the streams of a step. It asks the generators themselves: ``torch.manual_seed`` takes half a millisecond."""
    random.seed(mix(keys[0], step))
    np.random.seed(mix(keys[1], step) & 0xFFFFFFFF)  # noqa: NPY002  # the global generator is the one that users draw from
    torch.default_generator.manual_seed(mix(keys[2], step))
    devices.of(device).seed(mix(keys[-1], step))  # torch's key, where the run began without an accelerator


def stream_states(keys: Keys, step: int, device: torch.device) -> dict[str, Any]:
    """What ``random_state`` gives on the rank that has these keys, when the streams of a step have just begun."""
    numpy = np.random.RandomState(mix(keys[1], step) & 0xFFFFFFFF)
    torchs = torch.Generator(device="cpu").manual_seed(mix(keys[2], step))
    found = {"python": random.Random(mix(keys[0], step)), "numpy": numpy, "torch": torchs}
    own = devices.of(device).state_of_seed(mix(keys[-1], step))
    return {**{name: state_of(each) for name, each in found.items()}, DEVICE: own}


def states_beside(keys: Keys | None, step: int, device: torch.device) -> dict[str, Any]:
    """What a checkpoint has of this rank's generators beside their keys: nothing, unless something was drawn since the
    streams of the step began."""
    states = random_state(device)
    return {} if keys is not None and _are_alike(states, stream_states(keys, step, device)) else states


def states_in(saved: Mapping[str, Any], step: int, device: torch.device) -> Mapping[str, Any]:
    """The states of a rank's generators by what the checkpoint of a step has of them; empty where it has nothing."""
    are_beside = "python" in saved or "keys" not in saved
    return saved if are_beside else stream_states(saved["keys"], step, device)


def _are_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return all(_are_alike(one[name], other[name]) for name in one)
    return bool(np.array_equal(one, other))
