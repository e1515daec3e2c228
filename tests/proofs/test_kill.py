"""SIGKILL at any moment: what was committed stays, the run goes on from it, and ends with the bits of the run that lived."""

import json
import os
import platform
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import harness as harness_package
from harness import Task
from harness.runtime.environment import rank
from tests.support.cluster import (
    Run,
    alive,
    committed,
    harness,
    held,
    hold,
    launch,
    newest,
    read_json,
    release,
    train_undisturbed,
    wait_until,
)

STEPS, EVERY = 24, 3
STORM_STEPS = 240


class Noisy(Dataset):
    """Sixty points under noise that is drawn anew at every fetch."""

    def __init__(self) -> None:
        self.x = torch.randn(60, 32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        x = self.x[index]
        return x + 0.1 * torch.randn(32), x.sum().unsqueeze(0)


def build(place: str = ".", hold_at: int | None = None, alone: bool = False, norm: bool = False) -> Task:
    """A model of a megabyte with dropout, and a ``norm`` over the batch where one is asked for. In ``place``, the file
    ``paused`` keeps a process from starting, ``slow`` makes steps take longer, and the process (``alone``: rank 0's) waits
    at step ``hold_at`` until it is released."""
    Path(place, f"started.{os.getpid()}").touch()
    wait_until(lambda: not Path(place, "paused").exists(), "leave to start")
    model = nn.Sequential(
        *(nn.Linear(32, 256), *([nn.BatchNorm1d(256)] if norm else []), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.9)
    slow = Path(place, "slow")

    def loss(model: nn.Module, batch) -> torch.Tensor:
        if scheduler.last_epoch == hold_at and not (alone and rank()):
            hold(Path(place, "step"))
        x, y = batch
        predicted = model(x)
        if slow.exists():
            time.sleep(0.02)  # a storm needs a run that takes its time, where others take it
        return F.mse_loss(predicted, y)

    return Task(model, Noisy(), optimizer, loss, scheduler)


class Formula(Dataset):
    """A million million samples, each a function of its number."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int):
        x = torch.tensor([index % (97 + 2 * each) for each in range(32)], dtype=torch.float32) / 100
        return x, x.sum().unsqueeze(0)


def build_without_end(**args) -> Task:
    """The same model, for an epoch that nobody will see the end of."""
    return replace(build(**args), dataset=Formula())


def config(url: str, *, steps: int = STEPS, every: int = EVERY, workers: int = 0, keep: str | None = None, **args) -> dict:
    """The run of this file."""
    return {
        "task": f"{__file__}:build",
        "args": args,
        "train": {"steps": steps, "global_batch_size": 8, "clip_grad_norm": 1.0},
        "data": {"workers": workers},
        "checkpoint": {"url": url, "every_steps": every, "keep": keep},
        "stop": {"grace_seconds": 5},  # for a rank that waits for one that died while they started
    }


def digests(*url: str) -> dict[str, str]:
    """What a run ended with, and all that a resume starts from: model, optimizer, random states."""
    found = read_json("inspect", *url)
    return {name: found["digest"][name] for name in ("model", "optimizer", "random")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The digests at the end of the run on two ranks that nothing happens to."""
    directory = tmp_path_factory.mktemp("straight")
    train_undisturbed(directory, config("run", every=STEPS), ranks=2)
    return digests(str(directory / "run"))


# --- during a save ---------------------------------------------------------------------------------------------------

# The steps whose saves are interrupted, where, and the rank that is killed there; test_crash_points has every moment.
MOMENTS = {
    6: ("within a shard", 0),
    9: ("before the manifest", 0),
    12: ("after the manifest", 0),
    15: ("before the manifest", 1),
}


class Gated(AbstractFileSystem):
    """Local files as a store like any other, that stops at the moments above, each once.

    It publishes what it has been given so far under the final name: nothing is hidden from a reader.
    """

    protocol = "gated"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        moment, place = _moment_of(path)
        name = os.path.basename(path)
        first, manifest = name == "model.safetensors", name == "manifest.json"
        if moment == "before the manifest" and manifest:
            hold(place)
        if moment == "within a shard" and first:
            Path(path).write_bytes(value[: len(value) // 2])
            hold(place)
        Path(path).write_bytes(value)
        if moment == "after the manifest" and manifest:
            hold(place)

    def ls(self, path, detail=True, **kwargs):
        return LocalFileSystem().ls(path, detail)

    def info(self, path, **kwargs):
        return LocalFileSystem().info(path)

    def rm_file(self, path):
        os.unlink(path)

    def rmdir(self, path):
        os.rmdir(path)

    def _open(self, path, mode="rb", **kwargs):
        return open(path, mode)


fsspec.register_implementation("gated", Gated, clobber=True)


def _moment_of(path: str) -> tuple[str, Path]:
    """Which moment an object's save is interrupted at ("" for none), and the file by which it is known."""
    run, directory, _ = path.rsplit("/", 2)
    step = int(directory.split("-")[1]) if directory.startswith("step-") else 0
    return MOMENTS.get(step, ("", 0))[0], Path(run).with_name(f"saving-{step}")


@pytest.mark.torchrun
@pytest.mark.parametrize("steps", [[6, 12, 15], pytest.param(list(MOMENTS), marks=pytest.mark.soak)], ids=["some", "all"])
def test_killed_at_any_moment_of_a_save(tmp_path, straight, steps):
    """Whichever rank dies at whichever moment of a save: ``ls`` has the newest commit first among the whole ones, it is the
    earlier one unless the manifest was complete, and the run goes on from there, in the end with the same bits."""
    url, paused = tmp_path / "run", tmp_path / "paused"
    for step in MOMENTS.keys() - steps:
        release(tmp_path / f"saving-{step}")
    with launch(tmp_path, config(f"gated://{url}", place=str(tmp_path)), ranks=2, max_restarts=len(steps)) as run:
        for number, step in enumerate(steps, start=1):
            moment, victim = MOMENTS[step]
            run.wait(lambda step=step: held(tmp_path / f"saving-{step}"), f"{moment} of step {step}")
            paused.touch()  # the next attempt waits until we have looked
            before = run.workers()
            run.kill_rank(victim)
            release(tmp_path / f"saving-{step}")  # rank 0, where it is the other one that died, goes on saving
            run.wait(lambda before=before: before.items().isdisjoint(run.workers().items()), "the end of the attempt")
            committed = step if moment == "after the manifest" or victim != 0 else step - EVERY
            whole = [entry["step"] for entry in read_json("ls", str(url)) if entry["state"] == "whole"]
            if victim != 0 and whole[0] == step + EVERY:  # it had trained on, and could finish that one, too
                committed += EVERY
            assert whole == list(range(committed, 0, -EVERY)), moment
            paused.unlink()
            assert run.wait_for("resume", attempt=number + 1)["step"] == committed, moment
        run.succeed()
    assert digests(str(url)) == straight


# --- what a survivor keeps -------------------------------------------------------------------------------------------


@pytest.mark.torchrun
def test_a_survivor_keeps_the_step(tmp_path, straight):
    """Two deaths, and nothing durable before the end: in one the survivor is in a long step of its own, and its thread keeps
    the state, in the other it hears of the death in a collective. Each rank keeps states in a place of its own, as on two
    machines: the one that has died is given the state by the other. No step is lost, and the bits are the same."""
    for rank_ in range(2):
        (tmp_path / f"keep-{rank_}").mkdir()
    settings = config("run", every=1000, place=".", hold_at=10, alone=True, keep=f"{tmp_path}/keep-$RANK")
    with launch(tmp_path, settings, ranks=2, max_restarts=2) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step that takes long")
        run.kill_rank(1)
        resumed = run.wait_for("resume", attempt=2)
        release(tmp_path / "step")
        assert resumed["step"] == 10, run.output()
        (tmp_path / "slow").touch()
        run.wait_for("train", step=12, attempt=2)
        run.kill_rank(0)
        resumed = run.wait_for("resume", attempt=3)
        (tmp_path / "slow").unlink()
        trained = max(each["step"] for each in run.events("train") if each["attempt"] < resumed["attempt"])
        assert trained <= resumed["step"] <= trained + 1, run.output()
        run.succeed()
        first, (rank_, step) = [(each["rank"], each["step"]) for each in run.events("kept")]
        assert (first, rank_) == ((0, 10), 1)
        # What is kept may have one step more, whose metrics only the next attempt writes.
        assert step in (resumed["step"], resumed["step"] + 1), run.output()
        assert step <= trained + 1, run.output()
    assert digests(str(tmp_path / "run")) == straight
    assert list((tmp_path / "keep-0").iterdir()) == [], "the end is durable"


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "kills", "workers"), [(2, 40, 2), (3, 30, 0), (4, 30, 0)])
def test_a_storm_that_survivors_see_through(tmp_path, ranks, kills, workers):
    """Ranks are killed at random moments of a training with dropout, norms over the batch and accumulation, and hardly a
    checkpoint: in nine of ten cases no step is lost. Where rank 0 dies before it has given its running means to the others,
    the last save counts."""
    settings = config("run", steps=25 * kills, place=".", norm=True, every=20, workers=workers, keep="auto")
    settings["train"] |= {"global_batch_size": 24, "micro_batch_size": 2, "drop_last": True}
    lost = seen_through(tmp_path, lambda directory, **ways: launch(directory, settings, ranks=ranks, **ways), ranks, kills)
    assert sum(each <= 0 for each in lost) >= 0.9 * kills
    assert max(lost) <= 20


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_storm_on_a_gan(tmp_path, ranks):
    """It has two optimizers. Where a rank dies between their steps, the state of the survivors is that of no boundary, and
    the last save counts; else no step is lost."""
    (tmp_path / "gan.py").write_text(GAN)
    command = ("-m", "harness", "launch", "--max-restarts=30", f"--nproc-per-node={ranks}", "--", str(tmp_path / "gan.py"))
    env = {"PYTHONPATH": str(Path(harness_package.__file__).parents[1])}
    lost = seen_through(tmp_path, lambda directory, **_: launch(directory, None, command=command, env=env), ranks, 12)
    assert max(lost) <= 4
    assert min(lost) <= 0


GAN = """
import os, random, time
import numpy, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import harness

def net(inputs, outputs):
    layers = nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.LeakyReLU(), nn.Linear(64, outputs)
    return DistributedDataParallel(nn.Sequential(*layers))

harness.join_world()
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(0)
generator, discriminator = net(8, 2), net(2, 1)
of_generator, of_discriminator = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (generator, discriminator))
size = dist.get_world_size()
loader = harness.Loader(torch.utils.data.TensorDataset(torch.randn(480 * size, 2)), 8 * size)
state = {"generator": generator, "discriminator": discriminator, "loader": loader}
state |= {"of_generator": of_generator, "of_discriminator": of_discriminator}
run = harness.Run("run", state, every_steps=4, config={"log": {"every_steps": 1, "jsonl": "log.jsonl"}})
judge = nn.functional.softplus
for _ in run.epochs(5):
    for (real,) in loader:
        time.sleep(0.02 if os.path.exists("slow") else 0)
        fake = generator(torch.randn(len(real), 8))
        of_fake, of_real = discriminator(torch.cat([fake.detach(), real])).split(len(real))
        loss = (judge(of_fake) + judge(-of_real)).mean()
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()
        time.sleep(0.02 if os.path.exists("slow") else 0)
        loss = judge(-discriminator(fake)).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        run.step(loss=loss)
"""


def number_of(event: dict) -> int:
    """The attempt that has told an event."""
    return int(event["attempt"][:6])


def begun(run: Run, attempt: int) -> list[int]:
    """At which step an attempt has begun, as a list of one, once it has: one that has nothing to resume begins anew."""
    told = [each for each in run.events() if number_of(each) == attempt]
    if not any(each["event"] in ("resume", "start") for each in told):
        return []
    return [max(each["step"] for each in told if each["event"] in ("kept", "resume", "start"))]


def seen_through(place: Path, start: Callable[..., AbstractContextManager[Run]], ranks: int, kills: int) -> list[int]:
    """The steps that each kill has cost. The run that it is compared with is left alone."""
    (place / "straight").mkdir()
    with start(place / "straight") as run:
        run.succeed(seconds=600)
    directory, dice, lost, attempt = place / "storm", random.Random(seed := random.randrange(10**6)), [], 0
    directory.mkdir()
    (directory / "slow").touch()
    print(f"storm {seed=}")
    with start(directory, max_restarts=kills) as run:
        for _ in range(kills):
            attempt = number_of(run.wait_for("train", attempt=attempt + 1))
            time.sleep(dice.uniform(0, 0.5))
            run.kill_rank(dice.randrange(ranks))
            found = run.wait(lambda: begun(run, attempt + 1), f"attempt {attempt + 1}")  # noqa: B023  # called at once
            lost.append(max(each["step"] for each in run.events("train") if number_of(each) <= attempt) - found[0])
        (directory / "slow").unlink()
        run.succeed(seconds=600)
    print(f"lost {lost}")
    ends = [read_json("inspect", str(each / "run"))["digest"] for each in (directory, place / "straight")]
    assert ends[0] == ends[1]
    return lost


@pytest.mark.soak
@pytest.mark.torchrun
def test_a_data_set_of_a_million_million_samples(tmp_path):
    """Trained, killed twice and resumed in seconds, with the same samples and bits: the order is computed, not stored."""
    command = {**config("run", place=".", steps=60, workers=2), "task": f"{__file__}:build_without_end"}
    train_undisturbed(tmp_path / "straight", command, ranks=2)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "slow").touch()
    with launch(tmp_path / "killed", command, ranks=2, max_restarts=2) as run:
        for attempt, step in ((1, 10), (2, 25)):
            run.wait_for("save", step=step, attempt=attempt)
            run.kill_rank(attempt % 2)
        (tmp_path / "killed" / "slow").unlink()
        run.succeed()
        assert len(run.events("resume")) == 2
    assert digests(str(tmp_path / "killed" / "run")) == digests(str(tmp_path / "straight" / "run"))
    assert newest(tmp_path / "killed" / "run")["parts"]["loader"] == newest(tmp_path / "straight" / "run")["parts"]["loader"]


# --- at random moments -----------------------------------------------------------------------------------------------


def storm(directory: Path, kills: int, steps: int, seed: int, *, ranks: int = 2, workers: int = 0) -> dict[str, str]:
    """The digests of a run of which a random rank was killed at random moments: of its start, its steps and its saves."""
    print(f"storm {seed=}")
    dice = random.Random(seed)
    (directory / "slow").touch()
    command = config("run", steps=steps, place=".", every=dice.randint(2, 7), workers=workers)
    with launch(directory, command, ranks=ranks, max_restarts=2 * kills) as run:
        attempt = 0  # the newest that has trained
        for number in range(kills):
            if number % 5 == 2:
                longest_seconds = 3.0  # a start: imports, rendezvous, resume
                run.wait(lambda: len(run.workers()) == ranks, "all ranks to have a process")
            else:
                longest_seconds = 0.3  # some steps and saves
                attempt = number_of(run.wait_for("train", attempt=attempt + 1))
            time.sleep(dice.uniform(0, longest_seconds))  # the moment is to be any
            run.kill_rank(dice.randrange(ranks))
        (directory / "slow").unlink()
        run.succeed(seconds=300)
    assert len({record["attempt"] for record in events(directory)}) > kills / 2, (
        "most kills must have hit a run that trained"
    )
    return digests(str(directory / "run"))


def events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.soak
@pytest.mark.torchrun
def test_short_kill_storm(tmp_path):
    """Three SIGKILLs at random moments leave no trace in the bits of the result."""
    with launch(tmp_path / "straight", config("run", steps=STORM_STEPS, every=STORM_STEPS), ranks=2) as run:
        run.succeed()
    (tmp_path / "storm").mkdir()
    found = storm(tmp_path / "storm", 3, STORM_STEPS, seed=random.randrange(10**6))
    assert found == digests(str(tmp_path / "straight" / "run"))


@pytest.mark.torchrun
@pytest.mark.parametrize("launcher", ["harness launch", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_death_while_the_ranks_start_does_not_hold_up_the_others(tmp_path, straight, launcher):
    """A rank is killed while another builds its task, then while that is in a long step of its own: the survivor knows that
    torchrun's SIGTERM is no stop, and leaves at once, though it had a grace of minutes. The run continues and completes.
    ``harness launch`` reports the death in two lines, and torchrun's own output is not on the screen."""
    (tmp_path / "paused").touch()
    settings = config("run", place=".", hold_at=10, alone=True) | {"stop": {"grace_seconds": 200}}
    command = ("-m", "harness", *(["launch", "--nproc-per-node=2", "--"] if launcher == "harness launch" else []), "train")
    ranks = None if launcher == "harness launch" else 2
    with launch(tmp_path, settings, ranks=ranks, max_restarts=2, command=command) as run:
        run.wait(lambda: len(list(tmp_path.glob("started.*"))) == 2, "two ranks that build their task")
        survives(run)
        (tmp_path / "paused").unlink()
        run.wait(lambda: held(tmp_path / "step"), "the step that takes long")
        run.wait(lambda: 9 in committed(tmp_path / "run"), "the save before it")
        survives(run)
        release(tmp_path / "step")
        assert run.wait_for("resume", attempt=2)["step"] == 9
        run.succeed()
        assert "another rank has failed" in run.output()
        if launcher == "harness launch":
            between = lines_of_a_restart(run.output(), attempt=2)
            assert len(between) <= 8, between
            assert f"harness launch: rank 1 on {platform.node()} was killed by SIGKILL after step 10" in between
            kind = "restart 2 of at most 3 in a row without a newer checkpoint"
            follows = rf"harness launch: {kind}; training continues from step [69] or later"  # 9: if rank 0 knew of it
            assert any(re.fullmatch(follows, line) for line in between), between
            assert not re.search(r"Traceback|torch/distributed|closing signal", run.output())
    assert digests(str(tmp_path / "run")) == straight


def lines_of_a_restart(output: str, attempt: int) -> list[str]:
    """What is on the screen between the last line of training before a restart and the first one after it."""
    lines = output.splitlines()
    restart = next(index for index, line in enumerate(lines) if f"attempt {attempt}: resuming" in line)
    training = [index for index, line in enumerate(lines) if re.search(r"step \d+/\d+  epoch", line)]
    last, first = max(each for each in training if each < restart), min(each for each in training if each > restart)
    return lines[last + 1 : first]


def survives(run: Run) -> None:
    """Rank 1 is killed; rank 0 leaves before torchrun loses patience (30 s), and before its grace is over."""
    survivor = run.workers()[0]
    run.kill_rank(1)
    run.wait(lambda: not alive(survivor), "the other rank to leave", seconds=20)


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "kills", "workers"), [(2, 60, 2), (3, 50, 0)])
def test_long_kill_storm(tmp_path, ranks, kills, workers):
    """More than a hundred SIGKILLs at random moments, loader workers and saves included, leave no trace either."""
    steps = 40 * kills
    (tmp_path / "straight").mkdir()
    with launch(tmp_path / "straight", config("run", steps=steps, every=steps), ranks=ranks) as run:
        run.succeed(seconds=600)
    (tmp_path / "storm").mkdir()
    seed = random.randrange(10**6)
    found = storm(tmp_path / "storm", kills, steps, seed, ranks=ranks, workers=workers)
    assert found == digests(str(tmp_path / "straight" / "run"))


# --- on an object store ----------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.torchrun
def test_killed_on_s3(tmp_path, straight, s3):
    """The same end to end on a real S3 server: a kill, a restart, a resume, the same bits; the verbs read it, too."""
    url = s3.url("killed")
    with launch(tmp_path, config(url, place=".", hold_at=10, workers=2), ranks=2, max_restarts=1, env=s3.env) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which a rank is killed")
        run.wait(lambda: 9 in committed(url, s3.storage_options), "the save before it")
        run.kill_rank(0)
        release(tmp_path / "step")
        assert run.wait_for("resume", attempt=2)["step"] == 9
        run.succeed()
    listed = harness("ls", url, env=s3.env)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("whole") == STEPS // EVERY
    found = json.loads(harness("inspect", url, "--json", env=s3.env).stdout)
    assert {name: found["digest"][name] for name in straight} == straight


# --- the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.torchrun
def test_a_killed_launcher_leaves_no_writer_behind(tmp_path, straight):
    """When the launcher is SIGKILLed, torchrun ends, and with it its workers; a second start goes on and ends with the same
    bits."""
    settings = config("run", place=".", hold_at=10)
    command = ("-m", "harness", "launch", "--nproc-per-node=2", "--", "train")
    with launch(tmp_path, settings, command=command) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which the launcher is killed")
        run.wait(lambda: 9 in committed(tmp_path / "run"), "the save before it")
        workers = run.workers()
        os.kill(run.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in workers.values()), "the workers to end")
        wait_until(lambda: not run.processes(), "the end of all processes of the run")
    with launch(tmp_path, settings, ranks=2) as run:
        assert run.wait_for("resume")["step"] == 9
        run.succeed()
    assert digests(str(tmp_path / "run")) == straight
