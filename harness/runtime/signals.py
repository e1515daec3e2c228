"""Remembers that a stop was asked for, for as long as somebody listens.

A handler that saves or exits by itself breaks the lockstep of the ranks. So the handler sets a flag, and the loop acts on it
at a step boundary, after all ranks have agreed on that step.

A Python handler does not run while the main thread sits in a collective, and a collective whose peer has died may never
return. So a thread listens, too (``signal.set_wakeup_fd``: the C-level handler writes the signal's number into a pipe at
once).

Handlers and pipe belong to one process. A forked child would inherit both: ``terminate()`` would not end it, and a signal to
it would be taken for one to the trainer. So the child puts back what was there before, and hears no signal until it has.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from harness.runtime.environment import is_under_torchrun

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_NOTICES = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm sends them to every process of a job step, helpers too
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether a signal or the cloud has asked for a stop; ``reason`` names it. A second SIGINT interrupts at once."""

    before_leaving: Callable[[], None]
    """What the training still wants to finish if the process must leave without it. Called in another thread."""
    keep: Callable[[float], None]
    """Keeps the state, in at most the given seconds, when the grace is nearly over. Called in another thread."""

    def __init__(self) -> None:
        self.reason = ""
        self.settled: Literal["", "stop", "error"] = ""
        """How this process ends, once that is known: what becomes of the other ranks no longer matters then."""
        self.forget_training()
        self._before: dict[int, Any] = {}  # the handlers that ours have replaced
        self._bell: _Bell | None = None

    def __bool__(self) -> bool:
        return bool(self.reason)

    def forget_training(self) -> None:
        """There is no training any more that could finish or keep anything."""
        self.before_leaving = lambda: None
        self.keep = lambda _seconds: None

    def ask(self, why: str) -> None:
        """Asks for a stop from within the process; the first word stands."""
        self.reason = self.reason or why

    def listen(self) -> None:
        """Installs the handlers. Only the main thread may."""
        _mind_forks()
        self.settled = ""
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            # nohup has it ignored; torchrun listens to it all the same, and means it when it passes it on.
            if number == signal.SIGHUP and before == signal.SIG_IGN and not is_under_torchrun():
                continue
            if before != self._remember:
                signal.signal(number, self._remember)
                self._before[number] = before
        if self not in _listening:
            _listening.append(self)

    def close(self) -> None:
        """Puts the handlers of before back, where nobody has replaced ours since, and forgets the request."""
        if self._bell is not None:
            self._bell.close()
        self._put_back()
        _listening[:] = [request for request in _listening if request is not self]
        self.reason = self.settled = ""

    def when_asked(self, then: Callable[[threading.Event], None]) -> None:
        """Calls ``then`` in a thread at the first signal, or at once where it has come already. ``then`` is given an event
        that is set when nobody listens any more."""
        self._bell = bell = _Bell()

        def wait() -> None:
            while not self.reason:
                number = bell.wait()
                if bell.over.is_set():
                    return
                if number in STOP_SIGNALS and self._is_for_us(number, bell.over):
                    break
            then(bell.over)

        def wait_and_tidy() -> None:
            wait()
            bell.put_away()

        threading.Thread(target=wait_and_tidy, name="harness-grace", daemon=True).start()

    def _is_for_us(self, number: int, over: threading.Event) -> bool:
        """Whether a signal asks for a stop: the program may have replaced our handler, and call it or not."""
        return signal.getsignal(number) == self._remember or (not over.wait(1.0) and bool(self.reason))

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def _put_back(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            if signal.getsignal(number) == self._remember:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's

    def _end_in_child(self) -> None:
        self._put_back()
        if self._bell is not None:
            self._bell.end_in_child()
        # A child can be ended like any other process, but is not meant by a notice that only the trainer understands.
        for number in STOP_SIGNALS if _children_are_deaf else _NOTICES:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, signal.SIG_IGN)


class _Bell:
    """A pipe that the C-level handlers write to, and a thread reads."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        self._before = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)

    def wait(self) -> int:
        return os.read(self._receiver, 1)[0]

    def put_away(self) -> None:
        """For who has waited: nothing will be read any more."""
        os.close(self._receiver)

    def close(self) -> None:
        """Wakes the thread that waits. Our end stays open where somebody has replaced it, and may put it back."""
        if self.over.is_set():
            return
        self.over.set()
        with contextlib.suppress(OSError):  # who waits has gone already, or has plenty to read
            os.write(self._sender, b"\0")
        if self._leave(self._before):
            os.close(self._sender)

    def end_in_child(self) -> None:
        self._leave(-1)

    def _leave(self, descriptor: int) -> bool:
        """Has the handlers in C write elsewhere; False where somebody else has done so already."""
        installed = signal.set_wakeup_fd(descriptor)
        if installed != self._sender:
            signal.set_wakeup_fd(installed)
        return installed == self._sender


# --- forks -----------------------------------------------------------------------------------------------------------

_listening: list[StopRequest] = []
_children_are_deaf = False
_forking = threading.local()


@functools.cache
def _mind_forks() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    """A signal that reached the child before it has put the handlers back would be heard by the trainer."""
    if _listening:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork() -> None:
    if (mask := _forking.__dict__.pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for request in reversed(_listening):
        request._end_in_child()
    _listening.clear()
    _after_fork()


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Has the children that are forked meanwhile ignore stop signals from their first moment on."""
    global _children_are_deaf  # noqa: PLW0603  # read in the child, which has a copy
    before, _children_are_deaf = _children_are_deaf, True
    try:
        yield
    finally:
        _children_are_deaf = before


# --- the ends of processes -------------------------------------------------------------------------------------------


def ignore_stop_signals() -> None:
    """For a process that has only to leave: while Python ends, it takes its handlers away, and a signal that came then would
    turn a good end into a death (and, under torchrun, start the run again that was asked to stop)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int = 0) -> None:
    """Has the kernel SIGKILL this process when its parent ends (Linux): a launcher that is killed leaves no orphans.

    Without it the workers of a killed torchrun train on, and nobody knows of them. ``parent`` is the parent's process id,
    where the caller knows it: this finds a parent that ended before it could be watched.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent if parent else _is_orphan():
        os.kill(os.getpid(), signal.SIGKILL)


def _is_orphan() -> bool:
    """Whether process 1 has taken this one over. In a container process 1 may be the launcher itself, which is Python."""
    if os.getppid() != 1:
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return False
