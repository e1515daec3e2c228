"""What is done about a run that hangs: its stacks are written beside the checkpoints, and the process ends."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

from harness.config import RunConfig
from harness.data.loader import nothing
from harness.distributed.world import leave_at_once
from harness.runtime.console import print_error
from harness.runtime.environment import rank
from harness.runtime.watchdog import Watchdog
from harness.storage.store import open_store


class NoWatchdog:
    """Where ``watchdog.timeout_seconds`` is None, and between two loops."""

    is_reporting = False

    def step(self) -> None:
        """Nobody looks."""


@contextlib.contextmanager
def watching(config: RunConfig, keep: Callable[[], None] = nothing) -> Iterator[Watchdog | NoWatchdog]:
    """A watchdog for the time of the training, where one is wanted. It calls ``keep`` before it ends the process."""
    limits = config.watchdog
    if limits.timeout_seconds is None:
        yield NoWatchdog()
        return
    watchdog = Watchdog(
        limits.timeout_seconds, limits.first_step_seconds, _report_to(config), functools.partial(_leave, keep)
    )
    try:
        yield watchdog
    finally:
        watchdog.stop()


def _report_to(config: RunConfig) -> Callable[[str], None]:
    """Writes the stacks beside the checkpoints, if the storage still answers."""

    def report(stacks: str) -> None:
        if config.checkpoint.url is None:
            return
        text = stacks.encode()
        name = f"hangs/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-rank-{rank()}.txt"
        try:
            store = open_store(config.checkpoint.url, config.checkpoint.storage_options, tries=1, deadline_seconds=10)
            store.put(name, lambda: [text], len(text))
        except Exception as error:  # whatever it is, leaving comes first
            print_error(f"harness: could not write {name}: {error}")

    return report


def _leave(keep: Callable[[], None]) -> None:
    keep()
    time.sleep(1)  # the other ranks hang with this one and finish their reports now; the first to leave ends them all
    leave_at_once(1)
