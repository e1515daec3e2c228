"""What a run says where it was started: plain lines, JSON where asked, and on a terminal one live line below them.

Every line of a process's log carries its rank, host, attempt and step. JSON lines have all of them; in text the lines of
other ranks than 0 begin with rank and host. On a terminal warnings, errors, saves and resumes have colours. The live line is
tqdm's, which is imported only when there is a terminal. What is logged while it is there goes above it.

No line has a secret (see ``harness.secrecy``), whichever library it comes from, nor anything that a terminal would obey. The
loggers of other libraries are as the program has set them: only harness and the user's task are heard below warnings.
"""

import contextlib
import io
import json
import logging
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from harness.errors import HarnessError, Stopped
from harness.runtime.environment import is_first_of_node, rank, size
from harness.runtime.escapes import for_terminal
from harness.secrecy import learn, scrubbed, without_secrets


@dataclass
class Here:
    """Who speaks, and from where in the training."""

    rank: int
    host: str
    ranks: int = 1
    attempt: str = ""
    step: int | None = None


here = Here(rank(), platform.node(), size())  # a process has one; a program may join others by itself

Line = tuple[str, Mapping[str, Any]]  # what an event says to people, and its values
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "cyan": 36}
_COLOUR_OF_EVENT = {"save": "green", "done": "green", "resume": "cyan"}
_SECONDS_BETWEEN_LINES = 60.0  # of those that the live line makes superfluous, so that a terminal keeps some


class Lines(logging.Formatter):
    """One line for each event, for people or for programs."""

    def __init__(self, form: Literal["text", "json"] = "text") -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        if self.form == "json":
            return self._json(record)
        text, colour = printable(super().format(record)), _colour_of(record)
        return painted(text, colour) if here.rank == 0 else _clear() + painted(_of_rank(text), colour)

    def _json(self, record: logging.LogRecord) -> str:
        about = {"time": record.created, "level": record.levelname.lower(), "rank": here.rank, "host": here.host}
        about |= {"attempt": here.attempt, "step": here.step, "message": record.getMessage()}
        if record.exc_info:
            about["traceback"] = self.formatException(record.exc_info)
        return json.dumps(
            scrubbed({**about, **getattr(record, "values", {})}), default=lambda value: without_secrets(str(value))
        )


class Console(logging.StreamHandler[TextIO]):
    """The handler of a program that has none of its own. Of other ranks than 0 it lets pass what ``level`` says."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(Lines())
        self.setLevel(logging.NOTSET if here.rank == 0 else level())

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002  # logging's own name
        """Tells of a line that cannot be written without showing what was to be in it."""
        with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
            print_error(f"a line of the log could not be written:\n{traceback.format_exc()}")


def begin(name: str = "") -> Callable[[], None]:
    """Has harness be heard: through a console on a logger (by default the root, to which everyone's lines come), unless the
    program has handlers of its own. Returns what puts everything back."""
    learn()
    root, own = logging.getLogger(), logging.getLogger("harness")
    undo = [hear("harness")]
    if not root.handlers and not own.handlers:
        logger, console = logging.getLogger(name), Console()
        logger.addHandler(console)
        undo.append(lambda: logger.removeHandler(console))

    def end() -> None:
        for put_back in undo:
            put_back()

    return end


def hear(name: str) -> Callable[[], None]:
    """Has a logger heard as harness is, where nobody has set its level. Returns what puts it back."""
    logger = logging.getLogger(name)
    if logger.level != logging.NOTSET:
        return lambda: None
    logger.setLevel(level())
    return lambda: logger.setLevel(logging.NOTSET)


def print_error(text: str, *, for_all: bool = False, colour: str | None = None) -> None:
    """Writes to stderr what is no line of the log, in one piece. Where there are several ranks, each line has its rank,
    unless one rank speaks ``for_all``."""
    text = printable(text).rstrip("\n")
    text = text if for_all or here.ranks == 1 else _of_rank(text)
    sys.stderr.write(f"{_clear()}{painted(text, colour)}\n")
    sys.stderr.flush()


def report_error(error: BaseException, *, for_all: bool = False) -> None:
    """Reports an error: one of harness in its own words, any other with its traceback."""
    if isinstance(error, HarnessError):
        colour = None if isinstance(error, Stopped) else "red"
        print_error("\n".join(f"harness: {line}" for line in str(error).splitlines()), for_all=for_all, colour=colour)
    else:
        print_error("".join(traceback.format_exception(error)))


def printable(text: str) -> str:
    """A text as it may be shown: without secrets, and what a terminal would obey escaped."""
    return for_terminal(without_secrets(text), keep="\n\t")


def number(value: float, digits: int) -> str:
    """A number with ``digits`` significant digits: ``0.5123``, ``41,140``, ``1e+20``."""
    short = f"{value:.{digits}g}"
    if not 1000 <= abs(value) < 1e15:
        return short
    return f"{float(short):,.{max(digits - len(str(int(abs(value)))), 0)}f}"


def painted(text: str, colour: str | None, stream: TextIO | None = None) -> str:
    """A text in a colour, where the stream (stderr) is a terminal and ``NO_COLOR`` is not set."""
    if colour is None or os.environ.get("NO_COLOR") or not (stream or sys.stderr).isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _colour_of(record: logging.LogRecord) -> str | None:
    """What deserves attention stands out: errors, warnings, saves and resumes."""
    if record.levelno >= logging.WARNING:
        return "red" if record.levelno >= logging.ERROR else "yellow"
    values: Mapping[str, Any] = getattr(record, "values", {})
    return _COLOUR_OF_EVENT.get(values.get("event", ""))


def _of_rank(text: str) -> str:
    return "\n".join(f"rank {here.rank} on {here.host}: {line}" for line in text.split("\n"))


def _clear(stream: TextIO | None = None) -> str:
    """What takes the live line away that may stand on the terminal, also that of a rank which is dead."""
    return "\r\x1b[K" if (stream or sys.stderr).isatty() else ""


class Clearing:
    """A terminal on which the live line of another process may stand: it is taken away before a line is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_new = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(_clear(self._stream) + text if self._is_new and text else text)
        self._is_new = text.endswith("\n") if text else self._is_new
        return len(text)


def speak(form: Literal["text", "json"]) -> None:
    """Has this process's console speak in text or JSON; handlers that the program has made itself are its own."""
    for handler in _handlers():
        if isinstance(handler, Console):
            handler.setFormatter(Lines(form))


def level() -> int:
    """The level of this rank's log: rank 0 logs everything; of the others, one on each machine logs warnings, so that
    they appear once."""
    if here.rank == 0:
        return logging.INFO
    return logging.WARNING if is_first_of_node() else logging.ERROR


def is_on_terminal() -> bool:
    """Whether somebody sees a live line."""
    return any(_is_terminal(handler) for handler in _handlers())


class LiveLine:
    """The state of a run in one line at the bottom of the terminal, and everything else that is logged above it."""

    def __init__(self, step: int, total: int | None) -> None:
        from tqdm import tqdm  # noqa: PLC0415  # see the module's docstring

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread that redraws: the steps do

        Bar.set_lock(threading.RLock())
        self._metrics: Mapping[str, Any] = {}
        self._epoch, self._saved, self._is_saving = 0, 0.0, False
        self._held: Line | None = None  # the last of training, where it is shown nowhere else
        self._logged_time = -math.inf
        handlers = [handler for handler in _handlers() if _is_terminal(handler)]
        has_width = os.get_terminal_size(handlers[0].stream.fileno()).columns > 0  # a container's may not say
        form = "step {n_fmt}/{total_fmt} {percentage:3.0f}% |{bar:16}| {desc} eta {remaining}"
        self._bar = Bar(
            total=total,
            initial=step,
            file=handlers[0].stream,
            bar_format=form if total else "step {n_fmt} {desc}",
            mininterval=0.2,
            dynamic_ncols=has_width,
            **({} if has_width else {"ncols": 100, "nrows": 20}),
            leave=False,
        )
        self._streams = {each: each.setStream(_Above(each.stream, self._bar)) for each in handlers}  # those before

    def reached(self, step: int, epoch: int) -> None:
        """Goes along with the training, and draws where it is time to."""
        self._epoch = epoch
        if self._bar.update(step - self._bar.n):
            self._describe()

    def lines(self, event: str, line: Line) -> list[Line]:
        """What is to stand above of an event: of training one line a minute, and the last one at each save."""
        held = self._held
        if event == "train" and time.monotonic() < self._logged_time + _SECONDS_BETWEEN_LINES:
            self._held = line
            return []
        if event in ("train", "save"):
            self._held, self._logged_time = None, time.monotonic()
        return [held, line] if event == "save" and held else [line]

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes what an event says about the state of the run."""
        match record["event"]:
            case "train":
                self._metrics = record
            case "saving":
                self._is_saving = True
            case "save":
                self._is_saving, self._saved = False, time.monotonic()
            case "save_failed":
                self._is_saving = False
        self._describe()
        self._bar.refresh()

    def _describe(self) -> None:
        words = [f"epoch {self._epoch}"]
        words += [f"loss {number(self._metrics['loss'], 4)}"] if isinstance(self._metrics.get("loss"), float) else []
        words += [f"{number(self._metrics[unit], 4)} {unit}" for unit in ("samples/s", "steps/s") if unit in self._metrics]
        if self._is_saving:
            words.append("saving")
        elif self._saved:
            words.append(f"saved {time.monotonic() - self._saved:.0f} s ago")
        self._bar.set_description_str("  ".join(words), refresh=False)

    def close(self) -> None:
        """Takes the line away."""
        for handler, stream in self._streams.items():
            handler.setStream(stream)
        self._bar.close()


class _Above(io.TextIOBase):
    """A terminal whose last line is taken: what is written goes above it."""

    def __init__(self, stream: TextIO, bar: Any) -> None:
        self._stream, self._bar = stream, bar

    def write(self, text: str) -> int:
        self._bar.write(text, file=self._stream, end="")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _handlers() -> list[logging.StreamHandler[Any]]:
    """Those that write to a stream, of the program and of harness."""
    loggers = [logging.getLogger(), logging.getLogger("harness")]
    return [each for logger in loggers for each in logger.handlers if isinstance(each, logging.StreamHandler)]


def _is_terminal(handler: logging.StreamHandler[Any]) -> bool:
    isatty = getattr(handler.stream, "isatty", None)
    form = handler.formatter.form if isinstance(handler.formatter, Lines) else "text"
    return form == "text" and isatty is not None and bool(isatty())
