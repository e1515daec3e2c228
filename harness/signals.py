"""Remembers that a stop was asked for, and sees to it that the process leaves in time.

A handler that saves or exits by itself breaks the lockstep of the ranks. So the handler sets a flag, and the loop acts on it
at a step boundary, after all ranks have agreed on that step.

A Python handler does not run while the main thread sits in a collective, and a collective whose peer has died may never
return: torchrun tells the survivors by SIGTERM. So a thread listens, too (``signal.set_wakeup_fd``: the C-level handler
writes the signal's number into a socket at once), and when the grace is over it ends the process. Nothing is lost by
that but steps: the last commit stands.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether a signal has asked for a stop. A second SIGINT is not waited for: it interrupts at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def listen(self) -> None:
        """Installs the handlers. Only the main thread may."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def leave_in_time(self, grace_seconds: float, leave: Callable[[], None]) -> None:
        """From now on, calls ``leave`` in a thread when the process is still there so long after the first signal."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

        def wait_and_leave() -> None:
            with sender:  # kept open for as long as somebody listens
                while int.from_bytes(receiver.recv(1)) not in STOP_SIGNALS:
                    pass
            threading.Event().wait(grace_seconds)
            leave()

        threading.Thread(target=wait_and_leave, name="harness-grace", daemon=True).start()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


def die_with_parent() -> None:
    """Has the kernel SIGKILL this process when its parent ends (Linux): a launcher that is killed leaves no orphans.

    Without it the workers of a killed torchrun train on, and nobody knows of them.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and os.getpid() != 1:  # it ended before it could be watched
        os.kill(os.getpid(), signal.SIGKILL)
