"""What a run tells, for programs that draw it: TensorBoard's event files, Prometheus's text file."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

_NO_METRICS = {"event", "time", "attempt", "step", "level"}


class TensorBoard:
    """Curves in a directory. Where an attempt goes on from an earlier step, what was drawn after it is replaced."""

    def __init__(self, directory: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise ConfigError(f"metrics.tensorboard: {error}; pip install 'harness[tensorboard]'") from None
        self._open: Any = lambda step: SummaryWriter(directory, purge_step=step)
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes an event: an attempt's opening, or metrics."""
        if record["event"] in ("start", "resume"):
            self._writer = self._open(record.get("step", 0) + 1)
        elif record["event"] in ("train", "evaluate"):
            for name, value in numbers_of(record).items():
                self._writer.add_scalar(f"{record['event']}/{name}", value, record["step"], walltime=record["time"])
        elif record["event"] in ("save", "stop", "done"):
            self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()


class Prometheus:
    """The newest numbers in a text file, for node_exporter's textfile collector. It is replaced, never half-written."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values: dict[str, float] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes an event; a metric's name is ``harness_<event>_<name>``."""
        event = record["event"]
        self._values |= {_name(event, name): value for name, value in numbers_of(record).items()}
        self._values[_name(event, "time_seconds")] = record["time"]
        if isinstance(record.get("step"), int):
            self._values[_name(event, "step")] = record["step"]
        lines = [f"# TYPE {name} gauge\n{name} {_number(value)}\n" for name, value in sorted(self._values.items())]
        partial = f"{self._path}.{os.getpid()}.partial"  # not *.prom, which is what the collector reads
        Path(partial).write_text("".join(lines), encoding="utf-8")
        os.replace(partial, self._path)

    def close(self) -> None:
        """Leaves the file as it is: the last numbers stand."""


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record; what JSON has no number for stands in it as a word."""
    found = {}
    for name, value in record.items():
        if name in _NO_METRICS or isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
            continue
        found[name] = float(value)
    return found


def _name(event: str, name: str) -> str:
    return "harness_" + re.sub(r"[^a-zA-Z0-9_]", "_", f"{event}_{name}".replace("/s", "_per_second"))


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
