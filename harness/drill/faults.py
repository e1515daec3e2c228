"""The faults of a plan, carried out in a rank. All are real: a rank sends the signal to itself, or to the launcher, at the
very moment that the plan names."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harness.drill.plan import Fault, Plan

_PATIENCE_SECONDS = 10.0


class Faults:
    """Those of one start of a rank. ``write`` takes a line of its record: what is at hand, and values."""

    def __init__(self, plan: Plan, rank: int, start: int, write: Callable[..., None]) -> None:
        self._plan, self._rank, self._start, self._write = plan, rank, start, write
        self._done: set[Fault] = set()
        self._stands_in: Path | None = None  # a file that stands in the way of a save

    def at(self, when: str, step: int, directory: Path | None = None) -> None:
        """Carries out what the plan has for this moment; ``directory`` is that of a save which begins."""
        for fault in self._plan.faults:
            is_now = step == fault.step if when == "step" else step >= fault.step
            is_here = (fault.when, fault.start) == (when, self._start) and self._rank in (fault.ranks or (self._rank,))
            if not (is_now and is_here) or fault in self._done:
                continue
            self._done.add(fault)
            if fault.when == "saving" and fault.what == "kill":
                threading.Thread(target=self._kill_in_save, args=(fault, step, directory), daemon=True).start()
                continue
            if fault.when == "step" and fault.what != "stop":
                self._wait_for(f"step-{step // self._plan.every_steps * self._plan.every_steps:012}-*/manifest.json")
            self._carry_out(fault, step, directory)

    def clear_the_way(self) -> None:
        """Lets saves succeed again, once one has failed."""
        if self._stands_in is not None and '"save_failed"' in self._plan.events.read_text():
            self._stands_in.unlink(missing_ok=True)
            self._stands_in = None

    def _kill_in_save(self, fault: Fault, step: int, directory: Path) -> None:
        """Waits until some of the checkpoint lies on the disk."""
        self._wait_for(f"{directory.name}/*")
        self._carry_out(fault, step, directory)

    def _wait_for(self, pattern: str) -> None:
        """Waits until there is such a file in a run on a disk: a step may be shorter than a save."""
        deadline = time.monotonic() + _PATIENCE_SECONDS * self._plan.is_local
        while time.monotonic() < deadline and not any(Path(self._plan.url).glob(pattern)):
            time.sleep(0.0005)

    def _carry_out(self, fault: Fault, step: int, directory: Path | None) -> None:
        self._write("fault", step=step, what=fault.what, when=fault.when)
        match fault.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(self._plan.launcher_pid() or os.getpid(), signal.SIGTERM)
            case "kill launcher":
                os.kill(self._plan.launcher_pid() or os.getpid(), signal.SIGKILL)
            case "refuse save":
                assert directory is not None, "a save has one"
                directory.parent.mkdir(parents=True, exist_ok=True)
                directory.touch()  # a file where the save wants its directory: the disk itself refuses
                self._stands_in = directory
