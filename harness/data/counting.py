"""Whether a program counts the batches of an epoch by itself: such a count starts again at 0 after a restart."""

import gc
import inspect
import itertools
import logging
import sys
from types import FrameType, GeneratorType
from typing import Any

log = logging.getLogger(__name__)

_AROUND = (tuple, zip, map, filter, enumerate, itertools.islice, itertools.chain)
_COUNTS = (itertools.count, type(iter(range(0))))


def warn_of_counts(iterator: Any, epoch: int, batches: int) -> None:
    """Says so where ``enumerate``, or a ``zip`` with numbers, counts what an iterator gives, which continues within an
    epoch after ``batches``. Called by the iterator itself. Nobody but Python's garbage collector knows who holds it."""
    held = [iterator, *_generators_around(sys._getframe(1))]
    for _ in range(3):
        holders = [each for each in gc.get_referrers(*held) if type(each) in _AROUND]
        if any(type(each) is enumerate or any(type(one) in _COUNTS for one in gc.get_referents(each)) for each in holders):
            log.warning(
                "enumerate(loader) starts at 0, but epoch %d resumes after %d batches: values computed from that "
                "number differ from those of a run without a restart. Use loader.batch, which continues, or keep "
                "a counter in the state",
                epoch,
                batches,
            )
            return
        held = holders


def _generators_around(frame: FrameType | None) -> list[Any]:
    """The generators that ask for a batch and pass it on, as tqdm's does. While they run, nobody sees what they hold."""
    frames = []
    while frame is not None and (frame.f_code.co_flags & inspect.CO_GENERATOR or "torch" in frame.f_globals["__name__"]):
        frames.append(frame)
        frame = frame.f_back
    return [each for each in gc.get_objects() if type(each) is GeneratorType and each.gi_frame in frames]
