"""harness keeps PyTorch training alive.

It runs a model under ``torchrun`` (or in one plain process), writes checkpoints that cannot be half-written to any
fsspec filesystem, and after any death goes on from the newest whole one, bit for bit.
"""

from harness.task import Evaluation, Task

__all__ = ["Evaluation", "Task", "__version__"]

__version__ = "0.1.0"
