"""In which order DDP adds gradients up, carried over a restart.

DDP gathers gradients in buckets, and orders the buckets anew after the first backward pass, in the order in which the
gradients came. With three ranks or more the place of a gradient within a bucket decides in which order its parts are added,
so the first step after a restart would differ in its last bits from that of the run that never stopped. The order of the
first backward pass is therefore a part of the training's state: written down here, saved, and, before anything of a resumed
run is restored, gone through once more with gradients of zero. With fewer ranks only communication hooks need that.

Nobody is to notice that. Hooks of parameters do not hear of it. A communication hook that remembers what it sees is called
only where what it remembers is restored afterwards.
"""

import contextlib
import gc
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from harness import torch_private
from harness.checkpoint import dtensors


class BucketOrder:
    """The order for one DDP module: ``order`` has the numbers of its parameters, and is empty until it is known."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.order: list[int] = []
        self._model = model
        self._parameters = _reduced(model)
        self._hooks: list[RemovableHandle] = []
        self._lacking = torch_private.lacking_of_ddp(model)
        # One that looks for unused parameters keeps its first order. With a static graph DDP remembers more than an order.
        self.is_static = not self._lacking and bool(model.static_graph)
        reorders = not (self._lacking or model.find_unused_parameters or self.is_static)
        for number, parameter in enumerate(self._parameters if reorders else ()):
            handle = parameter.register_post_accumulate_grad_hook(self._note(number))  # type: ignore[no-untyped-call]
            self._hooks.append(handle)

    def settle(self, order: list[int], restored: Container[int] = ()) -> str | None:
        """Has DDP take over an order that was noted before, where bits depend on it. All ranks call it. Does nothing once
        DDP has an order.

        ``restored`` has the ids of those objects whose state is restored afterwards. Where a communication hook remembers
        more than that, nothing is done. Returns what keeps DDP from taking the order over.
        """
        if self._lacking:
            return f"torch {torch.__version__} has no {self._lacking}"
        if self.is_static:
            return "static_graph=True makes DDP reorder its gradients" if self._model.process_group.size() > 2 else None
        if not self._hooks or self.order or len(order) != len(self._parameters):
            return None
        hooks = torch_private.communication_hooks(self._model)
        for hook, state in hooks:
            memories = [each for each in (state, getattr(hook, "__self__", None)) if each is not None]
            if not (_forgets(hook) or any(id(each) in restored for each in memories)):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                return (
                    f"the communication hook {name} has a state that is not saved; add an object that holds it to the state"
                )
        self._remove_hooks()
        self.order = order
        if not hooks and self._model.process_group.size() <= 2:  # the sum of two has no order
            return None
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None  # one that is there would be averaged over the ranks
        sparse = {
            id(each.weight) for each in self._model.modules() if getattr(each, "sparse", False) and hasattr(each, "weight")
        }
        with _unheard(self._parameters):
            torch_private.begin_backward(self._model)
            for number in order:  # one by one: within one backward pass, torch would choose the order
                parameter = self._parameters[number]
                torch.autograd.backward(parameter, _nothing_for(parameter, is_sparse=id(parameter) in sparse))
            torch_private.end_backward(self._model)
        for parameter, gradient in zip(self._parameters, before, strict=True):
            parameter.grad = gradient
        return None

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


def bucket_orders(modules: Mapping[str, torch.nn.Module]) -> dict[str, BucketOrder]:
    """The orders of all DDP modules that are in these modules, or around them, by the name of a module."""
    found: dict[int, tuple[str, DistributedDataParallel]] = {}
    for name, module in modules.items():
        own = [each for each in module.modules() if isinstance(each, DistributedDataParallel)]
        for number, each in enumerate(own or _around(module)):
            found.setdefault(id(each), (f"{name}.{number}" if number else name, each))
    return {name: BucketOrder(each) for name, each in found.values()}


def _around(module: torch.nn.Module) -> list[DistributedDataParallel]:
    """The DDP modules that have parameters of a module: a program may train with those, and save what they wrap, or a part.

    Nobody knows them but Python's garbage collector. With two ranks there is but one order to add in: none is looked for.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 2):
        return []
    wanted = {id(each) for each in module.parameters() if each.requires_grad and not dtensors.is_sharded(each)}
    if not wanted:  # DDP takes no sharded parameters
        return []
    kinds = {id(kind) for kind in _with_subclasses(DistributedDataParallel)}  # in a set they are found ten times as fast

    def look() -> list[DistributedDataParallel]:
        found = [each for each in gc.get_objects() if id(type(each)) in kinds]
        return [each for each in found if any(id(parameter) in wanted for parameter in each.parameters())]

    if len(around := look()) > 1:  # an earlier wrapping may be garbage, which must not depend on the rank
        del around
        gc.collect()
        around = look()
    return around


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    each: type
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _reduced(model: DistributedDataParallel) -> list[torch.Tensor]:
    """The parameters whose gradients DDP adds up."""
    ignored = torch_private.parameters_left_out(model)
    return [each for name, each in model.module.named_parameters() if each.requires_grad and name not in ignored]


def _nothing_for(parameter: torch.Tensor, *, is_sparse: bool) -> torch.Tensor:
    """A gradient of zeros, of the layout that DDP expects: that of an embedding may be sparse."""
    if not is_sparse:
        return torch.zeros_like(parameter)
    rows = torch.zeros((1, 0), dtype=torch.int64, device=parameter.device)
    values = torch.zeros((0, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=False)


def _forgets(hook: Any) -> bool:
    """Whether this is one of torch's communication hooks that remember nothing. Wrappers of other hooks may."""
    home, _, name = getattr(hook, "__module__", "").rpartition(".")
    is_plain = home == "torch.distributed.algorithms.ddp_comm_hooks" and name in ("default_hooks", "quantization_hooks")
    return is_plain and "<locals>" not in getattr(hook, "__qualname__", "<locals>")


@contextlib.contextmanager
def _unheard(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """For a while no hook of these parameters is called but DDP's own, which are not Python's. The dictionaries that torch
    looks into are emptied and filled again: what a hook's handle removes, it removes from them."""
    silenced = [(hooks, dict(hooks)) for parameter in parameters for hooks in torch_private.hooks_of(parameter)]
    for hooks, _ in silenced:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in silenced:
            hooks.update(before)
