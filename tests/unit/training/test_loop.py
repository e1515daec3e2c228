"""The training loop: what is done when, and what it leaves as it was."""

import functools
import json
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from harness import Evaluation, Run, StopRequest, Task
from harness.checkpoint.saver import Saver
from harness.config import Config
from harness.distributed.world import TorchrunWorld
from harness.errors import ConfigError, StoreError
from harness.training.loop import build_task
from tests.support.cluster import launch, newest, play, played, read_json, returned, train_here

TRAIN = {"steps": 12, "global_batch_size": 4}  # the data set has ten samples: 3 steps an epoch


class Points(Dataset):
    """Ten samples of four points each; one can be broken."""

    def __init__(self, broken: int | None = None) -> None:
        self.x = torch.linspace(-1, 1, 40).view(10, 1, 4)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if index == self.broken:
            raise ZeroDivisionError(f"sample {index}")
        return self.x[index], 3 * self.x[index] + 1


def loss(model: nn.Module, batch) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def make(**options) -> Task:
    """A line to be learnt, with dropout and batch statistics; ``options`` replace what the task has."""
    model = options.pop("model", None) or nn.Sequential(
        nn.Conv1d(1, 8, 1), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Conv1d(8, 1, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Task(**{"model": model, "dataset": Points(), "optimizer": optimizer, "loss": loss, **options})


@pytest.fixture
def run(tmp_path):
    """Trains in this process at ``run`` and returns the steps that are saved there."""

    def run(task=make, **config) -> list[int]:
        train_here(task, url=tmp_path / "run", **{"train": TRAIN, **config})
        return sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("step-*"))

    return run


@pytest.fixture
def told(tmp_path):
    """The events of a run that was asked to write them; its ``log`` section is ``told.log``."""

    def told(name: str) -> list[dict]:
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == name]

    told.log = {"jsonl": str(tmp_path / "log.jsonl")}
    return told


# --- how long, and what is saved when --------------------------------------------------------------------------------


def test_steps_and_epochs(run):
    """An epoch is as many steps as it takes to train every sample; the last step is always saved."""
    assert run() == [12]
    assert run(train={"epochs": 5, "global_batch_size": 4}) == [12, 15]


@pytest.mark.parametrize(
    ("interval", "saved"),
    [
        ({"every_steps": 5}, [5, 10, 12]),
        ({"every_epochs": 2}, [6, 12]),
        ({"every_steps": 5, "every_epochs": 3}, [5, 9, 10, 12]),
        ({"every_steps": 2, "keep_last": 2}, [10, 12]),
        ({"every_seconds": 1e-9}, list(range(1, 13))),
    ],
)
def test_intervals(run, interval, saved):
    """After so many steps, epochs, seconds; each for itself."""
    assert run(checkpoint=interval) == saved


def test_a_finished_run_has_nothing_to_do(run, tmp_path):
    """Started again, it ends at once, and its checkpoints are as they were."""
    run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step-*/*")}
    assert run() == [12]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step-*/*")} == before


def test_a_finished_run_can_be_prolonged(run):
    """More steps in the configuration are trained from where it ended."""
    assert run() == [12]
    assert run(train={**TRAIN, "steps": 14}) == [12, 14]


def test_without_a_url_nothing_is_saved(tmp_path, monkeypatch):
    """Nor is anything written anywhere."""
    monkeypatch.chdir(tmp_path)
    assert train_here(make, train=TRAIN).step == 12
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_tells_where_the_run_is(run, tmp_path):
    """Step, epoch, cursor, world size, metrics, and what the bits depend on."""
    run(train={**TRAIN, "steps": 8})
    found = read_json("inspect", str(tmp_path / "run"))
    assert (found["step"], found["epoch"], found["world_size"]) == (8, 2, 1)
    assert found["metrics"]["last"]["loss"] > 0
    assert found["threads"] == torch.get_num_threads()


# --- a step ----------------------------------------------------------------------------------------------------------


def test_the_schedule_is_stepped_once_a_step(run, tmp_path):
    """Whatever the number of micro-batches."""

    def task() -> Task:
        plain = make()
        return Task(
            plain.model, plain.dataset, plain.optimizer, loss, torch.optim.lr_scheduler.StepLR(plain.optimizer, 1, 0.5)
        )

    run(task, train={**TRAIN, "micro_batch_size": 1})
    group = newest(tmp_path / "run")["parts"]["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(1e-2 * 0.5**12)


def first_step(url: Path, precision: str, clip: float | None) -> torch.Tensor:
    """How far one step of plain descent moves the weights."""

    def task() -> Task:
        model = nn.Conv1d(1, 1, 1)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        tenth = lambda model, batch: loss(model, batch) / 10  # times the scaler's first factor, it must fit into fp16
        return Task(model, Points(), torch.optim.SGD(model.parameters(), lr=1.0), tenth)

    train_here(task, url=url, train={"steps": 1, "global_batch_size": 10, "precision": precision, "clip_grad_norm": clip})
    return torch.cat([value.flatten() for value in newest(url)["parts"]["model"].values()])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_clipping_bounds_the_unscaled_gradients(tmp_path, precision):
    """The norm is bounded after a scaler's factor has been taken out, and small gradients are left alone."""
    free = first_step(tmp_path / "free", precision, None)
    assert float(free.norm()) > 0.1
    clipped = first_step(tmp_path / "clipped", precision, 0.05)
    torch.testing.assert_close(clipped, free * 0.05 / free.norm(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(first_step(tmp_path / "loose", precision, 1e6), free)


def test_the_loss_that_is_told_is_the_mean_over_the_batch(told):
    """Over all micro-batches, whatever their sizes."""
    task = lambda: make(model=nn.Conv1d(1, 1, 1))
    train_here(task, train={"steps": 1, "global_batch_size": 10}, log={**told.log, "every_steps": 1})
    train_here(task, train={"steps": 1, "global_batch_size": 10, "micro_batch_size": 3}, log={**told.log, "every_steps": 1})
    whole, pieces = (record["loss"] for record in told("train"))
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_is_not_a_number_is_saved(run, tmp_path):
    """A run that diverges goes on saving, as its owner may want to look at it."""

    def diverged(model: nn.Module, batch) -> torch.Tensor:
        return loss(model, batch) * float("nan")

    assert run(lambda: make(loss=diverged), checkpoint={"every_steps": 6}, nonfinite={"policy": "ignore"}) == [6, 12]
    assert read_json("inspect", str(tmp_path / "run"))["step"] == 12


# --- evaluation ------------------------------------------------------------------------------------------------------


def judged(**options) -> Task:
    """Evaluates with random numbers, in pieces that do not divide the data set."""

    def measure(model: nn.Module, batch) -> dict[str, torch.Tensor]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        return {"mse": loss(model, batch), "x": batch[0].mean()}

    evaluation = Evaluation(Points(), measure, **{"metric": "mse", "batch_size": 3, **options})
    return make(evaluation=evaluation)


def test_evaluation_leaves_everything_as_it_was(run, tmp_path):
    """Weights, statistics, random states: the run that is judged after every step ends as the one that never is."""
    run(judged, evaluation={"every_steps": 1})
    judged_digests = newest(tmp_path / "run")["digests"]
    train_here(make, url=tmp_path / "plain", train=TRAIN)
    plain_digests = newest(tmp_path / "plain")["digests"]
    for part in ("model", "optimizer", "random"):
        assert judged_digests[part] == plain_digests[part], part


def test_evaluation_leaves_frozen_parts_frozen(tmp_path):
    """A module that the task keeps in ``eval()`` stays there."""
    kept = nn.BatchNorm1d(1)

    def task() -> Task:
        return make(model=nn.Sequential(kept, nn.Conv1d(1, 1, 1)), evaluation=judged().evaluation, loss=with_kept_in_eval)

    def with_kept_in_eval(model: nn.Module, batch) -> torch.Tensor:
        kept.eval()
        return loss(model, batch)

    train_here(task, train={**TRAIN, "steps": 2}, evaluation={"every_steps": 1})
    assert not kept.training


def test_metrics_are_means_over_the_samples(run, told):
    """However the pieces fall."""
    run(judged, evaluation={"every_steps": 6}, log={**told.log, "every_steps": None})
    records = told("evaluate")
    assert [record["step"] for record in records] == [6, 12]
    assert records[0]["x"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_best_is_remembered_through_a_resume(run, tmp_path, told, higher_is_better):
    """The best value of the metric, with the others and the step of that evaluation."""
    task = lambda: judged(higher_is_better=higher_is_better)
    for steps in (5, 12):
        run(task, train={**TRAIN, "steps": steps}, evaluation={"every_steps": 1}, log=told.log)
    choose = max if higher_is_better else min
    best = choose(told("evaluate"), key=lambda record: record["mse"])
    saved = read_json("inspect", str(tmp_path / "run"))["metrics"]["best"]
    assert {key: best[key] for key in ("step", "mse", "x")} == saved


def test_a_death_in_an_evaluation_loses_nothing(run, tmp_path, told):
    """The step is kept, and the next attempt begins with its evaluation: of the same step, beside the loss of that step."""

    class Gone(Exception):
        """In place of a peer's death."""

    def dies() -> Task:
        task, calls = judged(), iter(range(100))

        def measure(model: nn.Module, batch) -> dict[str, torch.Tensor]:
            if next(calls) == 6:  # of four in each evaluation
                raise Gone
            return task.evaluation.measure(model, batch)

        return replace(task, evaluation=replace(task.evaluation, measure=measure))

    def values() -> list[list[float]]:
        names = "event", "step", "loss", "mse", "lr"
        return [[line.get(name) for name in names] for line in told("train") + told("evaluate")]

    intervals = {"evaluation": {"every_steps": 4}, "log": {**told.log, "every_steps": 1}}
    expected = tmp_path / "straight"
    train_here(judged, url=expected, train=TRAIN, **intervals)
    before = values()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "keep").mkdir()
    intervals["checkpoint"] = {"keep": str(tmp_path / "keep"), "every_steps": 5}
    with pytest.raises(Gone):
        run(dies, **intervals)
    run(judged, **intervals)
    assert [line["step"] for line in told("kept")] == [8]
    assert values() == before
    assert newest(tmp_path / "run")["digests"] == newest(expected)["digests"]


# --- when it goes wrong ----------------------------------------------------------------------------------------------


def test_a_builder_that_returns_something_else():
    """What it returned instead is said."""
    config = Config.model_validate({"task": "here:build", "train": TRAIN})
    with pytest.raises(ConfigError, match=r"expected here:build to return a harness\.Task, found int"):
        build_task(config, lambda: 5)


def test_a_sharded_model_needs_a_function_that_makes_the_optimizer():
    """One that has the parameters from before would train nothing. One process keeps the model whole, and makes it, too."""
    with pytest.raises(ConfigError, match="needs an optimizer that is made after the model is sharded"):
        train_here(make, train={**TRAIN, "parallel": "fsdp"})
    built = make()
    late = replace(built, optimizer=lambda model: type(built.optimizer)(model.parameters(), lr=0.1))
    assert train_here(lambda: late, train={**TRAIN, "parallel": "fsdp"}).step == train_here(make, train=TRAIN).step


def test_a_scheduler_is_made_once():
    """By a function, of an optimizer that is there: a second one would scale the learning rate again."""
    linear = functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.5, total_iters=4)
    config = Config.model_validate({"task": "here:build", "train": TRAIN})
    task = build_task(config, lambda: replace(make(), scheduler=linear))
    optimizer, _ = task.optimizer_and_scheduler()
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["initial_lr"] / 2


def test_a_builder_finds_everything_seeded():
    """The same call gives the same model, and ``torch.initial_seed()`` is the run's seed."""
    config = Config.model_validate({"task": "here:build", "train": TRAIN, "seed": 41})
    weights = [build_task(config, make).model[0].weight for _ in range(2)]
    assert torch.equal(*weights)
    assert torch.initial_seed() == 41


def build_broken(broken: str) -> Task:
    """Fails in a sample, or in the loss."""
    task = make(dataset=Points(3 if broken == "sample" else None))

    def failing(model: nn.Module, batch) -> torch.Tensor:
        raise ZeroDivisionError("in the loss")

    return Task(task.model, task.dataset, task.optimizer, failing if broken == "loss" else loss)


@pytest.mark.parametrize(("broken", "words"), [("sample", "sample 3"), ("loss", "in the loss")])
def test_an_error_ends_a_plain_run_at_once(tmp_path, broken, words):
    """With its traceback; loader workers, which ignore the signals that stop a run, do not keep it from leaving."""
    config = {"task": f"{__file__}:build_broken", "args": {"broken": broken}, "train": TRAIN, "data": {"workers": 2}}
    with launch(tmp_path, config) as run:
        run.wait(lambda: f"ZeroDivisionError: {words}" in run.output(), "the traceback")
        assert run.finish(seconds=30) == 1


def build_full(place: str, room_at: int) -> Task:
    """The place for the checkpoints turns into a file before the first save, and back at step ``room_at``."""
    task = make()
    steps = iter(range(1, 100))

    def obstructed(model: nn.Module, batch) -> torch.Tensor:
        step = next(steps)
        if step == 1:
            while Path(place).exists():  # what the run tells is put there now and then
                shutil.rmtree(place, ignore_errors=True)
            Path(place).touch()
        if step == room_at:
            os.unlink(place)
        return loss(model, batch)

    return Task(task.model, task.dataset, task.optimizer, obstructed)


def test_training_goes_on_when_a_save_fails(run, tmp_path, caplog):
    """A save that fails is told of each time, and the next one succeeds."""
    often = {"every_steps": 2, "mode": "sync"}  # so that it is known which saves fail
    saved = run(lambda: build_full(str(tmp_path / "run"), room_at=6), checkpoint=often)
    assert saved == [6, 8, 10, 12]
    failures = [record.message for record in caplog.records if "FAILED" in record.message]
    assert [message.partition(":")[0] for message in failures] == [
        "save of step 2 FAILED (1 in a row)",
        "save of step 4 FAILED (2 in a row)",
    ]


def test_too_many_failed_saves_in_a_row_end_the_run(run, tmp_path):
    """So does a last save that fails, whatever is allowed."""
    with pytest.raises(StoreError):
        run(
            lambda: build_full(str(tmp_path / "run"), room_at=50),
            checkpoint={"every_steps": 2, "failures_allowed": 1},
            train={**TRAIN, "steps": 40},
        )
    os.unlink(tmp_path / "run")
    with pytest.raises(StoreError):
        run(lambda: build_full(str(tmp_path / "run"), room_at=50), checkpoint={"failures_allowed": 9})


# --- stopping --------------------------------------------------------------------------------------------------------


def build_endless(place: str, seconds: float = 0.002) -> Task:
    """Says when it is well under way."""
    plain = make()
    counter = iter(range(10**9))

    def slow(model: nn.Module, batch) -> torch.Tensor:
        if next(counter) == 20:
            Path(place, "under-way").touch()
        time.sleep(seconds)
        return loss(model, batch)

    return Task(plain.model, plain.dataset, plain.optimizer, slow)


def endless(tmp_path: Path, **data) -> dict:
    return {
        "task": f"{__file__}:build_endless",
        "args": {"place": str(tmp_path)},
        "train": {"steps": 10**8, "global_batch_size": 8},
        "checkpoint": {"url": "run"},
        "data": data,
        "log": {"every_steps": None},
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_plain_run_that_is_asked_to_stop(tmp_path, number):
    """It saves its last step, says so, and leaves with the code that means: start me again. Loader workers, which get the
    signal too, do not keep it from that."""
    with launch(tmp_path, endless(tmp_path, workers=1)) as run:
        run.wait((tmp_path / "under-way").exists, "the run to be under way")
        os.killpg(run.process.pid, number)
        assert run.finish() == 75
        step = read_json("inspect", str(tmp_path / "run"))["step"]
        assert f"harness: asked to stop ({number.name}) at step {step}, which is saved" in run.output()


@pytest.mark.torchrun
def test_ranks_that_are_asked_to_stop_do_so_together(tmp_path):
    """One rank's signal is enough: all stop after the same step, and it is saved."""
    with launch(tmp_path, endless(tmp_path, workers=1), ranks=2) as run:
        run.wait((tmp_path / "under-way").exists, "the run to be under way")
        os.kill(run.workers()[1], signal.SIGTERM)
        run.succeed()
        step = read_json("inspect", str(tmp_path / "run"))["step"]
        assert f"asked to stop (on another rank) at step {step}, which is saved" in run.output()


# --- real ranks ------------------------------------------------------------------------------------------------------


def evaluated(world, place: Path):
    """The metrics of two ranks that judge shares of a data set of ten, three at a time, and what is left behind."""
    for url, task in (("judged", judged), ("plain", make)):
        log = {"jsonl": str(place / f"{url}.jsonl"), "every_steps": None}
        train_here(task, world, url=place / url, train=TRAIN, evaluation={"every_steps": 3}, log=log)
    found = [newest(place / url)["digests"] for url in ("judged", "plain")]
    return [all(found[0][part] == found[1][part] for part in ("model", "optimizer", "random"))]


def empty_shares(world, place: Path):
    """An evaluation on fewer samples than ranks."""

    def task() -> Task:
        one = TensorDataset(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
        return make(evaluation=Evaluation(one, judged().evaluation.measure, "mse"))

    return train_here(task, world, train=TRAIN).last["x"]


def saved_late(world, place: Path):
    """Which step each rank finds saved when its training has returned, with a disk that takes a second."""
    save = Saver.save

    def slowly(*args, **options):
        time.sleep(1)
        return save(*args, **options)

    Saver.save = slowly
    try:
        train_here(make, world, url=place, train=TRAIN)
    finally:
        Saver.save = save
    return newest(place)["step"]


def last_save_fails(world, place: Path):
    """What becomes of a run whose folder is a file when its end is saved."""
    full = place / f"run-{world.rank}"  # each rank obstructs one: rank 0's is the run's
    full.mkdir()
    train_here(lambda: build_full(str(full), room_at=50), world, url=place / "run-0", train=TRAIN)


def other_metrics(world, _place: Path):
    """What becomes of a loop whose ranks tell different metrics, or the same in another order."""
    told = []
    for metrics in ({"loss": 1.0, **({"accuracy": 1.0} if world.rank == 0 else {})}, {"ab"[world.rank]: 1.0}, {"loss": 1.0}):
        model = torch.nn.Linear(1, 1)
        state = {"model": world.wrap(model)}
        run = Run(None, state, world=world, stop=StopRequest(), config={"log": {"every_steps": 1}})
        try:
            for _ in run.steps(1):
                run.step(**metrics)
            told.append("")
        except ConfigError as error:
            told.append(str(error).partition("; ")[2])
    return told


def ranks_that_differ(world, place: Path):
    """What becomes of a save where rank 1 holds something else: weights, or those that a forward pass renormalises."""
    told = []
    for name in ("weights", "words"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"weights": nn.Linear(2, 1), "words": nn.Embedding(2, 2, max_norm=1.0)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = Run(place / name, {"model": model, "optimizer": optimizer}, world=world, every_steps=1, stop=StopRequest())
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logging.getLogger("harness.training.resume").addHandler(handler)
        try:
            for _ in run.steps(2):
                with torch.no_grad():
                    model[name].weight.add_(world.rank)
                run.step()
        except ConfigError as error:
            lines.append(str(error))
        finally:
            logging.getLogger("harness.training.resume").removeHandler(handler)
            run.close()
        told.append(" ".join(lines))
    return told


def unequal_steps(world, place: Path):
    """What is said where rank 1 leaves its loop three steps before rank 0 does."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("harness.training.attempt").addHandler(handler)
    torch.manual_seed(0)
    brief = TorchrunWorld(torch.device("cpu"), "gloo", timeout_seconds=2)
    run = Run(None, {"model": nn.Linear(1, 1)}, world=brief, stop=StopRequest(), config={"log": {"every_steps": None}})
    try:
        for step in run.steps(7):
            if world.rank == 1 and step == 4:
                break
            run.step()
    except Exception as error:
        run.remember_crash(error)
    finally:
        logging.getLogger("harness.training.attempt").removeHandler(handler)
        world.all_gather(None)  # over a group of its own
    return lines


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    return directory, played(__file__, directory, ranks=2)


@pytest.mark.torchrun
def test_ranks_share_an_evaluation(results):
    """Each measures its share; the means are over all samples, and training does not notice."""
    directory, found = results
    assert returned(found["evaluated"]) == [[True], [True]]
    records = [json.loads(line) for line in (directory / "evaluated" / "judged.jsonl").read_text().splitlines()]
    means = [record["x"] for record in records if record["event"] == "evaluate"]
    assert means == [pytest.approx(0, abs=1e-6)] * 4


@pytest.mark.torchrun
def test_ranks_that_differ_are_not_saved(results):
    """A checkpoint would give all ranks what rank 0 holds, or pieces of each. What no optimizer moves is told of."""
    (weights, words), (weights_of_other, words_of_other) = returned(results[1]["ranks_that_differ"])
    for text in (weights, weights_of_other):
        assert "step 1: model differs between rank 0 and ranks [1], nothing is saved" in text
    assert "parameters that no optimizer updates" in words
    assert words_of_other == ""
    directory = results[0] / "ranks_that_differ"
    assert list(directory.glob("weights/step-*/manifest.json")) == []
    assert newest(directory / "words")["step"] == 2


@pytest.mark.torchrun
def test_metrics_are_matched_by_name(results):
    """Never by position: means over different metrics are none."""
    told = ["rank 0 reports loss, accuracy; rank 1 reports loss", "rank 0 reports a; rank 1 reports b", ""]
    assert returned(results[1]["other_metrics"]) == [told, told]


@pytest.mark.torchrun
def test_a_rank_without_a_share_of_the_evaluation(results):
    """It learns the result from the others."""
    assert returned(results[1]["empty_shares"]) == [1.0, 1.0]


@pytest.mark.torchrun
def test_all_ranks_know_what_has_become_of_the_last_save(results):
    """None returns before it is committed; where it fails, it is every rank's error."""
    assert returned(results[1]["saved_late"]) == [12, 12]
    assert [result["raised"] for result in results[1]["last_save_fails"]] == ["StoreError", "StoreError"]


@pytest.mark.torchrun
def test_a_rank_that_waits_in_vain_says_where_it_was(results):
    """Besides what gloo has to say: which boundary it had reached, and what is asked of all ranks."""
    first, second = returned(results[1]["unequal_steps"])
    (line,) = [each for each in first if "timed out waiting for" in each]
    assert line.startswith(
        "rank 0 timed out waiting for another rank, after 7 calls of run.step() in this process (step 7); every"
    )
    assert not [each for each in second if "timed out waiting for" in each]


@pytest.mark.parametrize(("grace_seconds", "warnings"), [(1e-6, 1), (60.0, 0)])
def test_a_save_that_outlasts_the_grace_is_warned_of_once(run, caplog, grace_seconds, warnings):
    """At the first save, not at the preemption; two saves are made here."""
    assert run(checkpoint={"every_steps": 6}, stop={"grace_seconds": grace_seconds}) == [6, 12]
    assert caplog.text.count("would be killed before the checkpoint commits") == warnings


def test_a_save_that_outlasts_the_grace_is_warned_of_at_the_next_start(run, caplog):
    """Before the first step: the newest manifest says what a save takes."""
    run(checkpoint={"every_steps": 6})
    assert "would be killed before the checkpoint commits" not in caplog.text
    run(stop={"grace_seconds": 1e-6})  # has nothing left to train, and saves nothing
    assert caplog.text.count("would be killed before the checkpoint commits") == 1


# --- the data --------------------------------------------------------------------------------------------------------


class Told(Points):
    """Samples that depend on the epoch that the data set was told last; ``seen`` has one of each step."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        return torch.full((1, 4), float(self.epoch)), self.x[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_is_told_the_epoch(run, workers):
    """In each process that fetches, workers too, which are an epoch ahead; and again after a resume in its middle."""
    seen = []

    def task() -> Task:
        model = nn.Linear(4, 4)

        def note(model, batch):
            seen.append(set(batch[0].flatten().tolist()))
            return F.mse_loss(model(batch[0]), batch[1])

        return Task(model, Told(), torch.optim.SGD(model.parameters(), lr=0.1), note)

    run(task, train={**TRAIN, "steps": 5}, data={"workers": workers})
    run(task, train={**TRAIN, "steps": 9}, data={"workers": workers})
    assert seen == [{epoch} for epoch in (0.0, 1.0, 2.0) for _ in range(3)]


def test_a_short_last_batch_can_be_left_out(run, caplog):
    """Epochs are counted in whole batches then, and a batch norm that would be given one sample is no longer warned of."""
    assert run(train={"epochs": 2, "global_batch_size": 9}) == [4]
    assert "on which a batch norm cannot train (model): set drop_last (train.drop_last)" in caplog.text
    caplog.clear()
    assert run(train={"epochs": 6, "global_batch_size": 9, "drop_last": True}) == [4, 6]
    assert "batch norm" not in caplog.text


if __name__ == "__main__":
    play(
        [evaluated, empty_shares, saved_late, last_save_fails, other_metrics, ranks_that_differ, unequal_steps],
        Path(sys.argv[1]),
    )
