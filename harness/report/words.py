"""A report for the terminal, and the words that the page uses, too."""

from collections.abc import Iterable, Sequence

from harness.report.numbers import KINDS, Death, Life, RunReport
from harness.report.units import amount, duration
from harness.runtime.escapes import for_terminal
from harness.telemetry.journal import Record

MEANINGS = {
    "training": "steps that count",
    "saving": "training waits for a save",
    "loading": "from the attempt's claim to its first step: reading the checkpoint",
    "starting": "from the process's start to the claim: imports, the ranks meet",
    "lost": "steps that were trained again, or not at all",
    "down": "no known process",
}
MOST_LINES = 20  # of a list, on the terminal
_MOST_CHARACTERS = 400  # of a line


def short(report: RunReport) -> str:
    """The report in half a page, each line as a terminal may show it."""
    lines = [headline(report), *(f"doubt      {doubt}" for doubt in report.doubts), "", *_times(report), ""]
    lines += [*_save_lines(report), *_notes(report), "", *_deaths(report.known_deaths), *_attempts(report.lives)]
    return "\n".join(for_terminal(line, _MOST_CHARACTERS) for line in lines)


def headline(report: RunReport) -> str:
    """What became of the run, in a line."""
    return f"{report.url}: {summary(report)}"


def summary(report: RunReport) -> str:
    """What became of the run, without its name."""
    last = report.lives[-1]
    ending = last.ending if last.ending in ("done", "stopped", "running") else f"not running ({last.ending})"
    before = f" ({report.unclaimed_deaths} of them before the ranks had an attempt)" if report.unclaimed_deaths else ""
    deaths = _count(report.deaths, "death")
    return f"step {report.step}, {ending}; {_count(len(report.lives), 'attempt')}, {deaths}{before}"


def lost(steps: int, *, is_exact: bool) -> str:
    """How many steps were lost: what an attempt that was killed did last, nobody knows."""
    return str(steps) if is_exact else f"at least {steps}"


def _times(report: RunReport) -> Iterable[str]:
    found = report.as_json()
    again = f"{lost(report.lost_steps, is_exact=report.is_lost_exact)} step{'s' * (report.lost_steps != 1)}"
    yield f"goodput    {report.goodput:7.1%}  of {duration(report.wall_seconds)}; {again} lost"
    for kind in KINDS:
        share = report.seconds(kind) / max(report.wall_seconds, 1e-9)
        yield f"  {kind:<9}{share:7.1%}  {duration(report.seconds(kind)):>10}  {MEANINGS[kind]}"
    if (mean := found["mean_time_to_recovery_seconds"]) is not None:
        count = len(report.recoveries_seconds)
        yield f"recovery   {duration(mean):>8}  from a death until training continued, mean of {count}"


def _save_lines(report: RunReport) -> Iterable[str]:
    first, *more = saves(report)
    yield f"saves      {first}"
    yield from (f"           {line}" for line in more)


def saves(report: RunReport) -> list[str]:
    """What the saves took, in two lines; one where there were none."""
    found = report.as_json()
    if not report.saves:
        return ["none"]
    longest = max(save.blocked_seconds for save in report.saves)
    size, speed = report.saves[-1].bytes, found["save_gigabytes_per_second_median"]
    waited, lasted = duration(found["save_stall_seconds_median"]), duration(found["save_seconds_median"])
    return [
        f"{found['saves']} of {amount(size)}: training waited {waited} (median; at most {duration(longest)})",
        f"durable after {lasted}, {speed:.2g} GB/s (medians), {_count(found['save_retries'], 'retry', 'retries')}",
    ]


def _notes(report: RunReport) -> Iterable[str]:
    for event, records in report.notes.items():
        lines = [f"{event:<10} {note(record)}" for record in records]
        yield from lines[:MOST_LINES]
        if len(lines) > MOST_LINES:
            yield f"{event:<10} and {len(lines) - MOST_LINES} more"


def note(record: Record) -> str:
    """An event that is listed, in a line."""
    match record["event"]:
        case "save_failed":
            return f"step {record['step']}: {record['error']}"
        case "skip":
            return f"step {record['step']}: the previous save was still being written"
        case "fallback":
            return f"{record['directory']}: {record['why']}"
        case "nonfinite":
            return f"step {record['step']}: {record['policy']}, samples {str(record['samples'])[:60]}"
        case "straggler":
            times = f"{record['seconds']:.3g} s of work in a step, others {record['median_seconds']:.3g} s"
            return f"step {record['step']}: rank {record['rank']} on {record['host']}: {times}"
    raise KeyError(f"numbers.NOTES lists {record['event']}, for which there are no words here")


def _deaths(deaths: Sequence[Death]) -> Iterable[str]:
    if len(deaths) > MOST_LINES:
        yield f"the last {MOST_LINES} of {len(deaths)} deaths"
    for death in deaths[-MOST_LINES:]:
        loss = f"{lost(death.life.lost_steps, is_exact=death.life.is_complete)} lost"
        yield f"death   {death.life.number:<3}{_last_step(death.life)}, {loss}; {continued(death)}"


def _last_step(life: Life) -> str:
    return "no step" if life.last_step is None else f"step {life.last_step}"


def continued(death: Death) -> str:
    """From what training went on after a death, and how soon."""
    if death.seconds is None:
        return "training has not continued"
    kept = death.kept
    source = "the last checkpoint" if kept is None else f"what rank {kept['rank']} on {kept['host']} kept"
    return f"training continued from {source} after {duration(death.seconds)}"


def _attempts(lives: Sequence[Life]) -> Iterable[str]:
    if len(lives) > MOST_LINES:
        yield f"the last {MOST_LINES} of {len(lives)} attempts"
    for life in lives[-MOST_LINES:]:
        yield f"attempt {life.number:<3}{steps(life):<41}{duration(life.ended - life.began):>10}  {life.ending}"


def steps(life: Life) -> str:
    """Which steps an attempt trained."""
    if life.from_step is None:
        return "no step" if life.is_complete else "no known step"
    abandoned = "" if life.is_in_line else ", abandoned"
    missing = f", {lost(life.lost_steps, is_exact=life.is_complete)} lost" if life.lost_steps or not life.is_complete else ""
    return f"steps {life.from_step} to {life.last_step}{missing}{abandoned}"


def _count(number: int, what: str, several: str = "") -> str:
    return f"{number} {what if number == 1 else several or what + 's'}"
