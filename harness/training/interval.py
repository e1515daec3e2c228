"""The interval that loses least time, from what saves cost this training and from the deaths that this run has had.

Saves cost their part of the time, and a death costs half an interval on average. Together that is least at the square root
of twice the cost of a save times the time between deaths (J. W. Young, Communications of the ACM 17(9), 1974). The minimum
is flat, so rough numbers are enough.
"""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.checkpoint.saver import Saved
from harness.errors import StoreError
from harness.telemetry import journal
from harness.training.resume import Resumed

FIRST_SECONDS = 60.0  # until a save has shown what it costs
LONGEST_SECONDS = 1800.0
MOST_OF_TIME = 0.01  # that saves may cost
PRIOR_SECONDS = 24 * 3600.0  # without a death, that each run is taken to have behind it
_STEPS = 64  # whose median says what a step takes without a save
_SAVES = 5  # whose median says what a save costs: single ones differ by a factor
_LEAST_CHANGE = 0.5  # that is logged
_PLANNED = ("stop", "done")


@dataclass(frozen=True)
class Deaths:
    """Those of a run that lost steps, so far, and for how long it has trained."""

    count: int = 0
    seconds: float = 0.0

    @property
    def between_seconds(self) -> float:
        """The mean time between two of them."""
        return (self.seconds + PRIOR_SECONDS) / (self.count + 1)

    def as_json(self) -> dict[str, float]:
        return {"count": self.count, "seconds": self.seconds}


def best_seconds(cost_seconds: float, save_seconds: float, between_seconds: float) -> float:
    """The interval for saves that cost the training ``cost_seconds``, and are durable after ``save_seconds``."""
    young = math.sqrt(2 * cost_seconds * between_seconds)
    return max(min(young, LONGEST_SECONDS), cost_seconds / MOST_OF_TIME, save_seconds)


def deaths_before(catalog: Catalog, attempt: Attempt, resumed: Resumed) -> Deaths:
    """The deaths of the attempts before one.

    A checkpoint has those before its own attempt. The last attempt has died, too, unless its events say that it was stopped,
    or that it came to its end. It has lost nothing where a survivor has kept its last step.
    """
    told = resumed.meta.get("deaths")
    before = Deaths(int(told["count"]), float(told["seconds"])) if isinstance(told, dict) else Deaths()
    attempts = [each for each in catalog.attempts.all() if each < attempt]
    if resumed.kept or not attempts:
        return before
    try:
        word = journal.last_word(journal.Told(catalog.store).backwards(attempts[-1]))
    except StoreError:  # what was told is not worth a start
        word = ""
    return before if word in _PLANNED else Deaths(before.count + 1, before.seconds)


class Interval:
    """``checkpoint.every_seconds: auto``. Rank 0 asks it; the others learn of a save when it is agreed on."""

    def __init__(self, deaths: Deaths) -> None:
        self._before = deaths
        self._began = self._last = time.monotonic()
        self._quiet: deque[float] = deque(maxlen=_STEPS)  # what steps took without a save beside them
        self._beside_steps, self._beside_seconds = 0, 0.0  # those since the last save began, while it was under way
        self._costs: deque[float] = deque(maxlen=_SAVES)
        self.seconds = FIRST_SECONDS
        self._logged_seconds = FIRST_SECONDS

    @property
    def deaths(self) -> Deaths:
        """Up to now."""
        return Deaths(self._before.count, self._before.seconds + time.monotonic() - self._began)

    def step(self, *, is_saving: bool) -> None:
        """A step has ended."""
        now = time.monotonic()
        if is_saving:
            self._beside_steps, self._beside_seconds = self._beside_steps + 1, self._beside_seconds + now - self._last
        else:
            self._quiet.append(now - self._last)
        self._last = now

    def saved(self, saved: Saved) -> dict[str, float] | None:
        """A save has been committed. Returns the new interval and what it follows from, if it differs from what was
        returned last."""
        slower = self._beside_seconds - self._beside_steps * statistics.median(self._quiet) if self._quiet else 0.0
        self._beside_steps, self._beside_seconds = 0, 0.0
        # The steps beside a save include what it blocks, as long as the training goes on meanwhile.
        self._costs.append(max(saved.blocked_seconds, slower))
        cost_seconds = statistics.median(self._costs)
        between_seconds = self.deaths.between_seconds
        self.seconds = best_seconds(cost_seconds, saved.seconds, between_seconds)
        if abs(self.seconds - self._logged_seconds) <= _LEAST_CHANGE * self._logged_seconds:
            return None
        self._logged_seconds = self.seconds
        return {"seconds": self.seconds, "cost_seconds": cost_seconds, "between_deaths_seconds": between_seconds}
