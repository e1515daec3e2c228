"""What a launcher and its ranks let each other know, in a directory of small files.

``harness launch`` gives its ranks a directory. Each leaves a record there of how it ended, since torchrun turns every exit
code into 1; the launcher makes an exit code of them that Slurm, Kubernetes and SkyPilot can act on. torchrun also has one
signal for two things, a stop and the death of another rank, so the launcher and the agent say there which one it is. A rank
notes from which step it continues, since restarts that lead further are not counted. It also notes its step and the newest
checkpoint: a killed rank can report neither. And what torchrun prints about itself is kept there, out of sight.
"""

import json
import mmap
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import errors
from harness.errors import HarnessError
from harness.runtime.environment import is_first_of_node, rank
from harness.secrecy import without_secrets

DIRECTORY_VARIABLE = "HARNESS_OUTCOME_DIRECTORY"
POLL_SECONDS = 0.2  # the launcher looks as often as that
EVERY_RANK = "all"
TORCHRUN_LOG = "torchrun.log"  # in the directory, where what torchrun prints is folded away
_STEP = struct.Struct("<q")
_USAGE = 2  # torchrun's exit code where it does not understand its options; a failure of the ranks is 1

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


# --- a rank's side ---------------------------------------------------------------------------------------------------

_directory: Path | None = None  # that of the launcher which has started this process as a rank
_owner = 0  # the process that it was given to: a forked child is not the rank
_steps: dict[str, mmap.mmap] = {}  # the last step boundary of this rank, where the launcher can read it


def claim() -> None:
    """This process is a rank: it takes the launcher's directory over, and the record of its previous start away.

    What it starts from now on does not inherit the directory, and cannot speak for the rank.
    """
    global _directory, _owner  # a process is one rank
    if (name := os.environ.pop(DIRECTORY_VARIABLE, None)) is not None:
        _directory, _owner = Path(name), os.getpid()
        _in_own(f"ended-{_owner}").unlink(missing_ok=True)  # of an earlier process with this id
        _in_own(f"step-{rank()}").unlink(missing_ok=True)
        _steps.clear()
    forget()


def forget() -> None:
    """Takes this rank's record away: it was no end."""
    if is_wanted():
        _own_record().unlink(missing_ok=True)


def record_outcome(outcome: Outcome) -> None:
    """Leaves a record, where the launcher has asked for one. Never raises: an exit must not fail.

    One that ends the launch is given time to be seen: torchrun would start the rank again, to say the same once more.
    """
    if not is_wanted():
        return
    if _write(_own_record(), json.dumps(asdict(outcome))) and outcome.is_final:
        time.sleep(3 * POLL_SECONDS)


def is_wanted() -> bool:
    """Whether a launcher reads the record of this process."""
    return _directory is not None and _owner == os.getpid()


def stop_was_asked() -> bool:
    """Whether the launcher was asked to stop: a signal is its word."""
    return is_wanted() and _in_own("stop").exists()


def stop_reason() -> str:
    """The signal that the launcher got, which passes SIGTERM on for each; empty where it has got none."""
    return _in_own("stop").read_text() if stop_was_asked() else ""


def is_ended_for_another() -> bool:
    """Whether torchrun ends this rank because another one has failed, here or on another machine."""
    return is_wanted() and (_in_own(f"ended-{os.getpid()}").exists() or _in_own(f"ended-{EVERY_RANK}").exists())


def resumed(step: int) -> None:
    """Notes from which step this start continues."""
    if is_wanted() and is_first_of_node():
        _write(_in_own("resumed"), str(step))
    saved(step)


def saved(step: int) -> None:
    """Notes the step of the newest checkpoint, which rank 0 knows."""
    if is_wanted() and rank() == 0:
        _write(_in_own("saved"), str(step))


def kept(path: str) -> None:
    """Notes where a rank of this machine has kept a state."""
    if is_wanted():
        _write(_in_own("kept"), path)


def reached(step: int) -> None:
    """Notes a step boundary. It costs no system call but the first time, and outlives this process."""
    if not is_wanted():
        return
    name = f"step-{rank()}"
    if name not in _steps:
        try:
            with _in_own(name).open("w+b") as file:
                file.truncate(_STEP.size)
                _steps[name] = mmap.mmap(file.fileno(), _STEP.size)
        except OSError:  # a death is then reported without its step
            return
    _STEP.pack_into(_steps[name], 0, step)


def _own_record() -> Path:
    return _in_own(f"rank-{rank()}.json")


def _in_own(name: str) -> Path:
    assert _directory is not None
    return _directory / name


def _write(path: Path, text: str) -> bool:
    """Whether that was possible."""
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        return False
    return True


# --- the launcher's side ---------------------------------------------------------------------------------------------


def say_stop(directory: str, why: str) -> None:
    """Notes a stop request, before the signal is passed on."""
    _write(Path(directory, "stop"), why)


def say_ended(directory: str, whom: Iterable[int | str]) -> None:
    """Says which processes (or ``EVERY_RANK``) are about to be ended because of another rank, before they are signalled."""
    for each in whom:
        _write(Path(directory, f"ended-{each}"), "")


def resumed_step(directory: str) -> int | None:
    """From which step the newest start of this machine's ranks continued; None where none has come so far."""
    return _number_in(Path(directory, "resumed"))


def saved_step(directory: str) -> int | None:
    """The step of the newest checkpoint that rank 0 has noted; 0 before the first one. None where rank 0 is elsewhere."""
    return _number_in(Path(directory, "saved"))


def kept_path(directory: str) -> str:
    """Where a rank of this machine has kept a state; empty where none has."""
    try:
        return Path(directory, "kept").read_text()
    except OSError:
        return ""


def reached_step(directory: str, rank: int) -> int | None:
    """The last step boundary of a rank; None before its first one."""
    try:
        return int(_STEP.unpack(Path(directory, f"step-{rank}").read_bytes())[0])
    except (OSError, struct.error):
        return None


def say_death(directory: str, what: str) -> None:
    """Notes how the ranks failed, for the last line of the launch."""
    _write(Path(directory, "death"), what)


def death(directory: str) -> str:
    """How the ranks failed most recently; empty where they have not."""
    try:
        return Path(directory, "death").read_text()
    except OSError:
        return ""


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def record_of(directory: str, rank: int) -> Outcome | None:
    """The record that a rank has left."""
    return _read_record(Path(directory, f"rank-{rank}.json"))


def read_outcomes(directory: str) -> list[Outcome]:
    """The records of this machine's ranks."""
    found = map(_read_record, sorted(Path(directory).glob("rank-*.json")))
    return [record for record in found if record is not None]


def _read_record(path: Path) -> Outcome | None:
    """None where there is no record, or no more: a rank that starts again takes its own away."""
    try:
        return Outcome(**json.loads(path.read_text()))
    except OSError:
        return None


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
    if launcher == _USAGE and not codes and not asked_to_stop:
        return errors.ConfigError.exit_code
    if errors.Stopped.exit_code in codes or (asked_to_stop and launcher):
        return errors.Stopped.exit_code
    if not launcher:
        return 0
    found = {outcome.exit_code for outcome in outcomes if not outcome.verdict} - {0}
    return min(found) if found and found <= TRANSIENT_EXIT_CODES else 1
