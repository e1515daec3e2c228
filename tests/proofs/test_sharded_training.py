"""``harness train`` with a sharded model: the same training as with DDP, and the same bits after a death.

The batches, the micro-batches and the evaluation divide unevenly among the ranks: all go through the model equally often.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from harness import Evaluation, Run, Task
from harness.config import WorldConfig
from harness.distributed.world import join_world
from harness.errors import ConfigError
from tests.support.cluster import returned, train_here
from tests.support.sharding import Scene, play_scenes, scenes_played

STEPS = 7
TRAIN = {"steps": STEPS, "global_batch_size": 10, "micro_batch_size": 2, "clip_grad_norm": 1.0}


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 47

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.linspace(-1, 1, 6) * (index % 7 + 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def task() -> Task:
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 1))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch).squeeze(1) - batch.sum(1).sin()).square().mean()

    def measure(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"error": loss(model, batch)}

    numbers = Numbers()
    return Task(
        model=model,
        dataset=Subset(numbers, range(42)),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
        loss=loss,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS),
        evaluation=Evaluation(Subset(numbers, range(42, 47)), measure, metric="error", batch_size=1),
    )


def trained(
    url: Path, parallel: str, ranks: int, dies_after: int | None = None, init_from: Path | None = None, **fsdp: Any
) -> dict[str, Any]:
    """The end of a training, as rank 0 has logged it."""
    begin = {"init_from": str(init_from), "init_optimizer": True} if init_from else {}
    world = join_world(WorldConfig(device="cpu"))
    jsonl = url.with_suffix(f".{world.rank}.jsonl")
    step, reached = Run.step, [0]

    def counted(run: Run, /, **metrics: Any) -> None:
        step(run, **metrics)
        reached[0] += 1
        if reached[0] == dies_after:
            raise InterruptedError

    Run.step = counted
    try:
        train_here(
            task,
            world,
            url=url,
            **begin,
            train={**TRAIN, "parallel": parallel},
            fsdp={"wrap": ["Block"], **fsdp} if parallel != "ddp" else {},
            checkpoint={"every_steps": 2},
            evaluation={"every_steps": 3},
            log={"jsonl": str(jsonl), "every_steps": 1},
        )
    except InterruptedError:
        return {}
    finally:
        Run.step = step
        world.let_go()
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()] if world.rank == 0 else []
    steps = {line["step"]: line["loss"] for line in lines if line["event"] == "train"}
    errors = {line["step"]: line["error"] for line in lines if line["event"] == "evaluate"}
    return {"losses": [steps[each] for each in sorted(steps)], "errors": [errors[each] for each in sorted(errors)]}


def compared(place: Path, parallel: str, ranks: int) -> dict[str, Any]:
    """The training without a death, with one, and with DDP."""
    options = {"shard_size": 2} if parallel == "hsdp" else {}
    straight = trained(place / f"straight-{parallel}-{ranks}", parallel, ranks, **options)
    trained(place / f"{parallel}-{ranks}", parallel, ranks, dies_after=5, **options)
    again = trained(place / f"{parallel}-{ranks}", parallel, ranks, **options)
    return {"straight": straight, "again": again, "ddp": trained(place / f"ddp-{parallel}-{ranks}", "ddp", ranks)}


def started(place: Path) -> list[dict[str, Any]]:
    """Trainings that go on from the weights and moments of another one: with FSDP, and with DDP."""
    trained(place / "first", "fsdp", 3)
    return [trained(place / f"further-{each}", each, 3, init_from=place / "first") for each in ("fsdp", "ddp")]


def refused(place: Path) -> list[str]:
    """What does not fit, as every rank says."""
    found = []
    for options in ({"wrap": ["Blok"]}, {"shard_size": 2}):
        try:
            trained(place / "refused", "hsdp", 3, **options)
        except ConfigError as error:
            found.append(str(error))
    return found


CASES = [("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]
SCENES = [Scene(f"{kind}-{ranks}", ranks, lambda place, case=(kind, ranks): compared(place, *case)) for kind, ranks in CASES]
SCENES.append(Scene("started", 3, started))
SCENES.append(Scene("refused", 3, refused))


if __name__ == "__main__":
    play_scenes(SCENES, Path(sys.argv[1]))
    sys.exit(0)


pytestmark = [pytest.mark.torchrun, pytest.mark.soak]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Mapping[str, list[Any]]:
    return scenes_played(__file__, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_a_resume_has_the_same_bits(scenes, kind, ranks):
    """Losses and evaluations of each step are those of the run that never stopped."""
    found = returned(scenes[f"{kind}-{ranks}"])[0]
    assert len(found["straight"]["losses"]) == STEPS
    assert found["again"] == found["straight"]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_it_is_the_training_of_ddp(scenes, kind, ranks):
    """But for the order in which gradients are added up."""
    found = returned(scenes[f"{kind}-{ranks}"])[0]
    for name in ("losses", "errors"):
        assert found["straight"][name] == pytest.approx(found["ddp"][name], rel=1e-4)


def test_it_starts_from_another_run(scenes):
    """With ``init_from``: each rank takes its part, and the losses go on from where they were."""
    sharded, ddp = returned(scenes["started"])[0]
    for name in ("losses", "errors"):
        assert sharded[name] == pytest.approx(ddp[name], rel=1e-4)
    assert sharded["losses"][0] < 0.5 * returned(scenes["fsdp-3"])[0]["straight"]["losses"][0]


def test_what_does_not_fit(scenes):
    """A class that the model has not, and a number of ranks that cannot be divided."""
    for wrap, size in returned(scenes["refused"]):
        assert wrap == "fsdp.wrap: the model has no Blok; it has Block, Linear"
        assert size == "train.parallel hsdp: expected fsdp.shard_size to divide the 3 ranks, found 2"
