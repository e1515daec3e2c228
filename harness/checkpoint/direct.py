"""Checkpoints of any tensors, without a run: ``save``, ``load``, ``latest``. No process group, no training."""

import os
from collections.abc import Mapping
from typing import Any

from harness.checkpoint import commit
from harness.checkpoint import load as reading
from harness.checkpoint.catalog import Catalog, Entry
from harness.checkpoint.format import check_meta, check_step
from harness.checkpoint.store import open_store
from harness.errors import NoCheckpoint, Unsupported


def save(
    url: str | os.PathLike[str],
    parts: Mapping[str, Mapping[str, Any]],
    *,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Commits a checkpoint of named parts, such as ``{"model": model.state_dict()}``, and returns its directory in ``url``.

    A part holds tensors of any shape and dtype on any device, numbers, strings, lists and dictionaries. What was saved last
    is the newest, whatever its step. ``meta`` is JSON for the manifest. Raises ``Unsupported`` for a value that cannot be
    written without pickle, for a step that is no number from 0 to 999,999,999,999, and for a ``meta`` that is not JSON;
    ``StoreError`` where the storage fails. Nothing is committed then.
    """
    values: Mapping[str, Any] = parts
    for name, part in values.items():
        if not isinstance(part, Mapping):
            example = "{'model': model.state_dict()}"
            raise Unsupported(f"{name}: expected a dictionary, as in {example}, found {type(part).__name__}")
    number, about, encoded = check_step(step), check_meta(meta or {}), commit.encode(parts)
    catalog = Catalog(open_store(os.fspath(url), storage_options))
    attempt = catalog.claim_attempt({})
    with catalog.new_directory(number, attempt) as directory:
        commit.write_encoded(
            catalog.store,
            encoded,
            step=number,
            attempt=attempt,
            lineage=[],
            meta=about,
            shard_bytes=1 << 30,
            directory=directory,
        )
    return directory


def load(
    url: str | os.PathLike[str], *, step: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parts of the newest whole checkpoint of a run (or of a certain step), every byte verified; tensors on the CPU.

    Raises ``NoCheckpoint`` where there is none, ``Corrupt`` where bytes are not those that were written.
    """
    catalog = Catalog(open_store(os.fspath(url), storage_options))

    def read(entry: Entry) -> dict[str, Any]:
        assert entry.manifest is not None, "a whole checkpoint has a manifest"
        return reading.read(catalog.store, entry.directory, entry.manifest)

    return catalog.reading(read, step)


def latest(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> int | None:
    """The step of the newest whole checkpoint of a run; None where there is none. Reads no tensors.

    Raises ``UnknownFormat`` where there is none and something is called like one: that is not nothing.
    """
    try:
        return Catalog(open_store(os.fspath(url), storage_options)).newest().step
    except NoCheckpoint:
        return None
