"""Sharded models on real ranks: many scenarios, at several numbers of ranks, in one start of processes.

The ranks are forked from one process that has imported torch and what shards models. For each scenario so many of them form
a process group as it needs, and leave it afterwards; the others wait for the next one.
"""

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from harness.runtime.torch_import import import_torch
from tests.support.cluster import become_ranks, launch

TIMEOUT_SECONDS = 60
SHARDING = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")


class Scene(NamedTuple):
    """What so many ranks do together, in a directory of their own."""

    name: str
    ranks: int
    scenario: Callable[[Path], Any]


def play_scenes(scenes: Sequence[Scene], directory: Path) -> None:
    """On every rank: goes through the scenes in order and files what each returns, or raises."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for number, scene in enumerate(scenes):
        if rank >= scene.ranks:
            continue
        os.environ |= {"WORLD_SIZE": str(scene.ranks), "LOCAL_WORLD_SIZE": str(scene.ranks)}
        place = f"file://{directory}/join-{number}"
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=scene.ranks, timeout=timeout)
        try:
            result = {"returned": scene.scenario(directory)}
        except Exception as error:
            result = {"raised": type(error).__name__, "message": str(error), "where": traceback.format_exc()}
        (directory / f"{scene.name}.{rank}.json").write_text(json.dumps(result))
        dist.destroy_process_group()


def scenes_played(file: str, directory: Path, ranks: int, *arguments: str) -> Mapping[str, list[Any]]:
    """Starts a test file as a script on some ranks, lets it play its scenes, and returns the ranks' results of each."""
    with launch(directory, None, *arguments, command=(__file__, str(ranks), file, str(directory))) as run:
        run.succeed(600)
    found: dict[str, list[Any]] = {}
    for path in sorted(directory.glob("*.*.json")):
        found.setdefault(path.name.rsplit(".", 2)[0], []).append(json.loads(path.read_text()))
    return found


if __name__ == "__main__":
    import_torch(*SHARDING)
    become_ranks(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
