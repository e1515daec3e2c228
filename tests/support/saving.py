"""Saves without a training: a saver and what it saves, files that the kernel refuses, copies that are slow or held up."""

import contextlib
import logging
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harness.checkpoint import staging
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saver
from harness.storage.store import open_store

FIRST = Attempt("000001-00000000")
TOO_LARGE = 100_000  # values for ``parts``, where there are ``small_files``


def parts(step: int, count: int = 10) -> dict[str, dict[str, Any]]:
    return {"model": {"weight": torch.full((count,), float(step))}, "training": {"step": step}}


def saver(url: str, **changes: Any) -> Saver:
    whole: dict[str, Any] = {"attempt": FIRST, "lineage": [], "shard_bytes": 1 << 30, "failures_allowed": 2, **changes}
    return Saver(catalog=Catalog(open_store(url)), **{"retention": Retention(), **whole})


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """While the block lasts, the kernel refuses files beyond a size: a save of ``TOO_LARGE`` fails with EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_LARGE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def failed_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def slow_copies(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each tensor that is copied beside the training takes so long."""
    copy = staging.copy_tensor

    def slowly(*arguments: Any) -> Iterator[memoryview]:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)
        return copy(*arguments)

    monkeypatch.setattr(staging, "copy_tensor", slowly)


@contextlib.contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """While the block lasts, no copy beside the training gets further: an event says that one has begun, another one lets
    them go on."""
    begun, gate, copy = threading.Event(), threading.Event(), staging.copy_tensor

    def waiting(*arguments: Any) -> Iterator[memoryview]:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert gate.wait(30)
        return copy(*arguments)

    monkeypatch.setattr(staging, "copy_tensor", waiting)
    try:
        yield begun, gate
    finally:
        gate.set()
