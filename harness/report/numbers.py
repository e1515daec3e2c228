"""The numbers of a run, computed from what its attempts have left. Nothing is drawn here, and nothing is read from a clock.

The wall time of a run, from the start of its first launcher to its last sign of life, is divided among ``KINDS`` without
gaps and overlaps (see docs/guides/report.md). Goodput is the share of ``training``. What cannot be known is a
sentence in ``RunReport.doubts``.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Ancestor, Attempt
from harness.errors import CheckpointError, NoCheckpoint
from harness.report.clocks import Claim, Timed, on_one_clock
from harness.telemetry import crashes, journal
from harness.telemetry.dashboards import numbers_of
from harness.telemetry.journal import Record, Records

Kind = Literal["starting", "loading", "training", "saving", "lost", "down"]
KINDS: tuple[Kind, ...] = ("training", "saving", "loading", "starting", "lost", "down")
MOST_RECORDS = 100_000  # of steps, which a report holds in memory: a drawing shows 1,500 of them
_ALIVE_SECONDS = 60.0  # an attempt that has said something since may still run,
_ALIVE = 0.03  # and so may one for which this part of its age has passed
_AHEAD_SECONDS = 86400.0  # by so much a machine's clock may be ahead of that of whoever asks
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
    is_in_line: bool = True  # whether the run, as it is now, stands on it
    is_complete: bool = True  # whether its last word is known; what one that was killed did after it is not

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
class Death:
    """An attempt that died, and what became of its work."""

    life: Life
    kept: Record | None  # what the next attempt says of the rank that kept the last step; None: a checkpoint counted
    seconds: float | None  # from its last sign of life until an attempt trained; None where none has

    def as_json(self) -> dict[str, Any]:
        return {
            "attempt": self.life.number,
            "ending": self.life.ending,
            "last_step": self.life.last_step,
            "lost_steps": self.life.lost_steps,
            "lost_steps_are_exact": self.life.is_complete,
            "kept_by": None if self.kept is None else {"rank": self.kept["rank"], "host": self.kept["host"]},
            "recovery_seconds": self.seconds,
        }


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
class RunReport:
    """A run in numbers."""

    url: str
    lives: Sequence[Life]
    spans: Sequence[Span]  # the whole wall time
    saves: Sequence[Save]
    recoveries_seconds: Sequence[float]  # of each death after which training went on
    known_deaths: Sequence[Death] = ()  # of attempts
    notes: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # what else was told, by event
    unclaimed_deaths: int = 0  # starts of the ranks that ended before they had an attempt
    doubts: Sequence[str] = ()  # what cannot be known, or could not be read

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
        return max((life.kept_step or 0 for life in self.lives if life.is_in_line), default=0)

    @property
    def deaths(self) -> int:
        """How often it died, as far as that is known."""
        return len(self.known_deaths) + self.unclaimed_deaths

    @property
    def lost_steps(self) -> int:
        """How many steps are known to have been trained that do not count."""
        return sum(life.lost_steps for life in self.lives)

    @property
    def is_lost_exact(self) -> bool:
        """Whether there cannot have been more of them."""
        return all(life.is_complete for life in self.lives)

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
            "deaths": self.deaths,
            "unclaimed_deaths": self.unclaimed_deaths,
            "wall_seconds": self.wall_seconds,
            "goodput": self.goodput,
            **{f"{kind}_seconds": self.seconds(kind) for kind in KINDS},
            "lost_steps": self.lost_steps,
            "lost_steps_are_exact": self.is_lost_exact,
            "mean_time_to_recovery_seconds": statistics.fmean(recoveries) if recoveries else None,
            "saves": len(self.saves),
            "save_stall_seconds_median": _median(waits),
            "save_seconds_median": _median(durations),
            "save_gigabytes_per_second_median": _median(speeds),
            "save_retries": sum(save.retries for save in self.saves),
            **{name: len(self.notes.get(event, ())) for event, name in NOTES.items()},
            "kept_states": sum(death.kept is not None for death in self.known_deaths),
            "known_deaths": [death.as_json() for death in self.known_deaths],
            "doubts": list(self.doubts),
        }


# The events that are listed as they were told, and what several are called.
NOTES = {
    "save_failed": "failed_saves",
    "skip": "skipped_saves",
    "fallback": "fallbacks",
    "nonfinite": "nonfinite_steps",
    "straggler": "stragglers",
}


def read_report(catalog: Catalog, records: Records, now: float) -> RunReport:
    """The report of the run in a store; ``records`` is what ``read_records`` gives. Raises ``NoCheckpoint`` without any."""
    if not any(records.values()):
        unread = f" ({_lines(records.unreadable)} could not be read)" if records.unreadable else ""
        raise NoCheckpoint(
            f"{catalog.store.url}: {journal.DIRECTORY}/ holds no events to report on{unread}: nothing was trained "
            "here yet, or metrics.every_seconds is null"
        )
    attempts = sorted({*catalog.attempts.all(), *records})
    claims = {attempt: _about(catalog, attempt) for attempt in attempts}
    errors = {attempt: str(found[0].error) for attempt, found in crashes.read_crashes(catalog, attempts).items()}
    doubts = [f"{_lines(records.unreadable)} in {journal.DIRECTORY}/ could not be read"] if records.unreadable else []
    return of(catalog.store.url, claims, records, errors, now, lineage=newest_lineage(catalog), doubts=doubts)


def newest_lineage(catalog: Catalog) -> list[Ancestor]:
    """What the newest whole checkpoint stands on, itself included; nothing where there is none."""
    try:
        manifest = catalog.newest().manifest
    except CheckpointError:
        return []
    return [*manifest.lineage, Ancestor(manifest.attempt, manifest.step)] if manifest else []


def _about(catalog: Catalog, attempt: Attempt) -> Mapping[str, Any]:
    try:
        return catalog.attempts.about(attempt)
    except RecursionError:  # made to do harm
        return {}


def of(
    url: str,
    claims: Mapping[Attempt, Mapping[str, Any]],
    records: Mapping[Attempt, Sequence[Record]],
    errors: Mapping[Attempt, str],
    now: float,
    *,
    lineage: Sequence[Ancestor] = (),
    doubts: Sequence[str] = (),
) -> RunReport:
    """The report of attempts that claimed, told and died of these things; ``now`` is when somebody asks, ``lineage`` that of
    the newest checkpoint."""
    kept = journal.line(records, lineage)
    committed = {Attempt(ancestor.attempt): ancestor.until_step for ancestor in lineage}
    attempts = sorted(claims)
    known = {attempt: Claim.of(about) for attempt, about in claims.items()}
    times, more_doubts = on_one_clock(known, records)
    seen_through = dict(_seen_through(records))
    lives = []
    for attempt, successor in [*pairwise(attempts), (attempts[-1], None)]:
        timed = times[attempt]
        ending = _ending(timed, errors.get(attempt), None if successor else now)
        until_step = kept.get(attempt, 0)
        if until_step is None and ending not in ("running", *_SAID.values()):
            until_step = max([committed.get(attempt, 0), *_saved_steps(timed.events)])
        limit = None if successor is None else times[successor].began
        about = {"host": known[attempt].host, "ranks": known[attempt].ranks, "is_in_line": attempt in kept}
        lives.append(_life(attempt, about, timed, ending, until_step, limit, is_complete=attempt.id in seen_through))
    events = {attempt: timed.events for attempt, timed in times.items()}
    silent = [str(attempt.number) for attempt in kept if not records.get(attempt)]
    if silent:
        more_doubts.append(f"the run continues attempt {', '.join(silent)}, whose events are missing")
    launcher_began = known[attempts[0]].launcher_began
    began = lives[0].began if launcher_began is None else min(launcher_began, lives[0].began)
    return RunReport(
        url,
        lives,
        list(_whole(lives, began)),
        [_save(attempt, record) for attempt in attempts for record in events[attempt] if record["event"] == "save"],
        list(_recoveries(lives)),
        list(_deaths(lives, seen_through)),
        {event: [each for found in events.values() for each in found if each["event"] == event] for event in NOTES},
        _unclaimed([known[attempt] for attempt in attempts]),
        [*doubts, *more_doubts],
    )


def _saved_steps(events: Iterable[Record]) -> Iterable[int]:
    """The steps whose saves an attempt told of. A kill may have come between the last commit and its word."""
    return (record["step"] for record in events if record["event"] == "save")


def _lines(count: int) -> str:
    return f"{count} line{'s' * (count > 1)}"


def _unclaimed(claims: Sequence[Claim]) -> int:
    """How many starts of a launch's ranks have ended before one had an attempt, as the launches have counted them."""
    count = 0
    before: Claim | None = None
    for claim in claims:
        if claim.restarts is None:
            before = None
            continue
        is_same = before is not None and claim.launch == before.launch and claim.restarts >= (before.restarts or 0)
        next_one = (before.restarts or 0) + 1 if is_same and before else 0
        count += max(claim.restarts - next_one, 0)
        before = claim
    return count


def _life(
    attempt: Attempt,
    about: Mapping[str, Any],
    timed: Timed,
    ending: str,
    until_step: int | None,
    limit: float | None,
    *,
    is_complete: bool,
) -> Life:
    """An attempt of which the steps up to ``until_step`` count (None: all), and whose successor began at ``limit``. Where it
    ``is_complete``, its last step is known, whether it has had a last word or not."""
    events, began, claimed = timed.events, timed.began, timed.claimed
    ended = max(
        timed.ended if limit is None else min(timed.ended, limit), began
    )  # two that overlap: the later one is the run
    opening = journal.opening_of(events)
    says_end = ending == "running" or any(record["event"] in ("error", *_SAID) for record in events)
    about = {**about, "number": attempt.number, "id": attempt.id, "ending": ending, "is_complete": is_complete or says_end}
    if opening is None:
        spans = [Span("starting", began, min(claimed, ended)), Span("loading", min(claimed, ended), ended)]
        return Life(**about, from_step=None, last_step=None, kept_step=None, spans=spans)
    opened = min(opening["time"], ended)
    from_step = opening.get("step", 0)
    last_step = max(
        [
            from_step,
            until_step or 0,  # who goes on from a step knows that it was trained
            *(record["step"] for record in events if record["event"] in _SAYS_STEP and "step" in record),
        ]
    )
    kept_step = last_step if until_step is None else min(max(until_step, from_step), last_step)
    kept_time = ended if until_step is None else min(max(_reached(events, kept_step, opened), opened), ended)
    spans = [Span("starting", began, min(claimed, opened)), Span("loading", min(claimed, opened), opened)]
    spans += _trained(events, opened, kept_time, ended, is_whole=until_step is None)
    return Life(**about, from_step=from_step, last_step=last_step, kept_step=kept_step, spans=spans)


def _trained(events: Iterable[Record], opened: float, kept_time: float, ended: float, *, is_whole: bool) -> list[Span]:
    """The time from the first step on: training, and waiting for saves, up to ``kept_time``, and what was lost after it."""
    waits = {record["step"]: float(record["blocked_seconds"]) for record in events if record["event"] == "save"}
    spans, now = [], opened
    for record in events:
        if record["event"] == "saving" and record["step"] in waits and now <= record["time"] <= kept_time:
            end = min(record["time"] + waits[record["step"]], ended)
            spans += [Span("training", now, record["time"]), Span("saving", record["time"], end)]
            now = end
    spans.append(Span("training", now, max(now, kept_time)))
    if not is_whole:
        spans.append(Span("lost", spans[-1].end, max(spans[-1].end, ended)))
    return spans


def _whole(lives: Sequence[Life], began: float) -> Iterable[Span]:
    """All spans of a run from its beginning, with the times between the attempts."""
    now = began
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


def _seen_through(records: Mapping[Attempt, Sequence[Record]]) -> Iterable[tuple[str, Record]]:
    """The attempts whose last step a surviving rank has kept, and what the attempts that went on from there say of it."""
    for events in records.values():
        opening = journal.opening_of(events)
        kept = next((each for each in events if each["event"] == "kept"), None)
        if kept is not None and opening is not None and opening.get("lineage"):
            yield opening["lineage"][-1][0], kept


def _deaths(lives: Sequence[Life], seen_through: Mapping[str, Record]) -> Iterable[Death]:
    for index, life in enumerate(lives):
        if life.is_dead:
            opened = next((each.opened for each in lives[index + 1 :] if each.opened is not None), None)
            seconds = None if opened is None else max(opened - life.ended, 0.0)
            yield Death(life, seen_through.get(life.id), seconds)


def _ending(timed: Timed, error: str | None, now: float | None) -> str:
    """How an attempt ended, as far as anybody knows; ``now`` for the newest, which may not have."""
    for record in reversed(timed.events):
        if record["event"] in _SAID:
            return _SAID[record["event"]]
        if record["event"] == "error":
            return error or record["error"]
    if error:
        return error
    last, age_seconds = timed.last_by_its_clock, timed.ended - timed.began
    is_running = now is not None and -_AHEAD_SECONDS < now - last < max(_ALIVE_SECONDS, _ALIVE * age_seconds)
    return "running" if is_running else "killed"


def _reached(events: Iterable[Record], step: int, opened: float) -> float:
    """When an attempt had trained a step: a save says so to the moment, a line that was logged else."""
    times = [record["time"] for record in events if record["event"] == "saving" and record["step"] == step]
    times += [record["time"] for record in events if record["event"] in ("train", "beat") and record["step"] <= step][-1:]
    return float(times[0]) if times else opened


def _save(attempt: Attempt, record: Record) -> Save:
    names = ("time", "step", "bytes", "seconds", "blocked_seconds")
    return Save(attempt=attempt.number, retries=record.get("retries", 0), **{name: record[name] for name in names})


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def curves(records: Mapping[Attempt, Sequence[Record]]) -> tuple[str, dict[Attempt, list[tuple[int, float]]]]:
    """A metric of the training by attempt, and its name: the loss, or whatever the loop logs first."""
    trained = {attempt: [each for each in events if each["event"] == "train"] for attempt, events in records.items()}
    firsts = [numbers_of(events[0]) for events in trained.values() if events]
    names = [key for first in firsts for key in first if key not in _NO_CURVE]
    name = "loss" if "loss" in names or not names else names[0]
    return name, {
        attempt: [(each["step"], numbers[name]) for each in events if name in (numbers := numbers_of(each))]
        for attempt, events in trained.items()
    }


_NO_CURVE = {"lr", "samples/s", "steps/s"}
