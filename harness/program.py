"""How a program ends that trains: in words, in a record for the launcher, in an exit code, and in time."""

import logging
import re
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from harness import console, outcome
from harness.environment import is_under_torchrun
from harness.errors import HarnessError, RankFailure, Stopped
from harness.signals import StopRequest, die_with_parent, ignore_stop_signals
from harness.world import has_lost_a_peer, leave_at_once

log = logging.getLogger("harness")


def leave_in_time(stop: StopRequest, grace_seconds: float) -> None:
    """Sees to it that the process is gone so long after a stop signal, saved or not."""

    def leave() -> None:
        late = Stopped(f"no step boundary within {grace_seconds:.0f} s of the signal: the last commit stands")
        outcome.record(outcome.of(late))
        console.complain_of(late)
        leave_at_once(late.exit_code)

    stop.leave_in_time(grace_seconds, leave)


def record_stop(stopped: Stopped) -> int:
    """Says that all ranks have stopped well, and returns the exit code. torchrun would start a worker that says it in its
    exit code again; under it the record says it alone."""
    ignore_stop_signals()
    outcome.record(outcome.of(stopped))
    log.info("%s", stopped)
    return 0 if is_under_torchrun() else stopped.exit_code


def fail(error: BaseException) -> NoReturn:
    """Ends a rank at once, after an error. The others may wait for it in a collective for minutes; torchrun frees them once
    this one is gone."""
    if has_lost_a_peer(error):
        reason = re.sub(r"\[\S*\.cc:\d+\] ", "", str(error)).partition(". ")[0]  # without gloo's good wishes
        error = RankFailure(f"lost contact with another rank: {reason}; {where_this_rank_was(reason)}")
    console.complain_of(error)
    outcome.record(outcome.of(error))
    sys.stdout.flush()
    sys.stderr.flush()
    leave_at_once(error.exit_code if isinstance(error, HarnessError) else 1)


def where_this_rank_was(reason: str) -> str:
    """How far this rank is, to be compared with what the others say; after a wait that was too long, what to look for."""
    step = console.here.step
    place = (
        "this rank was before its first step boundary" if step is None else f"this rank was at the boundary of step {step}"
    )
    if not re.search(r"time.?out|timed out", reason, re.IGNORECASE):
        return place
    advice = "compare with the other ranks (every rank has to call run.step() equally often), or raise world.timeout_seconds"
    return f"{place}; {advice}"


def take_charge(grace_seconds: float) -> StopRequest:
    """What ``harness train`` does around a training, for a program that has a loop of its own. Once in its life.

    Stop signals are remembered and not obeyed at once, a killed launcher takes the program along, and harness is heard.
    """
    if _stop is None:
        _take_charge(grace_seconds)
    assert _stop is not None
    return _stop


_stop: StopRequest | None = None


def _take_charge(grace_seconds: float) -> None:
    global _stop  # noqa: PLW0603  # a process has one set of signal handlers
    _stop = StopRequest()
    if threading.current_thread() is threading.main_thread():
        _stop.listen()
        leave_in_time(_stop, grace_seconds)
    if is_under_torchrun():
        die_with_parent()
    outcome.forget()
    console.begin("harness")


def on_error(remember: Callable[[BaseException], None]) -> None:
    """Has an error that nobody catches remembered, and told as ``harness train`` tells it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        remember(error)
        if isinstance(error, HarnessError) or (is_under_torchrun() and not isinstance(error, KeyboardInterrupt)):
            fail(error)
        if before is sys.__excepthook__ and not isinstance(error, KeyboardInterrupt):
            console.complain_of(error)
        else:
            before(kind, error, trace)

    sys.excepthook = hook
