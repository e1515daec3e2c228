"""What a contender does. Each is made in a fresh process, with a URL of its own."""

from torch import nn
from torch.optim import Optimizer


class Contender:
    """Saves and restores a model and its optimizer under a URL.

    The loop is the same for all: ``save(step)`` after a step, ``fence()`` before each further step of the optimizer. A
    contender whose ``save`` returns when all is written has nothing to do in the other two.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def join(self) -> None:
        """Joins the other ranks under torchrun."""
        import torch.distributed as dist

        dist.init_process_group("gloo")

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """What a program does once, before its first save."""
        self.model = model
        self.optimizer = optimizer

    def save(self, step: int) -> None:
        """Begins to save, and returns when the training may go on."""
        raise NotImplementedError

    def fence(self) -> None:
        """Returns when the optimizer may change the weights."""

    def wait(self) -> None:
        """Returns when the save has ended. Raises what went wrong. Called from another thread than the others."""

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Puts what was saved into a live model and a fresh optimizer."""
        raise NotImplementedError

    def close(self) -> None:
        """Leaves no process or thread behind."""
