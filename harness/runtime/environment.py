"""What the launcher says to a process through its environment. No torch: it is asked before torch is imported.

A variable that is empty counts as not given. ``ranks`` judges what is there; all else takes what it can, and never raises.
"""

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError

_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How many processes other launchers say that they have started, in the environment of each of them.
_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
_was_asked = False  # when this process began


@dataclass(frozen=True)
class Ranks:
    """A process's place among those that were started together, and where they meet."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def ranks() -> Ranks | None:
    """What the launcher says of this process; None for one plain process.

    Raises ``ConfigError`` where something is missing or cannot be, and where several processes were started that do not know
    of each other: each would train alone.
    """
    given = {name: value for name in (*_RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if (value := _given(name))}
    numbers = {name: _natural(name, value) for name, value in given.items() if name != "MASTER_ADDR"}
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    local_rank, local_size = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", 1)
    missing = [name for name in _RANKS if name not in given]
    is_plain = size == 1 and rank == 0 and ("WORLD_SIZE" in given or "RANK" not in given) and bool(missing)
    if "LOCAL_RANK" in given and "LOCAL_WORLD_SIZE" not in given and (local_rank or not is_plain):
        raise ConfigError(
            f"environment: expected LOCAL_WORLD_SIZE (the number of ranks on this machine) beside LOCAL_RANK={local_rank}, "
            "found none; start the ranks with harness launch or torchrun, which set both"
        )
    if is_plain:
        if "WORLD_SIZE" not in given:  # where it is 1, each process is meant to train alone
            _refuse_strangers()
        return None
    if missing:
        there = [name for name in _RANKS if name in given]
        raise ConfigError(
            f"environment: expected {', '.join(missing)} beside {', '.join(there)}, found none; start the ranks with "
            f"harness launch or torchrun, which set all of them, or unset {' '.join(there)} to train in one plain process"
        )
    for name, number, of, count in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
    ):
        if not 0 <= number < count:
            raise ConfigError(
                f"environment: expected {name} to be from 0 to {of} - 1, found {name}={given.get(name)}, {of}={count}"
            )
    return Ranks(rank, size, local_rank, local_size, given["MASTER_ADDR"], numbers["MASTER_PORT"])


def _refuse_strangers() -> None:
    """Raises ``ConfigError`` where a launcher that is not torchrun has started several processes of this kind."""
    if found := strangers():
        raise ConfigError(
            f"environment: {found}, but none has a rank, so each would train alone; start harness launch "
            "(torchrun) once on each machine, as launch/slurm.sbatch does, or set WORLD_SIZE=1 if each is to "
            "train a run of its own"
        )


def strangers() -> str:
    """What another launcher than torchrun has started beside this process; empty where it is nothing."""
    if _given("SLURM_PTY_PORT"):  # a shell that srun has opened for a person, whatever it has reserved
        return ""
    counts = {name: _number(name, 1) for name in _OTHER_LAUNCHERS}
    return next(
        (f"{_OTHER_LAUNCHERS[name]} has started {n} processes ({name}={n})" for name, n in counts.items() if n > 1), ""
    )


def _given(name: str) -> str:
    """The value of a variable; empty where it is not given."""
    return os.environ.get(name, "").strip()


def _natural(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(f"environment: {name}: expected a number from 0 on, found {value!r}")
    return int(value)


def _number(name: str, default: int) -> int:
    """A number from a variable, where there is one."""
    value = _given(name)
    return int(value) if value.isascii() and value.isdecimal() else default


def is_under_torchrun() -> bool:
    """Whether torchrun started this process, and starts it again when it fails."""
    return bool(_given("TORCHELASTIC_RUN_ID"))


def rank() -> int:
    """This process's rank, before the ranks have met and after they have lost each other; 0 for one plain process."""
    return _number("RANK", 0)


def size() -> int:
    """How many ranks there are to be, before they have met."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of the ranks of this machine this process is."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int:
    """How many ranks this machine has."""
    return _number("LOCAL_WORLD_SIZE", 1)


def is_first_of_node() -> bool:
    """Whether this process speaks for its machine before the ranks have met."""
    return local_rank() == 0


def launch_id() -> str | None:
    """What the restarts of one launch have in common; None where the launcher gave it no name of its own."""
    name = _given("TORCHELASTIC_RUN_ID")
    return None if name in ("", "none") else name  # "none" is torchrun's word for "not given"


def shutdown_grace_seconds() -> float:
    """How long torchrun lets its workers live after it was asked to end; without torchrun, no limit is known."""
    if not is_under_torchrun():
        return math.inf
    word = _torchrun_option("--shutdown-timeout", "PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    return float(word) if word.isdecimal() else 30.0


def max_restarts() -> int | None:
    """How often torchrun restarts the ranks; None where it is not known."""
    word = os.environ.get("TORCHELASTIC_MAX_RESTARTS") or os.environ.get("PET_MAX_RESTARTS") or ""
    return int(word) if word.isdecimal() else None


def lends_its_store() -> bool:
    """Whether the ranks meet in torchrun's own store, which outlives them. See ``_fresh_store``."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """How often torchrun has restarted this process's rank in this launch, as this machine counts."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def began() -> float:
    """When this process was started, or for the first of a launch its torchrun: seconds since the epoch. Now, where the
    system does not say, and when it is asked again: what begins then is not the first that the process does."""
    global _was_asked  # noqa: PLW0603  # a process begins once
    if _was_asked:
        return time.time()
    _was_asked = True
    return (launcher_began() if restarts() == 0 else None) or _process_began(os.getpid()) or time.time()


def launcher_began() -> float | None:
    """When the torchrun that started this process was itself started; None where there is none, or nobody knows."""
    return _process_began(os.getppid()) if is_under_torchrun() else None


def _process_began(pid: int) -> float | None:
    """When a process was started, in seconds since the epoch; None where the system does not say."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):  # not Linux
        return None


def nodes() -> int:
    """How many machines the run has, as far as the launcher says; 1 where it says nothing."""
    if is_under_torchrun():
        return _number("GROUP_WORLD_SIZE", 1)
    words = [os.environ.get(name, "") for name in ("PET_NNODES", "SLURM_JOB_NUM_NODES", "SKYPILOT_NUM_NODES")]
    counts = [int(most) for word in words if (most := word.rpartition(":")[2]).isdecimal()]
    return max(*counts, size() // max(local_size(), 1), 1)


def least_nodes() -> int:
    """The least number of machines that torchrun waits for."""
    word = _torchrun_option("--nnodes", "PET_NNODES").partition(":")[0]
    return int(word) if is_under_torchrun() and word.isdecimal() else 1


def _torchrun_option(option: str, *variables: str) -> str:
    """What torchrun was started with: an option of the parent process's command line, or else a variable of the
    environment; empty where there is neither."""
    words = [next(filter(None, map(os.environ.get, variables)), "")]
    with suppress(OSError):  # not Linux, or the parent is gone
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        for word, following in zip(command, [*command[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if name.replace("_", "-") == option:
                words.append(value if equals else following)
    return words[-1]
