"""Sharded models: each rank saves its part, and what was saved in one layout is loaded in any other."""

import functools
import os
import pickle
import random
import re
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import harness
from harness import Loader, Run, StopRequest
from harness.checkpoint import format as layout_of_files
from harness.checkpoint import frozen, load, scatter, tree
from harness.checkpoint.catalog import Catalog, verify_all
from harness.checkpoint.format import TensorInfo, checksum, decode_header
from harness.config import run_config
from harness.distributed.world import TorchrunWorld, world_of_program
from harness.doctor.examination import examine_run
from harness.doctor.findings import Finding
from harness.errors import ConfigError, Corrupt, Unsupported
from harness.interchange import load_into, read_foreign
from harness.interchange.export import export_model
from harness.storage.store import open_store
from tests.support.cluster import launch, read_json, returned
from tests.support.process_memory import forget_the_peak, memory_bytes
from tests.support.sharding import Scene, play_scenes, scenes_played

KILLS = 20  # of a storm
ROWS = (1, 2, 7, 3, 13, 4, 5)  # one; of 2, 3, 4 and 6 ranks one less and one more; and what divides by nothing


class Table(nn.Module):
    """Parameters of odd sizes, a buffer and a parameter that no rank shares out; nothing is computed with them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, rows) for rows in ROWS)
        self.tall = nn.Parameter(torch.zeros(6, 2, 30))
        self.row = nn.Parameter(torch.zeros(1, 5))  # of which most ranks have nothing
        self.row_again = self.row  # tied; the state of an optimizer goes by the first name in the alphabet
        self.register_buffer("steps", torch.zeros(3))


def fsdp(model: nn.Module, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hsdp(model: nn.Module, _ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def parallel(model: nn.Module, mesh: Any) -> None:
    """Tensor parallelism: rows of some layers, columns of the others; biases of these stay whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    kinds = {f"layers.{index}": RowwiseParallel() if index % 2 else ColwiseParallel() for index in range(len(ROWS))}
    parallelize_module(model, mesh, kinds)


def tp(model: nn.Module, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    parallel(model, init_device_mesh("cpu", (ranks,)))


def tp_fsdp(model: nn.Module, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    parallel(model, mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def plain(model: nn.Module, ranks: int) -> None:
    """Every rank has all."""


LAYOUTS = {
    "one": (1, plain),
    "plain2": (2, plain),
    "fsdp1": (1, fsdp),
    "fsdp2": (2, fsdp),
    "fsdp3": (3, fsdp),
    "fsdp4": (4, fsdp),
    "hsdp": (4, hsdp),
    "tp2": (2, tp),
    "tp_fsdp": (4, tp_fsdp),
    "tp_fsdp6": (6, tp_fsdp),  # three times two: uneven on both
}


class Average:
    """An object of the program's own that keeps a copy of each parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: each.detach().clone() for name, each in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "decay": 0.9}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["values"].items():
            self.values[name].copy_(value)


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    """For each parameter of a plain model its own indices, shifted by its number."""
    return {
        name: torch.arange(each.numel(), dtype=torch.float32).view(each.shape) + 1000 * number
        for number, (name, each) in enumerate(model.named_parameters())
    }


def part_like(live: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a live one is laid out, by torch alone."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if not isinstance(live, DTensor):
        return whole.clone()
    mesh = live.device_mesh
    there = distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim)
    return there.redistribute(mesh, live.placements)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def built(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    ranks, shard = LAYOUTS[layout]
    model = Table()
    shard(model, ranks)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def fill(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter and moment values that say where they belong."""
    with torch.no_grad():
        for name, value in expected(Table()).items():
            live = model.get_parameter(name)
            live.copy_(part_like(live, value))
            optimizer.state[live] = {
                "step": torch.tensor(7.0),
                "exp_avg": part_like(live, value * 2),
                "exp_avg_sq": part_like(live, value * 3),
            }
        model.steps.copy_(torch.tensor([1.0, 2.0, 3.0]))


def wrong(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What does not have the values that it was saved with."""
    found = []
    for name, value in expected(Table()).items():
        live = model.get_parameter(name)
        state = optimizer.state[live]
        pairs = {
            "": (live, value),
            "/exp_avg": (state["exp_avg"], value * 2),
            "/exp_avg_sq": (state["exp_avg_sq"], value * 3),
        }
        found += [f"{name}{key}" for key, (one, other) in pairs.items() if not torch.equal(whole_of(one), other)]
        found += [f"{name}/step"] if state["step"] != 7 or type(state["step"]) is not torch.Tensor else []
        found += [f"{name}: type"] if type(state["exp_avg"]) is not type(live.detach()) else []
    return found + ([] if model.steps.tolist() == [1.0, 2.0, 3.0] else ["steps"])


def save(url: Path, layout: str, steps: int = 1, **config: Any) -> int:
    """Saves some steps in a layout, beside the training and at the end."""
    model, optimizer = built(layout)
    average = Average(model)
    state = {"average": average, "optimizer": optimizer, "model": model}
    run = Run(url, state, stop=StopRequest(), config={"checkpoint": config})
    fill(model, optimizer)
    for name, value in average.values.items():
        value.copy_(model.get_parameter(name).detach() * 4)
    for _ in run.steps(steps):
        run.step()
    run.close()
    return run.global_step


def resume(url: Path, layout: str, **config: Any) -> dict[str, Any]:
    """What has become of it in another layout."""
    model, optimizer = built(layout)
    average = Average(model)
    state = {"model": model, "optimizer": optimizer, "average": average}
    run = Run(url, state, stop=StopRequest(), config={"checkpoint": config})
    run.close()
    found = wrong(model, optimizer)
    values = {name: whole_of(value) for name, value in average.values.items()}
    found += [name for name, value in expected(Table()).items() if not torch.equal(values[name], value * 4)]
    return {"step": run.global_step, "wrong": found + ([] if model.row_again is model.row else ["tied"])}


# --- trained -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Odd sizes, dropout, running averages, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.last = (
            nn.Linear(8, 13),
            nn.BatchNorm1d(13),
            nn.Linear(13, 8),
            nn.Linear(8, 13),
        )
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.second(nn.functional.dropout(self.norm(self.first(batch)).relu(), 0.2, self.training))
        return self.last(hidden) * self.scale


class Heads(nn.Module):
    """What tensor parallelism can compute: even sizes, and a norm that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(batch)).relu())


def shard_net(model: nn.Module, kind: str, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if kind == "replicated":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=init_device_mesh("cpu", (ranks,)))
        return
    if kind == "heads":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        if ranks > 2:
            fully_shard(model, mesh=mesh["data"])
        return
    mesh = init_device_mesh(
        "cpu", (2, 2) if kind == "hsdp" else (ranks,), mesh_dim_names=("r", "s")[-1 - (kind == "hsdp") :]
    )
    options: dict[str, Any] = {"mesh": mesh}
    if kind == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "kept":
        options["reshard_after_forward"] = False
    if kind != "one group":
        fully_shard(model.second, **options)
    fully_shard(model, **options)


def train(url: Path | None, kind: str, until: int = 7, dies_after: int | None = None) -> dict[str, Any]:
    """Trains so many steps, or fewer, and returns the losses, and a digest of all that there is."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    with torch.device("meta" if kind == "meta" else "cpu"):
        model: nn.Module = Heads() if kind == "heads" else Net()
    if kind == "bf16":
        model.norm = nn.Identity()
    if kind == "frozen":  # beside what is trained, in one group, as LoRA has it
        model.first.requires_grad_(requires_grad=False)
    other = Net() if kind == "several" else nn.Module()
    data = ranks // 2 if kind == "heads" else ranks
    shard_net(model, kind, ranks)
    if kind == "several":
        shard_net(other, kind, ranks)
    if kind == "meta":
        model.to_empty(device="cpu")
        model.last.weight = model.first.weight
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.ones_(model.scale)
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()], lr=0.05)
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
    where = {"rank": rank // 2, "world_size": data} if kind == "heads" else {}
    loader = Loader(TensorDataset(inputs), 12, seed=3, **where)
    torch.manual_seed(rank % 2 if kind == "heads" else rank)
    state = {"optimizer": optimizer, "model": model, "loader": loader}
    state |= {"other": other} if kind == "several" else {}
    settings = {"checkpoint": {"check_snapshots": kind == "checked"}}
    run = Run(url, state, every_steps=2, stop=StopRequest(), config=settings)
    losses = []
    try:
        for _ in run.epochs(3):
            for (batch,) in loader:
                halves = batch.chunk(2) if kind == "accumulated" else [batch]
                for part in halves:
                    if kind == "accumulated":
                        model.set_requires_gradient_sync(part is halves[-1])
                    loss = model(part.bfloat16() if kind == "bf16" else part).float().square().mean()
                    loss = loss + other(part).square().mean() if kind == "several" else loss
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)
                losses.append(float(loss.detach()))
                if kind == "evaluated":
                    model.eval()
                    with torch.no_grad():
                        model(batch)
                    model.train()
                if run.global_step == dies_after:
                    raise InterruptedError
                if run.global_step == until:
                    run.finish()
                    return {"losses": losses, "digest": digest_here(optimizer, model, other), "from": until - len(losses)}
    except InterruptedError:
        return {"losses": losses}
    finally:
        run.close()
    raise AssertionError


def digest_here(optimizer: torch.optim.Optimizer, *models: nn.Module) -> str:
    """Of what this rank has of the models and their moments, bit for bit."""
    from harness.checkpoint.dtensors import local_of

    values = [value for model in models for value in model.state_dict().values()]  # first: it has the parameters put back
    states = [optimizer.state[each] for group in optimizer.param_groups for each in group["params"]]
    values += [state[key] for state in states for key in sorted(state)]
    return checksum(b"".join(bytes(each) for value in values for each in tree.raw_bytes(local_of(value))))


def resumed(place: Path, kind: str) -> dict[str, Any]:
    """A run that was left after its fifth step, and the one that it is compared with."""
    straight = train(place / f"straight-{kind}", kind)
    train(place / kind, kind, dies_after=5)
    again = train(place / kind, kind)
    return {
        "from": again["from"],
        "losses": again["losses"] == straight["losses"][again["from"] :],
        "same": again["digest"] == straight["digest"],
    }


def fine_tune(url: Path, until: int, **checkpoint: Any) -> None:
    """Trains a sum of low rank beside a frozen matrix, and saves after each step. Of the one frozen number a rank has
    nothing."""
    import torch.distributed as dist

    frozen.LEAST_BYTES = 1000  # these ranks do nothing else
    torch.manual_seed(0)
    base = nn.Linear(61, 61).requires_grad_(requires_grad=False)
    model = nn.Sequential(base, nn.Linear(61, 2, bias=False), nn.Linear(2, 61))
    model.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    shard_all(model, dist.get_world_size())
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    config = {"log": {"every_steps": None}, "checkpoint": checkpoint}
    state = {"model": model, "optimizer": optimizer}
    run = Run(url, state, every_steps=1, keep_last=3, stop=StopRequest(), config=config)
    for step in run.steps(6):
        model(torch.full((4, 61), step + 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        if run.global_step == until < 6:
            break
    run.close()


def fine_tuned(place: Path) -> None:
    """A run that is left after its third save, and goes on; and one that writes everything each time."""
    fine_tune(place / "tuned", 3)
    fine_tune(place / "tuned", 6)
    fine_tune(place / "tuned whole", 6, incremental=False)


# --- the scenes ------------------------------------------------------------------------------------------------------


def in_small_pieces(act: Callable[[Path], Any], place: Path) -> Any:
    """Tensors that are cut between small blocks, and read in stretches, or handed out in pieces, that end within rows."""
    layout_of_files.BLOCK_BYTES, load.STRETCH_BYTES, scatter.ROUND_BYTES = 64, 16, 1  # these ranks do nothing else
    return act(place / "small")


def meetings(place: Path) -> list[int]:
    """How often ranks that read a checkpoint between them meet, in the layout of the save: as they do, and in each round."""
    import torch.distributed as dist

    found, hand_out = [0], TorchrunWorld.hand_out

    def counted(*given: Any) -> None:
        found[-1] += 1
        hand_out(*given)

    TorchrunWorld.hand_out, scatter.ROUND_BYTES = counted, 12 << 10
    for step, every in enumerate((scatter.MEETS_EVERY, scatter.MEETS_EVERY, 1)):
        model, scatter.MEETS_EVERY = nn.Linear(64, 6000, bias=False), every
        torch.nn.init.constant_(model.weight, step)
        shard_all(model, dist.get_world_size())
        run = Run(place, {"model": model}, stop=StopRequest(), config={"checkpoint": {"restore": "shared"}})
        assert (run.global_step, whole_of(model.weight).unique().tolist()) == (min(step, 1), [0])
        for _ in run.steps(1):
            run.step()
        run.close()
        found.append(0)
    return found[1:3]


def fall_back(place: Path, damage: Callable[[Path], None]) -> dict[str, Any]:
    """Two steps are saved, and the newer one is damaged by one rank."""
    import torch.distributed as dist

    scatter.WINDOW_BYTES = 16  # several in each tensor
    save(place, "fsdp3", steps=2, every_steps=1)
    if dist.get_rank() == 0:
        (newest,) = place.glob(f"step-{2:012}-*")
        damage(newest)
    dist.barrier()
    return resume(place, "fsdp3")


def started(url: Path, layout: str) -> list[str]:
    """What is wrong with a model and an optimizer that get what another run has saved, the tied name but once."""
    model, optimizer = built(layout)
    foreign = read_foreign(str(url))
    del foreign.model["row_again"]
    load_into(model, optimizer, foreign)
    return wrong(model, optimizer) + ([] if model.row_again is model.row else ["tied"])


def saved_by_torch(directory: Path, layout: str) -> list[str]:
    """A directory of torch.distributed.checkpoint, which rank 0 then reads as ``harness import`` does."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    model, optimizer = built(layout)
    fill(model, optimizer)
    state = model.state_dict()
    if layout == "tp_fsdp6":  # of the 7 rows of this one, torch loses one, and says nothing
        state = {"layers.2.weight": state["layers.2.weight"]}
    dcp.save({"model": state}, checkpoint_id=directory)
    if dist.get_rank():
        return []
    try:
        found = read_foreign(str(directory), trust=True).model
    except Corrupt as error:
        return [str(error)]
    return [name for name, value in expected(Table()).items() if not torch.equal(found[name], value)]


LARGE_BYTES = 512 << 20


def in_memory(url: Path, layout: str) -> dict[str, Any]:
    """Saves a large model, and resumes it in the other layout: how much more memory this rank has needed for that, and how
    much it has read."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    model = nn.ModuleList(nn.Linear(4096, 1024, bias=False) for _ in range(LARGE_BYTES // (4096 * 1024 * 4)))
    for layer in model:
        LARGE[layout](layer, ranks)
    before, read_before = forget_the_peak(), bytes_read()
    run = Run(url, {"model": model}, stop=StopRequest())
    used = memory_bytes("VmHWM") - before
    found = {"step": run.global_step, "used": used, "read": bytes_read() - read_before}
    if not run.global_step:
        for _ in run.steps(1):
            run.step()
    run.close()
    return found


def bytes_read() -> int:
    """From files, by this process, from the page cache or the disk."""
    (line,) = (each for each in Path("/proc/self/io").read_text().splitlines() if each.startswith("rchar"))
    return int(line.split()[1])


def rows(layer: nn.Module, ranks: int) -> None:
    shard_all(layer, ranks)


def columns(layer: nn.Module, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    parallelize_module(layer, init_device_mesh("cpu", (ranks,)), RowwiseParallel())


LARGE = {"rows": rows, "columns": columns}


def buffers_elsewhere(place: Path) -> list[list[float]]:
    """Each rank of three has its own running averages; what two ranks, and one process, have of them then."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5))
    shard_all(model, ranks)
    run = Run(place, {"model": model}, stop=StopRequest())
    if ranks == 3:
        model[1].running_mean.fill_(rank + 1)
        model[1].num_batches_tracked.fill_(9)  # the same on all
        for _ in run.steps(1):
            run.step()
    run.close()
    return [model[1].running_mean.tolist(), [float(model[1].num_batches_tracked)]]


def shard_all(model: nn.Module, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lengthen(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": lambda save: flip(save / "model-rank1-00001-of-00001.safetensors"),
    "cut": lambda save: os.truncate(save / "optimizer-rank2-00001-of-00001.safetensors", 40),
    "longer": lambda save: lengthen(save / "model-rank2-00001-of-00001.safetensors"),
    "lost": lambda save: os.unlink(save / "model-rank2-00001-of-00001.safetensors"),
    "swapped": lambda save: swap(*(save / f"model-rank{rank}-00001-of-00001.safetensors" for rank in (0, 1))),
}


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def refusals(place: Path) -> list[str]:
    """What cannot be saved, on each rank: only one of them knows that something is wrong."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    found = []
    for shape in ((2, 3), (3, 3)):  # the ranks do not mean the same tensor, or leave a row out
        local = torch.ones(2, 3) if rank == 0 else torch.ones(shape)
        whole = (4, 3) if rank == 0 else (shape[0] * 2, 3)
        model = nn.Linear(3, 4, bias=False)
        given = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(whole), stride=(3, 1))
        model.weight = nn.Parameter(given)
        if shape == (2, 3):
            model.register_parameter("other", nn.Parameter(given * 2) if rank else None)
        try:
            Run(place / str(shape), {"model": model}, stop=StopRequest()).close()
        except (Unsupported, ConfigError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


class Quantized(torch.Tensor):
    """Numbers in another form than they show, as libraries for quantization make them."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, _function: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> "Quantized":
        return cls(args[0].codes)  # a view: nothing else is asked of it here


def without_a_place(place: Path) -> list[list[Any]]:
    """What has no place in a whole, each in a run of its own: what this rank says of it, and how the program would end."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _MaskPartial

    mesh, whole = init_device_mesh("cpu", (2,)), {"shape": torch.Size([4, 3]), "stride": (3, 1)}
    tensors = [
        DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False),
        DTensor.from_local(
            torch.ones(4, 3), mesh, [_MaskPartial(offset_shape=whole["shape"], offset_dim=0)], run_check=False
        ),
        DTensor.from_local(Quantized(torch.ones(2, 3)), mesh, [Shard(0)], run_check=False, **whole),
        DTensor.from_local(torch.ones(2 + dist.get_rank(), 3), mesh, [Shard(0)], run_check=False, **whole),
    ]
    model = nn.Linear(3, 4)
    states = [
        {"net": FullyShardedDataParallel(nn.Linear(3, 4), device_id=torch.device("cpu"))},
        {"net": model, "adam": ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)},
    ]
    for tensor in tensors:
        model = nn.Linear(3, 4)
        model.weight = nn.Parameter(tensor, requires_grad=False)
        states.append({"net": model})
    found = []
    for number, state in enumerate(states):
        try:
            Run(place / str(number), state, stop=StopRequest()).close()
        except Unsupported as error:
            found.append([str(error), error.exit_code])
    return found


def examined(url: Path, layout: str, kind: str) -> list[list[str]]:
    """What harness doctor finds where a script would make its run, check by check: that of a run which was saved in another
    layout, or of one whose ranks mean different tensors."""
    import torch.distributed as dist

    model, optimizer = built(layout)
    if kind == "mistaken" and dist.get_rank() == 1:
        model.layers[0].weight = nn.Parameter(model.layers[1].weight.detach().clone())
        optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "average": Average(model)}
    found: list[Finding] = []
    world, config = world_of_program(torch.device("cpu"), 20), run_config({"checkpoint": {"url": str(url)}})
    examine_run(world, config, state, torch.device("cpu"), [], found.extend, fresh=False)
    return [[each.check, each.level, each.found] for each in found]


# --- gradients ---------------------------------------------------------------------------------------------------------

LIMIT = 0.5


class Mixed(nn.Module):
    """A norm that stays whole where tensors are in parallel, beside layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(batch)).relu()) * 9


def shard_mixed(model: nn.Module, kind: str, ranks: int) -> tuple[int, int]:
    """Shards it in one of many ways; which samples this rank has then, and of how many shares."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "tensors":
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)
        return 0, 1
    if kind == "both":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model.up, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        return mesh["data"].get_local_rank(), mesh["data"].size()
    if kind == "some":
        fully_shard(model.up, mesh=init_device_mesh("cpu", (ranks,)))
    elif kind == "replicas":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")))
    return dist.get_rank(), dist.get_world_size()


def clipped(kind: str) -> dict[str, Any]:
    """The norm of all gradients, what it was said to be when they were clipped, and what they are then, beside those of one
    process; and whether every rank learns of a loss that is bad on one of them alone."""
    import torch.distributed as dist

    from harness.checkpoint.dtensors import is_sharded
    from harness.training import gradients

    torch.manual_seed(0)
    model, plain, batch = Mixed(), Mixed(), torch.randn(12, 8)
    plain.load_state_dict(model.state_dict())
    plain(batch).square().mean().backward()
    share, shares = shard_mixed(model, kind, dist.get_world_size())

    def backward(factor: float) -> None:
        (model(batch.chunk(shares)[share]).square().mean() * factor).backward()
        for parameter in model.parameters():
            if not is_sharded(parameter) and shares > 1:  # nobody else averages them
                dist.all_reduce(parameter.grad)
                parameter.grad /= shares

    backward(1)
    norms = [gradients.norm(each.parameters()) for each in (model, plain)]
    said = [gradients.clip(model.parameters(), LIMIT), nn.utils.clip_grad_norm_(plain.parameters(), LIMIT)]
    pairs = [(whole_of(one.grad), other.grad) for one, other in zip(model.parameters(), plain.parameters(), strict=True)]
    close = all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
    backward(float("nan") if dist.get_rank() == 1 else 1)
    return {
        "clips": float(norms[1]) > 2 * LIMIT,
        "norms": torch.allclose(norms[0], norms[1]) and type(norms[0]) is torch.Tensor,
        "said": [torch.equal(*each) for each in zip(norms, said, strict=True)],
        "gradients": close,
        "bad": not bool(gradients.norm(model.parameters()).isfinite()),
    }


def saving(layout: str) -> Scene:
    return Scene(f"save-{layout}", LAYOUTS[layout][0], lambda place: save(place / layout, layout))


def loading(layout: str, other: str, how: str = "each") -> Scene:
    name = f"load-{layout}-{other}-{how}"
    return Scene(name, LAYOUTS[other][0], lambda place: resume(place / layout, other, restore=how))


def training(kind: str, ranks: int) -> Scene:
    return Scene(f"train-{kind}-{ranks}", ranks, lambda place: resumed(place / str(ranks), kind))


# Some layouts are loaded as they were, and exchanged with one that cuts elsewhere; the soak has each of the 100 pairs, read
# both ways.
PAIRS = [
    *(("fsdp4", other, "each") for other in ("one", "fsdp2", "fsdp3", "hsdp", "tp2", "tp_fsdp6")),
    *((one, "fsdp3", "each") for one in ("one", "tp_fsdp")),
    *((*pair, "shared") for pair in (("one", "hsdp"), ("tp_fsdp6", "fsdp3"), ("fsdp4", "tp_fsdp6"), ("fsdp3", "plain2"))),
]
MORE_PAIRS = [(one, other, how) for one in LAYOUTS for other in LAYOUTS for how in ("each", "shared")]
TRAINED = [("plain", 3), ("evaluated", 2), ("heads", 4)]
MORE_TRAINED = [
    *((kind, 2) for kind in ("plain", "one group", "bf16", "offload", "kept", "accumulated", "checked", "heads")),
    *((kind, 2) for kind in ("meta", "frozen", "several", "replicated")),
    ("hsdp", 4),
]
SAVES = [*map(saving, LAYOUTS)]
CUT = {"writers": "all", "shard_bytes": 1024}
SMALL_LOADS = [("fsdp3", "each"), ("tp_fsdp", "each"), ("one", "each"), ("fsdp3", "shared"), ("tp_fsdp", "shared")]
SMALL = [
    Scene("small-save", 2, functools.partial(in_small_pieces, lambda url: save(url, "plain2", **CUT))),
    *(
        Scene(
            f"small-{other}-{how}",
            LAYOUTS[other][0],
            functools.partial(in_small_pieces, lambda url, it=other, how=how: resume(url, it, restore=how)),
        )
        for other, how in SMALL_LOADS
    ),
]
FAULTS = [Scene(f"fault-{kind}", 3, lambda place, kind=kind: fall_back(place / kind, DAMAGE[kind])) for kind in DAMAGE]
SCENES = [*SAVES, *(loading(*each) for each in PAIRS), *(training(*each) for each in TRAINED), *SMALL, *FAULTS]
SCENES += [Scene(f"buffers-{ranks}", ranks, lambda place: buffers_elsewhere(place / "buffers")) for ranks in (3, 4, 2)]
MIXTURES = ("some", "tensors", "both", "replicas")
SCENES += [Scene(f"clipped-{kind}", 4, lambda _, kind=kind: clipped(kind)) for kind in MIXTURES]
SCENES.append(Scene("refusals", 2, lambda place: refusals(place / "refusals")))
SCENES += [
    Scene(f"dcp-{layout}", LAYOUTS[layout][0], lambda place, it=layout: saved_by_torch(place / f"dcp-{it}", it))
    for layout in ("tp_fsdp", "tp_fsdp6")
]
SCENES.append(Scene("meetings", 3, lambda place: meetings(place / "meetings")))
SCENES.append(Scene("started", 3, lambda place: started(place / "tp_fsdp6", "fsdp3")))
SCENES += [
    Scene(f"doctor-{kind}", 3, lambda place, kind=kind, url=url: examined(place / url, "fsdp3", kind))
    for kind, url in (("well", "tp_fsdp"), ("mistaken", "nothing"))
]
SCENES.append(Scene("fine-tuned", 2, fine_tuned))
SCENES.append(Scene("placeless", 2, lambda place: without_a_place(place / "placeless")))
IN_MEMORY = [
    Scene(f"memory-{each}-{ranks}", ranks, lambda place, each=each: in_memory(place / "large", each))
    for each, ranks in (("rows", 2), ("rows", 4), ("columns", 4))
]
SOAK = [*IN_MEMORY, *SAVES, *(loading(*each) for each in MORE_PAIRS), *(training(*each) for each in MORE_TRAINED)]


if __name__ == "__main__":
    play_scenes(SOAK if "soak" in sys.argv else SCENES, Path(sys.argv[1]))
    sys.exit(0)


# --- the tests -------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.torchrun


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def scenes(place) -> Mapping[str, list[Any]]:
    return scenes_played(__file__, place)


@pytest.fixture(scope="module")
def soak_scenes(tmp_path_factory) -> Mapping[str, list[Any]]:
    return scenes_played(__file__, tmp_path_factory.mktemp("soak"), "soak", seconds=3000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_saved(scenes, place, layout):
    """By all ranks that have a part, and every byte is there."""
    assert set(returned(scenes[f"save-{layout}"])) == {1}
    (entry,) = verify_all(Catalog(open_store(str(place / layout))), deep=True)
    assert (entry.state, entry.problem) == ("whole", "")


def test_each_byte_is_written_once_and_not_by_one_rank(scenes, place):
    """Replicas share the work, and rank 0 has no more of it than the others; a checkpoint of whole tensors has no boxes."""
    sizes = {}
    for layout in ("one", "fsdp4", "hsdp", "tp_fsdp"):
        manifest = Catalog(open_store(str(place / layout))).newest().manifest
        assert manifest is not None
        sizes[layout] = {file.name: file.bytes for file in manifest.files if "-rank" in file.name}
        infos = [info for name in sizes[layout] for info in header_of(place / layout, name)]
        has_boxes = any(part.boxes for part in manifest.parts.values())
        assert has_boxes == (layout != "one")
        whole = sum(each.info(path).nbytes for part in manifest.parts.values() for path, each in part.boxes.items())
        assert sum(info.nbytes for info in infos) == whole
    assert not sizes["one"]
    assert {name.partition("-rank")[2][0] for name in sizes["hsdp"]} == set("0123")


def test_frozen_boxes_are_written_once(scenes, place):
    """Each rank refers to the file of its first save, also after a restart; the digests are those of a run that writes
    everything."""
    returned(scenes["fine-tuned"])
    tuned, whole = (Catalog(open_store(str(place / name))) for name in ("tuned", "tuned whole"))
    assert all(entry.state in ("whole", "base") for entry in verify_all(tuned, deep=True))
    for entry in tuned.entries(3):
        files = {file.path("").rpartition("/")[2]: file.base[:17] for file in entry.manifest.files if "frozen" in file.name}
        assert files == {f"model-frozen-rank{rank}-00001-of-00002.safetensors": "step-000000000001" for rank in (0, 1)}
        assert entry.manifest.shared_bytes > 61 * 61 * 4
    found, expected = (catalog.newest().manifest for catalog in (tuned, whole))
    assert found.step == expected.step == 6
    assert not expected.bases
    assert [found.parts[name].digest for name in ("model", "optimizer")] == [
        expected.parts[name].digest for name in ("model", "optimizer")
    ]


def header_of(url: Path, name: str) -> list[TensorInfo]:
    """The tensors in a shard."""
    (file,) = url.glob(f"step-*/{name}")
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return decode_header(data[8 : 8 + size], len(data) - 8 - size)


@pytest.mark.parametrize(("layout", "other", "how"), PAIRS)
def test_any_layout_loads_any_other(scenes, layout, other, how):
    """Parameters and moments, value by value: each says where it belongs. Read by each rank, or once for all."""
    for found in returned(scenes[f"load-{layout}-{other}-{how}"]):
        assert found == {"step": 1, "wrong": []}


@pytest.mark.parametrize(("other", "how"), SMALL_LOADS)
def test_pieces_of_whole_tensors_land_in_boxes(scenes, place, other, how, monkeypatch):
    """Pieces that two ranks have written of tensors that were whole, in stretches that end in the middle of a row."""
    assert set(returned(scenes["small-save"])) == {1}
    monkeypatch.setattr(layout_of_files, "BLOCK_BYTES", 64)
    manifest = Catalog(open_store(str(place / "small"))).newest().manifest
    assert manifest is not None
    assert manifest.parts["model"].slices
    for found in returned(scenes[f"small-{other}-{how}"]):
        assert found == {"step": 1, "wrong": []}


def test_buffers_are_each_ranks_own(scenes):
    """Where they differ; with other ranks, rank r takes those of rank r modulo the number of ranks that there were."""
    for ranks in (3, 4, 2):
        found = returned(scenes[f"buffers-{ranks}"])
        assert found == [[[rank % 3 + 1] * 5, [9]] for rank in range(ranks)]


def test_the_formats_reader_puts_boxes_together(scenes, place, tmp_path):
    """That of the documentation, which knows nothing of harness."""
    text = (Path(__file__).parents[2] / "docs/reference/format.md").read_text()
    found = re.search(r"^```python\n(# reader\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found
    (tmp_path / "reader.py").write_text(found[1])
    reader = runpy.run_path(str(tmp_path / "reader.py"))
    step, tensors = reader["read"](reader["newest"](place / "tp_fsdp"))
    assert step == 1
    for name, value in expected(Table()).items():
        assert (tensors[f"model/{name}"] == value.numpy()).all()
        assert (tensors[f"optimizer/state/{name}/exp_avg"] == 2 * value.numpy()).all()


def test_ranks_that_have_nothing_for_each_other_do_not_meet(scenes):
    """Where each wants what its own file has, they read at their own pace."""
    for own, each_round in returned(scenes["meetings"]):
        print(f"{own} meetings in {each_round} rounds")
        assert 4 * own < each_round


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "lost", "swapped"])
def test_whatever_piece_is_damaged_is_noticed(scenes, place, tmp_path, how):
    """Each file of each rank, and of each piece in it one byte: no reader takes anything."""
    assert set(returned(scenes["save-tp_fsdp6"])) == {1}
    shutil.copytree(place / "tp_fsdp6", tmp_path / "run")
    store, tried = open_store(str(tmp_path / "run")), 0
    entry = Catalog(store).newest()
    assert entry.manifest is not None
    files = {file.name: tmp_path / "run" / entry.directory / file.name for file in entry.manifest.files}
    whole = {name: file.read_bytes() for name, file in files.items()}

    def is_noticed(name: str) -> None:
        with pytest.raises(Corrupt):
            load.read(store, entry.directory, entry.manifest)
        files[name].write_bytes(whole[name])

    for name, data in whole.items():
        if how == "flipped":
            for at in places_in(data):
                files[name].write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
                is_noticed(name)
                tried += 1
            continue
        other = next((each for each in whole.values() if each != data and len(each) == len(data)), data[::-1])
        files[name].write_bytes({"cut": data[:-1], "longer": data + b"\0", "lost": b"", "swapped": other}[how])
        if how == "lost":
            files[name].unlink()
        is_noticed(name)
        tried += 1
    print(f"{tried} times {how}, in {len(files)} files")
    assert load.read(store, entry.directory, entry.manifest)["model"].keys() > {"tall", "row"}
    assert tried >= len(files) > 15


def places_in(data: bytes) -> list[int]:
    """A byte of a shard's header, and one in the middle of each piece behind it."""
    size = 8 + int.from_bytes(data[:8], "little")
    found, at = [size // 2], size
    for info in decode_header(data[8:size], len(data) - size):
        found += [at + info.nbytes // 2] if info.nbytes else []
        at += info.nbytes
    return found


@pytest.mark.parametrize("kind", DAMAGE)
def test_all_ranks_fall_back_together(scenes, kind):
    """Over a checkpoint of which a rank's file is damaged: nobody takes anything of it."""
    for found in returned(scenes[f"fault-{kind}"]):
        assert found == {"step": 1, "wrong": []}


def test_what_is_not_the_whole_is_refused_on_every_rank(scenes):
    """Tensors that only one rank has, and ranks that do not mean the same tensor."""
    one, other = returned(scenes["refusals"])
    assert one == other
    assert len(one) == 2
    assert one[0].startswith("Unsupported: model/other (float32[4, 3]): not sharded alike on rank 0 and on rank 1")
    assert one[1].startswith(
        "Unsupported: model/weight (float32[4, 3]) and 1 more: not sharded alike on rank 0 and on rank 1"
    )


def test_a_sharded_model_starts_from_what_others_have_saved(scenes):
    """Each rank takes its part of each tensor: of the weights, and of the optimizer's state."""
    assert returned(scenes["started"]) == [[]] * 3


def test_torchs_own_checkpoints_are_read_through_boxes(scenes, place):
    """Whoever has written which part. A tensor with a flipped bit is named, and so is one of which a part is missing: torch
    itself notices neither. What it has misplaced is refused, too."""
    assert returned(scenes["dcp-tp_fsdp"])[0] == []
    (said,) = returned(scenes["dcp-tp_fsdp6"])[0]
    assert "model.layers.2.weight" in said
    assert "mismatch sizes" in said
    (file,) = (place / "dcp-tp_fsdp").glob("__2_0.distcp")
    data, value = bytearray(file.read_bytes()), expected(Table())["tall"]
    at = data.index(value[3, 0, 7].numpy().tobytes() + value[3, 0, 8].numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.tall: expected the checksum in __2_0\.distcp, found another"):
        read_foreign(str(place / "dcp-tp_fsdp"), trust=True)
    metadata = pickle.loads((place / "dcp-tp_fsdp/.metadata").read_bytes())
    del metadata.state_dict_metadata["model.tall"].chunks[0]
    (place / "dcp-tp_fsdp/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(Corrupt, match=r"model\.tall: the parts in it are not the whole tensor: 180 items are in none"):
        read_foreign(str(place / "dcp-tp_fsdp"), trust=True)


REFUSED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard
import harness

dist.init_process_group("gloo")
mesh, model = dist.init_device_mesh("cpu", (2,)), torch.nn.Linear(3, 4)
if sys.argv[1] == "fsdp1":
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
elif sys.argv[1] == "partial":
    model.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
else:
    local = torch.ones(2 + dist.get_rank(), 3)
    whole = {"shape": torch.Size([4, 3]), "stride": (3, 1)}
    model.weight = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **whole))
harness.Run("run", {"model": model})
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["fsdp1", "partial", "on one rank"])
def test_a_program_that_is_refused_ends_as_a_mistake(tmp_path, kind):
    """Exit code 2, of the launch as well, which starts nothing again; one sentence of each rank that is not ended before it
    says it, no traceback."""
    (tmp_path / "script.py").write_text(REFUSED + "raise SystemExit(9)\n")
    command = ("-m", "harness", "launch", "--nproc-per-node=2", "--max-restarts=3", "--", "script.py", kind)
    with launch(tmp_path, None, command=command) as run:
        assert run.finish() == 2
        said = run.output()
    assert "Traceback" not in said
    ends = re.findall(r"^(rank \d|harness launch).*: model.*; (?:use|redistribute|give) ", said, re.MULTILINE)
    assert "harness launch" in ends
    assert {*ends} & {"rank 0", "rank 1"}
    assert len(ends) == len({*ends})


def test_the_doctor_examines_a_sharded_model(scenes, place):
    """It resumes on all ranks what was saved in another layout, and knows the size of the whole."""
    found = {check: [level, words] for check, level, words in returned(scenes["doctor-well"])[0]}
    assert not [check for check, (level, _) in found.items() if level == "error"]
    assert found["sharding"][1].startswith("the parts make up each tensor: 3(S(0)) ")
    assert found["resume"][1].startswith("step 1, every byte verified")
    values = sum(value.numel() for value in expected(Table()).values())
    size = (4 * values + 3 + len(expected(Table()))) * 4  # weights, moments and their average; the buffer and the steps
    assert found["state"][1] == f"a checkpoint has {size / 1e6:.1f} MB"


def test_the_doctor_finds_ranks_that_mean_different_tensors(scenes):
    """Before a run is begun."""
    found = {check: [level, words] for check, level, words in returned(scenes["doctor-mistaken"])[0]}
    level, words = found["sharding"]
    assert level == "error"
    assert words.startswith("average/state/values/layers.0.weight (float32[1, 5])")
    assert "not sharded alike on rank 0 and on rank 1" in words


def test_what_has_no_place_in_the_whole_is_refused_by_every_rank(scenes, place):
    """At the start, in one sentence that says what to use, and as a mistake. One rank alone may know of it."""
    sentences = [
        r"net: FullyShardedDataParallel flattens the parameters .*; use torch\.distributed\.fsdp\.fully_shard, or .*",
        r"adam: ZeroRedundancyOptimizer gives each rank its own shard .*; use torch\.distributed\.fsdp\.fully_shard, and .*",
        r"net/weight: a DTensor with the placement P\(sum\), .*; redistribute it to Shard or Replicate .* \(rank 0\)",
        r"net/weight: a DTensor with the placement Mask.*, which has no place in the whole .*; use Shard or Replicate .*",
        r"net/weight: a DTensor whose local part is a Quantized; convert the model after training, not before .*",
        r"net/weight: expected a local part of shape \[2, 3\] .* found \[3, 3\]; give DTensor\.from_local .* \(rank 1\)",
    ]
    for found in returned(scenes["placeless"]):
        for (said, exit_code), sentence in zip(found, sentences, strict=True):
            assert exit_code == 2
            assert re.fullmatch(sentence, said)
    assert not [*place.glob("placeless/*/step-*")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_whole_tensors(scenes, place, layout, tmp_path):
    """harness.load, and export: what the run has had, whoever has written which part of it."""
    parts = harness.load(place / layout)
    want = expected(Table())
    assert all(torch.equal(parts["model"][name], value) for name, value in want.items())
    assert all(torch.equal(parts["optimizer"]["state"][name]["exp_avg_sq"], value * 3) for name, value in want.items())
    store = open_store(str(place / layout))
    entry = Catalog(store).newest()
    assert entry.manifest is not None
    export_model(store, entry.directory, entry.manifest, str(tmp_path / "out.safetensors"))
    assert all(torch.equal(load_file(tmp_path / "out.safetensors")[name], value) for name, value in want.items())


def test_digests_of_wholes_are_equal_in_every_layout(scenes, place):
    """``inspect --digest``; those that a manifest has are of the boxes."""
    whole, own = {}, {}
    for layout in LAYOUTS:
        store = open_store(str(place / layout))
        entry = Catalog(store).newest()
        assert entry.manifest is not None
        whole[layout] = load.digests(store, entry.directory, entry.manifest)
        own[layout] = {name: part.digest for name, part in entry.manifest.parts.items()}
    for part in ("model", "optimizer"):
        assert {each[part] for each in whole.values()} == {own["one"][part]}
        assert len({own[layout][part] for layout in ("one", "fsdp2", "fsdp3", "tp2", "tp_fsdp")}) == 5
    assert read_json("inspect", str(place / "fsdp3"), "--digest", "--json")["digest"] == whole["fsdp3"]


@pytest.mark.soak
@pytest.mark.timeout(3600)  # of the scenes
@pytest.mark.parametrize(("layout", "other", "how"), MORE_PAIRS)
def test_every_layout_loads_every_other(soak_scenes, layout, other, how):
    """All pairs, both ways."""
    test_any_layout_loads_any_other(soak_scenes, layout, other, how)


@pytest.mark.parametrize(("kind", "ranks"), TRAINED)
def test_a_resume_has_the_bits_of_the_run_that_never_stopped(scenes, kind, ranks):
    """In the same layout: losses, weights, moments, each rank's own running averages and random numbers."""
    for found in returned(scenes[f"train-{kind}-{ranks}"]):
        assert found == {"from": 4, "losses": True, "same": True}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "ranks"), MORE_TRAINED)
def test_so_has_one_of_each_kind(soak_scenes, kind, ranks):
    """Mixed precision, CPU offload, accumulation, one group for all, parameters that stay whole, replicas, tensors in
    parallel."""
    test_a_resume_has_the_bits_of_the_run_that_never_stopped(soak_scenes, kind, ranks)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_restore_needs_room_for_a_ranks_part_and_a_window(soak_scenes, layout):
    """Not for the whole: its part is put in when all ranks have theirs. All ranks together read the checkpoint once."""
    found = returned(soak_scenes[f"memory-{layout}-4"])
    part, window = LARGE_BYTES // 4, 3 * scatter.ROUND_BYTES  # its own piece, and what it sends and gets
    print(f"a part has {part >> 20} MiB; more in memory: {[each['used'] >> 20 for each in found]} MiB")
    assert {each["step"] for each in found} == {1}
    assert max(each["used"] for each in found) < part + window < LARGE_BYTES
    assert LARGE_BYTES <= sum(each["read"] for each in found) < 1.01 * LARGE_BYTES


@pytest.mark.parametrize("kind", MIXTURES)
def test_gradients_are_clipped_as_those_of_one_process(scenes, kind):
    """Plain and sharded ones together, and those of several meshes. Where one rank has a bad loss, all learn of it."""
    for found in returned(scenes[f"clipped-{kind}"]):
        assert found == {"clips": True, "norms": True, "said": [True, True], "gradients": True, "bad": True}


STORMS = [  # the layout and its ranks; then those between, in which the samples are the same
    ("fsdp", 2, "fsdp", 3),
    ("fsdp", 3, "fsdp", 2),
    ("hsdp", 4, "fsdp", 2),
    ("tp_fsdp", 4, "fsdp", 3),
]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("layout", "ranks", "other", "other_ranks"), STORMS)
def test_a_kill_storm_leaves_no_trace(tmp_path, layout, ranks, other, other_ranks):
    """SIGKILLs of single ranks at random moments, saves included: the end has the bits of the run that lived, with bfloat16,
    accumulated gradients and processes that fetch. Killed again, with other ranks and then with as many as before, it
    trains the same samples."""
    steps, chance = 120 * KILLS, random.Random(seed := random.randrange(10**6))
    straight, storm = Storm(tmp_path / "straight", chance), Storm(tmp_path / "storm", chance)
    straight.train(layout, ranks, steps)
    storm.train(layout, ranks, steps, KILLS)
    print(f"seed {seed}: {storm.killed} SIGKILLs, {len(storm.attempts())} attempts, {storm.in_saves} of them left a save")
    assert storm.killed == KILLS
    assert len(storm.attempts()) >= 1 + KILLS
    one, two = straight.digests(steps), storm.digests(steps)
    assert {part: two[part] for part in ("model", "optimizer", "random", "loader")} == {
        part: one[part] for part in ("model", "optimizer", "random", "loader")
    }
    straight.train(layout, ranks, steps + 160)
    storm.train(other, other_ranks, steps + 80, kills=1)
    storm.train(layout, ranks, steps + 160, kills=1)
    assert storm.killed == KILLS + 2
    assert storm.digests(steps + 160)["loader"] == straight.digests(steps + 160)["loader"]


class Storm:
    """A run that is started, and killed, as often as it is wanted."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory, self.chance = directory, chance
        self.url, self.slow = directory / "run", directory / "run.slow"
        self.killed = 0  # ranks, each by a SIGKILL
        self.last_killed = 0  # the number of the attempt
        self.in_saves = 0  # of these, while a save was under way
        directory.mkdir()

    def attempts(self) -> list[Path]:
        return [*(self.url / "attempts").iterdir()]

    def newest_saved(self) -> int:
        """The number of the newest attempt that has committed a save."""
        return max((int(path.parent.name.split("-")[2]) for path in self.url.glob("step-*/manifest.json")), default=0)

    def digests(self, step: int) -> dict[str, str]:
        found = read_json("inspect", str(self.url), "--digest")
        assert found["step"] == step
        return found["digest"]

    def train(self, layout: str, ranks: int, steps: int, kills: int = 0) -> None:
        """Trains up to a step, after so many kills, each of another attempt, when that has committed a save."""
        program = str(Path(__file__).parents[1] / "support" / "sharded_run.py")
        # torch's own way to meet after a restart, which the program uses, takes several with a store that is shared.
        how = {"max_restarts": 2 * kills, "env": {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}} if kills else {}
        self.slow.touch() if kills else self.slow.unlink(missing_ok=True)
        with launch(self.directory, None, layout, "run", str(steps), ranks=ranks, command=(program,), **how) as run:
            for _ in range(kills):
                before = self.last_killed
                run.wait(lambda before=before: self.newest_saved() > before, "a save of the next attempt")
                time.sleep(self.chance.random() * 0.3)
                run.kill_rank(self.chance.randrange(ranks))
                self.killed += 1
                self.last_killed = max(int(path.name[:6]) for path in self.attempts())
                self.in_saves += any(not (save / "manifest.json").exists() for save in self.url.glob("step-*"))
            self.slow.unlink(missing_ok=True)
            run.succeed(600)
