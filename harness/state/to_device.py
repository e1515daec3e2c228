"""What was read from a checkpoint, on its way to the device."""

from typing import Any

import torch

from harness.checkpoint.format import span
from harness.checkpoint.tree import is_composed
from harness.data.nested import mapped

_LARGE_BYTES = 1 << 20  # smaller tensors go where torch puts them, if anywhere: an optimizer's count of steps stays here
_STAGE_BYTES = 16 << 20


def sent(value: Any, device: torch.device) -> Any:
    """A value with its large tensors on a CUDA device. On the CPU they are left where they are."""
    if device.type != "cuda":
        return value
    stage = _Stage(device)

    def sent_leaf(leaf: Any) -> Any:
        is_plain = isinstance(leaf, torch.Tensor) and not is_composed(leaf)
        is_large = is_plain and leaf.device.type == "cpu" and leaf.nbytes >= _LARGE_BYTES
        return stage.send(leaf) if is_large else leaf

    return mapped(sent_leaf, value)


class _Stage:
    """Two pieces of pinned memory: one is filled while the other travels. What is not pinned travels at half the speed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.halves = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self.arrived = [torch.cuda.Event() for _ in self.halves]  # type: ignore[no-untyped-call]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (places := span(tensor.shape, tensor.stride())):
            tensor = tensor.contiguous()
            places = tensor.numel()
        target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        flat = (each.detach().as_strided((places,), (1,)).view(torch.uint8) for each in (tensor, target))
        pieces = (torch.split(each, _STAGE_BYTES) for each in flat)
        for number, (here, there) in enumerate(zip(*pieces, strict=True)):
            half, arrived = self.halves[number % 2][: len(here)], self.arrived[number % 2]
            arrived.synchronize()  # at once, where nothing is on its way
            half.copy_(here)
            there.copy_(half, non_blocking=True)
            arrived.record()
        return target
