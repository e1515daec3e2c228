"""The start of a program: torch is imported out of the garbage collector's sight."""

import contextlib
import gc
import importlib
import os
import sys
import time

from harness.errors import ConfigError
from harness.runtime.gc_pause import without_collections
from harness.runtime.threads import Background

_OF_OPTIMIZERS = "torch._dynamo"  # which torch (2.11 to 2.15) imports when the first optimizer is made; it is not public
_TO_TRAIN = ("torch", _OF_OPTIMIZERS)
_END_SECONDS = 10.0  # for a thread that has nothing more to do


def import_torch(*modules: str) -> None:
    """Imports modules of torch (by default, what a training needs) before the program has anything of its own, and has the
    collector pass over them from then on. Raises what the first import raises: a second one would end in another error.

    Of its hundreds of thousands of objects none is garbage before the program ends. The collector looks through them all
    the same: several times while they are made, then in each full collection between two steps, and again at the end. A
    process that makes an optimizer and leaves takes 1.5 s instead of 2.5 s without that. Where torch is there already,
    nothing is done: what else is there by then may have to be collected, if only to be flushed.
    """
    if "torch" in sys.modules:
        return
    with without_collections():
        # Errors that it catches on the way stay somewhere in it, with the frames of all callers, and with what those are
        # going to hold, the user's task, which would then never be collected. A thread has no callers.
        importing = Background(lambda: _import(modules or _TO_TRAIN), "harness-import")
        try:
            importing.result()
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ConfigError(f"{error}: PyTorch is needed; install it for {sys.executable}: pip install torch") from None
        _wait_for_the_end_of(importing)
        gc.freeze()


def _wait_for_the_end_of(thread: Background[None]) -> None:
    """Waits until the kernel has ended a thread, which is a moment after Python's ``join`` returns.

    In that moment MKL holds all locks of its memory, to free that of the thread: whatever is forked then hangs in its first
    product of matrices (torch 2.13, ``mm_cleanup_thread_cbk``).
    """
    deadline = time.monotonic() + _END_SECONDS
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < deadline:
        time.sleep(0.0001)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError) if name == _OF_OPTIMIZERS else contextlib.nullcontext():
            importlib.import_module(name)
