"""What the launcher says to a process through its environment. No torch: it is asked before torch is imported."""

import math
import os
import time
from contextlib import suppress
from pathlib import Path

_was_asked = False  # when this process began


def is_under_torchrun() -> bool:
    """Whether torchrun started this process, and starts it again when it fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's rank, before the ranks have met and after they have lost each other; 0 for one plain process."""
    return int(os.environ.get("RANK", "0"))


def is_first_of_node() -> bool:
    """Whether this process speaks for its machine before the ranks have met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launch_id() -> str | None:
    """What the restarts of one launch have in common; None where the launcher gave it no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's word for "not given"
    return None if name == "none" else name


def shutdown_grace_seconds() -> float:
    """How long torchrun lets its workers live after it was asked to end; without torchrun, no limit is known."""
    if not is_under_torchrun():
        return math.inf
    word = _torchrun_option("--shutdown-timeout", "PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    return float(word) if word.isdecimal() else 30.0


def max_restarts() -> int | None:
    """How often torchrun starts the ranks anew; None where nobody has said."""
    word = os.environ.get("TORCHELASTIC_MAX_RESTARTS") or os.environ.get("PET_MAX_RESTARTS") or ""
    return int(word) if word.isdecimal() else None


def lends_its_store() -> bool:
    """Whether the ranks meet in torchrun's own store, which outlives them. See ``harness.world._fresh_store``."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """How often torchrun has started this process's rank anew in this launch, as this machine counts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
        return int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    words = [os.environ.get(name, "") for name in ("PET_NNODES", "SLURM_JOB_NUM_NODES", "SKYPILOT_NUM_NODES")]
    counts = [int(most) for word in words if (most := word.rpartition(":")[2]).isdecimal()]
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return max(*counts, processes // here, 1)


def least_nodes() -> int:
    """How many machines torchrun was told to wait for at least."""
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
