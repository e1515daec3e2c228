"""Random numbers: seeds, and the states of generators, to keep and to set."""

import contextlib
import random
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from harness.distributed import device as devices

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# This process's own, which user code draws from.
PROCESS = {
    "python": random.getstate.__self__,  # type: ignore[attr-defined]
    "numpy": np.random.get_state.__self__,  # type: ignore[attr-defined]
    "torch": torch.default_generator,
}
DEVICE = "cuda"  # the name, in saved states, of the device's own generator, whatever the device is


_PACKED = [struct.Struct(f"<{count}q").pack for count in range(5)]


def mix(*numbers: int) -> int:
    """A well-spread 63-bit seed from several numbers below 2^63: a hash of them (XXH3; a fifth of a microsecond)."""
    return xxhash.xxh3_64_intdigest(_PACKED[len(numbers)](*numbers)) >> 1


def seed_everything(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, those of all devices included."""
    seed = mix(*numbers) if len(numbers) > 1 else numbers[0]
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # the global generator is the one that users' data sets draw from
    torch.manual_seed(seed)


def seed_process(seed: int) -> None:
    """Seeds the process's own generators alone: those of the devices are not a loader's."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # as above
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the process's own generators back afterwards, after an error, too."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002  # as above
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002  # as above
        torch.default_generator.set_state(states[2])


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Has tensors made on the CPU where ``torch.set_default_device`` says otherwise."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def state_of(generator: Any) -> Any:
    """A generator's state, as plain values and tensors."""
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"version": version, "words": torch.from_numpy(np.array(words, dtype=np.int64)), "gauss": gauss}
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Sets a generator to what ``state_of`` has given."""
    if isinstance(generator, random.Random):
        if isinstance(state, Mapping):
            state = state["version"], tuple(state["words"].tolist()), state["gauss"]
        generator.setstate(state)  # of an optimizer's generator, earlier checkpoints have Python's tuple
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators: Python's, NumPy's, torch's, and the device's own."""
    own = devices.of(device).random_state()
    return {**{name: state_of(each) for name, each in PROCESS.items()}, DEVICE: own}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets this process's generators. Done last: everything else that is restored may draw from them."""
    for name, each in PROCESS.items():
        set_state(each, state[name])
    devices.of(device).set_random_state(state[DEVICE])
