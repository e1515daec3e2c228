"""What is in a state, for those who look for what is not."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from harness import torch_private
from harness.checkpoint import dtensors, tree
from harness.data.loader import Loader
from harness.state.optimizers import plain_optimizer
from harness.state.parts import OtherPart, Part


class Contents:
    """The objects that a state has, and those that they have."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts
        self.loaders = [part.live for part in parts.values() if isinstance(part.live, Loader | DataLoader)]
        self.has_scaler = any(isinstance(part.live, torch.amp.GradScaler) for part in parts.values())
        # An object of the program's own may keep a position in the data, too.
        self.may_have_position = bool(self.loaders) or any(type(part) is OtherPart for part in parts.values())

    def objects(self) -> set[int]:
        """The ids of the objects, and of those that they have as attributes."""
        lives = [part.live for part in self.parts.values()]
        held = [each for live in lives for each in (live, *attributes(live).values())]
        held += [item for each in held if isinstance(each, list | tuple) for item in each]
        return {id(each) for each in held}

    def places(self) -> set[int]:
        """The addresses of the tensors."""
        return {dtensors.address_of(tensor) for part in self.parts.values() for tensor in part.tensors()}

    def marks(self) -> dict[str, Any]:
        """By part, what shows that something has changed it, at little cost: plain values, and the versions of tensors.

        Modules, optimizers and loaders are left out, which change in each step.
        """
        found = {}
        for name, part in self.parts.items():
            if not isinstance(part.live, nn.Module | Optimizer | DataLoader | Loader):
                encoded = tree.encode(part.capture(), name)
                versions = {
                    path: (tensor.data_ptr(), torch_private.version(tensor)) for path, tensor in encoded.tensors.items()
                }
                found[name] = (json.dumps(encoded.tree, sort_keys=True), versions)
        return found

    def without_scheduler(self) -> list[str]:
        """The names of those optimizers whose learning rate is a scheduler's that no object of the state is, or has.

        torch's schedulers, and those of others that follow them, note the rate that they begin with in the optimizer.
        """
        others = [part.live for part in self.parts.values() if not isinstance(part.live, nn.Module | Optimizer)]
        held = [each for other in others for each in (other, *attributes(other).values())]
        scheduled = {id(plain_optimizer(attributes(each).get("optimizer"))) for each in held}
        return [
            name
            for name, part in self.parts.items()
            if isinstance(part.live, Optimizer)
            if id(part.live) not in scheduled and any("initial_lr" in group for group in part.live.param_groups)
        ]


def attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that has a dictionary of them."""
    return getattr(value, "__dict__", {})
