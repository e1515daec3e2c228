"""Steps whose loss or gradients are not finite: found on all ranks at once, without a message of its own.

A loss that is not finite gives its backward pass a NaN to begin with. DDP adds the gradients of the ranks up, so one bad
loss on one rank, and one bad gradient anywhere, makes the gradients bad on every rank; their norm, which costs one pass over
them, says so to all at the same step.

With a gradient scaler (fp16) a norm that is not finite is part of the scaler's search for its scale, which passes over the
step by itself. There only a bad loss counts, which the ranks ask each other about when a norm is bad.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from harness.data.loader import Loader
from harness.distributed.world import World

_MOST_SAMPLES = 64  # in a message


def seed_of(scaled_loss: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """What the backward pass of a scaled loss begins with: 1 as always, NaN where the loss itself is not finite."""
    return (loss.detach() * 0 + 1).to(scaled_loss.dtype)  # 0 times what is not finite is NaN


def is_bad(world: World, norm: torch.Tensor, loss: torch.Tensor, *, has_scaler: bool) -> bool:
    """Whether a step must not be taken; the same on all ranks."""
    if bool(norm.isfinite()):
        return False
    return not has_scaler or bool(ranks_with_bad_loss(world, loss))


def ranks_with_bad_loss(world: World, loss: torch.Tensor) -> list[int]:
    """The ranks whose share of a batch has a loss that is not finite. All ranks call it."""
    return [rank for rank, is_finite in enumerate(world.all_gather(math.isfinite(float(loss)))) if not is_finite]


def what_is_bad(world: World, loss: torch.Tensor, loader: Loader) -> tuple[str, Sequence[int]]:
    """What is not finite about the batch that was just trained, in words, and the samples that it comes from. All ranks call
    it."""
    ranks = ranks_with_bad_loss(world, loss)
    samples = [index for rank in ranks or range(world.size) for index in loader.position.samples(rank, world.size)]
    what = f"the loss on rank {', '.join(map(str, ranks))} is" if ranks else "every loss is finite and the gradients are"
    more = f" and {len(samples) - _MOST_SAMPLES} more" if len(samples) > _MOST_SAMPLES else ""
    return f"{what} not finite; epoch {loader.position.trained_epoch}, samples {samples[:_MOST_SAMPLES]}{more}", samples


def buffers_with_nan(model: nn.Module) -> list[str]:
    """Buffers that a bad batch has spoilt in the forward pass, as the running averages of a batch norm."""
    return [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and bool(buffer.isnan().any())]
