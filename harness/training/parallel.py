"""How ``harness train`` spreads a model over the ranks: a replica on each (DDP), or shards of it (FSDP2, HSDP).

A sharded model meets the other ranks in each forward pass, too. So all ranks go through it equally often: see ``evened``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from harness.config import Config
from harness.data.fetching import Step
from harness.distributed import device
from harness.distributed.world import World
from harness.errors import ConfigError
from harness.runtime.environment import local_size


def check(model: nn.Module, config: Config, ranks: int) -> None:
    """Raises ``ConfigError`` where ``spread`` would."""
    if config.train.parallel != "ddp" and ranks > 1:
        _mesh_shape(config, ranks)
        _wrapped(model, config.fsdp.wrap)


def spread(model: nn.Module, config: Config, world: World) -> nn.Module:
    """The model as it is called in training, as ``train.parallel`` has it. One rank alone keeps it whole.

    Sharding replaces the parameters: an optimizer is made afterwards. Raises ``ConfigError`` for a class in ``fsdp.wrap``
    that the model does not have, and for a number of ranks that ``fsdp.shard_size`` does not divide.
    """
    if config.train.parallel == "ddp" or world.size == 1:
        return world.wrap(model)
    # These take half a second to import, and few runs need them.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # noqa: PLC0415

    fsdp = config.fsdp
    shape = _mesh_shape(config, world.size)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]),
        "reshard_after_forward": fsdp.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(_DTYPES[fsdp.param_dtype], _DTYPES[fsdp.reduce_dtype]),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.of(world.device).is_async) if fsdp.offload else OffloadPolicy(),
    }
    for module in _wrapped(model, fsdp.wrap):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def _mesh_shape(config: Config, ranks: int) -> tuple[int, ...]:
    if config.train.parallel == "fsdp":
        return (ranks,)
    shard_size = config.fsdp.shard_size or local_size()
    if ranks % shard_size:
        what = "fsdp.shard_size" if config.fsdp.shard_size else "the ranks of a machine (fsdp.shard_size)"
        raise ConfigError(f"train.parallel hsdp: expected {what} to divide the {ranks} ranks, found {shard_size}")
    return ranks // shard_size, shard_size


def _wrapped(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these classes, inner ones first, as ``fully_shard`` wants them."""
    found = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    if missing := sorted({*names} - {type(module).__name__ for module in found}):
        classes = sorted({type(module).__name__ for module in model.modules() if module is not model})
        raise ConfigError(f"fsdp.wrap: the model has no {', '.join(missing)}; it has {', '.join(classes)}")
    return found[::-1]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``spread`` has sharded it."""
    return hasattr(model, "set_requires_gradient_sync")


@contextlib.contextmanager
def without_meeting(model: nn.Module) -> Iterator[None]:
    """The time of a backward pass whose gradients are only added to those that there are."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]  # torch's FSDPModule
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        yield


def evened(micro_batches: Step, most: int) -> Step:
    """As many micro-batches as the rank with ``most`` of them has: the last one again, with a weight of 0."""
    batch, _ = micro_batches[-1]
    return [*micro_batches, *[(batch, 0.0)] * (most - len(micro_batches))]


def share_buffers(model: nn.Module, plain: nn.Module, world: World) -> None:
    """Before an evaluation: DDP overwrites the buffers of the other ranks with rank 0's before the next step, so these are
    judged. Those of a sharded model stay each rank's own."""
    if not is_sharded(model):
        world.broadcast_tensors([buffer for buffer in plain.buffers() if buffer.numel()])
