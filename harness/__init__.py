"""harness keeps PyTorch training alive.

It runs a model under ``torchrun`` or in one plain process. It writes checkpoints that are whole or absent to any fsspec
filesystem. After any death it resumes from the newest whole checkpoint, bit for bit.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # see ``__getattr__``
    from harness.checkpoint.checkpointer import Checkpointer, latest, load, save
    from harness.data.loader import Loader
    from harness.data.schedule import Schedule
    from harness.data.seeding import random_state, restore_random_state
    from harness.distributed.world import join_world
    from harness.errors import HarnessError
    from harness.runtime.signals import StopRequest
    from harness.task import Evaluation, Task
    from harness.training.run import Run

__version__ = "0.2.0"

__all__ = [
    "Checkpointer",
    "Evaluation",
    "HarnessError",
    "Loader",
    "Run",
    "Schedule",
    "StopRequest",
    "Task",
    "join_world",
    "latest",
    "load",
    "random_state",
    "restore_random_state",
    "save",
]

_HOMES = {
    "Checkpointer": "checkpoint.checkpointer",
    "Evaluation": "task",
    "HarnessError": "errors",
    "Loader": "data.loader",
    "Run": "training.run",
    "Schedule": "data.schedule",
    "StopRequest": "runtime.signals",
    "Task": "task",
    "join_world": "distributed.world",
    "latest": "checkpoint.checkpointer",
    "load": "checkpoint.checkpointer",
    "random_state": "data.seeding",
    "restore_random_state": "data.seeding",
    "save": "checkpoint.checkpointer",
}


def __dir__() -> list[str]:
    """What is there, also before it is imported."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the verbs that only read a URL must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(f"harness.{_HOMES[name]}"), name)
