"""How a worker ended, in a file: torchrun turns every worker's exit code into 1.

``harness launch`` gives its workers a directory; each rank leaves one small record there, and the launcher makes an exit
code of them that Slurm, Kubernetes and SkyPilot can act on.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import errors
from harness.environment import rank
from harness.errors import HarnessError
from harness.secrecy import without_secrets

DIRECTORY_VARIABLE = "HARNESS_OUTCOME_DIRECTORY"
POLL_SECONDS = 0.2  # the launcher looks as often as that

# Starting again would end in the same way: somebody has to act first.
FINAL_EXIT_CODES = frozenset(
    {
        errors.ConfigError.exit_code,
        errors.Corrupt.exit_code,
        errors.NoCheckpoint.exit_code,
        errors.CrashLoop.exit_code,
        errors.NonFinite.exit_code,
        errors.Superseded.exit_code,
    }
)


# Nothing is wrong with the run itself: it may be started again, once the storage answers and all ranks can live.
TRANSIENT_EXIT_CODES = frozenset({errors.StoreError.exit_code, errors.RankFailure.exit_code})


@dataclass(frozen=True)
class Outcome:
    """The end of a rank: its exit code as ``harness.errors`` defines them, and one line for people.

    A ``verdict`` is what the doctor says of a run, by ranks that are all well and end with 0.
    """

    exit_code: int
    message: str = ""
    verdict: bool = False

    @property
    def is_final(self) -> bool:
        """Whether this ends the launch."""
        return self.exit_code in FINAL_EXIT_CODES and not self.verdict


def record(outcome: Outcome) -> None:
    """Leaves a record, where the launcher has asked for one. Never raises: an exit must not fail.

    One that ends the launch is given time to be seen: torchrun would start the rank again, to say the same once more.
    """
    if (path := _own_record()) is None:
        return
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(outcome)))
        partial.replace(path)
    except OSError:
        return
    if outcome.is_final:
        time.sleep(3 * POLL_SECONDS)


def is_wanted() -> bool:
    """Whether a launcher reads the record of this rank."""
    return DIRECTORY_VARIABLE in os.environ


def forget() -> None:
    """Takes the record of this rank's previous start away."""
    if (path := _own_record()) is not None:
        path.unlink(missing_ok=True)


def _own_record() -> Path | None:
    """Where this rank leaves its record; None where no launcher has asked for one."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return None if directory is None else Path(directory, f"rank-{rank()}.json")


def read(directory: str) -> list[Outcome]:
    """The records of this machine's ranks."""
    return [Outcome(**json.loads(path.read_text())) for path in sorted(Path(directory).glob("rank-*.json"))]


def of(error: BaseException) -> Outcome:
    """The outcome that an exception means."""
    if isinstance(error, HarnessError):
        return Outcome(error.exit_code, str(error).partition("\n")[0])
    return Outcome(1, without_secrets(f"{type(error).__name__}: {error}").partition("\n")[0])


def message(code: int, outcomes: Iterable[Outcome]) -> str:
    """What the first rank with an exit code says; empty where none has it."""
    return next((outcome.message for outcome in outcomes if outcome.exit_code == code), "")


def exit_code(launcher: int, outcomes: Iterable[Outcome], *, asked_to_stop: bool = False) -> int:
    """The exit code of a launch, from torchrun's own and the ranks' records.

    What no restart can mend comes first, then a stop (torchrun says 1 even when all workers stopped well; ranks that were
    asked before they had begun leave no record), then what may pass, then torchrun's own word.
    """
    outcomes = list(outcomes)
    codes = [outcome.exit_code for outcome in outcomes]
    final = [outcome.exit_code for outcome in outcomes if outcome.is_final]
    if final:
        return final[0]
    if not launcher and any(outcome.verdict for outcome in outcomes):
        return codes[0]
    if errors.Stopped.exit_code in codes or (asked_to_stop and launcher):
        return errors.Stopped.exit_code
    if not launcher:
        return 0
    found = {outcome.exit_code for outcome in outcomes if not outcome.verdict} - {0}
    return min(found) if found and found <= TRANSIENT_EXIT_CODES else 1
