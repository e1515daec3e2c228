"""Python's garbage collector, held where a great many objects are made and none of them is garbage."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """20,000 small tensors are a million objects; to look for garbage among them would take longer than to name them all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
