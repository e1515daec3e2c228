"""What the launcher says to a process through its environment. No torch: it is asked before torch is imported."""

import os


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
