"""The norm of all gradients together, and clipping to it, whatever mixture of plain and sharded ones they are.

torch's own functions (2.13) refuse gradients of which some are sharded and others are not, and those of several meshes, as
tensor parallelism with FSDP has them. So each mesh has a norm of its own, which all of its ranks meet for. The norm of these
is that of all gradients. Where nothing is sharded there is one group, and its norm has the bits of torch's.
"""

from collections.abc import Iterable

import torch
from torch import nn

from harness.checkpoint import dtensors


def norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm over all gradients. Shape (). Not finite where one of them is not, or where the sum of squares overflows.
    All ranks that a gradient is shared out to call it."""
    norms = [_norm(group) for group in _groups(parameters)]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scales all gradients such that their norm is at most ``limit``, and returns what it was."""
    parameters = list(parameters)
    found = norm(parameters)
    for group in _groups(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, found)
    return found


def _groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that have gradients, by the mesh of these, in the order in which the model has them: on every rank the same."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(dtensors.mesh_of(parameter.grad), []).append(parameter)
    return list(groups.values())


def _norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    found = nn.utils.get_total_norm([each.coalesce().values() if each.is_sparse else each for each in gradients])
    return dtensors.whole_of(found)
