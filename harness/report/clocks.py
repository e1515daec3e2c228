"""The times of a run on one line: what its attempts have told by clocks that may have been set, or differ.

Within an attempt the time that passed between two records is known, whatever was done to the clock: each has the seconds
since the attempt began by a clock that nobody sets. Between two attempts nothing is known but what their clocks say; where
that cannot be, the time between them counts as none, and a sentence says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from harness.checkpoint.format import Attempt
from harness.report.units import duration
from harness.telemetry import journal
from harness.telemetry.journal import Record

_ALIKE_SECONDS = 5.0  # by so much two clocks may differ, or a record may be late
_YEAR_10000 = 253_402_300_800.0


@dataclass(frozen=True)
class Claim:
    """What an attempt wrote when it numbered itself. What it did not say, or cannot be, is None."""

    began: float | None = None  # when its process was started, or for a launch's first its launcher
    launcher_began: float | None = None
    started: float | None = None  # when it numbered itself
    host: str = ""
    ranks: int | None = None
    launch: str | None = None
    restarts: int | None = None  # how often the launch had started its ranks again by then

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "Claim":
        """The claim in a record that anybody may have written."""
        host, launch = about.get("host"), about.get("launch")
        return cls(
            _time(about.get("began")),
            _time(about.get("launcher_began")),
            _iso_time(about.get("started")),
            host if isinstance(host, str) else "",
            _count(about.get("world_size")),
            launch if isinstance(launch, str) else None,
            _count(about.get("restarts")),
        )


@dataclass(frozen=True)
class Timed:
    """An attempt's times, in seconds since the epoch by the clock of the run's beginning."""

    began: float
    claimed: float
    events: Sequence[Record]
    last_by_its_clock: float

    @property
    def ended(self) -> float:
        """Its last sign of life."""
        return max([self.claimed, *(float(record["time"]) for record in self.events)])


def on_one_clock(
    claims: Mapping[Attempt, Claim], records: Mapping[Attempt, Sequence[Record]]
) -> tuple[dict[Attempt, Timed], list[str]]:
    """Each attempt's times, as one clock would have told them, and in sentences what that clock cannot know."""
    found: dict[Attempt, Timed] = {}
    doubts: list[str] = []
    before: Attempt | None = None
    ahead = 0.0  # what is to be added to what this attempt's clock says
    begins = [_begin(claims[attempt], records.get(attempt, ())) for attempt in sorted(claims)]
    first = next(filter(None, begins), (0.0, 0.0))[0]
    for attempt, begin in zip(sorted(claims), begins, strict=True):
        events = records.get(attempt, ())
        otherwise = found[before].ended - ahead if before else first
        began, claimed = begin or (otherwise, otherwise)
        if before is not None:
            began, claimed, ahead, doubt = _after(
                found, before, claims, attempt, began + ahead, claimed + ahead, ahead, events
            )
            doubts += [doubt] if doubt else []
        else:
            began, claimed = began + ahead, claimed + ahead
        timed, ahead, jumped = _within(events, claimed, ahead)
        if abs(jumped) > _ALIKE_SECONDS:
            way = "ahead" if jumped > 0 else "back"
            cost = "" if all("uptime_seconds" in record for record in events) else "; some of its time may be missing"
            doubts.append(f"the clock was set {way} by about {duration(abs(jumped))} within attempt {attempt.number}{cost}")
        last = events[-1]["time"] if events else claimed - ahead
        found[attempt] = Timed(began, claimed, timed, float(last))
        before = attempt
    return found, doubts


def _begin(claim: Claim, events: Sequence[Record]) -> tuple[float, float] | None:
    """When an attempt's process began, and when it numbered itself, by its own clock; None where nothing says so."""
    claimed = claim.started
    if claimed is None:
        claimed = events[0]["time"] if events else claim.began
    if claimed is None:
        return None
    return claimed if claim.began is None else min(claim.began, claimed), claimed


def _after(
    found: Mapping[Attempt, Timed],
    before: Attempt,
    claims: Mapping[Attempt, Claim],
    attempt: Attempt,
    began: float,
    claimed: float,
    ahead: float,
    events: Sequence[Record],
) -> tuple[float, float, float, str]:
    """When an attempt began and claimed its number after the one before it, by how much its clock is behind, and a doubt."""
    previous = found[before]
    opening = journal.opening_of(events)
    opened = opening["time"] + ahead if opening else claimed
    pair = f"attempts {before.number} and {attempt.number}"
    if claimed < previous.claimed - _ALIKE_SECONDS or opened < _stands_on(found, opening) - _ALIKE_SECONDS:
        shift = previous.ended - began
        hosts = (claims[before].host, claims[attempt].host)
        what = (
            f"the clock was set back between {pair}" if hosts[0] == hosts[1] else f"the clocks of the hosts of {pair} differ"
        )
        return began + shift, claimed + shift, ahead + shift, f"{what}: down time unknown"
    if claimed >= previous.ended - _ALIKE_SECONDS:  # a launcher may have waited for long before its ranks were the run
        began = min(max(began, previous.ended), max(claimed, previous.ended))
        return began, max(claimed, began), ahead, ""
    over = duration(previous.ended - claimed)
    doubt = (
        f"{pair} overlap by {over}: either two trained at once, or the clock was set back; the time between them is unknown"
    )
    return began, claimed, ahead, doubt


def _stands_on(found: Mapping[Attempt, Timed], opening: Record | None) -> float:
    """When the save began with which an attempt went on."""
    lineage = opening.get("lineage", ()) if opening else ()
    if not lineage or (ancestor := Attempt(lineage[-1][0])) not in found:
        return 0.0
    return max(
        (each["time"] for each in found[ancestor].events if each["event"] == "saving" and each["step"] == lineage[-1][1]),
        default=0.0,
    )


def _within(events: Sequence[Record], claimed: float, ahead: float) -> tuple[list[Record], float, float]:
    """The records with times that nobody has set, how far those are ahead of the clock in the end, and by how much that was
    set in between."""
    timed: list[Record] = []
    now, jumped = claimed, 0.0
    before: float | None = None
    for record in events:
        by_clock, uptime = record["time"] + ahead, _time(record.get("uptime_seconds"))
        passed = uptime - before if uptime is not None and before is not None and uptime >= before else None
        jump = by_clock - now - (passed or 0.0)
        if jump < -_ALIKE_SECONDS or (passed is not None and jump > _ALIKE_SECONDS):
            ahead, by_clock, jumped = ahead - jump, by_clock - jump, jumped + jump
        now, before = max(now, by_clock), uptime
        timed.append({**record, "time": now})
    return timed, ahead, jumped


def _time(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < _YEAR_10000 else None


def _iso_time(value: Any) -> float | None:
    try:
        moment = datetime.fromisoformat(value)
        return _time((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (TypeError, ValueError, OverflowError):
        return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1_000_000 else None
