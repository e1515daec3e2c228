"""``torch.save`` and ``torch.load``, as they are written by hand."""

import os

import torch
from torch import nn
from torch.optim import Optimizer

from contenders.protocol import Contender


class TorchSave(Contender):
    """Into the file's place."""

    def path(self, step: int) -> str:
        return f"{self.url}/{step}.pt"

    def state(self) -> dict[str, dict]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, step: int) -> None:
        torch.save(self.state(), self.path(step))

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        self.put(self.load(step), model, optimizer)

    def load(self, step: int) -> dict[str, dict]:
        return torch.load(self.path(step), map_location="cpu", weights_only=True)

    def put(self, saved: dict[str, dict], model: nn.Module, optimizer: Optimizer) -> None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])


class SafeTorchSave(TorchSave):
    """Under another name, fsynced, renamed, and the directory fsynced."""

    def save(self, step: int) -> None:
        partial = f"{self.path(step)}.partial"
        with open(partial, "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path(step))
        directory = os.open(self.url, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


class MappedTorchLoad(TorchSave):
    """The same file, mapped into memory."""

    def load(self, step: int) -> dict[str, dict]:
        return torch.load(self.path(step), map_location="cpu", weights_only=True, mmap=True)
