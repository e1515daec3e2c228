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
import sys
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


class Told(Mapping[Attempt, Iterable[Record]]):
    """What each attempt told, as it lay there when this was made. It is read each time that it is asked for, and no more of
    it is in memory than a segment or two: a long run tells gigabytes. Segments in ``known`` are left out.

    Raises ``StoreError``, as all that reads.
    """

    def __init__(self, store: Store, known: Collection[str] = ()) -> None:
        self._store = store
        self._sizes = {name: size for name, size in store.list(DIRECTORY).items() if _attempt_of(name) and name not in known}
        self._names: dict[Attempt, list[str]] = {}
        for name in sorted(self._sizes):
            self._names.setdefault(Attempt(_attempt_of(name)), []).append(name)
        self._unreadable: dict[Attempt, int] = {}

    def __getitem__(self, attempt: Attempt) -> Iterator[Record]:
        if attempt not in self._names:
            raise KeyError(attempt)
        return (record for _, record in self.each([attempt]))

    def __iter__(self) -> Iterator[Attempt]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def segments(self) -> Collection[str]:
        """Their names."""
        return self._sizes.keys()

    @property
    def unreadable(self) -> int:
        """The lines so far that were none, or had impossible values."""
        return sum(self._unreadable.values())

    def each(self, attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, Record]]:
        """What these attempts told, one after the other."""
        for attempt, records in self._segments([(each, name) for each in attempts for name in self._names.get(each, ())]):
            for record in records:
                yield attempt, record

    def backwards(self, attempt: Attempt) -> Iterator[Record]:
        """What an attempt told, its last word first. Who has found what it looks for reads no more."""
        for name in reversed(self._names.get(attempt, [])):
            for _, records in self._segments([(attempt, name)]):
                yield from reversed(records)

    def _segments(self, owned: Sequence[tuple[Attempt, str]]) -> Iterator[tuple[Attempt, list[Record]]]:
        """The records of each segment, and whose they are."""
        before, lines, reads = None, dict[bytes, None](), self._read([name for _, name in owned])
        for (attempt, _), data in zip(owned, reads, strict=True):
            # A put that failed may have landed. The next segment then begins with its lines.
            known = lines if attempt == before else dict[bytes, None]()
            lines = dict.fromkeys(line for line in data if line.strip())
            if attempt != before:
                self._unreadable[attempt] = 0
            parsed = [_record(line, attempt) for line in lines if line not in known]
            records = [record for record in parsed if record is not None]
            self._unreadable[attempt] += len(parsed) - len(records)
            before = attempt
            yield attempt, records

    def _read(self, names: Sequence[str]) -> Iterator[list[bytes]]:
        """The lines of each segment."""
        ranges = [
            (name, start, min(SLICE_BYTES, size - start))
            for name in names
            for size in [self._sizes[name]]
            for start in range(0, max(size, 1), SLICE_BYTES)
        ]
        try:
            pieces = zip(ranges, self._store.pieces(ranges), strict=True)
            for _, group in groupby(pieces, key=lambda piece: piece[0][0]):
                yield [line[: LINE_LIMIT_BYTES + 1] for line in _lines(data for _, data in group)]
        except FileNotFoundError as error:
            what = f"{DIRECTORY}/ was deleted while it was read ({error})"
            raise StoreError(f"{self._store.url}: {what}", transient=True) from None


def read_records(store: Store, known: set[str] | None = None, most: float = math.inf) -> Records:
    """What each attempt told, in that order. Segments in ``known`` are left out, and what is read is added.

    Of more than ``most`` records of steps about half as many are kept, evenly, and with them the highest and the lowest
    values. The first and the last of an attempt stay, and so do all other events. Raises ``StoreError``.
    """
    told = Told(store, known or ())
    attempts = {attempt: _Thinned() for attempt in told}
    size, count = 2, 0  # of so many records of steps two are kept
    for attempt, record in told.each(told):
        own = attempts[attempt]
        before = own.steps
        own.add(record, size)
        count += own.steps - before
        if count > most:
            size *= 2
            for each in attempts.values():
                each.thin()
            count = sum(each.steps for each in attempts.values())
            most = max(most, 2 * count)  # where no more can be left out
    records = Records({attempt: each.records for attempt, each in attempts.items()})
    records.unreadable = told.unreadable
    if known is not None:
        known |= {*told.segments}
    return records


class _Thinned:
    """The records of an attempt, of which those of steps may be too many."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.steps = 0  # the records of steps among them
        self._begin = self._fresh = 0  # where those are that were added since some were left out, and their number

    def add(self, record: Record, size: int) -> None:
        """Adds a record. Of each ``size`` records of steps that others follow, two stay."""
        if record["event"] in _OF_STEPS:
            if self._fresh >= size > 2:
                self._leave_out(self._begin, len(self.records), size)
            self._fresh += 1
            self.steps += 1
        self.records.append(record)
        if self.steps == 1:
            self._begin, self._fresh = len(self.records), 0

    def thin(self) -> None:
        """Leaves out every other one, but the first and the last."""
        found = [index for index, record in enumerate(self.records) if record["event"] in _OF_STEPS]
        if found:
            self._leave_out(found[0] + 1, found[-1], 4)

    def _leave_out(self, begin: int, end: int, size: int) -> None:
        found = [index for index in range(begin, end) if self.records[index]["event"] in _OF_STEPS]
        groups = (found[start : start + size] for start in range(0, len(found) - size + 1, size))
        gone = {index for each in groups for index in sorted(each, key=lambda index: _height(self.records[index]))[1:-1]}
        self.records[begin:end] = [self.records[index] for index in range(begin, end) if index not in gone]
        self.steps -= len(gone)
        self._begin, self._fresh = len(self.records), 0


def _height(record: Record) -> float:
    """How high a curve is at a record: the loss, or whatever else it has first. What is no number is the highest."""
    value = record.get("loss", next((value for name, value in record.items() if name not in _NO_METRIC), 0.0))
    return value if isinstance(value, int | float) else math.inf


_OF_STEPS = ("train", "evaluate", "beat")  # of which there are ever more
_NO_METRIC = ("event", "time", "attempt", "step", "uptime_seconds", "lr", "samples/s", "steps/s")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a segment; of one that is too long only so much that it is seen to be."""
    rest = b""
    for data in pieces:
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        rest = rest[: LINE_LIMIT_BYTES + 1]
    yield rest


def line(records: Mapping[Attempt, Iterable[Record]], lineage: Sequence[Ancestor] = ()) -> dict[Attempt, int | None]:
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
    return any(each["event"] == "saving" and each.get("step") == step for each in Told(store).backwards(attempt))


def last_word(records: Iterable[Record]) -> str:
    """How an attempt ended, by its records from the last one on: ``stop``, ``done`` or ``error``; empty where it has told of
    its training since, or nothing at all."""
    words = (record["event"] for record in records)
    return next((word if word in _ENDS else "" for word in words if word in (*_ENDS, *_TRAINS)), "")


_ENDS = ("stop", "done", "error")
_TRAINS = ("train", "saving", *OPENINGS)


def opening_of(records: Iterable[Record]) -> Record | None:
    """With what an attempt began to train; None where it did not come so far."""
    return next((record for record in records if record["event"] in OPENINGS), None)


def merged(records: Mapping[Attempt, Iterable[Record]], lineage: Sequence[Ancestor] = ()) -> Iterator[Record]:
    """What was logged of the steps and evaluations of the run as it is now: each once, by the attempt that it stands on."""
    until = line(records, lineage)
    one_by_one = ((attempt, record) for attempt in until for record in records.get(attempt, ()))
    for attempt, record in records.each(until) if isinstance(records, Told) else one_by_one:
        until_step = until[attempt]
        if record["event"] in ("train", "evaluate") and (until_step is None or record["step"] <= until_step):
            yield record


def _attempt_of(name: str) -> str:
    """The attempt that owns a segment; empty for what is none."""
    attempt, _, number = name.removeprefix(f"{DIRECTORY}/").removesuffix(".jsonl").rpartition("-")
    return attempt if name.endswith(".jsonl") and number.isdecimal() and Attempt.parse(attempt) else ""


def _record(text: bytes, owner: Attempt) -> Record | None:
    """What a line of an attempt says; None where it says nothing that could be, or is another attempt's."""
    if len(text) > LINE_LIMIT_BYTES:
        return None
    try:
        record = _DECODER.decode(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_shallow(record, _DEEPEST):
        return None
    event, attempt = record.get("event"), record.get("attempt")
    if not isinstance(event, str) or (isinstance(attempt, str) and Attempt.parse(attempt) and attempt != owner.id):
        return None
    required = {"time": _is_seconds, **REQUIRED.get(event, {})}
    given = {name: check for name, check in {"step": _is_step, **_GIVEN.get(event, {})}.items() if name in record}
    if not all(name in record and check(record[name]) for name, check in {**given, **required}.items()):
        return None
    return {sys.intern(name): value for name, value in record.items()} | {"event": sys.intern(event), "attempt": owner.id}


def _whole_number(text: str) -> float | int | str:
    return int(text) if len(text) < 20 else _number(text)


def _number(text: str) -> float | str:
    """A number; one that is too large for that in a word, as it is written."""
    value = float(text)
    return value if math.isfinite(value) else repr(value)


def _word(text: str) -> str:
    """JSON has no word for it, and Python's reader takes it all the same."""
    return repr(float(text.replace("Infinity", "inf")))


_DECODER = json.JSONDecoder(parse_int=_whole_number, parse_float=_number, parse_constant=_word)


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
REQUIRED: Mapping[str, _Checks] = {
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
