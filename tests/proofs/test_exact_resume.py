"""A run that was killed and resumed ends with the bits of the run that never stopped."""

import json
import logging
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.utils.data import Dataset

from harness import Evaluation, Run, StopRequest, Task
from harness.data.schedule import Cursor, Schedule
from harness.data.seeding import seed_everything
from harness.state.ddp_buckets import BucketOrder
from harness.tasks import gpt
from tests.support.cluster import (
    TORCHRUN,
    branch,
    committed,
    held,
    hold,
    launch,
    newest,
    play,
    played,
    read_json,
    release,
    returned,
    train_here,
)

SAMPLES, BATCH, STEPS, SEED = (
    40,
    13,
    14,
    7,
)  # an epoch is 3 steps of 13 samples, which no number of ranks divides, and one of 1
EVERY, KILLED_AT = 3, 8  # the newest checkpoint before the death is that of step 6: within the second epoch


# The compiler looks at what it should not look at.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Augmented(Dataset):
    """Small images of which no two fetches are alike: each draws from all three generators."""

    def __init__(self) -> None:
        self.images, self.labels = torch.randn(SAMPLES, 1, 8, 8), torch.randint(4, (SAMPLES,))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        image = self.images[index] + 0.1 * torch.randn(1, 8, 8) + float(np.random.normal(scale=0.1))
        return (image.flip(2) if random.random() < 0.5 else image), self.labels[index], index


def small_net() -> nn.Module:
    """Whatever makes resuming hard: dropout, batch statistics, parameters in more than one gradient bucket."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(256, 1100),  # 1.1 MB: DDP's first bucket ends here
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(1100, 4),
    )


def build(place: str | None = None, hold_at: int | None = None, settle: bool = True) -> Task:
    """Writes down which samples each step trains; waits at step ``hold_at`` until the test has done its worst."""
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    if not settle:
        BucketOrder.settle = lambda *_: None

    def loss(model: nn.Module, batch) -> torch.Tensor:
        images, labels, indices = batch
        step = scheduler.last_epoch
        if place is not None:
            with open(f"{place}/samples.jsonl", "a") as file:  # one write: the ranks share the file
                file.write(json.dumps([step, indices.tolist()]) + "\n")
            if step == hold_at:
                hold(Path(place, "step"))
        return F.cross_entropy(model(images), labels)

    measure = lambda model, batch: {"loss": F.cross_entropy(model(batch[0]), batch[1])}
    return Task(model, Augmented(), optimizer, loss, scheduler, Evaluation(Augmented(), measure, "loss"))


def config(url: str, *, steps: int = STEPS, workers: int = 0, **args) -> dict:
    """The run of this file."""
    return {
        "task": f"{__file__}:build",
        "args": args,
        "seed": SEED,
        "train": {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": 2, "clip_grad_norm": 1.0},
        "data": {"workers": workers},
        "checkpoint": {"url": url, "every_steps": EVERY},
        "evaluation": {"every_steps": 4},
    }


def digests(url: str | Path) -> dict[str, str]:
    """The digests of the model and the optimizer at the end of a run."""
    found = read_json("inspect", str(url))
    assert found["step"] == STEPS
    return {name: found["digest"][name] for name in ("model", "optimizer", "random")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, on_three_ranks):
    """The directory of the run that nothing happens to, by the number of ranks (None: one plain process)."""
    alone = tmp_path_factory.mktemp("straight")
    with launch(alone, config("run", place=".")) as run:
        run.succeed()
    returned(on_three_ranks[1]["undisturbed"])
    return {None: alone, 3: on_three_ranks[0] / "undisturbed"}


# --- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_one_process_killed_and_started_again(tmp_path, straight, workers):
    """A plain process that is SIGKILLed within an epoch and started again by hand ends bit-identical."""
    command = config("run", workers=workers, place=".", hold_at=KILLED_AT)
    with launch(tmp_path, command) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which it is killed")
        run.wait(lambda: 6 in committed(tmp_path / "run"), "the save before it")
        run.kill()
    with launch(tmp_path, command) as run:
        assert run.wait_for("resume")["step"] == 6
        run.succeed()
    assert digests(tmp_path / "run") == digests(straight[None] / "run")


@pytest.mark.torchrun
def test_a_rank_killed_and_restarted_by_torchrun(tmp_path, straight):
    """When a rank is SIGKILLed within an epoch, torchrun restarts all, and they end bit-identical; the uninterrupted run
    fetched without workers, so their number does not matter either."""
    command = config("run", workers=2, place=".", hold_at=KILLED_AT)
    with launch(tmp_path, command, ranks=3, max_restarts=1, agent=TORCHRUN) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which a rank is killed")
        run.wait(lambda: 6 in committed(tmp_path / "run"), "the save before it")
        run.kill_rank(0)
        release(tmp_path / "step")
        assert run.wait_for("resume", attempt=2)["step"] == 6
        run.succeed()
    assert digests(tmp_path / "run") == digests(straight[3] / "run")


@pytest.mark.soak
@pytest.mark.torchrun
def test_without_settled_gradients_a_resume_differs(tmp_path, straight):
    """The tests above can fail: on three ranks, a resume in which DDP orders its gradients anew ends with other bits."""
    branch(straight[3] / "run", tmp_path / "run", 6)
    with launch(tmp_path, config("run", settle=False), ranks=3) as run:
        assert run.wait_for("resume")["step"] == 6
        run.succeed()
    assert digests(tmp_path / "run")["model"] != digests(straight[3] / "run")["model"]


# --- other world sizes -----------------------------------------------------------------------------------------------


@pytest.mark.torchrun
def test_the_same_samples_at_other_world_sizes(tmp_path, straight, caplog):
    """A run that goes from three ranks under DDP to one plain process to two ranks trains the same global batches."""
    branch(straight[3] / "run", tmp_path / "run", 6)
    train_here(lambda: build(str(tmp_path)), **here(tmp_path, steps=10))
    assert "world_size" in caplog.text  # the change is told of
    with launch(tmp_path, config("run", place="."), ranks=2) as run:
        run.wait_for("resume")
        run.succeed()
        assert "world_size" in run.output()
    trained, expected = samples_by_step(tmp_path), expected_samples()
    assert {step: trained[step] for step in range(6, STEPS)} == {step: expected[step] for step in range(6, STEPS)}
    assert samples_by_step(straight[None]) == samples_by_step(straight[3]) == expected


def samples_by_step(directory: Path) -> dict[int, list[int]]:
    """The indices that all ranks together trained at each step, sorted; a rehearsal before step 0 repeats some of them."""
    found: dict[int, set[int]] = {}
    for line in (directory / "samples.jsonl").read_text().splitlines():
        step, indices = json.loads(line)
        found.setdefault(step, set()).update(indices)
    return {step: sorted(found[step]) for step in sorted(found)}


def expected_samples() -> dict[int, list[int]]:
    schedule = Schedule(SAMPLES, SEED, BATCH, None)
    plan = schedule.steps(Cursor(), 0, 1)
    return {step: sorted(next(plan)[0].indices) for step in range(STEPS)}


# --- on three ranks in one start -------------------------------------------------------------------------------------


class Points(Dataset):
    """Ten fixed samples."""

    def __init__(self, count: int = 10) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], self.y[index]


def regression(model: nn.Module, batch) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def build_plain(samples: int = 10) -> Task:
    """No dropout, no batch statistics; after one step, the weights differ from the first ones by the gradients."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return Task(model, Points(samples), torch.optim.SGD(model.parameters(), lr=1.0), regression)


class Awkward(nn.Module):
    """Owns children that are called like wrappers, a compiled one, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 16)
        self.compiled = torch.compile(nn.Linear(16, 16), backend="eager")
        self._orig_mod = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(requires_grad=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.module(x))
        x = torch.tanh(self._orig_mod(self.compiled(x)))
        return self.head(F.dropout(torch.tanh(self.frozen(x)), 0.2, self.training))


def build_awkward() -> Task:
    model = Awkward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Task(model, Points(), torch.optim.AdamW(learning, lr=1e-2), regression)


def build_forgotten() -> Task:
    """Only the last layer's parameters are the optimizer's; the others have gradients all the same."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return Task(model, Points(), torch.optim.AdamW(model[2].parameters(), lr=1e-2), regression)


def build_compiled() -> Task:
    """The whole model is compiled."""
    model = torch.compile(nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Linear(16, 3)), backend="eager")
    return Task(model, Points(), torch.optim.AdamW(model.parameters(), lr=1e-2), regression)


def build_gpt() -> Task:
    """Tied weights."""
    return gpt.build(layers=1, heads=2, width=16, context=16, dropout=0.2)


def build_dropout() -> Task:
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
    return Task(model, Points(), torch.optim.AdamW(model.parameters(), lr=1e-2), regression)


def in_two_halves(world, place: Path, task, **train) -> list[dict[str, str]]:
    """The digests after four steps in one go, and after two, a resume, and two more."""
    train = {"global_batch_size": 4, "clip_grad_norm": 0.1, **train}
    for url, steps in (("straight", 4), ("halves", 2), ("halves", 4)):
        train_here(task, world, url=place / url, seed=SEED, train={**train, "steps": steps})
    return [newest(place / url)["digests"] for url in ("straight", "halves")]


def undisturbed(world, place: Path):
    """The run that others are compared with."""
    train_here(lambda: build(str(place)), world, **here(place))


def here(place: Path, **options) -> dict:
    """The run of this file, for ``train_here``."""
    return {key: value for key, value in config(str(place / "run"), **options).items() if key not in ("task", "args")}


def uneven(world, place: Path):
    train_here(build_plain, world, url=place / "run", train={"steps": 1, "global_batch_size": 10, "micro_batch_size": 3})


def fewer_samples_than_ranks(world, place: Path):
    task = lambda: build_plain(samples=world.size - 1)
    train_here(task, world, url=place / "run", train={"steps": 1, "global_batch_size": 10})


def awkward(world, place: Path):
    return in_two_halves(world, place, build_awkward)


def compiled(world, place: Path):
    return in_two_halves(world, place, build_compiled)


def forgotten(world, place: Path):
    return in_two_halves(world, place, build_forgotten)


def bf16(world, place: Path):
    return in_two_halves(world, place, build_dropout, precision="bf16", micro_batch_size=1)


def fp16(world, place: Path):
    return in_two_halves(world, place, build_dropout, precision="fp16", micro_batch_size=1)


class Fading:
    """Makes the gradients of a model a little smaller each time that one comes."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = 0
        for parameter in model.parameters():
            parameter.register_hook(self.fade)

    def fade(self, gradient: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return gradient * 0.999**self.seen

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def hooked(world, place: Path):
    """The digests as from ``in_two_halves``, and how many gradients the hooks have seen, of a loop that saves what DDP
    wraps, and whose gradients pass through hooks of parameters and a communication hook."""
    found = []
    for url, steps in (("straight", 4), ("halves", 2), ("halves", 4)):
        seed_everything(SEED)
        plain = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3))
        unsaved: list[None] = []  # which nobody puts back
        for parameter in plain.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, unsaved=unsaved: unsaved.append(None))
        fading = Fading(plain)
        model = world.wrap(plain)
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = {"first": plain[0], "model": plain, "optimizer": optimizer, "fading": fading}
        run = Run(place / url, state, world=world, stop=StopRequest(), config={"log": {"every_steps": None}})
        began = run.global_step
        for step in run.steps(steps):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + world.rank)
            model(torch.randn(5, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            run.step()
        found.append((len(unsaved) / (steps - began), newest(place / url)["digests"]))
        run.close()
    return [{**digests, "seen": seen} for seen, digests in (found[0], found[2])]


def static(world, place: Path):
    """What is said of a resume under DDP with a static graph."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("harness.state.capture").addHandler(handler)
    for steps in (1, 2):
        torch.manual_seed(SEED)
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), static_graph=True)
        run = Run(place / "run", {"model": model}, world=world, stop=StopRequest(), config={"log": {"every_steps": None}})
        for _ in run.steps(steps):
            model(torch.ones(1, 2)).sum().backward()
            run.step()
        run.close()
    logging.getLogger("harness.state.capture").removeHandler(handler)
    return lines


@pytest.fixture(scope="module")
def on_three_ranks(tmp_path_factory):
    """What three ranks made of the scenarios, and where."""
    directory = tmp_path_factory.mktemp("three")
    return directory, played(__file__, directory, ranks=3)


def first_gradients(place: Path, **train) -> dict[str, torch.Tensor]:
    """The weights after one step of size 1 in this process."""
    train_here(build_plain, url=place / "run", train={"steps": 1, **train})
    return newest(place / "run")["parts"]["model"]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    """Micro-batches, the last of them smaller, add up to the gradient of the mean over the global batch."""
    large = first_gradients(tmp_path / "large", global_batch_size=10)
    small = first_gradients(tmp_path / "small", global_batch_size=10, micro_batch_size=3)
    assert_close(small, large)


@pytest.mark.torchrun
def test_uneven_shares_weigh_by_samples(tmp_path, on_three_ranks):
    """Three ranks with 3, 3 and 4 of ten samples, one, one and two micro-batches, make the step that one process makes."""
    directory, results = on_three_ranks
    returned(results["uneven"])
    assert_close(newest(directory / "uneven" / "run")["parts"]["model"], first_gradients(tmp_path, global_batch_size=10))


@pytest.mark.torchrun
def test_fewer_samples_than_ranks(tmp_path, on_three_ranks):
    """A rank for which there is no sample goes along and changes nothing."""
    directory, results = on_three_ranks
    returned(results["fewer_samples_than_ranks"])
    train_here(lambda: build_plain(2), url=tmp_path / "run", train={"steps": 1, "global_batch_size": 10})
    found = newest(directory / "fewer_samples_than_ranks" / "run")["parts"]["model"]
    assert_close(found, newest(tmp_path / "run")["parts"]["model"])


@pytest.mark.torchrun
@pytest.mark.parametrize("scenario", ["awkward", "compiled", "forgotten", "bf16", "fp16", "hooked"])
def test_resumed_on_three_ranks(on_three_ranks, scenario):
    """Under DDP, a run in two halves ends with the bits of the run in one go: whatever the model's children are called and
    wrapped in, in reduced precision, and when gradients pass through hooks, which notice nothing of a resume."""
    straight, halves = returned(on_three_ranks[1][scenario])[0]
    assert halves == straight


@pytest.mark.torchrun
def test_a_static_graph_is_told_of(on_three_ranks):
    """DDP keeps more of it than an order. One rank says that a resume may differ."""
    words = "model: with three ranks or more the next step may differ in its last bits: static_graph=True makes DDP "
    assert returned(on_three_ranks[1]["static"]) == [[f"{words}reorder its gradients"], [], []]


@pytest.mark.torchrun
def test_names_in_a_checkpoint_are_the_plain_ones(on_three_ranks):
    """Neither DDP's nor the compiler's prefixes are saved; children that are really called so keep their names."""
    saved = newest(on_three_ranks[0] / "awkward" / "straight")["parts"]["model"]
    children = ("module", "compiled", "_orig_mod", "frozen", "head")
    assert sorted(saved) == sorted(f"{child}.{kind}" for child in children for kind in ("weight", "bias"))
    whole = newest(on_three_ranks[0] / "compiled" / "straight")["parts"]["model"]
    assert sorted(whole) == ["0.bias", "0.weight", "2.bias", "2.weight"]


@pytest.mark.torchrun
def test_a_run_under_ddp_goes_on_without_ddp_and_back(tmp_path, on_three_ranks):
    """A checkpoint of three ranks fits one plain process, to the last name."""
    branch(on_three_ranks[0] / "awkward" / "straight", tmp_path / "run", 4)
    train = {"global_batch_size": 4, "clip_grad_norm": 0.1}
    progress = train_here(build_awkward, url=tmp_path / "run", seed=SEED, train={**train, "steps": 6})
    assert progress.step == 6


# --- in one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", [build_awkward, build_compiled, build_forgotten, build_gpt, build_dropout])
def test_resumed_in_one_process(tmp_path, task, precision):
    """A run in two halves ends with the bits of the run in one go, with clipping, in every precision."""
    straight, halves = in_two_halves(None, tmp_path, task, precision=precision, micro_batch_size=2)
    assert halves == straight


if __name__ == "__main__":
    play(
        [undisturbed, uneven, fewer_samples_than_ranks, awkward, compiled, forgotten, bf16, fp16, hooked, static],
        Path(sys.argv[1]),
    )
