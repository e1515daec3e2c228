"""What a run tells, kept beside its checkpoints: ``metrics/<attempt>-<number>.jsonl``. No torch.

A store can put an object and list objects; it cannot append. So each attempt owns segments, small objects of JSON lines
that are put whole and never touched again. A thread writes the events since the last one at intervals (after the first
quarter of an hour, when the attempt has become 1 % older), and a save does before it commits. A kill loses at most the lines
of the last interval, and none of a step that a checkpoint stands on.

A reader merges them: the line of the newest attempt, which says at its start from which steps of which attempts it goes on.
What those told of later steps was trained again, and is passed over.

Anyone who can write the run's URL can write these lines. ``read_records`` gives only records whose fields have the types and
the ranges that they must have; the others are counted.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from harness.checkpoint.format import Ancestor, Attempt
from harness.errors import HarnessError, StoreError
from harness.storage.store import Store

Record = Mapping[str, Any]

log = logging.getLogger(__name__)

DIRECTORY = "metrics"
OPENINGS = ("start", "resume")  # the events with which an attempt begins to train
_OLDER = 0.01  # of an attempt's age: then its next segment is due, whatever the interval
_MOST_LINES = 100_000  # that wait for a store which does not take them
_LEAVE_SECONDS = 5.0  # for the last segment, when the process is about to end
SLICE_BYTES = 16 << 20  # of a segment, read at once
LINE_LIMIT_BYTES = 16 << 20  # the longest that is written has the numbers of a batch's samples
_DEEPEST = 8  # a line nests three levels: a lineage
_MOST_STEPS = 10**12  # a directory's name has twelve digits for them
_YEAR_10000 = 253_402_300_800.0  # in seconds since the epoch: no clock says that


class Journal:
    """Writes the segments of one attempt. An error with them never stops a training; it is logged once."""

    def __init__(self, store: Store, attempt: str, every_seconds: float) -> None:
        self._store = store
        self._attempt = attempt
        self._every_seconds = every_seconds
        self._began = time.monotonic()
        self._began_uptime = _uptime()
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
            clocked = {**record, "uptime_seconds": round(_uptime() - self._began_uptime, 3)}
            self._waiting.append(json.dumps(clocked, allow_nan=False, default=str).encode() + b"\n")
        if record["event"] in OPENINGS:
            self._wake.set()

    def reached(self, step: int) -> None:
        """Remembers how far the training is: each interval says so, whether a line was logged or not."""
        self._step = step

    def flush(self) -> None:
        """Writes the events so far."""
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
                    log.warning(
                        "could not write events beside the checkpoints; training continues, and the write will be "
                        "retried: %s",
                        error,
                    )
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


def _uptime() -> float:
    """Seconds by a clock that nobody sets, and that counts the time in which the machine slept, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


# --- reading ---------------------------------------------------------------------------------------------------------


class Records(dict[Attempt, list[Record]]):
    """What each attempt told, the first attempt first; ``unreadable`` lines were none, or had impossible values."""

    unreadable = 0


def read_records(store: Store, only: Attempt | None = None, known: set[str] | None = None) -> Records:
    """What each attempt told (or one of them), in that order. Segments in ``known`` are left out, and what is read is added.

    Raises ``StoreError``.
    """
    found: dict[Attempt, dict[bytes, None]] = {}
    records = Records()
    try:
        for name, lines in _segments(store, only, known or ()):
            attempt = Attempt(_attempt_of(name))
            # A put that failed may have landed, and its lines were put again.
            found.setdefault(attempt, {}).update(
                dict.fromkeys(line[: LINE_LIMIT_BYTES + 1] for line in lines if line.strip())
            )
            if known is not None:
                known.add(name)
    except FileNotFoundError as error:
        raise StoreError(f"{store.url}: {DIRECTORY}/ was deleted while it was read ({error})", transient=True) from None
    for attempt in sorted(found):
        parsed = [_record(text, attempt) for text in found[attempt]]
        records[attempt] = [record for record in parsed if record is not None]
        records.unreadable += len(parsed) - len(records[attempt])
    return records


def _segments(store: Store, only: Attempt | None, known: Collection[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The name and the lines of each segment that is not known."""
    sizes = store.list(DIRECTORY)
    attempts = {name: attempt for name in sizes.keys() - known if (attempt := _attempt_of(name))}
    names = sorted(name for name, attempt in attempts.items() if only is None or attempt == only.id)
    ranges = [
        (name, start, min(SLICE_BYTES, sizes[name] - start))
        for name in names
        for start in range(0, sizes[name], SLICE_BYTES)
    ]
    pieces = zip(ranges, store.pieces(ranges), strict=True)
    for name, group in groupby(pieces, key=lambda piece: piece[0][0]):
        yield name, _lines(data for _, data in group)


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a segment; of one that is too long only so much that it is seen to be."""
    rest = b""
    for data in pieces:
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        rest = rest[: LINE_LIMIT_BYTES + 1]
    yield rest


def line(records: Mapping[Attempt, Sequence[Record]], lineage: Sequence[Ancestor] = ()) -> dict[Attempt, int | None]:
    """The attempts that the run, as it is now, consists of, in order, each with the last step that counts (None: all).

    ``lineage`` is that of the newest checkpoint, itself included: its attempt may be a newer one that told nothing.
    """
    committed = {Attempt(ancestor.attempt): ancestor.until_step for ancestor in lineage}
    for attempt in sorted(records, reverse=True):
        if opening := opening_of(records[attempt]):
            if committed and max(committed) > attempt:
                break
            ancestors = {Attempt(name): int(step) for name, step in opening.get("lineage", ())}
            return {**ancestors, attempt: None}
    return {**committed}


def tells_of_save(store: Store, attempt: Attempt, step: int) -> bool:
    """Whether the events of an attempt, which it writes before it commits a save, tell of one."""
    told = read_records(store, attempt).get(attempt, [])
    return any(each["event"] == "saving" and each.get("step") == step for each in told)


def opening_of(records: Iterable[Record]) -> Record | None:
    """With what an attempt began to train; None where it did not come so far."""
    return next((record for record in records if record["event"] in OPENINGS), None)


def merged(records: Mapping[Attempt, Sequence[Record]], lineage: Sequence[Ancestor] = ()) -> list[Record]:
    """What was logged of the steps and evaluations of the run as it is now: each once, by the attempt that it stands on."""
    return [
        record
        for attempt, until_step in line(records, lineage).items()
        for record in records.get(attempt, ())
        if record["event"] in ("train", "evaluate") and (until_step is None or record["step"] <= until_step)
    ]


def _attempt_of(name: str) -> str:
    """The attempt that owns a segment; empty for what is none."""
    attempt, _, number = name.removeprefix(f"{DIRECTORY}/").removesuffix(".jsonl").rpartition("-")
    return attempt if name.endswith(".jsonl") and number.isdecimal() and Attempt.parse(attempt) else ""


def _record(text: bytes, owner: Attempt) -> Record | None:
    """What a line of an attempt says; None where it says nothing that could be, or is another attempt's."""
    if len(text) > LINE_LIMIT_BYTES:
        return None
    try:
        record = json.loads(text, parse_int=_whole_number, parse_float=_number, parse_constant=_word)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_shallow(record, _DEEPEST):
        return None
    event, attempt = record.get("event"), record.get("attempt")
    if not isinstance(event, str) or (isinstance(attempt, str) and Attempt.parse(attempt) and attempt != owner.id):
        return None
    required = {"time": _is_seconds, **_REQUIRED.get(event, {})}
    given = {name: check for name, check in {"step": _is_step, **_GIVEN.get(event, {})}.items() if name in record}
    if not all(name in record and check(record[name]) for name, check in {**given, **required}.items()):
        return None
    return {**record, "attempt": owner.id}


def _whole_number(text: str) -> float | int | str:
    return int(text) if len(text) < 20 else _number(text)


def _number(text: str) -> float | str:
    """A number; one that is too large for that in a word, as it is written."""
    value = float(text)
    return value if math.isfinite(value) else repr(value)


def _word(text: str) -> str:
    """JSON has no word for it, and Python's reader takes it all the same."""
    return repr(float(text.replace("Infinity", "inf")))


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(
        _is_shallow(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_STEPS


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _YEAR_10000


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_lineage(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_text(pair[0]) and Attempt.parse(pair[0]) and _is_step(pair[1])
        for pair in value
    )


# What whoever reads counts on: the fields that a record of an event must have, and those that it may have.
_Checks = Mapping[str, Callable[[Any], bool]]
_STEP: _Checks = {"step": _is_step}
_REQUIRED: Mapping[str, _Checks] = {
    **dict.fromkeys(("train", "evaluate", "beat", "saving", "skip"), _STEP),
    "save": {**_STEP, "bytes": _is_count, "seconds": _is_seconds, "blocked_seconds": _is_seconds},
    "save_failed": {**_STEP, "error": _is_text},
    "fallback": {"directory": _is_text, "why": _is_text},
    "nonfinite": {**_STEP, "policy": _is_text, "samples": lambda value: isinstance(value, list)},
    "straggler": {**_STEP, "rank": _is_count, "host": _is_text, "seconds": _is_seconds, "median_seconds": _is_seconds},
    "kept": {**_STEP, "rank": _is_count, "host": _is_text},
    "error": {"error": _is_text},
}
_GIVEN: Mapping[str, _Checks] = {**{event: {"lineage": _is_lineage} for event in OPENINGS}, "save": {"retries": _is_count}}
