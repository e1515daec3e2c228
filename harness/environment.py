"""What the launcher says to a process through its environment. No torch: it is asked before torch is imported."""

import math
import os
from contextlib import suppress
from pathlib import Path


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
    """How long torchrun lets its workers live after it was asked to end; without torchrun, no limit is known.

    torchrun's options are on the command line of the parent process, or in the environment that it was started with.
    """
    if not is_under_torchrun():
        return math.inf
    words = [os.environ.get("PET_SHUTDOWN_TIMEOUT") or os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or "30"]
    with suppress(OSError):  # not Linux, or the parent is gone
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        for word, following in zip(command, [*command[1:], ""], strict=True):
            name, equals, value = word.replace("_", "-").partition("=")
            if name == "--shutdown-timeout":
                words.append(value if equals else following)
    return float(words[-1]) if words[-1].isdecimal() else 30.0
