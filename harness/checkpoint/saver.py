"""Saving: what happens around a commit, and what a failed one means.

Only rank 0 has a ``Saver``. A save that fails is told of each time and counted; training goes on, because the checkpoints
that exist are untouched, and the disk may have room again at the next one. After ``failures_allowed`` in a row, or when the
save was the last thing to do, the error is raised.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.format import Ancestor, Attempt
from harness.errors import StoreError, Superseded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A commit, and what it took."""

    directory: str
    bytes: int
    seconds: float


@dataclass
class Saver:
    """Writes the checkpoints of one attempt."""

    catalog: Catalog
    attempt: Attempt
    lineage: Sequence[Ancestor]
    retention: Retention
    shard_bytes: int
    failures_allowed: int
    failures: int = 0

    def save(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        *,
        step: int,
        meta: Mapping[str, Any],
        best_step: int | None = None,
        must_succeed: bool,
    ) -> Saved | None:
        """Commits a checkpoint, then deletes what is not to be kept. None when it failed and training may go on.

        ``best_step`` is a step whose checkpoint is kept whatever its age. Raises ``Superseded`` when a newer attempt has
        taken the run over.
        """
        began = time.monotonic()
        try:
            directory, manifest = commit.write(
                self.catalog.store,
                parts,
                step=step,
                attempt=self.attempt,
                lineage=self.lineage,
                meta=meta,
                shard_bytes=self.shard_bytes,
            )
        except StoreError as error:
            self.failures += 1
            what = f"save of step {step} FAILED ({self.failures} in a row)"
            log.error("%s: %s", what, error)  # noqa: TRY400  # a full disk needs no traceback
            if must_succeed or self.failures > self.failures_allowed:
                raise
            return None
        self.failures = 0
        try:
            self.step_aside()
            self.catalog.prune(self.retention, best_step)
        except StoreError as error:  # the commit stands; what is left over goes after the next one
            log.warning("could not delete old checkpoints: %s", error)
        return Saved(directory, manifest.bytes, time.monotonic() - began)

    def step_aside(self) -> None:
        """Stops a writer that was believed dead, and is not, before it deletes what its successor counts on.

        What it has committed does no harm: it is not on the successor's line. Raises ``Superseded``.
        """
        newest = max(self.catalog.attempts(), default=self.attempt)
        if newest > self.attempt:
            about = self.catalog.about_attempt(newest)
            who = f"started {about.get('started')} on {about.get('host')}"
            raise Superseded(f"{self.catalog.store.url}: attempt {newest.number} trains this run now ({who})")
