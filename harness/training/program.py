"""The process of a training: it owns what a process has only once, and gives it back when the training is over.

``Program`` has the signal handlers, the time to leave after a signal, and the hook for errors that nobody catches, while a
loop is under way. How a rank ends is said here, too: in words, in a record for the launcher, in an exit code.

torchrun has one signal for two things. SIGTERM may be a stop, which all ranks agree on at a step boundary. Or another rank
has died, and torchrun is about to restart all of them: then nothing can be agreed on any more, and a rank that waited for
its step boundary would hold up the others. ``harness launch`` lets its ranks know which one it is, through
``harness.launcher.outcome``. Under plain torchrun a rank looks whether all ranks of its machine are still there.
"""

import atexit
import contextlib
import functools
import inspect
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from harness.errors import HarnessError, RankFailure, Stopped
from harness.launcher import outcome
from harness.runtime import console
from harness.runtime.environment import is_first_of_node, is_under_torchrun
from harness.runtime.signals import StopRequest, die_with_parent, ignore_stop_signals

if TYPE_CHECKING:
    from harness.distributed.world import World  # torch: a program listens before it is imported

log = logging.getLogger("harness")

_LOOK_SECONDS = 0.1
_LAST_OF_GRACE = 0.3  # in which the last step boundary is kept, if no other comes
_MOST_LOOKS = 10_000  # calls: an error that a program passes over in silence is not waited for for ever
OnError = Callable[[BaseException], None]


def begin() -> None:
    """What a process that trains does first: a killed launcher takes it along, and its record of an earlier end is gone."""
    if is_under_torchrun():
        die_with_parent()
    outcome.claim()


class Program:
    """Listens to stop signals from ``with`` to the end of it, and sees to it that the process leaves in time after one."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.grace_seconds = math.inf  # until the training begins: a stop that comes earlier has all of it from then on

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may install handlers
            self.stop.listen()
            self.stop.when_asked(self._leave_in_time)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self.stop.close()

    def _leave_in_time(self, over: threading.Event) -> None:
        """Ends the process when the grace is over, or as soon as the signal turns out to be another rank's death."""
        deadline, has_kept = math.inf, False
        while True:
            if not self.stop.settled and another_has_failed():
                with contextlib.suppress(Exception):  # leaving comes first
                    self.stop.before_leaving()
                _leave(RankFailure("another rank has failed; this rank exits, too"), speaks=is_first_of_node())
            deadline = min(deadline, time.monotonic() + self.grace_seconds)
            left_seconds = deadline - time.monotonic()
            if not self.stop.settled and not has_kept and left_seconds < _LAST_OF_GRACE * self.grace_seconds:
                has_kept = True
                self.stop.keep(max(left_seconds - _LOOK_SECONDS, 0.0))
            if time.monotonic() > deadline:
                _leave(self._late(), speaks=True)
            if over.wait(_LOOK_SECONDS):
                return

    def _late(self) -> HarnessError:
        """What it means that the grace is over."""
        late = (
            f"no step boundary within {self.grace_seconds:.0f} s of the stop signal; the last committed checkpoint is kept"
        )
        if self.stop.settled == "error":
            return HarnessError(f"the shutdown after an error took more than {self.grace_seconds:.0f} s")
        if self.stop.settled == "stop" or not outcome.is_wanted() or outcome.stop_was_asked():
            return Stopped(late)
        # Only this rank was signalled, and the others know of nothing: they start again, with it.
        return RankFailure(f"{late}, and all ranks restart from it; to stop the run, send the signal to harness launch")


def _leave(error: HarnessError, *, speaks: bool) -> NoReturn:
    """Ends the process from another thread, whatever the main thread is at."""
    outcome.record_outcome(outcome.of(error))
    if speaks:
        console.report_error(error)
    os._exit(error.exit_code)


def another_has_failed() -> bool:
    """Whether this rank was signalled because of another one's death. False where nothing is known."""
    if outcome.is_wanted():
        return outcome.is_ended_for_another()
    return is_under_torchrun() and _has_lost_a_sibling()


def _has_lost_a_sibling() -> bool:
    """Whether fewer ranks than torchrun has started on this machine are there (Linux)."""
    agent = os.getppid()
    try:
        if os.getsid(0) != os.getpid():  # torchrun gives each rank a session: a wrapper stands between it and this process
            return False
        tasks = Path(f"/proc/{agent}/task").iterdir()
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        return sum(os.getsid(pid) == pid for pid in children) < int(os.environ["LOCAL_WORLD_SIZE"])
    except (OSError, AttributeError, KeyError, ValueError):  # not Linux, or one of them has just gone
        return False


# --- how a rank ends -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(world: "World") -> Iterator[None]:
    """The time of a training. The process ends in step with the other ranks of ``world`` after a success and after a stop,
    at once after a failure. If it is the only rank, the caller reports the error."""
    stopped: Stopped | None = None
    try:
        try:
            yield
        except Stopped as error:
            stopped = error
        world.close()
        ignore_stop_signals()
    except BaseException as error:
        if world.size == 1:
            raise
        fail(error)
    if stopped is not None:
        end_stopped(stopped)


def end_stopped(stopped: Stopped) -> NoReturn:
    """Ends the process, whose ranks have all stopped well. torchrun would start a worker that says so in its exit code
    again; under it the record says it alone."""
    ignore_stop_signals()
    outcome.record_outcome(outcome.of(stopped))
    if is_under_torchrun():
        log.info("%s", stopped)
        sys.exit(0)
    console.report_error(stopped)
    sys.exit(stopped.exit_code)


def fail(error: BaseException) -> NoReturn:
    """Ends a rank at once, after an error. The others may wait for it in a collective for minutes; torchrun frees them once
    this one is gone."""
    meant = _meant(error)
    if meant is error or not outcome.is_wanted() or is_first_of_node() or _is_timeout(str(meant)):
        console.report_error(meant)  # of the ranks that a death leaves behind one for each machine: harness launch names it
    error = meant
    outcome.record_outcome(outcome.of(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, HarnessError) else 1)


def _meant(error: BaseException) -> BaseException:
    """What torch says of a lost peer, in our words; any other error as it is."""
    from harness.distributed.world import has_lost_a_peer  # noqa: PLC0415  # torch: a program listens before it is imported

    if not has_lost_a_peer(error):
        return error
    reason = re.sub(r"\[\S*\.cc:\d+\] ", "", str(error)).partition(". ")[0]  # without gloo's good wishes
    return RankFailure(f"lost contact with another rank: {reason}; {where_this_rank_was(reason)}")


def where_this_rank_was(reason: str) -> str:
    """How far this rank is, to be compared with what the others say; after a wait that was too long, what to look for."""
    step = console.here.step
    place = (
        "this rank was before its first step boundary" if step is None else f"this rank was at the boundary of step {step}"
    )
    if not _is_timeout(reason):
        return place
    advice = "compare with the other ranks (every rank must call run.step() equally often), or raise world.timeout_seconds"
    return f"{place}; {advice}"


def _is_timeout(reason: str) -> bool:
    return re.search(r"time.?out|timed out", reason, re.IGNORECASE) is not None


# --- a program that has a loop of its own ------------------------------------------------------------------------------


class Hosted(Protocol):
    """A run in a program: what the program's process does for it."""

    def remember_crash(self, error: BaseException) -> None:
        """An error has ended a loop, or the program. Called once or several times with the same one."""

    def close(self) -> None:
        """The program ends. Called once more, perhaps."""


class Nobody:
    """In place of a run that is not there yet."""

    def remember_crash(self, _error: BaseException) -> None:
        """There is no attempt that could remember it."""

    def close(self) -> None:
        """Nothing is open."""


class Guest:
    """In place of a host, if the caller passes a stop request, and so owns the process."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def has_finished(self, run: Hosted) -> None:
        """Nothing was installed."""

    def let_go(self, run: Hosted) -> None:
        """Nothing was installed."""

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def start(self, _run: Hosted) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def loop(self, _run: Hosted, _grace_seconds: float) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def end(self, _run: Hosted, stopped: Stopped) -> NoReturn:
        """Raises it: the caller decides how the program ends."""
        raise stopped


class Host(Program):
    """What ``harness train`` does around a training, for a program that has loops of its own: while one is under way.

    Several runs may share it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._loops = 0  # that are under way; one may stand in another
        self._runs: list[Hosted] = []  # to be closed when the program ends
        self._unfinished: list[Hosted] = []  # of these, those that are told of an error which ends the program
        self._hook: Any = None
        self._before: Any = None  # the hook that ours has replaced
        self._last_word: BaseException | None = None  # an error that the program has caught, and that no restart can mend
        begin()
        console.begin("harness")

    def keep(self, run: Hosted) -> None:
        """Closes a run when the program ends, and has an error that nobody catches told as ``harness train`` tells it; not
        at a prompt."""
        for runs in (self._runs, self._unfinished):
            if run not in runs:
                runs.append(run)
        atexit.unregister(self._leave)
        atexit.register(self._leave)  # before what the storage's libraries have registered meanwhile
        if self._hook is None and not is_interactive():
            self._before, self._hook = sys.excepthook, self._report_failure
            sys.excepthook = self._hook

    def has_finished(self, run: Hosted) -> None:
        """The training is over: what fails from now on is the program's own affair."""
        self._unfinished = [each for each in self._unfinished if each is not run]
        if not self._unfinished and self._hook is not None and sys.excepthook == self._hook:
            sys.excepthook, self._hook = self._before, None

    def let_go(self, run: Hosted) -> None:
        """The run is closed."""
        self.has_finished(run)
        self._runs = [each for each in self._runs if each is not run]
        if not self._runs and self._last_word is None:
            atexit.unregister(self._leave)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """The time before there is a run: a setting that is wrong ends the program as an error in the loop does."""
        nobody = Nobody()
        with self.start(nobody):
            yield
        self.let_go(nobody)

    @contextlib.contextmanager
    def start(self, run: Hosted) -> Iterator[None]:
        """The time in which a run is made: an error then is no other than one in the loop."""
        self.keep(run)
        try:
            yield
        except Exception as error:
            self._saw(run, error)
            raise

    @contextlib.contextmanager
    def loop(self, run: Hosted, grace_seconds: float) -> Iterator[None]:
        """The time of a loop. The process is as before afterwards, and a stop that was asked for is forgotten.

        The run hears of the error that ends it, even if the program catches it.
        """
        self.keep(run)
        self.grace_seconds = grace_seconds
        self._last_word = None
        outcome.forget()
        self._loops += 1
        if self._loops == 1:
            self.__enter__()
        try:
            yield
        except GeneratorExit:  # the loop was left: by break, or by an error that cannot be seen from here yet
            if not self.stop.settled and os.getpid() == self._pid:
                _when_handled(functools.partial(self._saw, run))
            raise
        except Exception as error:
            self._saw(run, error)
            raise
        finally:
            self._loops -= 1
            if self._loops == 0 and os.getpid() == self._pid:
                self.__exit__()

    def end(self, run: Hosted, stopped: Stopped) -> NoReturn:
        """Ends the program, whose ranks have all stopped; at a prompt only the loop."""
        if is_interactive():
            raise KeyboardInterrupt(str(stopped)) if self.stop.reason == "SIGINT" else stopped
        run.close()
        end_stopped(stopped)

    def _report_failure(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """In place of ``sys.excepthook``."""
        runs = [*self._unfinished] if os.getpid() == self._pid else []  # a forked child is no rank
        for run in runs:
            run.remember_crash(error)
            with contextlib.suppress(Exception):  # the error that is under way matters more
                run.close()
        if runs and (isinstance(error, HarnessError) or (is_under_torchrun() and not isinstance(error, KeyboardInterrupt))):
            fail(error)
        if runs and self._before is sys.__excepthook__ and not isinstance(error, KeyboardInterrupt):
            console.report_error(error)
        else:
            self._before(kind, error, trace)

    def _saw(self, run: Hosted, error: BaseException) -> None:
        """An error has ended a loop. The program may catch it and end with any exit code, or try again."""
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return
        run.remember_crash(error)
        ending = outcome.of(_meant(error))
        if ending.is_final:  # the launcher ends all at once where it sees such a record, and the program may know better
            self._last_word = error
        else:
            outcome.record_outcome(ending)

    def _leave(self) -> None:
        """The process ends. A forked child has none of the runs' threads, and must not touch the parent's connections."""
        if os.getpid() != self._pid:
            return
        for run in [*self._runs]:
            run.close()
        if self._last_word is not None:
            outcome.record_outcome(outcome.of(self._last_word))


def host() -> Host:
    """That of this process; a forked child that trains has its own."""
    return _host_of(os.getpid())


@functools.cache
def _host_of(_pid: int) -> Host:
    return Host()


def is_interactive() -> bool:
    """Whether somebody sits at a prompt: the process has to outlive a training."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _when_handled(on_error: OnError) -> None:
    """Calls ``on_error`` with the error that is leaving a loop now, as soon as somebody handles it.

    A generator that is closed by an error cannot see it: Python has put it aside until a handler is found. What the handler
    calls first is the first moment to look. An error that nobody handles comes to ``sys.excepthook``.
    """
    frames = _left_frames(sys._getframe())
    if not frames or sys.getprofile() is not None:  # somebody measures, or debugs
        return
    innermost, instruction = frames[0]
    looks = _MOST_LOOKS

    def look(_frame: FrameType, _event: str, _argument: object) -> None:
        nonlocal looks
        looks -= 1
        error = sys.exception()
        came_from = [(frame.tb_frame, frame.tb_lasti) for frame in _traces(error)]
        goes_on = innermost.f_lasti != instruction
        if any(each in came_from for each in frames[: 1 if goes_on else None]):
            sys.setprofile(None)
            assert error is not None
            on_error(error)
        elif goes_on or not looks:  # the loop was left by break, or nobody has looked at its error
            sys.setprofile(None)

    sys.setprofile(look)


def _left_frames(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """Who was in the loop, and at which instruction: the nearest function, after generators around ours (tqdm's, say)."""
    frames = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("harness", "contextlib"):
            frames.append((frame, frame.f_lasti))
            if not frame.f_code.co_flags & inspect.CO_GENERATOR:
                break
        frame = frame.f_back
    return frames


def _traces(error: BaseException | None) -> Iterator[TracebackType]:
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        yield trace
        trace = trace.tb_next
