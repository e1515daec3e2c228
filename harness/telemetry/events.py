"""The events of a run: each is one line on the console, and one record in everything that keeps or draws it. Rank 0 only."""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from harness.config import RunConfig
from harness.errors import ConfigError
from harness.runtime import console
from harness.runtime.console import LiveLine, here, number
from harness.secrecy import scrubbed, without_secrets
from harness.storage.store import Store, limited
from harness.telemetry import trackers
from harness.telemetry.dashboards import Prometheus, TensorBoard
from harness.telemetry.journal import Journal

log = logging.getLogger("harness")

# What a record says by itself, on the console, in the journal and in the log: no metric may have such a name.
_OF_RECORD = ("event", "time", "attempt", "step", "uptime_seconds", "lr", "samples/s", "steps/s")
_OF_CONSOLE = ("message", "level", "rank", "host", "traceback")
OWN_NAMES = frozenset({*_OF_RECORD, *_OF_CONSOLE})


def check_metric_names(names: Iterable[str]) -> None:
    """Raises ``ConfigError`` for a metric's name that a record has for something else, or that is no text."""
    for name in names:
        if name in OWN_NAMES:
            raise ConfigError(
                f"run.step: the name {name!r} is harness's own; give the metric another one, such as 'my_{name}'"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"run.step: the name {name!r} is not valid Unicode and cannot be written; rename the metric"
            ) from None


def _is_number(value: Any) -> bool:
    """Whether ``float(value)`` has a meaning. Tensors and arrays are known by what they have; torch is not imported."""
    if isinstance(value, str | bytes | complex) or not hasattr(value, "__float__"):
        return False
    is_complex = getattr(value, "is_complex", None)
    return math.prod(getattr(value, "shape", ())) == 1 and not (callable(is_complex) and is_complex())


class EventLog:
    """Writes the events of one attempt, into its ``store``, too, where it has one. On other ranks than 0 it is made with
    ``active=False`` and writes nothing.

    If an event cannot be written somewhere, training continues; that is logged once.
    """

    def __init__(self, config: RunConfig, *, active: bool, attempt: str = "", store: Store | None = None) -> None:
        here.attempt = attempt
        console.speak(config.log.format)
        self._active = active
        self._attempt = attempt
        self._live: LiveLine | None = None
        self._sinks: list[Any] = []
        self._failed: set[Any] = set()
        self._journal: Journal | None = None
        if not active:
            return
        url, metrics = config.checkpoint.url, config.metrics
        if config.log.jsonl is not None:
            self._sinks.append(_JsonLines(config.log.jsonl))
        if metrics.tensorboard:
            self._sinks.append(TensorBoard(_directory(metrics.tensorboard, url)))
        if metrics.prometheus is not None:
            self._sinks.append(Prometheus(metrics.prometheus))
        if trackers.wanted(config):
            self._sinks.append(trackers.Trackers(config, attempt))
        if store is not None and metrics.every_seconds is not None:
            # Two short tries: a save waits for it, and the lines that it does not take are put later.
            self._journal = Journal(limited(store, tries=2, deadline_seconds=5), attempt, metrics.every_seconds)
            self._sinks.append(self._journal)

    def emit(self, name: str, message: str, /, **values: Any) -> None:
        """Logs one event: ``message`` goes to the console (unless it is empty), the values go to all sinks. A value never
        replaces a key of the record itself."""
        if not self._active:
            return
        own = {"event": name, "time": time.time(), "attempt": self._attempt}
        record = scrubbed({**own, **as_json(values), **own})
        if message:
            for text, about in self._live.lines(name, (message, record)) if self._live else [(message, record)]:
                log.info("%s", without_secrets(text), extra={"values": about})
        for sink in self._sinks:
            try:
                sink.write(record)
            except Exception as error:  # whatever it is: what draws a training does not end it
                if sink not in self._failed:
                    log.warning("%s: %s", type(sink).__name__.strip("_"), without_secrets(str(error)))
                self._failed.add(sink)

    def reached(self, step: int, epoch: int) -> None:
        """Takes note of a step boundary."""
        here.step = step
        if self._journal is not None:
            self._journal.reached(step)
        if self._live is not None:
            self._live.reached(step, epoch)

    def show(self, step: int, total: int | None) -> None:
        """Begins the live line, where there is a terminal."""
        if self._active and self._live is None and console.is_on_terminal():
            self._live = LiveLine(step, total)
            self._sinks.append(self._live)

    def flush(self) -> None:
        """Writes the events so far beside the checkpoints."""
        if self._journal is not None:
            self._journal.flush()

    def close(self) -> None:
        """Closes all sinks, after the last event."""
        sinks, self._sinks, self._live = self._sinks, [], None
        for sink in reversed(sinks):  # the live line first: others may have to say something
            sink.close()


class _JsonLines:
    """A local file to which a line is appended for each event."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            open(path, "a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigError(f"log.jsonl: cannot append to {path}: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:  # closed each time: a line survives the process
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing is open."""


def _directory(wanted: bool | str, url: str | None) -> str:
    """Where TensorBoard's files go."""
    if isinstance(wanted, str):
        return wanted
    if url is None or "://" in url:
        raise ConfigError(
            f"metrics.tensorboard: expected a directory where checkpoint.url is not a local path, found {wanted}"
        )
    return f"{url}/tensorboard"


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: ``nan`` and ``inf`` become strings, and so does what JSON cannot hold."""
    return {str(key): _as_json(value) for key, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Mapping):
        return as_json(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    return _as_json(float(value)) if _is_number(value) else str(value)


def hash_of(names: Iterable[str]) -> int:
    """A number that differs where names, or their order, do. It is exact as a float."""
    return xxhash.xxh3_64_intdigest("\0".join(names).encode()) >> 11


def number_of(metric: tuple[str, Any]) -> float:
    """The value of a named metric. Raises ``ConfigError`` for what is no number."""
    name, value = metric
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
        found = f"{type(value).__name__}{shape}"
        raise ConfigError(f"run.step: {name}: expected a number or a tensor with one element, found {found}") from None


def metrics_in_words(values: dict[str, float]) -> str:
    """Metrics for people: ``loss 0.5123  val_loss 0.6  41,140 samples/s``."""
    return "  ".join(
        f"{number(value, 4)} {name}" if name.endswith("/s") else f"{name} {number(value, 5)}"
        for name, value in values.items()
    )
