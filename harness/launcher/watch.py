"""Looks after the ranks of this machine while torchrun waits: a death is noticed at once, a suspended rank after some time.

A process that is suspended (SIGSTOP) is no death to torchrun, and it hears no SIGTERM. The other ranks would wait for it
until their timeout. So it is named, and killed if it stays so. One that a debugger holds is left alone.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

LOOK_SECONDS = 1.0


class Watch:
    """Of the ranks that torchrun has started most recently.

    ``suspended_seconds`` is how long a rank may be suspended, 0 for ever; ``say`` hears of it. Time in which this process
    did not run itself does not count: all of a job may have been suspended together.
    """

    def __init__(self, suspended_seconds: float, say: Callable[[str], None]) -> None:
        self._limit_seconds = suspended_seconds
        self._say = say
        self._pidfds: dict[int, int] = {}  # by process id; of those that run
        self._known: dict[int, int] = {}
        self.suspended: dict[int, float] = {}
        """The ranks that are suspended, and how many seconds they have been so."""
        self._looked_time = time.monotonic()
        self.ended: dict[int, float] = {}
        """The ranks that were killed here, and how many seconds they had been suspended."""

    def wait(self, pids: Mapping[int, int], seconds: float) -> None:
        """Waits for so long, or until one of these ranks (by number) ends."""
        if pids != self._known:
            self._begin(pids)
        poll = select.poll()
        for pidfd in self._pidfds.values():
            poll.register(pidfd, select.POLLIN)
        gone = {pidfd for pidfd, _ in poll.poll(1000 * seconds)}
        for pid in [pid for pid, pidfd in self._pidfds.items() if pidfd in gone]:
            os.close(self._pidfds.pop(pid))
        now = time.monotonic()
        if self._limit_seconds and now >= self._looked_time + LOOK_SECONDS:
            passed = min(now - self._looked_time, 2 * LOOK_SECONDS)
            self._looked_time = now
            for rank, pid in pids.items():
                self._look(rank, pid, passed)

    def _begin(self, pids: Mapping[int, int]) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._known, self._pidfds, self.suspended, self.ended = dict(pids), {}, {}, {}
        for pid in pids.values():
            with contextlib.suppress(OSError):  # it is gone, and waited for
                self._pidfds[pid] = os.pidfd_open(pid)

    def _look(self, rank: int, pid: int, passed_seconds: float) -> None:
        if not is_suspended(pid):
            self.suspended.pop(rank, None)
            return
        if rank not in self.suspended:
            self.suspended[rank] = 0.0
            ends = f"it is killed if it is still so in {self._limit_seconds:.0f} s (--suspended-seconds)"
            self._say(f"rank {rank} is suspended (SIGSTOP, process {pid}), and the others wait for it; {ends}")
            return
        self.suspended[rank] += passed_seconds
        if self.suspended[rank] >= self._limit_seconds:
            self.ended[rank] = self.suspended.pop(rank)
            os.kill(pid, signal.SIGKILL)


def is_suspended(pid: int) -> bool:
    """Whether a process does not run because of SIGSTOP or its like (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
