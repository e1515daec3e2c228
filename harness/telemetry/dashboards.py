"""What a run tells, for programs that draw it: TensorBoard's event files, Prometheus's text file."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.runtime.escapes import for_prometheus_label, for_prometheus_name, for_terminal

_NO_METRICS = {"event", "time", "attempt", "step", "uptime_seconds", "level"}


class TensorBoard:
    """Curves in a directory. Where an attempt goes on from an earlier step, what was drawn after it is replaced."""

    def __init__(self, directory: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise ConfigError(f"metrics.tensorboard: {error}; pip install tensorboard") from None
        self._open: Any = lambda step: SummaryWriter(directory, purge_step=step)
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes an event: an attempt's opening, or metrics."""
        if record["event"] in ("start", "resume"):
            self._writer = self._open(record.get("step", 0) + 1)
        elif record["event"] in ("train", "evaluate") and "step" in record:
            for name, value in numbers_of(record).items():
                self._writer.add_scalar(
                    f"{record['event']}/{for_terminal(name)}", value, record["step"], walltime=record["time"]
                )
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
        self._values: dict[str, dict[str, float]] = {}  # by metric, by labels

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes an event; a metric's name is ``harness_<event>_<name>``. If that loses part of a name, the name becomes a
        label."""
        event, used = record["event"], set()
        own = {"time_seconds": record["time"], "step": record.get("step")}
        numbers = [(name, value) for name, value in own.items() if isinstance(value, int | float)]
        for name, value in [*numbers, *numbers_of(record).items()]:
            metric = for_prometheus_name("harness", event, name)
            is_unambiguous = metric not in used and for_prometheus_name(name) == name.replace("/s", "_per_second")
            labels = "" if is_unambiguous else f'{{name="{for_prometheus_label(name)}"}}'
            self._values.setdefault(metric, {})[labels] = value
            used.add(metric)
        lines = []
        for metric, samples in sorted(self._values.items()):
            lines.append(f"# TYPE {metric} gauge\n")
            lines += (f"{metric}{labels} {_number(value)}\n" for labels, value in sorted(samples.items()))
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
        try:
            found[name] = float(value)
        except OverflowError:  # a whole number that no float can be
            found[name] = math.inf if int(value) > 0 else -math.inf
    return found


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
