"""What is trained while checkpoints are taken: a plain module and AdamW, of a chosen size.

A state is named by its size (``2GB``: weights and moments in a few large tensors, as in a GPT) or by the number of its
tensors (``20000-tensors``: 16 numbers in each). How long a step lasts is chosen by the size of its batch.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import nn

UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}
BYTES_PER_PARAMETER = 12  # a weight and two moments, each of fp32
TENSORS_PER_PARAMETER = 4  # the same, and the number of the step
TINY_NUMBERS = 16
MEASURED_BYTES = 1_500_000_000  # a process saves about so much: one small save is over before the noise of a step is,
MOST_TIMES = 5  # but a very small one not for ever


@dataclass(frozen=True)
class Shape:
    """The width and the number of the layers, or the number of tiny parameters."""

    layers: int = 0
    width: int = 0
    tiny: int = 0


def shape_of(state: str) -> Shape:
    """What a name stands for. Raises ``ValueError`` for one that stands for nothing."""
    if state.endswith("-tensors"):
        return Shape(tiny=int(state.removesuffix("-tensors")) // TENSORS_PER_PARAMETER)
    if state[-2:] not in UNITS:
        raise ValueError(f"a state is called 0.5GB, 10MB or 20000-tensors, not {state}")
    parameters = float(state[:-2]) * UNITS[state[-2:]] / BYTES_PER_PARAMETER
    width = next((width for width in (4096, 2048, 1024, 512, 256) if parameters / width**2 > 6), 128)
    return Shape(layers=max(1, round(parameters / width**2)), width=width)


def size_bytes(state: str) -> int:
    """Of the weights and the moments, about."""
    shape = shape_of(state)
    return BYTES_PER_PARAMETER * (shape.layers * shape.width**2 + shape.tiny * TINY_NUMBERS)


def times(state: str) -> int:
    """How often a process measures the same, to tell the median."""
    return min(MOST_TIMES, max(1, round(MEASURED_BYTES / size_bytes(state)))) if shape_of(state).layers else 1


class Tiny(nn.Module):
    """A layer whose rows are parameters of their own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(TINY_NUMBERS) for _ in range(count))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch @ torch.stack(list(self.rows)).t()


class Training:
    """A model, its optimizer, and the two halves of a step."""

    def __init__(self, state: str, *, seed: int, batch: int) -> None:
        torch.manual_seed(seed)
        shape = shape_of(state)
        self.model: nn.Module = Tiny(shape.tiny)
        if shape.layers:
            layers = (nn.Linear(shape.width, shape.width) for _ in range(shape.layers))
            self.model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.optimizer = self.fresh_optimizer()
        self.batch = torch.randn(batch, shape.width or TINY_NUMBERS)

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def forget(self) -> None:
        """As if nothing had been trained: all weights are 0, there are no gradients, and the optimizer is a fresh one."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
                parameter.grad = None  # with them DCP restores no moments, and does not say so
        self.optimizer = self.fresh_optimizer()

    def forward_backward(self) -> None:
        # Gradients are zeroed here, in place, so that they are in memory while a checkpoint is taken, as they are in a loop
        # that accumulates: a peak of memory is then not hidden in the room that they would leave.
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.batch).square().mean().backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that a checkpoint holds, in a fixed order."""
        for parameter in self.model.parameters():
            yield parameter.detach()
            yield from (value for _, value in sorted(self.optimizer.state.get(parameter, {}).items()))

    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def raw_bytes(self) -> Iterator[np.ndarray]:
        """The bytes of each tensor, uint8."""
        for tensor in self.tensors():
            yield tensor.reshape(-1).view(torch.uint8).numpy()

    def digest(self) -> str:
        """What the state is, bit for bit."""
        whole = xxhash.xxh3_128()
        for each in self.raw_bytes():
            whole.update(each)
        return whole.hexdigest()

    def touch(self) -> None:
        """Reads a byte of each page, so that what is mapped is in memory."""
        for tensor in self.tensors():
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()


def calibrated_batch(state: str, seconds: float) -> int:
    """The size of the batch with which forward and backward last at least so long."""
    batch = 1
    while True:
        training = Training(state, seed=0, batch=batch)
        training.forward_backward()
        began = time.perf_counter()
        training.forward_backward()
        took = time.perf_counter() - began
        if took >= seconds:
            return batch
        batch = max(batch + 1, min(4 * batch, int(batch * 1.2 * seconds / took)))
