"""Trying what may fail, or never end."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from harness.doctor.findings import in_words

T = TypeVar("T")


def attempt(function: Callable[[], T], limit_seconds: float) -> tuple[T | None, str]:
    """The result of a call, and in words why there is none. One that does not end in time is left behind in its thread."""
    results: list[Any] = []
    problems: list[str] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as problem:  # whatever it is, the one who waits is to hear of it
            problems.append(in_words(problem))

    thread = threading.Thread(target=run, name="harness-doctor", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    if results:
        return results[0], ""
    return None, problems[0] if problems else f"no end within {limit_seconds:.0f} s"
