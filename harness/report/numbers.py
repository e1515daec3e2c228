"""The numbers of a run, computed from what its attempts have left. Nothing is drawn here, and nothing is read from a clock.

The wall time of a run, from the start of its first launcher to its last sign of life, is divided among ``KINDS`` without
gaps and overlaps; docs/report.md says what each means. Goodput is the share of ``training``.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from harness import crashes, journal
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.dashboards import numbers_of
from harness.errors import NoCheckpoint
from harness.journal import Record

Kind = Literal["starting", "loading", "training", "saving", "lost", "down"]
KINDS: tuple[Kind, ...] = ("training", "saving", "loading", "starting", "lost", "down")
_ALIVE_SECONDS = 60.0  # an attempt that has said something since may still run,
_ALIVE = 0.03  # and so may one for which this part of its age has passed
_SAID = {"done": "done", "stop": "stopped", "rollback": "rolled back"}  # events that end an attempt, and no death
_SAYS_STEP = {"train", "beat", "saving", "error", *_SAID}  # events that say which step was trained last


@dataclass(frozen=True)
class Span:
    """Some of the run's time, in seconds since the epoch."""

    kind: Kind
    begin: float
    end: float


@dataclass(frozen=True)
class Life:
    """An attempt, from its start to its last sign of life."""

    number: int
    id: str
    host: str
    ranks: int | None
    ending: str  # done, stopped, rolled back, running, killed, or an error
    from_step: int | None  # where it began to train; None where it did not come so far
    last_step: int | None  # the last that it is known to have trained
    kept_step: int | None  # the last that counts: its successors went on from there
    spans: Sequence[Span]

    @property
    def began(self) -> float:
        return self.spans[0].begin

    @property
    def ended(self) -> float:
        return self.spans[-1].end

    @property
    def is_dead(self) -> bool:
        """Whether it ended otherwise than it was meant to."""
        return self.ending not in (*_SAID.values(), "running")

    @property
    def opened(self) -> float | None:
        """When it began to train."""
        return (
            None if self.from_step is None else next(span.begin for span in self.spans if span.kind in ("training", "lost"))
        )

    @property
    def lost_steps(self) -> int:
        return 0 if self.last_step is None or self.kept_step is None else max(self.last_step - self.kept_step, 0)


@dataclass(frozen=True)
class Save:
    """A checkpoint that was committed."""

    time: float  # when it was told of
    attempt: int
    step: int
    bytes: int
    seconds: float  # until it was durable
    blocked_seconds: float  # of these, how long the training waited
    retries: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / max(self.seconds, 1e-9) / 1e9


@dataclass(frozen=True)
class Report:
    """A run in numbers."""

    url: str
    lives: Sequence[Life]
    spans: Sequence[Span]  # the whole wall time
    saves: Sequence[Save]
    recoveries_seconds: Sequence[float]  # of each death after which training went on
    notes: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # what else was told, by event

    def seconds(self, kind: Kind) -> float:
        """How much of the wall time is of a kind."""
        return sum((span.end - span.begin for span in self.spans if span.kind == kind), 0.0)

    @property
    def wall_seconds(self) -> float:
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def goodput(self) -> float:
        return self.seconds("training") / max(self.wall_seconds, 1e-9)

    @property
    def step(self) -> int:
        """How far the run is."""
        return max((life.kept_step or 0 for life in self.lives), default=0)

    def as_json(self) -> dict[str, Any]:
        """The numbers, by name."""
        waits, durations = ([getattr(save, name) for save in self.saves] for name in ("blocked_seconds", "seconds"))
        speeds = [save.gigabytes_per_second for save in self.saves]
        recoveries = self.recoveries_seconds
        return {
            "url": self.url,
            "step": self.step,
            "ending": self.lives[-1].ending,
            "attempts": len(self.lives),
            "deaths": sum(life.is_dead for life in self.lives),
            "wall_seconds": self.wall_seconds,
            "goodput": self.goodput,
            **{f"{kind}_seconds": self.seconds(kind) for kind in KINDS},
            "lost_steps": sum(life.lost_steps for life in self.lives),
            "mean_time_to_recovery_seconds": statistics.fmean(recoveries) if recoveries else None,
            "saves": len(self.saves),
            "save_stall_seconds_median": _median(waits),
            "save_seconds_median": _median(durations),
            "save_gigabytes_per_second_median": _median(speeds),
            "save_retries": sum(save.retries for save in self.saves),
            **{name: len(self.notes.get(event, ())) for event, name in NOTES.items()},
        }


# The events that are listed as they were told, and what several are called.
NOTES = {
    "save_failed": "failed_saves",
    "skip": "skipped_saves",
    "fallback": "fallbacks",
    "nonfinite": "nonfinite_steps",
    "straggler": "stragglers",
}


def read(catalog: Catalog, records: Mapping[Attempt, Sequence[Record]], now: float) -> Report:
    """The report of the run in a store; ``records`` is what ``journal.read`` gives. Raises ``NoCheckpoint`` without any."""
    if not any(records.values()):
        raise NoCheckpoint(
            f"{catalog.store.url}: there is nothing in {journal.DIRECTORY}/ to report on: nothing was trained here yet, or "
            "metrics.every_seconds is null"
        )
    attempts = sorted({*catalog.attempts(), *records})
    claims = {attempt: catalog.about_attempt(attempt) for attempt in attempts}
    errors = {attempt: found[0].error for attempt, found in crashes.read(catalog, attempts).items()}
    return of(catalog.store.url, claims, records, errors, now)


def of(
    url: str,
    claims: Mapping[Attempt, Mapping[str, Any]],
    records: Mapping[Attempt, Sequence[Record]],
    errors: Mapping[Attempt, str],
    now: float,
) -> Report:
    """The report of attempts that claimed, told and died of these things; ``now`` is when somebody asks."""
    kept = journal.line(records)
    attempts = sorted(claims)
    begins = {attempt: _began(claims[attempt], records.get(attempt, ())) for attempt in attempts}
    lives = []
    for attempt, successor in [*pairwise(attempts), (attempts[-1], None)]:
        told = records.get(attempt, ())
        is_newest = successor is None
        ending = _ending(told, errors.get(attempt), now if is_newest else None, begins[attempt])
        until_step = kept.get(attempt, 0)
        if until_step is None and ending not in ("running", *_SAID.values()):
            until_step = max((record["step"] for record in told if record["event"] == "save"), default=0)
        limit = None if successor is None else begins[successor]
        lives.append(_life(attempt, claims[attempt], told, begins[attempt], ending, until_step, limit))
    return Report(
        url,
        lives,
        list(_whole(lives)),
        [_save(attempt, record) for attempt in attempts for record in records.get(attempt, ()) if record["event"] == "save"],
        list(_recoveries(lives)),
        {event: [each for told in records.values() for each in told if each["event"] == event] for event in NOTES},
    )


def _life(
    attempt: Attempt,
    claim: Mapping[str, Any],
    told: Sequence[Record],
    began: float,
    ending: str,
    until_step: int | None,
    limit: float | None,
) -> Life:
    """An attempt of which the steps up to ``until_step`` count (None: all), and whose successor began at ``limit``."""
    claimed = max(_claimed(claim, told), began)
    ended = max([claimed, *(record["time"] for record in told)])
    ended = max(ended if limit is None else min(ended, limit), began)  # two that overlap: the later one is the run
    opening = journal.opening_of(told)
    host, ranks = str(claim.get("host", "")), claim.get("world_size")
    about = (attempt.number, attempt.id, host, ranks, ending)
    if opening is None:
        spans = [Span("starting", began, min(claimed, ended)), Span("loading", min(claimed, ended), ended)]
        return Life(*about, None, None, None, spans)
    opened = min(opening["time"], ended)
    from_step = int(opening.get("step", 0))
    last_step = max([from_step, *(record["step"] for record in told if record["event"] in _SAYS_STEP and "step" in record)])
    kept_step = last_step if until_step is None else min(max(until_step, from_step), last_step)
    kept_time = ended if until_step is None else min(max(_reached(told, kept_step, opened), opened), ended)
    spans = [Span("starting", began, min(claimed, opened)), Span("loading", min(claimed, opened), opened)]
    spans += _trained(told, opened, kept_time, ended, is_whole=until_step is None)
    return Life(*about, from_step, last_step, kept_step, spans)


def _trained(told: Iterable[Record], opened: float, kept_time: float, ended: float, *, is_whole: bool) -> list[Span]:
    """The time from the first step on: training, and waiting for saves, up to ``kept_time``, and what was lost after it."""
    waits = {record["step"]: float(record["blocked_seconds"]) for record in told if record["event"] == "save"}
    spans, now = [], opened
    for record in told:
        if record["event"] == "saving" and record["step"] in waits and now <= record["time"] <= kept_time:
            end = min(record["time"] + waits[record["step"]], ended)
            spans += [Span("training", now, record["time"]), Span("saving", record["time"], end)]
            now = end
    spans.append(Span("training", now, max(now, kept_time)))
    if not is_whole:
        spans.append(Span("lost", spans[-1].end, max(spans[-1].end, ended)))
    return spans


def _whole(lives: Sequence[Life]) -> Iterable[Span]:
    """All spans of a run, with the times between the attempts."""
    now = lives[0].began
    for life in lives:
        if life.began > now:
            yield Span("down", now, life.began)
        for span in life.spans:
            if span.end > now:
                yield Span(span.kind, max(span.begin, now), span.end)
                now = span.end


def _recoveries(lives: Sequence[Life]) -> Iterable[float]:
    """From each death until training goes on; attempts that die before they train prolong it."""
    since: float | None = None
    for life in lives:
        if since is not None and life.opened is not None:
            yield life.opened - since
            since = None
        if life.is_dead and since is None:
            since = life.ended


def _ending(told: Sequence[Record], error: str | None, now: float | None, began: float) -> str:
    """How an attempt ended, as far as anybody knows; ``now`` for the newest, which may not have."""
    for record in reversed(told):
        if record["event"] in _SAID:
            return _SAID[record["event"]]
        if record["event"] == "error":
            return error or str(record["error"])
    if error:
        return error
    last = told[-1]["time"] if told else began
    is_running = now is not None and now - last < max(_ALIVE_SECONDS, _ALIVE * (last - began))
    return "running" if is_running else "killed"


def _reached(told: Iterable[Record], step: int, opened: float) -> float:
    """When an attempt had trained a step: a save says so to the moment, a line that was logged else."""
    times = [record["time"] for record in told if record["event"] == "saving" and record["step"] == step]
    times += [record["time"] for record in told if record["event"] in ("train", "beat") and record["step"] <= step][-1:]
    return float(times[0]) if times else opened


def _began(claim: Mapping[str, Any], told: Sequence[Record]) -> float:
    return float(claim["began"]) if isinstance(claim.get("began"), float | int) else _claimed(claim, told)


def _claimed(claim: Mapping[str, Any], told: Sequence[Record]) -> float:
    """When an attempt numbered itself."""
    if isinstance(claim.get("started"), str):
        return datetime.fromisoformat(claim["started"]).timestamp()
    return float(told[0]["time"]) if told else 0.0


def _save(attempt: Attempt, record: Record) -> Save:
    names = ("time", "step", "bytes", "seconds", "blocked_seconds")
    return Save(attempt=attempt.number, retries=record.get("retries", 0), **{name: record[name] for name in names})


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def curves(
    records: Mapping[Attempt, Sequence[Record]], name: str | None = None
) -> tuple[str, dict[Attempt, list[tuple[int, float]]]]:
    """A metric of the training by attempt, and its name: by default the loss, or whatever the loop logs first."""
    trained = {attempt: [each for each in told if each["event"] == "train"] for attempt, told in records.items()}
    if name is None:
        names = [key for told in trained.values() for key in (told[0] if told else ()) if key not in _NO_CURVE]
        name = "loss" if "loss" in names or not names else names[0]
    return name, {
        attempt: [(each["step"], numbers[name]) for each in told if name in (numbers := numbers_of(each))]
        for attempt, told in trained.items()
    }


_NO_CURVE = {"event", "time", "attempt", "step", "lr", "samples/s", "steps/s"}
