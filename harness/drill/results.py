"""What has become of the trials of a drill, and what a death costs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from harness.drill.record import Line, Record
from harness.drill.trials import Trial

Curve = Sequence[tuple[int, float]]

SURVIVES_INEXACTLY = 79
"""The exit code where the job comes to its end after each death, and is not the one that was never killed."""


@dataclass(frozen=True)
class Death:
    """A fault that has ended ranks: the last step before it, the step from which they went on, and how long that took."""

    step: int
    resumed_from: int
    seconds_to_next_step: float | None
    was_asked: bool = False
    """Whether the ranks were asked to stop, and have saved their last step."""


def deaths(run: Record) -> Iterator[Death]:
    """The deaths of a run, in order."""
    ends, began = run.deadly, run.all_at("begun")
    for start in sorted({line["start"] for line in ends}):
        first = next(line for line in ends if line["start"] == start)
        time, step = first["time"], first["step"]
        after = next((line for line in began if line["time"] > time), None)
        following = next((line for line in run.of_rank(0) if line["time"] > time and line["start"] > start), None)
        if after is not None:
            seconds = following["time"] - time if following else None
            was_asked = first["what"] == "stop"
            yield Death(after["step"] if was_asked else step, after["step"], seconds, was_asked)


@dataclass(frozen=True)
class Result:
    """What has become of one trial."""

    trial: Trial
    outcome: Literal["exact", "different", "failed", "not tried"]
    deaths: Sequence[Death] = ()
    first_difference: str = ""
    cause: str = ""
    why: str = ""
    """Why it failed, or was not tried."""

    @property
    def is_well(self) -> bool:
        """Whether this speaks for the job; the control must show a difference."""
        return (
            self.outcome in ("different", "not tried") if self.trial.is_control else self.outcome in ("exact", "not tried")
        )


@dataclass(frozen=True)
class Costs:
    """What saves and deaths cost this job, as far as a drill has seen it."""

    step_seconds: float
    save_seconds: float
    """From its beginning until a checkpoint is durable."""
    blocked_seconds: float
    """How long the training waits for a save."""
    recovery_seconds: float | None
    """From a death to the next step."""
    grace_seconds: float

    @classmethod
    def of(cls, reference: Record, results: Sequence[Result]) -> "Costs":
        steps = [line["time"] for line in reference.of_rank(0)]
        saves = [line for line in reference.events if line["event"] == "save"]
        waits = [death.seconds_to_next_step for each in results for death in each.deaths]
        known = [seconds for seconds in waits if seconds is not None]
        return cls(
            step_seconds=(steps[-1] - steps[0]) / max(len(steps) - 1, 1) if steps else 0.0,
            save_seconds=_mean(saves, "seconds"),
            blocked_seconds=_mean(saves, "blocked_seconds"),
            recovery_seconds=fmean(known) if known else None,
            grace_seconds=reference.all_at("begun")[0]["grace_seconds"],
        )

    def best_interval_seconds(self, between_deaths_seconds: float) -> float:
        """The interval that loses least time (J. W. Young, Communications of the ACM 17(9), 1974), and no shorter one than a
        save takes."""
        return max(math.sqrt(2 * max(self.blocked_seconds, 1e-3) * between_deaths_seconds), self.save_seconds)

    def share_lost(self, interval_seconds: float, between_deaths_seconds: float) -> float:
        """The part of the time that saves, repeated steps and recoveries take at an interval."""
        per_death = interval_seconds / 2 + (self.recovery_seconds or 0.0)
        return max(self.blocked_seconds, 0.0) / interval_seconds + per_death / between_deaths_seconds


def _mean(lines: Sequence[Line], key: str) -> float:
    return fmean(line[key] for line in lines) if lines else 0.0


@dataclass(frozen=True)
class Findings:
    """A whole drill."""

    command: str
    steps: int
    ranks: int
    irreproducible: str
    """Where two runs without any death differ, and the usual suspects; empty where they do not."""
    results: Sequence[Result]
    costs: Costs
    metric: str = ""
    """What the curves show; empty where the job tells of none."""
    curve: Curve = ()
    """Of the run without a death: step and value."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Of the others, by what was done to them."""

    @property
    def survives(self) -> bool:
        return all(each.outcome != "failed" for each in self.results)

    @property
    def is_exact(self) -> bool:
        return all(each.is_well for each in self.results if not each.trial.is_control)

    @property
    def could_tell(self) -> bool:
        """Whether a resume that leaves something out has shown."""
        return all(each.is_well for each in self.results if each.trial.is_control)

    @property
    def exit_code(self) -> int:
        if not self.survives:
            return 1
        return 0 if self.is_exact and self.could_tell else SURVIVES_INEXACTLY

    def as_json(self) -> dict[str, Any]:
        verdict = {"survives": self.survives, "exact": self.is_exact, "could_tell": self.could_tell}
        return {**verdict, **asdict(self)}
