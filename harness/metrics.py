"""What a run tells about itself: one console line and, where asked for, one JSON line per event. Rank 0 only."""

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from harness.config import LogConfig
from harness.errors import ConfigError

log = logging.getLogger("harness")


class Reporter:
    """Writes events. On other ranks than 0 it is made with ``active=False`` and writes nothing."""

    def __init__(self, config: LogConfig, *, active: bool, attempt: str = "") -> None:
        self._active = active
        self._attempt = attempt
        self._jsonl = config.jsonl if active else None
        if self._jsonl is not None:
            try:
                open(self._jsonl, "a", encoding="utf-8").close()
            except OSError as error:
                raise ConfigError(f"log.jsonl: cannot append to {config.jsonl}: {error.strerror}") from None

    def event(self, name: str, message: str, **values: Any) -> None:
        """Tells of one event: ``message`` to the console, the values to the JSON lines."""
        if not self._active:
            return
        log.info(message)
        if self._jsonl is not None:
            record = {"event": name, "time": time.time(), "attempt": self._attempt, **as_json(values)}
            with open(self._jsonl, "a", encoding="utf-8") as file:  # closed each time: a line survives the process
                file.write(json.dumps(record, allow_nan=False) + "\n")


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: a number that is none (``nan``, ``inf``) is told in a word."""
    return {
        key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def in_words(values: dict[str, float]) -> str:
    """Metrics for people: ``loss 0.5123  val_loss 0.6``."""
    return "  ".join(f"{name} {value:.5g}" for name, value in values.items())
