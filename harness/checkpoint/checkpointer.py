"""Checkpoints of any tensors, without a run: ``Checkpointer``, and ``save``, ``load`` and ``latest`` as its short form.

It is the engine that ``harness.Run`` uses. No process group, no training.
"""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from harness.checkpoint import load as reading
from harness.checkpoint.catalog import Catalog, Entry
from harness.checkpoint.format import Ancestor, Attempt, check_meta, check_step
from harness.checkpoint.plan import IsSteady, nothing_is_steady
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saved, Saver, SaveRequest
from harness.errors import NoCheckpoint, Unsupported
from harness.storage.store import open_store

Parts = Mapping[str, Mapping[str, Any]]


class Checkpointer:
    """Saves checkpoints at a URL (any fsspec URL, or a path), while the program continues::

        with Checkpointer("s3://bucket/run", keep_last=3) as checkpoints:
            ...
            checkpoints.begin({"model": model.state_dict()}, step=100)   # copies, and returns
            ...                                                          # the program continues
            checkpoints.wait()                                           # durable, or the error

    Parts are dictionaries of tensors (of any shape, dtype and device), numbers, strings, lists and dictionaries. The
    checkpoint saved last is the newest, whatever its step. ``keep_last`` deletes older ones, and makes this the URL's only
    writer: it deletes what an earlier writer left unfinished, and raises ``Superseded`` once a later writer has begun.
    ``shard_bytes`` and ``streams`` are those of ``checkpoint`` in the configuration; None chooses by the storage.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        shard_bytes: int | None = None,
        streams: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._catalog = Catalog(open_store(os.fspath(url), storage_options))
        self._retention = Retention(keep_last)
        self._shard_bytes = shard_bytes or self._catalog.store.shard_bytes
        self._streams = streams or self._catalog.store.streams
        self._lineage: list[Ancestor] = []  # of the checkpoint that was loaded
        self._saver: Saver | None = None  # made with the first save: who only reads leaves nothing behind
        self._last_step = 0  # that it has saved

    def save(self, parts: Parts, *, step: int = 0, meta: Mapping[str, Any] | None = None) -> str:
        """Commits a checkpoint without copying it first, and returns its directory in the URL. ``meta`` is JSON for the
        manifest.

        Raises ``Unsupported`` for a value that cannot be written without pickle, for a step that is not a number from 0 to
        999,999,999,999, and for a ``meta`` that is not JSON. Raises ``StoreError`` if the storage fails. Then nothing is
        committed.
        """
        request = _checked(parts, step, meta)
        self.wait()
        saved = self._saver_for(request.step).save(parts, request, must_succeed=True)
        assert saved is not None, "it must succeed"
        return saved.directory

    def begin(
        self,
        parts: Parts,
        *,
        step: int = 0,
        meta: Mapping[str, Any] | None = None,
        is_steady: IsSteady = nothing_is_steady,
    ) -> None:
        """Begins to save ``parts`` as they are now, in other threads. Waits first for a save in progress.

        It copies everything before it returns, except tensors for which ``is_steady`` is true. Those are copied while the
        program continues; call ``fence`` before you change one. Raises ``Unsupported`` as ``save`` does. The next call of
        ``begin``, ``save`` or ``wait`` raises what fails later.
        """
        request = _checked(parts, step, meta, is_steady)
        self.wait()
        self._saver_for(request.step).begin(parts, request)

    def fence(self) -> None:
        """Waits until no tensor is being copied, so that all of them may change."""
        if self._saver is not None:
            self._saver.fence()

    def wait(self) -> Saved | None:
        """Waits until the save in progress is durable, and returns what it took. Raises its error if it failed.

        Returns None if there is none, and if nothing was committed because a steady tensor changed before ``fence``."""
        return self._saver.wait() if self._saver is not None else None

    def load(self, step: int | None = None) -> dict[str, Any]:
        """Returns the parts of the newest whole checkpoint, or of the one at ``step``.

        Every byte is verified; tensors are on the CPU. Later saves continue from it.

        Raises ``NoCheckpoint`` if there is none, and ``Corrupt`` if bytes differ from those that were written.
        """

        def read(entry: Entry) -> tuple[Entry, dict[str, Any]]:
            assert entry.manifest is not None, "a whole checkpoint has a manifest"
            return entry, reading.read(self._catalog.store, entry.directory, entry.manifest)

        self.wait()
        entry, parts = self._catalog.reading(read, step)
        assert entry.manifest is not None, "a whole checkpoint has a manifest"
        self._lineage = [*entry.manifest.lineage, Ancestor(entry.manifest.attempt, entry.step)]
        self._saver = None
        return parts

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None if there is none. Reads no tensors.

        Raises ``UnknownFormat`` if there is none, but something has a name like one.
        """
        try:
            return self._catalog.newest().step
        except NoCheckpoint:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits; an error that is under way matters more than that of a save."""
        try:
            self.wait()
        except Exception:
            if error is None:
                raise

    def _saver_for(self, step: int) -> Saver:
        """The writer of an attempt in which each save has a later step than the one before: the last is the newest."""
        if self._saver is None or step <= self._last_step:
            self._saver = self._new_saver(self._catalog.attempts.claim({}))
        self._last_step = step
        return self._saver

    def _new_saver(self, attempt: Attempt) -> Saver:
        return Saver(
            catalog=self._catalog,
            attempt=attempt,
            lineage=self._lineage,
            retention=self._retention,
            shard_bytes=self._shard_bytes,
            streams=self._streams,
            failures_allowed=0,
            owns_run=self._retention.keep_last is not None,
        )


def _checked(
    parts: Parts, step: int, meta: Mapping[str, Any] | None, is_steady: IsSteady = nothing_is_steady
) -> SaveRequest:
    values: Mapping[str, Any] = parts
    for name, part in values.items():
        if not isinstance(part, Mapping):
            example = "{'model': model.state_dict()}"
            raise Unsupported(f"{name}: expected a dictionary, as in {example}, found {type(part).__name__}")
    return SaveRequest(check_step(step), check_meta(meta or {}), is_steady=is_steady)


# --- in one call -----------------------------------------------------------------------------------------------------


def save(
    url: str | os.PathLike[str],
    parts: Parts,
    *,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """``Checkpointer(url).save(…)``: commits a checkpoint of named parts, such as ``{"model": model.state_dict()}``, and
    returns its directory in ``url``."""
    return Checkpointer(url, storage_options=storage_options).save(parts, step=step, meta=meta)


def load(
    url: str | os.PathLike[str], *, step: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``Checkpointer(url).load(…)``: returns the parts of the newest whole checkpoint, or of the one at ``step``."""
    return Checkpointer(url, storage_options=storage_options).load(step)


def latest(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> int | None:
    """``Checkpointer(url).latest()``: returns the step of the newest whole checkpoint, or None if there is none."""
    return Checkpointer(url, storage_options=storage_options).latest()
