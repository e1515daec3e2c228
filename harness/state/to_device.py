"""What was read from a checkpoint, on its way to the device."""

from typing import Any

import torch

from harness.checkpoint.format import span
from harness.checkpoint.tree import is_composed
from harness.data.nested import mapped
from harness.distributed.device import NOTHING, of

LARGE_BYTES = 1 << 20  # smaller tensors go where torch puts them, if anywhere: an optimizer's count of steps stays here
STAGE_BYTES = 16 << 20


def sent(value: Any, device: torch.device) -> Any:
    """A value with its large tensors on an accelerator. On other devices they are left where they are."""
    if not of(device).is_async:
        return value
    stage = _Stage(device)

    def sent_leaf(leaf: Any) -> Any:
        is_plain = isinstance(leaf, torch.Tensor) and not is_composed(leaf)
        is_large = is_plain and leaf.device.type == "cpu" and leaf.nbytes >= LARGE_BYTES
        return stage.send(leaf) if is_large else leaf

    return mapped(sent_leaf, value)


class _Stage:
    """Two pieces of pinned memory: one is filled while the other travels. What is not pinned travels at half the speed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.accelerator = device, of(device)
        self.halves = [self.accelerator.host_memory(STAGE_BYTES) for _ in range(2)]
        self.arrived = [NOTHING for _ in self.halves]
        self.count = 0  # of the pieces so far

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (places := span(tensor.shape, tensor.stride())):
            tensor = tensor.contiguous()
            places = tensor.numel()
        target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        flat = (each.detach().as_strided((places,), (1,)).view(torch.uint8) for each in (tensor, target))
        pieces = (torch.split(each, STAGE_BYTES) for each in flat)
        for here, there in zip(*pieces, strict=True):
            number, self.count = self.count % 2, self.count + 1
            self.arrived[number].synchronize()  # what it held before
            half = self.halves[number][: len(here)]
            half.copy_(here)
            self.accelerator.copy(there, half)
            self.arrived[number] = self.accelerator.mark()
        return target
