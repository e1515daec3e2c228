"""``python -u -m harness.launcher.agent``: torchrun, which tells ``harness launch`` and the ranks what it does.

``harness launch`` starts it. Python's garbage collector does not look through its imports: its ranks start after 1.2 s
instead of 1.7 s. Where the launcher gives a directory (``harness.launcher.outcome``):

* before torchrun ends ranks because another one has failed, here or elsewhere, it notes that there. A rank cannot tell it
  from a stop: both are SIGTERM;
* it forks its ranks (``harness.launcher.fork_server``), notices their deaths at once and ends suspended ones
  (``harness.launcher.watch``);
* two lines report a failure: who died of what, and the restart. Where the ranks have come further since the last one, the
  restarts before it are forgotten;
* what torchrun prints about itself goes to a file, where the launcher has made one. The ranks keep the real stderr.

On a terminal it takes the live line of its ranks away before it writes.

All of it hangs on parts of torchrun that are not public (``harness.torch_private``). Where a torch does not have them,
one line says what is missing.
"""

import contextlib
import functools
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

from harness.errors import RankFailure
from harness.launcher import fork_server, outcome
from harness.launcher.fork_server import THREADS_VARIABLE, Order, Preload
from harness.launcher.watch import Watch, is_suspended
from harness.runtime.console import Clearing, painted, printable
from harness.runtime.torch_import import import_torch

COUNTS_PROGRESS_VARIABLE = "HARNESS_RESTARTS_WITHOUT_PROGRESS"  # set where --max-restarts is harness's own
SUSPENDED_VARIABLE = "HARNESS_SUSPENDED_SECONDS"  # after which a suspended rank is killed; 0: never


class Restarts:
    """How many restarts are left: all of them, when the ranks have started from a later step than ever before."""

    def __init__(self, allowed: int, *, renewed: bool) -> None:
        self._allowed = allowed
        self._renewed = renewed
        self._furthest: int | None = None

    def left(self, left: int, step: int | None) -> int:
        """As ``left``, after the end of ranks that had continued from ``step``."""
        if step is None or (self._furthest is not None and step <= self._furthest):
            return left
        is_first, self._furthest = self._furthest is None, step
        return left if is_first or not self._renewed else self._allowed

    def describe(self, left: int, saved_step: int | None) -> str:
        """What follows the failure of a rank."""
        kind = "in a row without a newer checkpoint" if self._renewed else "(--max-restarts)"
        if left:
            return f"restart {self._allowed - left + 1} of at most {self._allowed} {kind}{_continues(saved_step)}"
        kept = f"; the newest checkpoint is of step {saved_step} or later" if saved_step else ""
        spent = f"no restart is left of the {self._allowed} allowed" if self._allowed else "no restart is allowed"
        return f"{spent} {kind}{kept}"


def _continues(step: int | None) -> str:
    """From where; a save may have committed since rank 0 noted the last one."""
    if step is None:
        return ""
    return f"; training continues from step {step} or later" if step else "; no checkpoint has been reported yet"


def describe_death(directory: str, codes: Mapping[int, int], suspended: Mapping[int, float] | None = None) -> str:
    """Which rank died of what, and where. ``codes`` are those of all that failed here: of these, the one that did not
    fail because of another one is meant. ``suspended``: those that were killed for it, and after how many seconds."""
    if not codes:
        return "a rank failed"
    culprits = [rank for rank, code in codes.items() if code not in (RankFailure.exit_code, -signal.SIGTERM)]
    rank = min(culprits or codes)
    code, step, record = codes[rank], outcome.reached_step(directory, rank), outcome.record_of(directory, rank)
    died = f"was killed by {_name_of(-code)}" if code < 0 else f"ended with exit code {code}"
    died = f"was suspended for {suspended[rank]:.0f} s and killed" if suspended and rank in suspended else died
    place = (
        "" if outcome.resumed_step(directory) is None else " before its first step"
    )  # of a program without a Run, no word
    place = place if step is None else f" after step {step}"
    why = f": {record.message}" if record is not None and record.message and code > 0 else ""
    return f"rank {rank} on {platform.node()} {died}{place}{why}"


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _watch(directory: str, stderr: TextIO, *, renewed: bool, suspended_seconds: float) -> None:
    """Has torchrun note in the directory why it ends ranks, report their deaths, and count its restarts."""
    from harness import torch_private  # noqa: PLC0415  # imports torch

    restarts: Restarts | None = None
    watch = Watch(suspended_seconds, functools.partial(_say, stderr))

    def left(allowed: int, now: int, codes: Mapping[int, int]) -> int:
        nonlocal restarts
        restarts = restarts or Restarts(allowed, renewed=renewed)
        now = restarts.left(now, outcome.resumed_step(directory))
        death = describe_death(directory, codes, watch.ended)
        follows = restarts.describe(now, outcome.saved_step(directory))
        outcome.say_death(directory, f"{death}; {follows}")
        _say(stderr, death, "red")
        if now:  # else the launcher's last line says it
            _say(stderr, follows)
        return now

    def end(pids: Sequence[int]) -> None:
        outcome.say_ended(directory, pids)
        for pid in filter(is_suspended, pids):  # it hears of no other signal, and torchrun would wait for it
            os.kill(pid, signal.SIGCONT)

    torch_private.before_ranks_are_ended(end)
    torch_private.when_ranks_fail(left)
    torch_private.watch_ranks(watch.wait)


def _fold(directory: str) -> bool:
    """Sends what this process prints to the launcher's file, where there is one."""
    try:
        log = os.open(Path(directory, outcome.TORCHRUN_LOG), os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return False
    os.dup2(log, 2)  # what torch prints from C++ as well
    os.close(log)
    return True


def _say(stderr: TextIO, text: str, colour: str = "yellow") -> None:
    print(painted(printable(f"harness launch: {text}"), colour, stderr), file=stderr, flush=True)


def main() -> None:
    """torchrun's own command line and exit code; or, in a process that has been forked for it, a rank."""
    directory = os.environ.get(outcome.DIRECTORY_VARIABLE)
    preload, is_preset = Preload.take(), fork_server.preset_threads(sys.argv[1:])
    import_torch("torch")
    stderr = _without_live_line(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
    started = fork_server.start(preload, functools.partial(_say, stderr)) if fork_server.is_wanted() else None
    if isinstance(started, Order):
        stderr.close()
        fork_server.run(started)
        return
    if is_preset:  # torchrun does it again, and says so
        del os.environ[THREADS_VARIABLE]
    is_folded = directory is not None and _fold(directory)
    sys.argv[0] = "torchrun"  # in its messages
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.run import main as torchrun  # noqa: PLC0415

    from harness import torch_private  # noqa: PLC0415  # imports torch

    with contextlib.redirect_stderr(stderr):  # for a warning that torch lacks something
        if started is not None:
            torch_private.start_ranks_by(started.start)
        if "--standalone" in sys.argv:
            torch_private.meet_at_once()
        if directory is not None:
            renewed = os.environ.pop(COUNTS_PROGRESS_VARIABLE, "") == "1"
            _watch(directory, stderr, renewed=renewed, suspended_seconds=float(os.environ.pop(SUSPENDED_VARIABLE, "0")))
        if is_folded and not torch_private.give_ranks(stderr):
            os.dup2(stderr.fileno(), 2)
    sys.stderr = sys.stderr if is_folded else _without_live_line(sys.stderr)
    try:
        torchrun()
    except SignalException:  # it has said which one
        sys.exit(1)


def _without_live_line(stream: TextIO) -> TextIO:
    """A terminal without the live line of the ranks, when something is written to it."""
    return cast("TextIO", Clearing(stream)) if stream.isatty() else stream


if __name__ == "__main__":
    main()
