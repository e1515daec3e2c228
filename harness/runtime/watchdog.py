"""Ends a process in which nothing goes on: a collective without its peer, a loader that waits, storage that hangs.

torch's own time-outs are minutes long and do not cover a data loader or a file system. A step that does not end within
``timeout_seconds`` (``first_seconds`` for the first one, which compiles and warms up) is a hang: the stacks of all threads
go to stderr and to the run's URL, and the process leaves with ``os._exit``, which no finalizer can hold up. torchrun then
restarts the ranks, or the launcher the job.

Two timers run. A Python thread does the above. Should it not get to run, because the stuck main thread holds the interpreter
lock, ``faulthandler``'s thread, which is plain C and needs no lock, writes the stacks and ends the process
a little later.
"""

import faulthandler
import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

_LAST_RESORT_SECONDS = 15.0  # how much later than the thread the C timer fires


class Watchdog:
    """Barks when ``step`` is not called for too long. ``report`` gets the stacks as text, ``leave`` ends the process."""

    def __init__(
        self,
        timeout_seconds: float,
        first_seconds: float,
        report: Callable[[str], None],
        leave: Callable[[], None],
    ) -> None:
        _mind_forks()
        self._pid = os.getpid()
        self._timeout_seconds = timeout_seconds
        self._report = report
        self._leave = leave
        self._lock = threading.Condition()
        self._deadline: float | None = time.monotonic() + first_seconds
        self._armed_until = 0.0
        self.is_reporting = False
        """Whether a hang was found: the process ends soon."""
        self._arm_last_resort()
        threading.Thread(target=self._watch, name="harness-watchdog", daemon=True).start()

    def step(self) -> None:
        """A step has ended; the next one has its whole time from now on. Costs a microsecond, now and then a hundred."""
        self._deadline = time.monotonic() + self._timeout_seconds
        if self._deadline - self._armed_until > 1.0:  # the C timer is a thread that is made anew: not at every step
            self._arm_last_resort()

    def stop(self) -> None:
        """Lies down: there is nothing more to watch. In a forked child there never was."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._deadline = None
            self._lock.notify()
        _armed[:] = [each for each in _armed if each is not self]
        faulthandler.cancel_dump_traceback_later()

    def _arm_last_resort(self) -> None:
        if self._deadline is None:  # it has lain down
            return
        self._armed_until = self._deadline
        _armed[:] = [self]  # a process has one such timer
        seconds = self._deadline - time.monotonic() + _LAST_RESORT_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr, whatever sys.stderr is

    def _watch(self) -> None:
        with self._lock:
            while (deadline := self._deadline) is not None and (left := deadline - time.monotonic()) > 0:
                self._lock.wait(min(left, self._timeout_seconds / 4))  # the first step's time may be over before it is up
        if self._deadline is None:
            return
        self.is_reporting = True
        text = stacks()
        print(f"harness: no step has ended within its time; the stacks of all threads:\n{text}", file=sys.stderr, flush=True)
        self._report(text)
        self._leave()


_armed: list[Watchdog] = []


@functools.cache
def _mind_forks() -> None:
    """The C timer's thread does not come along into a forked child, which would wait for it for ever at its end. So there is
    no timer at that moment."""

    def stop_timer() -> None:
        if _armed:
            faulthandler.cancel_dump_traceback_later()

    def start_timer() -> None:
        for watchdog in _armed[:]:
            watchdog._arm_last_resort()

    os.register_at_fork(before=stop_timer, after_in_parent=start_timer, after_in_child=_armed.clear)


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to descriptors only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
