"""Resuming: from the newest checkpoint that every rank can read, or not at all."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

from harness import Loader, Run, StopRequest, Task
from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Ancestor, Attempt
from harness.config import Config
from harness.errors import ConfigError, Mismatch, NoCheckpoint, StoreError
from harness.state.capture import State
from harness.storage.store import open_store
from harness.training.loop import build_task
from harness.training.resume import check_lockstep, on_first
from tests.support.cluster import harness, newest, play, played, read_json, returned, train_here
from tests.support.faults import Flawed, Life, parts_at

TRAIN = {"steps": 6, "global_batch_size": 4}
CHECKPOINT = {"every_steps": 2}


def build(samples: int = 10, width: int = 4, lr: float = 1e-2, by_rank: float = 0.0, dtype: str = "float32") -> Task:
    """Something to train; ``by_rank`` makes the ranks differ, as they must not."""
    lr += by_rank * int(os.environ.get("RANK", "0"))
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1)).to(getattr(torch, dtype))
    dataset = TensorDataset(torch.randn(samples, 2, dtype=model[0].weight.dtype))
    return Task(
        model, dataset, torch.optim.Adam(model.parameters(), lr=lr), lambda model, batch: model(batch[0]).square().mean()
    )


@pytest.fixture
def url(tmp_path):
    """A run with checkpoints of steps 2, 4 and 6."""
    train_here(build, url=tmp_path / "run", train=TRAIN, checkpoint=CHECKPOINT)
    return tmp_path / "run"


def prolong(url: Path, task=build, steps: int = 8, **config):
    """Starts the run again, to train further."""
    return train_here(task, url=url, **{"train": {**TRAIN, "steps": steps}, "checkpoint": CHECKPOINT, **config})


def save(url: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return next(url.glob(f"step-{step:012}-*"))


def flip(file: Path, position: int = -1) -> None:
    """One bit of a file, by default of its last byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit in the weights": lambda save: flip(save / "model.safetensors"),
    "a flipped bit in the header": lambda save: flip(save / "optimizer.safetensors", 20),
    "a cut file": lambda save: os.truncate(save / "model.safetensors", 40),
    "a missing file": lambda save: os.unlink(save / "optimizer.safetensors"),
    "a flipped bit in the manifest": lambda save: flip(save / "manifest.json", 100),
    "a cut manifest": lambda save: os.truncate(save / "manifest.json", 100),
    "another checkpoint's manifest": lambda save: shutil.copy(
        next(save.parent.glob(f"step-{2:012}-*")) / "manifest.json", save / "manifest.json"
    ),
}


# --- what is resumed -------------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_starts(tmp_path):
    """Nothing there, nothing to resume."""
    assert train_here(build, url=tmp_path / "run", train=TRAIN).step == 6


def test_the_newest_is_taken(url, caplog):
    """What is older is left alone."""
    caplog.set_level("INFO")
    prolong(url)
    assert f"resuming from {save(url, 6).name}" in caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_it_falls_back_over_a_corrupt_one(url, kind, caplog):
    """To the one before, loudly, and ends with the bits of a run that was never corrupt."""
    straight = newest(url)["digests"]["model"]
    DAMAGE[kind](save(url, 6))
    bad = save(url, 6).name
    prolong(url, steps=6)
    (record,) = [record for record in caplog.records if "NOT resuming" in record.message]
    assert record.levelname == "ERROR"
    assert record.message.startswith(f"NOT resuming from {bad}: ")
    found = newest(url)
    assert (found["step"], found["digests"]["model"]) == (6, straight)


def test_a_resume_falls_back_as_far_as_it_must(url, caplog):
    """Each one that is passed over is told of, with what is wrong with it."""
    DAMAGE["a cut file"](save(url, 6))
    DAMAGE["a flipped bit in the weights"](save(url, 4))
    caplog.set_level("INFO")
    prolong(url)
    refused = [record.message for record in caplog.records if "NOT resuming" in record.message]
    assert len(refused) == 2
    assert "model.safetensors: expected" in refused[0]
    assert "model.safetensors: expected xxh3_128:" in refused[1]
    assert "step-000000000002" in next(
        message for message in caplog.messages if "resuming from step" in message and "NOT" not in message
    )


def test_another_line_that_goes_further_is_told_of(tmp_path, caplog):
    """Where two copies of a run went on apart and were put together: what is on the other one, and that it stays."""
    store = open_store(str(tmp_path))
    life = Life(store, keep_last=None)
    life.save(200)
    for step in (300, 400):
        Life(store, keep_last=None).save(step)
    other = Catalog(store)
    elsewhere = [Attempt(f"00000{number}-eeeeeeee") for number in (4, 5)]
    lineage = [Ancestor(life.attempt.id, 200)]
    for attempt, step in zip(elsewhere, (210, 230), strict=True):
        commit.write(store, parts_at(step), step=step, attempt=attempt, lineage=lineage, meta={"world_size": 2})
        lineage.append(Ancestor(attempt.id, step))
    last = Life(store, keep_last=1)
    assert (last.restored.step, last.restored.exact) == (230, True)
    (told,) = [record.message for record in caplog.records if "that this run does not continue" in record.message]
    assert told.startswith(
        "a newer checkpoint exists that this run does not continue: step 400 of attempt 3, step-000000000400-000003-"
    )
    last.save(240)
    assert [entry.step for entry in other.entries()] == [240, 400]


def test_an_unfinished_save_is_no_checkpoint(url, caplog):
    """A directory without a manifest is passed over in silence: it never was one."""
    os.unlink(save(url, 6) / "manifest.json")
    caplog.set_level("INFO")
    prolong(url)
    assert "NOT resuming" not in caplog.text
    assert f"resuming from {save(url, 4).name}" in caplog.text


def test_a_corrupt_line_is_abandoned(url):
    """After a fall-back, what the corrupt line had beyond it is not taken up again, though its step is higher."""
    flip(save(url, 6) / "model.safetensors")
    abandoned = save(url, 6).name
    prolong(url, steps=5)
    shutil.copytree(url / abandoned, url.parent / "kept")
    flip(url / abandoned / "model.safetensors")  # whole again
    assert newest(url)["step"] == 5
    lineage = read_json("inspect", str(url))["lineage"]
    assert [ancestor["until_step"] for ancestor in lineage] == [4]


def test_the_one_before_is_taken_in_a_crash_loop(tmp_path, caplog):
    """When attempts fail in the same way at the same step, the next one starts from the checkpoint before."""

    def breaking() -> Task:
        task = build()
        calls = iter(range(100))

        def loss(model: nn.Module, batch) -> torch.Tensor:
            next(calls)
            if float(task.optimizer.state[model[0].weight].get("step", torch.zeros(()))) == 5:
                raise FloatingPointError("nothing good")
            return task.loss(model, batch)

        return Task(task.model, task.dataset, task.optimizer, loss)

    caplog.set_level("INFO")
    config = {"url": tmp_path / "run", "train": TRAIN, "checkpoint": CHECKPOINT, "crash_loop": {"same_failures": 2}}
    for _ in range(3):
        with pytest.raises(FloatingPointError):
            train_here(breaking, **config)
    starts = [message.partition(",")[0] for message in caplog.messages if message.startswith("attempt ")]
    assert [start.partition("step-")[2][:12] for start in starts[1:]] == ["000000000004", "000000000002"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_whole_checkpoint_is_no_reason_to_start_anew(url):
    """The run stops, and nothing is written over the damage."""
    for step in (2, 4, 6):
        flip(save(url, step) / "model.safetensors")
    before = sorted(url.glob("step-*"))
    with pytest.raises(NoCheckpoint, match="expected a whole checkpoint, found 3 corrupt ones"):
        prolong(url)
    assert sorted(url.glob("step-*")) == before


def test_the_exit_code_of_a_run_without_a_whole_checkpoint(url, tmp_path):
    """66, one line on what was expected, one for each that is corrupt, no traceback."""
    for step in (2, 4, 6):
        flip(save(url, step) / "model.safetensors")
    config = {"task": f"{__file__}:build", "train": {**TRAIN, "steps": 8}, "checkpoint": {"url": str(url)}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    done = harness("train", str(tmp_path / "run.yaml"))
    assert done.returncode == 66, done.stderr
    assert done.stderr.count("NOT resuming from step-") == 3
    assert done.stderr.count("harness: ") == 1
    assert "Traceback" not in done.stderr


CHANGES = {
    "another seed": ({"seed": 5}, {}, "seed: the checkpoint was written with 0, the loader has 5"),
    "other data": ({}, {"samples": 11}, "samples: the checkpoint was written with 10, the loader has 11"),
    "another width": ({}, {"width": 5}, "0.weight: the checkpoint has float32[4, 2], the model has float32[5, 2]"),
    "another dtype": ({}, {"dtype": "float64"}, "1.bias: the checkpoint has float32[1], the model has float64[1]"),
    "a scaler": ({"train": {**TRAIN, "steps": 8, "precision": "fp16"}}, {}, "train.precision"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_does_not_fit_is_refused(url, change):
    """It is not a matter of falling back: the checkpoint is whole, the run is another. Names, shapes and dtypes are said."""
    config, args, words = CHANGES[change]
    with pytest.raises(Mismatch) as caught:
        prolong(url, lambda: build(**args), **config)
    assert words in str(caught.value)


def test_a_model_with_other_names_is_refused(url):
    """Every name that only one side has, with its shape and dtype."""

    def renamed() -> Task:
        task = build()
        model = nn.Sequential(task.model[0], nn.Identity(), task.model[1])
        return Task(model, task.dataset, task.optimizer, lambda model, batch: model(batch[0]).sum())

    with pytest.raises(Mismatch) as caught:
        prolong(url, renamed)
    for line in (
        "(4 differences)",
        "2.weight: not in the checkpoint; the model has float32[1, 4]",
        "1.weight: not in the model; the checkpoint has float32[1, 4]",
    ):
        assert line in str(caught.value)


def test_another_optimizer_is_refused(url):
    """Its options and its state are not this one's."""

    def other() -> Task:
        task = build()
        return Task(task.model, task.dataset, torch.optim.SGD(task.model.parameters(), lr=1e-2), task.loss)

    with pytest.raises(Mismatch, match="the checkpoint does not fit the optimizer SGD"):
        prolong(url, other)


def test_a_scheduler_that_comes_or_goes_is_refused(url):
    """In either direction."""

    def scheduled() -> Task:
        task = build()
        scheduler = torch.optim.lr_scheduler.StepLR(task.optimizer, 3)
        return Task(task.model, task.dataset, task.optimizer, task.loss, scheduler)

    with pytest.raises(Mismatch, match="scheduler: not in the checkpoint; the run has"):
        prolong(url, scheduled)
    train_here(scheduled, url=url.with_name("scheduled"), train=TRAIN)
    with pytest.raises(Mismatch, match=r"initial_lr|scheduler: not in the run; the checkpoint has it"):
        prolong(url.with_name("scheduled"))


def test_a_refused_checkpoint_touches_nothing(url):
    """The model and the optimizer are as they were built."""
    tasks = []

    def wider() -> Task:
        tasks.append(build(width=5))
        return tasks[-1]

    with pytest.raises(Mismatch):
        prolong(url, wider)
    (task,) = tasks
    untouched = build_task(Config.model_validate({"task": "here:build", "train": TRAIN}), lambda: build(width=5))
    for name, value in untouched.model.state_dict().items():
        assert torch.equal(task.model.state_dict()[name], value), name
    assert not task.optimizer.state


# --- a fresh start ---------------------------------------------------------------------------------------------------


def test_fresh_refuses_a_used_url(url):
    """Instead of resuming, and instead of overwriting."""
    with pytest.raises(ConfigError, match=r"checkpoint\.url: --fresh expects an unused URL, found a run in "):
        prolong(url, fresh=True)


def test_fresh_refuses_corrupt_runs_too(url):
    """They are somebody's."""
    for step in (2, 4, 6):
        flip(save(url, step) / "manifest.json", 50)
    with pytest.raises(ConfigError, match="--fresh"):
        prolong(url, fresh=True)


def test_fresh_takes_an_unused_url(tmp_path):
    """That is what it is for."""
    assert train_here(build, url=tmp_path / "run", train=TRAIN, fresh=True).step == 6


def test_fresh_lets_a_launch_restart_its_own_run(tmp_path, monkeypatch):
    """torchrun starts the same command again after a death; another launch is another matter."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    train_here(build, url=tmp_path / "run", train=TRAIN, fresh=True)
    assert prolong(tmp_path / "run", fresh=True).step == 8
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    with pytest.raises(ConfigError, match="--fresh"):
        prolong(tmp_path / "run", steps=9, fresh=True)


# --- all ranks together ----------------------------------------------------------------------------------------------


def one_rank_cannot_read(world, place: Path):
    train_here(build, world, url=place / "run", train=TRAIN, checkpoint=CHECKPOINT)

    def flip_a_bit(path: str, data: bytes) -> bytes:
        is_flawed = world.rank == 1 and path.endswith("model.safetensors")
        return data[:-1] + bytes([data[-1] ^ 1]) if is_flawed else data

    Flawed.flaw = staticmethod(flip_a_bit)
    log = {"jsonl": str(place / "log.jsonl")}
    task_here = {"train": {**TRAIN, "steps": 8}, "checkpoint": {**CHECKPOINT, "restore": "each"}, "log": log}
    return train_here(build, world, url=f"flawed://{place}/run", **task_here).step


def ranks_differ_in_an_option(world, place: Path):
    train_here(lambda: build(by_rank=0.5), world, url=place / "run", train=TRAIN)


def ranks_differ_in_their_data(world, place: Path):
    train_here(lambda: build(samples=10 + world.rank), world, url=place / "run", train=TRAIN)


def ranks_differ_in_their_batches(world, place: Path):
    train_here(build, world, url=place / "run", train={"steps": 6, "global_batch_size": 4 + 2 * world.rank})


def ranks_have_other_samples(world, place: Path):
    whole = TensorDataset(torch.randn(40, 2, generator=torch.Generator().manual_seed(1)))
    seed = torch.Generator().manual_seed(world.rank)  # as it is without one
    Run(place / "run", {"loader": Loader(random_split(whole, [30, 10], seed)[0], 4)}, world=world, stop=StopRequest())


def ranks_differ_in_their_models(world, place: Path):
    torch.manual_seed(world.rank)
    Run(place / "run", {"model": nn.Linear(2, 2)}, world=world, stop=StopRequest())


def ranks_differ_after_a_resume(world, place: Path):
    model = nn.Linear(2, 2)
    check_lockstep(world, State({"model": model}, world.device), {"seen": world.rank}, resumed=True)


def only_rank_0_fails(world, place: Path):
    def fail():
        assert world.rank == 0
        raise StoreError("the disk is gone", transient=True)

    try:
        on_first(world, fail)
    except StoreError as error:
        return [str(error), error.transient]


def only_rank_0_looks(world, place: Path):
    return on_first(world, lambda: f"seen by rank {world.rank}")


def refused_by_all(world, place: Path):
    train_here(build, world, url=place / "run", train=TRAIN)
    train_here(lambda: build(width=5), world, url=place / "run", train={**TRAIN, "steps": 7})


SCENARIOS = [
    one_rank_cannot_read,
    ranks_differ_in_an_option,
    ranks_differ_in_their_data,
    ranks_differ_in_their_batches,
    ranks_have_other_samples,
    ranks_differ_in_their_models,
    ranks_differ_after_a_resume,
    only_rank_0_fails,
    only_rank_0_looks,
    refused_by_all,
]


def build_split(seed: int) -> Task:
    """A task that splits its data by itself."""
    task = build(samples=40)
    part = random_split(task.dataset, [30, 10], torch.Generator().manual_seed(seed))[0]
    return replace(task, dataset=part)


def test_another_split_at_a_restart_is_refused(tmp_path):
    """Samples that the model is judged by would be trained; other data on purpose has a setting."""
    train_here(lambda: build_split(0), url=tmp_path / "run", train=TRAIN, checkpoint=CHECKPOINT)
    with pytest.raises(Mismatch, match=r"step-0+6-.*the data set has changed since the checkpoint \(sample \d+(, \d+)+ of"):
        prolong(tmp_path / "run", lambda: build_split(1))
    assert prolong(tmp_path / "run", lambda: build_split(0), steps=7).step == 7
    assert prolong(tmp_path / "run", lambda: build_split(1), data={"fingerprint": False}).step == 8


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    return directory, played(__file__, directory, ranks=2)


@pytest.mark.torchrun
def test_all_fall_back_when_one_rank_cannot_read(results):
    """A checkpoint that only one of two ranks finds corrupt is nobody's."""
    directory, found = results
    assert returned(found["one_rank_cannot_read"]) == [8, 8]
    lines = (directory / "one_rank_cannot_read" / "log.jsonl").read_text().splitlines()
    (resumed,) = [record for record in map(json.loads, lines) if record["event"] == "resume"]
    assert resumed["step"] == 4


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("scenario", "error", "words"),
    [
        ("ranks_differ_in_an_option", "ConfigError", "optimizer"),
        ("ranks_differ_in_their_data", "ConfigError", "samples"),
        ("ranks_differ_in_their_batches", "ConfigError", "config"),
        (
            "ranks_differ_in_their_models",
            "ConfigError",
            "DistributedDataParallel, which makes them equal, before Run is made",
        ),
        ("ranks_differ_after_a_resume", "RankFailure", "seen: 0 on rank 0, 1 on rank 1"),
    ],
)
def test_ranks_that_differ_do_not_train(results, scenario, error, words):
    """Lockstep is verified before the first step: every rank refuses, and says in what they differ. What was built like that
    would be built like that by a restart."""
    for result in results[1][scenario]:
        assert result.get("raised") == error, result
        assert "not in lockstep: ranks [1] differ from rank 0" in result["message"]
        assert words in result["message"]


@pytest.mark.torchrun
def test_ranks_with_other_samples_do_not_train(results):
    """As many samples in the same order, and not the same ones: each rank has split the data by itself."""
    for result in results[1]["ranks_have_other_samples"]:
        assert result.get("raised") == "ConfigError", result
        assert "rank 1 has other samples than rank 0: give random_split a seeded generator" in result["message"]


@pytest.mark.torchrun
def test_what_rank_0_finds_is_everybodys(results):
    """Its answer as its error, with what the error carries."""
    found = results[1]
    assert returned(found["only_rank_0_looks"]) == ["seen by rank 0"] * 2
    assert returned(found["only_rank_0_fails"]) == [["the disk is gone", True]] * 2


@pytest.mark.torchrun
def test_a_mismatch_is_every_ranks(results):
    """All refuse together; none waits for the others."""
    assert [result.get("raised") for result in results[1]["refused_by_all"]] == ["Mismatch"] * 2


if __name__ == "__main__":
    play(SCENARIOS, Path(sys.argv[1]))
