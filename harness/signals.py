"""Remembers that a stop was asked for; nothing else.

A handler that saves or exits by itself breaks the lockstep of the ranks. So the handler sets a flag, and the loop acts on it
at a step boundary, after all ranks have agreed on that step.
"""

import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether a signal has asked for a stop. A second SIGINT is not waited for: it interrupts at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def listen(self) -> None:
        """Installs the handlers. Only the main thread may."""
        for number in _STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
