"""A program with a sharded model, which ``test_sharded`` kills: ``sharded_run.py LAYOUT URL STEPS``."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import harness


def main(layout: str, url: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 61), nn.ReLU(), nn.Dropout(0.1), nn.Linear(61, 7), nn.ReLU(), nn.Linear(7, 16))
    shape = (2, 2) if layout == "hsdp" else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    loader = harness.Loader(TensorDataset(inputs), 12, seed=1)
    random.seed(dist.get_rank())  # all that a checkpoint has of random states: they are compared, too
    np.random.seed(dist.get_rank())  # the global generator
    torch.manual_seed(dist.get_rank())
    slow = Path(f"{url}.slow")
    config = {"checkpoint": {"keep_last": 3}, "stop": {"grace_seconds": 5}}
    run = harness.Run(url, {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=3, config=config)
    for _ in run.epochs(steps // 8):
        for (batch,) in loader:
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
            if slow.exists():
                time.sleep(0.02)  # a storm needs a run that takes its time


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
