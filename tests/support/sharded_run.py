"""A program with a sharded model, which ``test_sharded`` kills: ``sharded_run.py LAYOUT URL STEPS``.

It computes in bfloat16, adds up the gradients of two micro-batches before the ranks meet for them, and has processes that
fetch its samples.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

import harness


def sharded(model: nn.Sequential, layout: str) -> DeviceMesh:
    """Shards a model in place, and returns the mesh of the ranks that have samples of their own."""
    ranks = dist.get_world_size()
    if layout == "fsdp":
        mesh = data = init_device_mesh("cpu", (ranks,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        data = init_device_mesh("cpu", (ranks,))
    else:
        both = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
        mesh = data = both["data"]
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model[0], mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return data


def main(layout: str, url: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # Odd sizes, of which tensor parallelism wants but one to be even.
    model = nn.Sequential(nn.Linear(16, 62), nn.ReLU(), nn.Dropout(0.1), nn.Linear(62, 7), nn.ReLU(), nn.Linear(7, 16))
    data = sharded(model, layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    rank, size = data.get_local_rank(), data.size()
    loader = harness.Loader(TensorDataset(inputs), 12, seed=1, workers=1, rank=rank, world_size=size)
    random.seed(dist.get_rank())  # all that a checkpoint has of random states: they are compared, too
    np.random.seed(dist.get_rank())  # the global generator
    torch.manual_seed(dist.get_rank())
    slow = Path(f"{url}.slow")
    config = {"checkpoint": {"keep_last": 3}, "stop": {"grace_seconds": 5}}
    run = harness.Run(url, {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=3, config=config)
    for _ in run.epochs(steps // 8):
        for (batch,) in loader:
            halves = batch.chunk(2)
            for half in halves:
                model.set_requires_gradient_sync(half is halves[-1])  # type: ignore[operator]  # torch's FSDPModule
                loss = (model(half).float() - half).square().sum() / batch.numel()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
            if slow.exists():
                time.sleep(0.02)  # a storm needs a run that takes its time


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
