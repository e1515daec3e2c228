"""Trying what may fail, or never end."""

from collections.abc import Callable
from typing import TypeVar

from harness.doctor.findings import describe_error
from harness.runtime.threads import Background

T = TypeVar("T")


def run_bounded(function: Callable[[], T], limit_seconds: float) -> tuple[T | None, str]:
    """The result of a call, and in words why there is none. One that does not end in time is left behind in its thread."""
    trying = Background(function, "harness-doctor")
    try:
        return trying.result_within(limit_seconds), ""
    except BaseException as problem:  # whatever it is, the one who waits is to hear of it
        return None, f"no end within {limit_seconds:.0f} s" if trying.left_behind else describe_error(problem)
