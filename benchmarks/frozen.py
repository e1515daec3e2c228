"""What the saves of a fine-tune cost, whose frozen weights are written once, and those of a run that trains everything.

    python benchmarks/frozen.py [--gigabytes 0.5] [--part 0.01] [--saves 10] [--rounds 3] [--folder DIRECTORY]

A model of frozen matrices, each with a trained sum of low rank, saves after each of its steps, which last a second. A round
trains in fresh processes with ``checkpoint.incremental`` off (before) and on (now). Told are the bytes of the first save and
of the largest later one, and medians of the seconds of the later ones: until they are durable, and in which the training
waits. The floor is the trained parameters and their two moments in bytes, and the time in which the whole state is hashed
and these bytes are written with fsync. Then the same for a state of the same size that is trained whole.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDE = 2048


def fine_tune(url: str, frozen_bytes: int, part: float, saves: int, *, incremental: bool) -> None:
    """In a process of its own; with a part of 1 everything is trained."""
    import torch
    from torch import nn

    from harness import Run

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(SIDE, SIDE, bias=False).requires_grad_(part == 1)
            rank = 0 if part == 1 else max(round(part * SIDE / 2), 1)
            self.down, self.up = nn.Linear(SIDE, rank, bias=False), nn.Linear(rank, SIDE, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x)) if self.down.weight.numel() else self.base(x)

    torch.manual_seed(1)
    model = nn.Sequential(*(Layer() for _ in range(round(frozen_bytes / (4 * SIDE * SIDE)))))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad and each.numel()])
    config = {"log": {"every_steps": None}, "checkpoint": {"incremental": incremental}}
    run = Run(url, {"model": model, "optimizer": optimizer}, every_steps=1, keep_last=2, config=config)
    for _ in run.steps(saves):
        optimizer.zero_grad()
        model(torch.randn(4, SIDE)).square().mean().backward()
        optimizer.step()
        time.sleep(1)
        run.step()


def measured(folder: Path, name: str, *arguments: Any) -> list[dict[str, Any]]:
    url = folder / name
    subprocess.run([sys.executable, __file__, "--run", json.dumps([str(url), *arguments])], check=True, capture_output=True)
    lines = (line for path in sorted((url / "metrics").iterdir()) for line in path.read_text().splitlines())
    saves = [each for each in map(json.loads, lines) if each["event"] == "save"]
    subprocess.run(["rm", "-rf", str(url)], check=True)
    return saves


def floor(folder: Path, all_bytes: int, changed_bytes: int) -> float:
    import xxhash

    data = os.urandom(1 << 20)
    began = time.perf_counter()
    whole = xxhash.xxh3_128()
    for _ in range(all_bytes >> 20):
        whole.update(data)
    with (folder / "floor").open("wb") as file:
        for _ in range(changed_bytes >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=0.5)
    options.add_argument("--part", type=float, default=0.01)
    options.add_argument("--saves", type=int, default=10)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", help="where the runs are made (default: the folder for temporary files)")
    options.add_argument("--run", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.run:
        url, frozen_bytes, part, saves, incremental = json.loads(chosen.run)
        fine_tune(url, frozen_bytes, part, saves, incremental=incremental)
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder, size_bytes = Path(name), round(chosen.gigabytes * 1e9)
        for title, each_bytes, part in (
            (f"{chosen.part:.0%} is trained", size_bytes, chosen.part),
            ("all is trained", size_bytes // 3, 1),
        ):
            found: dict[str, list[list[dict[str, Any]]]] = {"before": [], "now": []}
            for _ in range(chosen.rounds):
                for what, rounds in found.items():
                    rounds.append(measured(folder, what, each_bytes, part, chosen.saves, what == "now"))
            base_bytes = round(each_bytes / (4 * SIDE * SIDE)) * 4 * SIDE * SIDE
            changed_bytes = 3 * (base_bytes if part == 1 else round(base_bytes * 2 * max(round(part * SIDE / 2), 1) / SIDE))
            seconds = floor(folder, changed_bytes + (base_bytes if part < 1 else 0), changed_bytes)
            print(title, flush=True)
            for what, rounds in found.items():
                later = [save for saves in rounds for save in saves[1:]]
                durable, blocked = (statistics.median(each[key] for each in later) for key in ("seconds", "blocked_seconds"))
                first, largest = rounds[0][0]["bytes"], max(each["bytes"] for each in later)
                sizes = f"first {first / 1e6:8.2f} MB  later {largest / 1e6:8.2f} MB"
                print(f"  {what:<7} {sizes}  durable {durable:6.3f} s  blocked {blocked:7.4f} s", flush=True)
            print(f"  floor   {'':17} later {changed_bytes / 1e6:8.2f} MB  durable {seconds:6.3f} s", flush=True)


if __name__ == "__main__":
    main()
