"""What a run says where it was started: plain lines, JSON where asked, and on a terminal one live line below them.

Every line of a process's log carries its rank, host, attempt and step: as JSON in so many words; in text the lines of other
ranks than 0 begin with them. The live line is tqdm's, which is imported only when there is a terminal. What is logged while
it is there goes above it.
"""

import io
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

from harness.environment import is_first_of_node, rank


@dataclass
class Here:
    """Who speaks, and from where in the training."""

    rank: int
    host: str
    attempt: str = ""
    step: int | None = None


here = Here(rank(), platform.node())  # a process has one


class Lines(logging.Formatter):
    """One line for each event, for people or for programs."""

    def __init__(self, form: Literal["text", "json"] = "text") -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        if self.form == "json":
            return self._json(record)
        text = super().format(record)
        if here.rank == 0:
            return text
        begin = "\r\x1b[K" if sys.stderr.isatty() else ""  # where rank 0's live line is
        return f"{begin}rank {here.rank} on {here.host}: {text}"

    def _json(self, record: logging.LogRecord) -> str:
        about = {"time": record.created, "level": record.levelname.lower(), **asdict(here), "message": record.getMessage()}
        if record.exc_info:
            about["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**about, **getattr(record, "values", {})}, default=str)


class Console(logging.StreamHandler[TextIO]):
    """The handler of a program that has none of its own."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(Lines())


def speak(form: Literal["text", "json"]) -> None:
    """Has this process's console speak in text or JSON; handlers that the program has made itself are its own."""
    for handler in _handlers():
        if isinstance(handler, Console):
            handler.setFormatter(Lines(form))


def level() -> int:
    """What this rank says: rank 0 all; of the others one of each machine warnings, so that its troubles are told once."""
    if here.rank == 0:
        return logging.INFO
    return logging.WARNING if is_first_of_node() else logging.ERROR


def is_on_terminal() -> bool:
    """Whether somebody sees a live line."""
    return any(_is_terminal(handler) for handler in _handlers())


class LiveLine:
    """The state of a run in one line at the bottom of the terminal, and everything else that is logged above it."""

    shows = ("train",)  # the events that are not lines of their own where this one is

    def __init__(self, step: int, total: int | None) -> None:
        from tqdm import tqdm  # noqa: PLC0415  # see the module's docstring

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread that redraws: the steps do

        Bar.set_lock(threading.RLock())
        self._metrics: Mapping[str, Any] = {}
        self._epoch, self._saved, self._is_saving = 0, 0.0, False
        self._handlers = [handler for handler in _handlers() if _is_terminal(handler)]
        self._streams = [handler.stream for handler in self._handlers]
        has_width = os.get_terminal_size(self._streams[0].fileno()).columns > 0  # a container's may not say
        form = "step {n_fmt}/{total_fmt} {percentage:3.0f}% |{bar:16}| {desc} eta {remaining}"
        self._bar = Bar(
            total=total,
            initial=step,
            file=self._streams[0],
            bar_format=form if total else "step {n_fmt} {desc}",
            mininterval=0.2,
            dynamic_ncols=has_width,
            **({} if has_width else {"ncols": 100, "nrows": 20}),
            leave=False,
        )
        for handler in self._handlers:
            handler.setStream(_Above(handler.stream, self._bar))

    def reached(self, step: int, epoch: int) -> None:
        """Goes along with the training, and draws where it is time to."""
        self._epoch = epoch
        if self._bar.update(step - self._bar.n):
            self._describe()

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
        words += [f"loss {self._metrics['loss']:.4g}"] if isinstance(self._metrics.get("loss"), float) else []
        words += [f"{self._metrics[unit]:.4g} {unit}" for unit in ("samples/s", "steps/s") if unit in self._metrics]
        if self._is_saving:
            words.append("saving")
        elif self._saved:
            words.append(f"saved {time.monotonic() - self._saved:.0f} s ago")
        self._bar.set_description_str("  ".join(words), refresh=False)

    def close(self) -> None:
        """Takes the line away."""
        for handler, stream in zip(self._handlers, self._streams, strict=True):
            handler.setStream(stream)
        self._handlers, self._streams = [], []
        self._bar.close()


class _Above(io.TextIOBase):
    """A terminal whose last line is taken: what is written goes above it."""

    def __init__(self, stream: TextIO, bar: Any) -> None:
        self._stream, self._bar = stream, bar

    def write(self, text: str) -> int:
        with self._bar.get_lock():
            self._bar.clear()
            written = self._stream.write(text)
            self._stream.flush()
            self._bar.refresh()
        return written

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
