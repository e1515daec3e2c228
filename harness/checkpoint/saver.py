"""Saving: what happens around a commit, beside the training, and what a failed save means.

Only rank 0 has a ``Saver``. ``begin`` takes a snapshot of the state (see ``harness.checkpoint.staging``) and leaves the
rest, copying, hashing and writing, to a thread of low priority, in calls that do without the interpreter lock. At most one
save is under way. Its result is handed out by ``poll`` or ``wait``. ``save`` does everything before it returns, without a
copy of the state.

A save that fails is told of each time and counted; training goes on, because the checkpoints that exist are untouched, and
the disk may have room again at the next one. After ``failures_allowed`` in a row, or when the save was the last thing to
do, the error is raised.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.checkpoint import commit, staging
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.format import Ancestor, Attempt
from harness.checkpoint.staging import HostMemory, Snapshot
from harness.checkpoint.threads import Background
from harness.checkpoint.tree import Encoded
from harness.errors import HarnessError, StoreError, Superseded

log = logging.getLogger(__name__)

_NICENESS = 10  # of the writer's thread


@dataclass(frozen=True)
class Saved:
    """A commit, and what it took."""

    step: int
    directory: str
    bytes: int
    seconds: float  # until it was committed
    blocked_seconds: float  # of these, how long the training waited for it


@dataclass(frozen=True)
class _Order:
    """What a save is to write, besides the state."""

    step: int
    meta: Mapping[str, Any]
    best_step: int | None
    expected: Mapping[str, Mapping[str, str]] | None = None  # checksums, where they are to be compared


def _nothing_is_steady(_tensor: torch.Tensor) -> bool:
    return False


@dataclass
class Saver:
    """Writes the checkpoints of one attempt."""

    catalog: Catalog
    attempt: Attempt
    lineage: Sequence[Ancestor]
    retention: Retention
    shard_bytes: int
    failures_allowed: int
    streams: int = 1
    memory: HostMemory = field(default_factory=lambda: HostMemory(pinned=False))
    memory_limit_bytes: int | None = None
    failures: int = 0
    _under_way: "_Writing | None" = None

    def save(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        *,
        step: int,
        meta: Mapping[str, Any],
        best_step: int | None = None,
        must_succeed: bool = False,
    ) -> Saved | None:
        """Commits a checkpoint, then deletes what is not to be kept. None when it failed and training may go on.

        ``best_step`` is a step whose checkpoint is kept whatever its age. Raises ``Superseded`` when a newer attempt has
        taken the run over, ``Unsupported`` for a state that cannot be written.
        """
        assert self._under_way is None, "the result of the save before this one comes first"
        began = time.monotonic()

        def write() -> tuple[str, int]:
            return self._commit(commit.encode(parts), _Order(step, meta, best_step))

        committed = self._committed(step, write, must_succeed=must_succeed)
        seconds = time.monotonic() - began
        return Saved(step, *committed, seconds, seconds) if committed else None

    def begin(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        *,
        step: int,
        meta: Mapping[str, Any],
        best_step: int | None = None,
        is_steady: Callable[[torch.Tensor], bool] = _nothing_is_steady,
        check: bool = False,
    ) -> None:
        """Begins to save what ``parts`` are now. Whoever changes a tensor for which ``is_steady`` calls ``fence`` first.

        ``check`` compares what is written with the state as it is now, and raises ``Unsupported`` from ``poll`` or ``wait``
        when something has changed it in between. It costs a pass over the state. A state that does not fit into
        ``memory_limit_bytes`` is written before ``begin`` returns.
        """
        assert self._under_way is None, "the result of the save before this one comes first"
        began = time.monotonic()
        encoded = commit.encode(parts)
        expected = commit.checksums(encoded) if check else None
        fits = self.memory_limit_bytes is None or staging.size_bytes(encoded) <= self.memory_limit_bytes
        snapshot = Snapshot(encoded, self.memory, is_steady) if fits else None
        source = encoded if snapshot is None else snapshot.parts
        order = _Order(step, meta, best_step, expected)
        self._under_way = _Writing(snapshot, lambda: self._commit(source, order), step, began)
        if snapshot is None:
            self._under_way.join()
        self._under_way.blocked_seconds = time.monotonic() - began

    def fence(self) -> None:
        """To be called before anything steady is changed: waits until the snapshot does not need it any more."""
        if (writing := self._under_way) is not None:  # another thread may wait for it, and take it away
            writing.fence()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, or its result has not been asked for."""
        return self._under_way is not None

    def poll(self) -> Saved | None:
        """What has become of the save that is under way, once, when it is over; raises what ``save`` raises."""
        if self._under_way is None or self._under_way.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Waits for the save that is under way, and says what ``save`` says."""
        if self._under_way is None:
            return None
        writing = self._under_way
        began = time.monotonic()
        writing.join()
        writing.blocked_seconds += time.monotonic() - began
        self._under_way = None
        committed = self._committed(writing.step, writing.result)
        return Saved(writing.step, *committed, writing.seconds, writing.blocked_seconds) if committed else None

    def give_up_after(self, seconds: float) -> Saved | None:
        """Leaves a save that is under way some time to end, whatever comes of it: the training is over. Raises nothing."""
        if self._under_way is None:
            return None
        self._under_way.join(seconds)
        if self._under_way.is_alive():
            log.warning("save of step %s given up after another %.0f s", self._under_way.step, seconds)
            self._under_way = None
            return None
        with contextlib.suppress(HarnessError):  # what ends the training matters more
            return self.wait()
        return None

    def step_aside(self) -> None:
        """Stops a writer that was believed dead, and is not, before it deletes what its successor counts on.

        What it has committed does no harm: it is not on the successor's line. Raises ``Superseded``.
        """
        newest = max(self.catalog.attempts(), default=self.attempt)
        if newest > self.attempt:
            about = self.catalog.about_attempt(newest)
            who = f"started {about.get('started')} on {about.get('host')}"
            raise Superseded(f"{self.catalog.store.url}: attempt {newest.number} trains this run now ({who})")

    def _commit(self, encoded: Mapping[str, Encoded], order: _Order) -> tuple[str, int]:
        """Writes, and then tidies up; the directory and its bytes."""
        directory, manifest = commit.write_encoded(
            self.catalog.store,
            encoded,
            step=order.step,
            attempt=self.attempt,
            lineage=self.lineage,
            meta=order.meta,
            shard_bytes=self.shard_bytes,
            streams=self.streams,
            expected=order.expected,
        )
        try:
            self.step_aside()
            self.catalog.prune(self.retention, order.best_step)
        except StoreError as error:  # the commit stands; what is left over goes after the next one
            log.warning("could not delete old checkpoints: %s", error)
        return directory, manifest.bytes

    def _committed(
        self, step: int, write: Callable[[], tuple[str, int]], *, must_succeed: bool = False
    ) -> tuple[str, int] | None:
        """What ``_commit`` says; None when it failed, which is told of and counted, and training may go on."""
        try:
            committed = write()
        except StoreError as error:
            self.failures += 1
            what = f"save of step {step} FAILED ({self.failures} in a row)"
            log.error("%s: %s", what, error)  # noqa: TRY400  # a full disk needs no traceback
            if must_succeed or self.failures > self.failures_allowed:
                raise
            return None
        self.failures = 0
        return committed


class _Writing(Background[tuple[str, int]]):
    """A save that is under way; its result is that of ``write``."""

    def __init__(self, snapshot: Snapshot | None, write: Callable[[], tuple[str, int]], step: int, began: float) -> None:
        self.step = step
        self.blocked_seconds = 0.0
        self.seconds = 0.0
        self._began = began
        self._snapshot = snapshot
        self._write = write
        super().__init__(self._work, "harness-saver")

    def _work(self) -> tuple[str, int]:
        with contextlib.suppress(OSError, AttributeError):  # Linux has a niceness for each thread; its children inherit it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            if self._snapshot is not None:
                self._snapshot.drain()
            return self._write()
        finally:
            self.seconds = time.monotonic() - self._began

    def fence(self) -> None:
        if self._snapshot is not None:
            began = time.monotonic()
            self._snapshot.fence()
            self.blocked_seconds += time.monotonic() - began
