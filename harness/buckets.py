"""In which order DDP adds gradients up, carried over a restart.

DDP gathers gradients in buckets, and orders the buckets anew after the first backward pass, in the order in which the
gradients came. With three ranks or more the place of a gradient within a bucket decides in which order its parts are added,
so the first step after a restart would differ in its last bits from that of the run that never stopped. The order of the
first backward pass is therefore a part of the training's state: written down here, saved, and, before a resumed run trains,
gone through once more with gradients of zero.
"""

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class GradientOrder:
    """The order for one DDP module: ``order`` has the numbers of its parameters, and is empty until it is known."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.order: list[int] = []
        self._model = model
        self._parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        # One that looks for unused parameters keeps its first order. With a static graph DDP remembers more than an order.
        reorders = not model.find_unused_parameters and not model.static_graph
        self._hooks: list[RemovableHandle] = []
        for number, parameter in enumerate(self._parameters if reorders else ()):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note(number)))

    def settle(self, order: list[int]) -> None:
        """Has DDP take over an order that was noted before. All ranks call it. Does nothing once DDP has an order."""
        if not self._hooks or self.order or len(order) != len(self._parameters):
            return
        self._remove_hooks()
        self.order = order
        before = [parameter.grad for parameter in self._parameters]
        reducer = self._model.reducer
        reducer.prepare_for_forward()
        reducer.prepare_for_backward([])
        for number in order:  # one by one: within one backward pass, torch would choose the order
            parameter = self._parameters[number]
            torch.autograd.backward(parameter, torch.zeros_like(parameter))
        for parameter, gradient in zip(self._parameters, before, strict=True):
            parameter.grad = gradient

    def stop_noting(self) -> None:
        """Once the order is known, what notes it only takes time."""
        if len(self.order) == len(self._parameters):
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _note(self, number: int) -> Callable[[torch.Tensor], None]:
        def note(_parameter: torch.Tensor) -> None:
            if self._model.require_backward_grad_sync and len(self.order) < len(self._parameters):
                self.order.append(number)

        return note
