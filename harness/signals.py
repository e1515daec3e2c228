"""Remembers that a stop was asked for, and sees to it that the process leaves in time.

A handler that saves or exits by itself breaks the lockstep of the ranks. So the handler sets a flag, and the loop acts on it
at a step boundary, after all ranks have agreed on that step.

A Python handler does not run while the main thread sits in a collective, and a collective whose peer has died may never
return: torchrun tells the survivors by SIGTERM. So a thread listens, too (``signal.set_wakeup_fd``: the C-level handler
writes the signal's number into a pipe at once), and when the grace is over it ends the process. Nothing is lost by
that but steps: the last commit stands.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from harness.environment import is_under_torchrun

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether somebody has asked for a stop: a signal, by its name, or the cloud. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def ask(self, why: str) -> None:
        """Asks for a stop from within the process; the first word stands."""
        self.reason = self.reason or why

    def listen(self) -> None:
        """Installs the handlers. Only the main thread may."""
        for number in STOP_SIGNALS:
            # nohup has it ignored; torchrun listens to it all the same, and means it when it passes it on.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN and not is_under_torchrun():
                continue
            signal.signal(number, self._remember)

    def leave_in_time(self, grace_seconds: float, leave: Callable[[], None]) -> None:
        """Calls ``leave`` in a thread when the process is still there so long after the first signal, or after now if that
        has come already."""
        receiver, sender = os.pipe()  # open until the process ends: the handler in C writes into it
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

        def wait_and_leave() -> None:
            while not self.reason and os.read(receiver, 1)[0] not in STOP_SIGNALS:
                pass
            threading.Event().wait(grace_seconds)
            leave()

        threading.Thread(target=wait_and_leave, name="harness-grace", daemon=True).start()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


def ignore_stop_signals() -> None:
    """For a process that has only to leave: while Python ends, it takes its handlers away, and a signal that came then would
    turn a good end into a death (and, under torchrun, start the run again that was asked to stop)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int = 0) -> None:
    """Has the kernel SIGKILL this process when its parent ends (Linux): a launcher that is killed leaves no orphans.

    Without it the workers of a killed torchrun train on, and nobody knows of them. ``parent`` is the parent's process id,
    where the caller knows it: one that ended before it could be watched is told by it.
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
