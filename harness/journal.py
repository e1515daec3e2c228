"""What a run tells, kept beside its checkpoints: ``metrics/<attempt>-<number>.jsonl``. No torch.

A store can put an object and list objects; it cannot append. So each attempt owns segments, small objects of JSON lines
that are put whole and never touched again. A thread puts what was told since the last one at intervals (after the first
quarter of an hour, when the attempt has become 1 % older), and a save does before it commits. A kill loses at most the lines
of the last interval, and none of a step that a checkpoint stands on.

Whoever reads merges: the line of the newest attempt, which says at its start from which steps of which attempts it goes on.
What those told of later steps was trained again, and is passed over.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.checkpoint.format import Attempt
from harness.checkpoint.store import Store
from harness.errors import HarnessError

Record = Mapping[str, Any]

log = logging.getLogger(__name__)

DIRECTORY = "metrics"
OPENINGS = ("start", "resume")  # the events with which an attempt begins to train
_OLDER = 0.01  # of an attempt's age: then its next segment is due, whatever the interval
_MOST_LINES = 100_000  # that wait for a store which does not take them
_LEAVE_SECONDS = 5.0  # for the last segment, when the process is about to end


class Journal:
    """Writes the segments of one attempt. Nothing that happens to them stops a training: it is told of once."""

    def __init__(self, store: Store, attempt: str, every_seconds: float) -> None:
        self._store = store
        self._attempt = attempt
        self._every_seconds = every_seconds
        self._began = time.monotonic()
        self._waiting: list[bytes] = []  # lines that are not in the store yet
        self._segments = 0
        self._step: int | None = None
        self._warned = False
        self._putting = threading.Lock()
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="harness-journal", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Takes one more line. The first is put at once, so that a start is known of."""
        if len(self._waiting) < _MOST_LINES:
            self._waiting.append(json.dumps(record, allow_nan=False, default=str).encode() + b"\n")
        if record["event"] in OPENINGS:
            self._wake.set()

    def reached(self, step: int) -> None:
        """Remembers how far the training is: each interval says so, whether a line was logged or not."""
        self._step = step

    def flush(self) -> None:
        """Puts what was told until now."""
        with self._putting:
            lines = self._waiting[:]
            if not lines:
                return
            data, name = b"".join(lines), f"{DIRECTORY}/{self._attempt}-{self._segments:06}.jsonl"
            self._segments += 1  # also after a failure: a put that hung may still land, and must replace nothing
            try:
                self._store.put(name, lambda: [data], len(data))
            except HarnessError as error:
                if not self._warned:
                    log.warning("could not keep what the run tells, training goes on and it is tried again: %s", error)
                self._warned = True
                return
            del self._waiting[: len(lines)]

    def close(self) -> None:
        """Puts the last segment, if the store takes it soon."""
        self._over = True
        self._wake.set()
        self._thread.join(_LEAVE_SECONDS)

    def _work(self) -> None:
        while not self._over:
            self._wake.wait(max(self._every_seconds, _OLDER * (time.monotonic() - self._began)))
            if not self._wake.is_set() and self._step is not None:
                self.write({"event": "beat", "time": time.time(), "attempt": self._attempt, "step": self._step})
            self._wake.clear()
            self.flush()
        self.flush()  # what came while it was putting the lines before


def read(store: Store) -> dict[Attempt, list[Record]]:
    """What each attempt told, in that order, the first attempt first. Lines that are none are left out."""
    found: dict[Attempt, dict[bytes, None]] = {}
    sizes = store.list(DIRECTORY)
    names = sorted(name for name in sizes if _attempt_of(name))
    for name, data in zip(names, store.pieces((name, 0, sizes[name]) for name in names), strict=True):
        lines = dict.fromkeys(data.splitlines())  # a put that failed may have landed, and its lines were put again
        found.setdefault(Attempt(_attempt_of(name)), {}).update(lines)
    return {attempt: list(filter(None, map(_record, found[attempt]))) for attempt in sorted(found)}


def line(records: Mapping[Attempt, Sequence[Record]]) -> dict[Attempt, int | None]:
    """The attempts that the run, as it is now, consists of, in order, each with the last step that counts (None: all)."""
    for attempt in sorted(records, reverse=True):
        if opening := opening_of(records[attempt]):
            ancestors = {Attempt(name): int(step) for name, step in opening.get("lineage", ())}
            return {**ancestors, attempt: None}
    return {}


def opening_of(records: Iterable[Record]) -> Record | None:
    """With what an attempt began to train; None where it did not come so far."""
    return next((record for record in records if record["event"] in OPENINGS), None)


def merged(records: Mapping[Attempt, Sequence[Record]]) -> list[Record]:
    """What was logged of the steps and evaluations of the run as it is now: each once, by the attempt that it stands on."""
    return [
        record
        for attempt, until_step in line(records).items()
        for record in records.get(attempt, ())
        if record["event"] in ("train", "evaluate") and (until_step is None or record["step"] <= until_step)
    ]


def _attempt_of(name: str) -> str:
    """The attempt that owns a segment; empty for what is none."""
    attempt, _, number = name.removeprefix(f"{DIRECTORY}/").removesuffix(".jsonl").rpartition("-")
    return attempt if name.endswith(".jsonl") and number.isdecimal() and Attempt.parse(attempt) else ""


def _record(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"event", "time"} <= record.keys() else None
