"""What the ranks of a run say to each other, by number of ranks: counted, not timed.

    python benchmarks/ranks.py [--ranks 2 4 8] [--up-to 4096]

Real ranks train a small model with a ``Run``: they start, take steps, log, save, are asked to stop, and resume. Each
collective over the control group is counted, with the bytes that rank 0 gets and the bytes that it gives to others (its own
value counts once in a collective). What the numbers of ranks show is a line: the bytes at ``--up-to`` are those of the line
through the two largest numbers. The gradients of DDP are the program's own, and do not count.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.distributed.world import ROW_BYTES, TEXT_BYTES, TorchrunWorld, World, join_world
from harness.errors import Stopped

EVERY, LOGGED, STOP_AT = 10, 13, 25  # steps
MOMENTS = ("a start", "a resume", "a step", "a logged step", "the first save", "a save", "a stop")


class Count:
    """Counts the collectives of a world, and the bytes in them, by the moment in which they come."""

    def __init__(self, world: World) -> None:
        self.moment = ""
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # collectives, bytes
        calls = "broadcast gather all_gather all_gather_floats all_gather_text exchange hand_out begin_max"
        for name in calls.split():
            setattr(world, name, self._counting(getattr(world, name), name, world.size))

    def _counting(self, call: Callable[..., Any], name: str, size: int) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            match name:
                case "gather":
                    moved = sum(max(len(pickle.dumps(each)), ROW_BYTES) for each in result or ())
                case "all_gather_text":
                    moved = size * TEXT_BYTES
                case "broadcast" | "all_gather":
                    moved = sum(len(pickle.dumps(each)) for each in (result if isinstance(result, list) else [result]))
                case "all_gather_floats":
                    moved = 8 * size * len(arguments[0])
                case "begin_max":
                    moved = 8 * len(arguments[0])
                case _:
                    moved = arguments[0].numel() + sum(each.numel() for each in arguments[1] if torch.is_tensor(each))
            entry = self.found[self.moment]
            entry[0] += 1
            entry[1] += moved
            return result

        return counting


def rank(url: str) -> None:
    """Trains as one rank. Rank 0 prints what it has counted."""
    world = join_world()
    assert isinstance(world, TorchrunWorld)
    count = Count(world)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    loader = Loader(TensorDataset(torch.ones(4096, 8)), world.size)
    is_new = not Path(url).exists()
    count.moment = "a start" if is_new else "a resume"
    stop, state = StopRequest(), {"model": model, "optimizer": optimizer, "loader": loader}
    run = Run(url, state, every_steps=EVERY, world=world, stop=stop, config={"log": {"every_steps": LOGGED}})
    with contextlib.closing(run), contextlib.suppress(Stopped):
        for _ in run.epochs(100):
            for (x,) in loader:
                model(x).mean().backward()
                optimizer.step()
                step = run.global_step + 1
                count.moment = "a logged step" if step == LOGGED else "a step" if step < STOP_AT else "a stop"
                if step >= STOP_AT:
                    stop.ask("the end")
                run.step(loss=step)
                count.moment = {EVERY: "the first save", 2 * EVERY: "a save"}.get(step, count.moment)
    if world.rank == 0:
        found = {moment: count.found[moment] for moment in MOMENTS if moment in count.found}
        found.get("a step", [0, 0])[:] = [each / (STOP_AT - 2) for each in found.get("a step", [0, 0])]
        print(json.dumps(found if is_new else {"a resume": found["a resume"]}))
    world.close()


def counted(ranks: int) -> dict[str, list[float]]:
    """What rank 0 of so many has counted."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
            command += [f"--nproc-per-node={ranks}", __file__, "--rank", f"{folder}/run"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found |= json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def table(numbers: Sequence[int], up_to: int) -> str:
    found = {ranks: counted(ranks) for ranks in numbers}
    *_, low, high = sorted(numbers)
    lines = [
        f"| of | collectives | {' | '.join(f'bytes, {ranks} ranks' for ranks in numbers)} | a further rank | at {up_to:,} |",
        "| --- | --- |" + " --- |" * (len(numbers) + 2),
    ]
    for moment in MOMENTS:
        own = [found[ranks][moment] for ranks in numbers]
        slope = (found[high][moment][1] - found[low][moment][1]) / (high - low)
        bytes_ = " | ".join(f"{each[1]:,.0f}" for each in own)
        most = found[high][moment][1] + slope * (up_to - high)
        lines.append(f"| {moment} | {own[-1][0]:.3g} | {bytes_} | {slope:,.0f} | {most:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--up-to", type=int, default=4096)
    parser.add_argument("--rank", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
    else:
        print(table(options.ranks, options.up_to))


if __name__ == "__main__":
    main()
