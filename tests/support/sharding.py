"""Sharded models on real ranks: many scenarios, at several numbers of ranks, from one import of torch.

One process imports torch and what shards models. For each scenario it forks so many ranks, which form a process group, file
what the scenario has returned, and end at once. So no process has more than one process group in its life, and takes none
down: a rank that had formed and left forty of them once died in malloc. What one scenario breaks, no other one meets.
"""

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from harness.runtime.torch_import import import_torch
from tests.support.cluster import launch

TIMEOUT_SECONDS = 60
SHARDING = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")


class Scene(NamedTuple):
    """What so many ranks do together, in a directory of their own."""

    name: str
    ranks: int
    scenario: Callable[[Path], Any]


def play_scenes(scenes: Sequence[Scene], directory: Path) -> None:
    """Goes through the scenes in order, each on ranks of its own. A rank that dies has raised what ended it."""
    import torch

    torch.set_num_threads(1)
    _warm_up()
    for number, scene in enumerate(scenes):
        ranks = {}
        for rank in range(scene.ranks):
            if not (pid := os.fork()):
                _play(scene, rank, directory, f"file://{directory}/join-{number}")
            ranks[pid] = rank
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if code := os.waitstatus_to_exitcode(status):
                _file(directory, scene, rank, {"raised": "Death", "message": f"exit code {code}"})


def _warm_up() -> None:
    """What the first one would import that takes such a step; without a backward pass, after which nothing may be forked."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


def _play(scene: Scene, rank: int, directory: Path, place: str) -> NoReturn:
    """A rank's life."""
    import torch.distributed as dist

    try:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scene.ranks, "LOCAL_WORLD_SIZE": scene.ranks}
        os.environ |= {name: str(value) for name, value in told.items()}
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=scene.ranks, timeout=timeout)
        result = {"returned": scene.scenario(directory)}
    except Exception as error:
        result = {"raised": type(error).__name__, "message": str(error), "where": traceback.format_exc()}
    _file(directory, scene, rank, result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _file(directory: Path, scene: Scene, rank: int, result: Mapping[str, Any]) -> None:
    (directory / f"{scene.name}.{rank}.json").write_text(json.dumps(result))


def scenes_played(file: str, directory: Path, *arguments: str, seconds: float = 600) -> Mapping[str, list[Any]]:
    """Starts a test file as a script, lets it play its scenes, and returns the ranks' results of each."""
    with launch(directory, None, *arguments, command=(__file__, file, str(directory))) as run:
        run.succeed(seconds)
    found: dict[str, list[Any]] = {}
    for path in sorted(directory.glob("*.*.json")):
        found.setdefault(path.name.rsplit(".", 2)[0], []).append(json.loads(path.read_text()))
    return found


if __name__ == "__main__":
    import_torch(*SHARDING)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
