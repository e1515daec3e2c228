"""Whether the samples of a data set are still the same ones: another split, or other data, has other ones.

``sketch`` makes a few numbers of a sample, and ``others`` compares those of several samples. Numbers are compared loosely,
since another processor or another version of a library rounds differently.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from harness.data.fetching import Fetcher
from harness.data.schedule import MicroBatch, Schedule
from harness.data.seeding import mix
from harness.errors import ConfigError, Mismatch

log = logging.getLogger(__name__)

_MOST_LEAVES = 32  # of a sample
_MOST_ELEMENTS = 4096  # of an array, evenly spread
_TOLERANCE = 1e-3  # of the size of the numbers; what is only rounded in another way differs by less, another sample by more

Sketch = list[Any]  # of each leaf of a sample a word, which must be equal, or three numbers
_MANY_TIMES = 20
_FINGERS = 3  # samples that are looked at; more than half of them must be others before anything is refused
_ADVICE = (
    "give random_split a seeded generator, and sort directory listings; if the data changed on purpose, start "
    "with Loader(fingerprint=False) (data.fingerprint=false)"
)


class Fingerprint:
    """What three samples look like, as pairs of an index and a sketch: as they were in the loaded checkpoint, or before
    the first batch.

    There is none where nobody has asked then, where the samples cannot be fetched, or where they are others each time.
    """

    def __init__(self, schedule: Schedule, fetcher: Fetcher, *, compares: bool, speaks: bool) -> None:
        self._schedule = schedule
        self._fetcher = fetcher
        self._compares = self._is_unknown = compares
        self._speaks = speaks
        self._value: list[tuple[int, Sketch]] | None = None

    def value(self, dataset: Dataset[Any]) -> list[tuple[int, Sketch]] | None:
        """The fingerprint of a data set; fetches samples when it is called first."""
        if self._is_unknown:
            self._is_unknown = False
            self._value = self._draw(dataset)
        return self._value

    def stop_looking(self) -> None:
        """The first batch comes: what is not known by now stays unknown."""
        self._is_unknown = False

    def restore(self, saved: list[tuple[int, Sketch]] | None) -> None:
        """Takes over the one of a checkpoint."""
        if self._compares:
            self._value = saved or self._value

    def agree(self, dataset: Dataset[Any], all_gather: Callable[[Any], list[Any]]) -> None:
        """Gives all ranks rank 0's fingerprint. All ranks call it. Raises ``ConfigError`` where they have other samples."""
        found = all_gather(self.value(dataset))
        differ = [rank for rank, each in enumerate(found) if found[0] and each and _are_others(found[0], each)]
        if differ and all(all_gather(self._is_repeatable(dataset))):
            raise ConfigError(f"rank {differ[0]} has other samples than rank 0: {_ADVICE}")
        self._value = found[0]

    def refuse_others(self, dataset: Dataset[Any], saved: Any) -> None:
        """Raises ``Mismatch`` where a fingerprint that was saved is not that of this data set."""
        own = self.value(dataset)
        if saved and own and _are_others(saved, own) and self._is_repeatable(dataset):
            which = f"(sample {', '.join(map(str, others(saved, own)))} of the data set)"
            raise Mismatch(f"the data set has changed since the checkpoint {which}: {_ADVICE}")

    def _is_repeatable(self, dataset: Dataset[Any]) -> bool:
        """Whether the fingerprint is the same whenever it is taken; one that chance seldom changes may just look so."""
        return all(self._draw(dataset) == self._value for _ in range(_MANY_TIMES))

    def _draw(self, dataset: Dataset[Any]) -> list[tuple[int, Sketch]] | None:
        """Fetches the samples twice, as for a batch of epoch 0."""
        size, begin = self._schedule.samples, mix(self._schedule.seed, 0)
        indices = sorted({(begin + number * size // _FINGERS) % size for number in range(_FINGERS)})
        plan = [[MicroBatch(0, (index,), 1.0)] * 2 for index in indices]
        workers = min(1, self._fetcher.workers)
        fetched = self._fetcher.batches(dataset, iter(plan), workers=workers, collate=_sketch_first)
        try:
            with contextlib.closing(fetched):
                drawn = [[batch for batch, _ in step] for step in itertools.islice(fetched, len(plan))]
        except Exception as error:  # whatever it is, the training will meet it, too
            log.debug("no fingerprint of the data set: %s", error)
            return None
        for index, (first, second) in zip(indices, drawn, strict=True):
            if _are_others([(index, first)], [(index, second)]):
                if self._speaks:
                    self._speaks = False  # once
                    log.warning(
                        "sample %d of the data set differs each time it is fetched, so a resumed run trains on other "
                        "samples than an uninterrupted one; draw its random numbers from the global generators of "
                        "Python, NumPy or torch",
                        index,
                    )
                return None
        return [(index, first) for index, (first, _) in zip(indices, drawn, strict=True)]


def _sketch_first(samples: list[Any]) -> Sketch:
    return sketch(samples[0])


def _are_others(saved: Sequence[Any], live: Sequence[Any]) -> bool:
    """Whether most of the samples that both fingerprints have are not alike."""
    both = len({index for index, _ in saved} & {index for index, _ in live})
    return 2 * len(others(saved, live)) > both


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
