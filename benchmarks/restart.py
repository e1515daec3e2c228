"""How long a run stands still when a rank is killed: from SIGKILL to the next finished optimizer step.

    python benchmarks/restart.py [--rounds 5] [--kills 3] [--layers 12] [--transformers]

Two contenders train the same model on two ranks and load the same state after each kill: ``harness launch -- train``, which
verifies every byte, compares the ranks and claims an attempt, and the script that one writes by hand (``bare`` below) under
torchrun: DDP, ``torch.save`` over the only file, ``torch.load`` and two ``load_state_dict``. With ``--transformers`` both
are scripts that train a GPT-2 of that package (``requirements.txt`` has it): harness's has a ``harness.Run``, and is started
with ``--preload``. They take turns, so that both see the same machine; each round is a fresh launch, in which rank 1 is
killed several times. The ratio is that of the medians, with the smallest and largest ratio of the rounds' medians as its
spread.
Processor time is that of rank 0's own process until its first step begins: imports, the model, DDP, the restore.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

RANKS = 2
SAVE_EVERY_STEPS = 10
MOST_STEPS = 10**6
WIDTH = 1024  # a layer has a million parameters: 4 MB, and 12 MB of state with AdamW's moments


def build(layers: int, folder: str):
    """A task for harness."""
    import torch
    from torch.utils.data import TensorDataset

    from harness import Task

    model, samples, loss = make(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    optimizer.register_step_post_hook(notes(folder, model))
    return Task(
        model=model, dataset=TensorDataset(samples), optimizer=optimizer, loss=lambda model, batch: loss(model, batch[0])
    )


def gpt2():
    """A model of somebody else's package, which takes as long to import as torch: 120 MB of state."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=384, n_layer=4, n_head=6, n_positions=64))


def make(layers: int):
    """The model, the samples, and the loss of a batch."""
    import torch
    from torch import nn

    if layers:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        return model, torch.randn(64, WIDTH), lambda model, batch: nn.functional.mse_loss(model(batch), batch)
    return gpt2(), torch.randint(0, 8192, (64, 8)), lambda model, batch: model(input_ids=batch, labels=batch).loss


def bare(layers: int, folder: str) -> None:
    """The loop that one writes by hand."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model, samples, loss = make(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    path, step = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    wrapped = nn.parallel.DistributedDataParallel(model)
    note = notes(folder, model)
    while step < MOST_STEPS:
        batch = samples[(step * 8 + dist.get_rank() * 4) % 64 :][:4]
        loss(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        note()
        if dist.get_rank() == 0 and step % SAVE_EVERY_STEPS == 0:
            partial = path.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
            partial.replace(path)


def with_run(layers: int, folder: str) -> None:
    """The same with a harness.Run."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import TensorDataset

    import harness

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model, samples, loss = make(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    loader = harness.Loader(TensorDataset(samples), global_batch_size=8)
    state = {"model": wrapped, "optimizer": optimizer, "loader": loader}
    run = harness.Run(str(Path(folder, "run")), state, every_steps=SAVE_EVERY_STEPS, keep_last=1)
    note = notes(folder, model)
    for _ in run.epochs(MOST_STEPS):
        for (batch,) in loader:
            loss(wrapped, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            note()
            run.step()


def notes(folder: str, model: Any) -> Callable[..., None]:
    """Writes a line for each finished step of rank 0: its process, the time, the processor time before its first step."""
    if os.environ["RANK"] != "0":
        return lambda *_: None
    log = open(Path(folder, "steps"), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # as long as the process lives
    used: list[float] = []
    model.register_forward_pre_hook(lambda *_: used.append(time.process_time()))
    return lambda *_: log.write(f"{os.getpid()} {time.time()} {used[0]}\n") and None


@contextmanager
def training(name: str, layers: int, folder: Path) -> Iterator[None]:
    """A contender at work."""
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            {
                "task": f"{__file__}:build",
                "args": {"layers": layers, "folder": str(folder)},
                "train": {"steps": MOST_STEPS, "global_batch_size": 8},
                "checkpoint": {"url": str(folder / "run"), "every_steps": SAVE_EVERY_STEPS, "keep_last": 1},
            }
        )
    )
    options = [f"--nproc-per-node={RANKS}", "--max-restarts=100"]
    script = [__file__, f"--as={name}", f"--folder={folder}", "--layers", str(layers)]
    command = {
        "bare": ["-m", "torch.distributed.run", "--standalone", *options, *script],
        "harness": ["-m", "harness", "launch", *options, "--", "train", str(config)],
        "run": ["-m", "harness", "launch", "--preload=transformers.models.gpt2.modeling_gpt2", *options, "--", *script],
    }[name]
    # Without the second one a restart of torch 2.13 may call at a dead rank's address, and burn another: for both the best.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
        finally:
            for pid in [process.pid, *below(process.pid)]:
                with suppress(ProcessLookupError):  # who watches its parent is gone with it
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    """The children of a process, in the order in which they came."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def below(pid: int) -> list[int]:
    """Everything that a process has started."""
    return [each for child in children(pid) for each in (child, *below(child))]


class Step(NamedTuple):
    """A step of rank 0: its process, when it was finished, the processor time of the process before its first one."""

    pid: int
    finished_time: float
    processor_seconds: float


def finished_steps(folder: Path) -> list[Step]:
    """Those of all starts."""
    path = folder / "steps"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        Step(int(pid), float(when), float(used))
        for pid, when, used in (line.split() for line in lines if line.endswith("\n"))
    ]


def wait_for_steps(folder: Path, count: int, after_time: float) -> list[Step]:
    """The steps after a time, once there are so many by processes that began after it."""
    old = {step.pid for step in finished_steps(folder) if step.finished_time < after_time}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [step for step in finished_steps(folder) if step.pid not in old]
        if len(steps) >= count:
            return steps
        time.sleep(0.01)
    raise SystemExit(f"no steps within two minutes; it said:\n{(folder / 'output').read_text()[-3000:]}")


def one_round(name: str, layers: int, kills: int) -> list[tuple[float, float]]:
    """For each kill the seconds to the next step, and the processor time of rank 0."""
    with tempfile.TemporaryDirectory() as place, training(name, layers, Path(place)):
        folder, found = Path(place), []
        steps = wait_for_steps(folder, SAVE_EVERY_STEPS + 2, 0.0)
        for _ in range(kills):
            rank_0 = steps[-1].pid
            parent = int(Path(f"/proc/{rank_0}/stat").read_text().rpartition(")")[2].split()[1])
            (rank_1,) = [pid for pid in children(parent) if pid != rank_0 and os.getsid(pid) == pid]
            killed_time = time.time()
            os.kill(rank_1, signal.SIGKILL)
            steps = wait_for_steps(folder, SAVE_EVERY_STEPS + 2, killed_time)
            found.append((steps[0].finished_time - killed_time, steps[0].processor_seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3, help="in each round")
    parser.add_argument("--layers", type=int, default=12, help="12 MB of state each")
    parser.add_argument("--transformers", action="store_true", help="a GPT-2 in their place")
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.name:
        (bare if arguments.name == "bare" else with_run)(arguments.layers, arguments.folder)
        return
    layers, mine = (0, "run") if arguments.transformers else (arguments.layers, "harness")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and nothing goes on training
    rounds: dict[str, list[list[tuple[float, float]]]] = {"bare": [], mine: []}
    for index in range(arguments.rounds):
        for name in ("bare", mine) if index % 2 else (mine, "bare"):
            found = one_round(name, layers, arguments.kills)
            words = "  ".join(f"{seconds:.2f} s ({used:.2f})" for seconds, used in found)
            print(f"round {index + 1}  {name:<8} {words}", flush=True)
            rounds[name].append(found)
    state = f"{12 * layers} MB of state" if layers else "a GPT-2 of transformers"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {state}")
    for column, what in enumerate(("kill to step", "processor time")):
        values = {name: [[kill[column] for kill in found] for found in of] for name, of in rounds.items()}
        for name, found in values.items():
            flat = [value for each in found for value in each]
            print(f"{what}, {name:<8} median {statistics.median(flat):.2f} s  ({min(flat):.2f} to {max(flat):.2f})")
        mine_of, bare_of = ([statistics.median(each) for each in values[name]] for name in (mine, "bare"))
        ratios = [one / other for one, other in zip(mine_of, bare_of, strict=True)]
        medians = [statistics.median(value for each in values[name] for value in each) for name in (mine, "bare")]
        print(f"{what}, ratio {medians[0] / medians[1]:.2f}  (rounds: {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
