"""torch's sharded tensors: what of one lies here. The only place that knows what a ``DTensor`` is.

A program that has none has not imported ``torch.distributed.tensor``, which takes a second: it is not imported for this.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from harness.checkpoint.boxes import Box, Cut, box_of
from harness.errors import Unsupported

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})


def is_sharded(value: Any) -> bool:
    """Whether a value is a ``DTensor``, of which each rank has a part (or all of it, where it is replicated)."""
    if type(value) in _PLAIN:  # as nearly all are: a save asks some thousand times
        return False
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_of(tensor: Any) -> torch.Tensor:
    """The memory that a tensor has here; of a plain one, the tensor itself."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():  # else it is a view that autograd follows
        return tensor.to_local()  # type: ignore[no-any-return]


def whole_of(tensor: Any) -> torch.Tensor:
    """All of a tensor, which the ranks of its mesh meet for; of a plain one, the tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def mesh_of(tensor: Any) -> Any:
    """The mesh of a sharded tensor; None for a plain one."""
    return tensor.device_mesh if is_sharded(tensor) else None


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none."""
    return local_of(tensor).data_ptr()


def own_box(tensor: Any, name: str) -> Box:
    """The part of a sharded tensor that this rank has. Raises ``Unsupported``, with the tensor's name, where that is not a
    box of the whole."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise Unsupported(f"{name}: a DTensor of a mesh that this rank is not in; give every rank the whole model's state")
    mesh, shape, local = tuple(tensor.device_mesh.shape), tuple(tensor.shape), local_of(tensor)
    cuts = [_cut(placement, len(shape), name) for placement in tensor.placements]
    if type(local) not in _PLAIN:
        kind = type(local).__name__
        raise Unsupported(f"{name}: a DTensor whose local part is a {kind}; convert the model after training, not before")
    try:
        box = box_of(shape, mesh, cuts, coordinate)
    except ValueError as error:
        raise Unsupported(f"{name}: a DTensor with placements {tensor.placements}: {error}") from None
    if box.shape != tuple(local.shape):
        advice = "give DTensor.from_local the whole tensor's shape= and stride="
        raise Unsupported(
            f"{name}: expected a local part of shape {list(box.shape)} for placements {tensor.placements} of "
            f"{list(shape)}, found {list(local.shape)}; {advice}"
        )
    return box


def _cut(placement: Any, dims: int, name: str) -> Cut | None:
    kind = type(placement).__name__
    if kind == "Replicate":
        return None
    if kind == "Shard":
        return Cut(placement.dim % dims)
    if kind == "_StridedShard":  # what fully_shard makes of a dimension that tensor parallelism has cut
        return Cut(placement.dim % dims, placement.split_factor)
    advice = "redistribute it to Shard or Replicate before it is saved" if kind == "Partial" else "use Shard or Replicate"
    raise Unsupported(f"{name}: a DTensor with the placement {placement}, which has no place in the whole tensor; {advice}")


def layout_of(tensor: Any) -> str:
    """How a sharded tensor lies on its mesh, in a word."""
    places = [str(placement).replace(" ", "") for placement in tensor.placements]
    return f"{'x'.join(map(str, tensor.device_mesh.shape))}({','.join(places)})"


class Landing:
    """Where a tensor of a checkpoint goes: into the part that a live sharded tensor has here."""

    def __init__(self, live: Any, name: str) -> None:
        self._live = live
        self.shape = tuple(live.shape)
        self.box = own_box(live, name)

    def holding(self, local: torch.Tensor) -> torch.Tensor:
        """A sharded tensor like the live one, whose part here is ``local``."""
        live = self._live
        local = local.to(local_of(live).device)
        from_local: Callable[..., torch.Tensor] = type(live).from_local
        with torch.no_grad():
            return from_local(
                local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
            )

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same of a whole tensor, of which a copy is made."""
        return self.holding(whole.detach()[self.box.within(Box.whole(self.shape))].clone())


def as_live(saved: Any, live: Any, name: str) -> Any:
    """A saved tensor, or of a whole one the part that belongs into a sharded one here."""
    is_whole = isinstance(saved, torch.Tensor) and not is_sharded(saved)
    if is_whole and is_sharded(live) and saved.shape == live.shape:
        return Landing(live, name).part_of(saved)
    return saved
