"""A run around a loop that somebody else has written: what it saves, restores, says, and refuses."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness
from harness import Loader, Run, StopRequest
from harness.data.seeding import seed_everything
from harness.distributed import device
from harness.distributed.world import SoloWorld
from harness.errors import ConfigError, Mismatch, NoCheckpoint, Stopped, StoreError, Unsupported
from harness.training.run import device_of
from tests.support.cluster import newest
from tests.support.late_device import MODES, Late, LateDevice

SAMPLES, BATCH = 10, 4  # three steps an epoch


class Script:
    """A loop as a program has it: a model, an optimizer, a loader, in a run."""

    def __init__(
        self,
        url: Path | None,
        *,
        batch: int = BATCH,
        extra: dict[str, Any] | None = None,
        every_steps: int | None = None,
        **options,
    ):
        seed_everything(3)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.loader = Loader(TensorDataset(torch.randn(SAMPLES, 2)), batch, seed=3)
        self.seen: list[int] = []
        self.stop = StopRequest()
        state = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader, **(extra or {})}
        quiet = {"log": {"every_steps": None}, **options.pop("config", {})}
        self.run = Run(url, state, every_steps=every_steps, config=quiet, stop=self.stop, **options)

    def train(self, epochs: int, *, until: int | None = None) -> "Script":
        """Trains; ``until`` is a step before the successor of which the program dies, as it were."""
        for epoch in self.run.epochs(epochs):
            for (x,) in self.loader:
                if self.run.global_step == until:
                    self.run.close()
                    return self
                self.step(x)
                self.seen.append(epoch)
        return self

    def step(self, x: torch.Tensor) -> None:
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.run.step(loss=loss)


def saved_steps(url: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in url.glob("step-*"))


# --- exactly ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [1, 2, 3, 4, 6, 7])
def test_it_goes_on_from_within_an_epoch_and_from_its_end(tmp_path, until):
    """With the bits of the loop that was not interrupted, in the same epochs."""
    straight = Script(tmp_path / "straight").train(3)
    assert straight.seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    Script(tmp_path / "halves", every_steps=1).train(3, until=until)
    resumed = Script(tmp_path / "halves").train(3)
    assert resumed.seen == straight.seen[until:]
    assert newest(tmp_path / "halves")["digests"] == newest(tmp_path / "straight")["digests"]


def test_random_numbers_before_the_loop_do_not_count(tmp_path):
    """They are restored when the loop begins, so a program may draw between its run and its loop."""
    straight = Script(tmp_path / "straight").train(2)
    Script(tmp_path / "halves", every_steps=1).train(2, until=4)
    resumed = Script(tmp_path / "halves")
    torch.randn(5)
    resumed.train(2)
    assert all(torch.equal(*pair) for pair in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))


def test_another_batch_size_goes_on_from_the_same_sample(tmp_path):
    """The position is one of samples; the ledger agrees."""
    Script(tmp_path, every_steps=1).train(2, until=1)
    script = Script(tmp_path, batch=2)
    script.train(1)
    assert len(script.seen) == 3


# --- intervals and ends ----------------------------------------------------------------------------------------------


def test_saves_after_so_many_steps_or_epochs_and_at_the_end(tmp_path):
    """After so many steps or epochs, and at the end."""
    Script(tmp_path / "steps", every_steps=2).train(2)
    assert saved_steps(tmp_path / "steps") == [2, 4, 6]
    Script(tmp_path / "epochs", every_epochs=1).train(3)
    assert saved_steps(tmp_path / "epochs") == [3, 6, 9]
    Script(tmp_path / "last", every_steps=1, keep_last=2).train(2)
    assert saved_steps(tmp_path / "last") == [5, 6]
    Script(tmp_path / "end").train(1)
    assert saved_steps(tmp_path / "end") == [3]


def test_an_epoch_that_is_left_early(tmp_path):
    """The next one begins at its beginning, and a resume knows."""
    script = Script(tmp_path)
    for _ in script.run.epochs(2):
        for (x,) in script.loader:
            script.step(x)
            break
    assert (script.run.global_step, script.loader.cursor.epoch) == (2, 2)
    assert Script(tmp_path).train(2).seen == []


def test_a_loop_that_is_left_early_says_so(tmp_path):
    """``finish`` saves its end."""
    script = Script(tmp_path)
    for _ in script.run.steps(100):
        script.step(torch.ones(1, 2))
        if script.run.global_step == 4:
            break
    script.run.finish()
    assert newest(tmp_path)["step"] == 4


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_that_was_finished_early_stays_finished(tmp_path, caplog, inside):
    """A restart trains nothing; ``reopen`` does, and so does a second loop of the same program."""

    def program(**options) -> Script:
        script = Script(tmp_path, **options)
        for _ in script.run.epochs(4):
            for (x,) in script.loader:
                script.step(x)
                script.seen.append(script.run.global_step)
            if script.run.epoch >= 2:
                if inside:
                    script.run.finish()
                break
        if not inside and script.seen:
            script.run.finish()
        return script

    assert program().seen == [1, 2, 3, 4, 5, 6]
    again = program()
    assert again.seen == []
    assert "run.finish() ended this run early, at step 6" in caplog.text
    for _ in again.run.steps(7):
        again.step(torch.ones(1, 2))
    assert newest(tmp_path)["step"] == 7
    assert Script(tmp_path, reopen=True).train(3).seen == [2, 2, 2]


def test_a_loop_that_is_left_without_a_word(tmp_path, caplog):
    """What is not saved is told of when the run is closed; not after an error, nor where the end was saved."""
    for finishes in (True, False):
        script = Script(tmp_path / str(finishes), every_steps=2)
        for _ in script.run.steps(100):
            script.step(torch.ones(1, 2))
            if script.run.global_step == 5:
                break
        if finishes:
            script.run.finish()
        script.run.close()
        found = "the loop was left early, at step 5; nothing after step 4 is saved" in caplog.text
        assert found != finishes


def test_what_changes_after_the_last_save_is_saved_by_finish(tmp_path):
    """Averages that get their statistics when the loop is over, say."""
    script = Script(tmp_path).train(1)
    script.run.finish()
    assert saved_steps(tmp_path) == [3], "nothing has changed"
    with torch.no_grad():
        script.model[0].weight.mul_(0.5)
    script.run.finish()
    assert saved_steps(tmp_path) == [3, 3]
    assert torch.equal(harness.load(tmp_path)["model"]["0.weight"], script.model[0].weight)
    assert Script(tmp_path).train(2).seen == [1, 1, 1], "the loop was at its own end"


@pytest.mark.parametrize("every", [2, 4])
def test_epochs_that_end_between_two_steps(tmp_path, every):
    """Batches that are left over at the end of an epoch hide none of its intervals."""
    log = {"log": {"every_steps": None, "every_epochs": every, "jsonl": str(tmp_path / "log.jsonl")}}
    script = Script(tmp_path / "run", every_epochs=every, config=log)
    for _ in script.run.epochs(9):
        for number, (x,) in enumerate(script.loader, 1):
            if number % 2 == 0:  # of three
                script.step(x)
    assert saved_steps(tmp_path / "run") == [*range(every, 9, every), 9]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "train"] == [*range(every, 9, every)]


def test_metrics_that_are_no_numbers():
    """Are named."""
    script = Script(None, config={"log": {"every_steps": 1}})
    with pytest.raises(ConfigError, match=r"run\.step: logits: expected a number .* found Tensor of shape \[3\]"):
        for _ in script.run.steps(2):
            script.run.step(logits=torch.ones(3))


def test_more_metrics_than_fit_into_one_message(tmp_path):
    """All are logged."""
    log = {"log": {"every_steps": 1, "jsonl": str(tmp_path / "log.jsonl")}}
    script = Script(None, config=log)
    values = {f"metric {number}": float(number) for number in range(100)}
    for _ in script.run.steps(1):
        script.run.step(**values)
    (record,) = [
        each for each in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if each["event"] == "train"
    ]
    assert {name: record[name] for name in values} == values


def test_without_a_url_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Script(None).train(1).run.global_step == 3
    assert list(tmp_path.iterdir()) == []


def test_asked_to_stop_it_saves_and_raises(tmp_path):
    """With a stop request of the program's own."""
    script = Script(tmp_path)
    script.stop.ask("a bell")
    with pytest.raises(Stopped, match=r"asked to stop \(a bell\) at step 1, which is saved"):
        script.train(1)
    assert newest(tmp_path)["step"] == 1


def test_the_best_is_kept(tmp_path):
    """Where the loop tells of evaluations."""
    script = Script(tmp_path, keep_last=1, config={"checkpoint": {"keep_best": True}})
    for loss in (3.0, 1.0, 2.0, 5.0):
        for _ in script.run.steps(script.run.global_step + 1):
            script.step(torch.ones(1, 2))
            script.run.evaluated("loss", {"loss": loss})
    assert saved_steps(tmp_path) == [2, 4]
    assert Script(tmp_path).run.best == {"loss": 1.0, "step": 2}


def test_the_best_is_the_one_that_was_judged(tmp_path):
    """At the end of an epoch it is that of the step before; NaN is never the best, not even as the first."""
    script = Script(tmp_path, every_steps=1, keep_last=1, config={"checkpoint": {"keep_best": True}})
    for epoch in script.run.epochs(4):
        for (x,) in script.loader:
            script.step(x)
        script.run.evaluated("err", {"err": [float("nan"), 0.1, 0.5, float("nan")][epoch]})
    assert script.run.state.progress.best == {"err": 0.1, "step": 6}
    assert saved_steps(tmp_path) == [6, 12]


def test_an_evaluation_between_the_optimizer_and_the_boundary(tmp_path):
    """Is one of the step that is about to be told of."""
    script = Script(tmp_path, keep_last=1, config={"checkpoint": {"keep_best": True}})
    for number, _ in enumerate(script.run.steps(4)):
        script.optimizer.step()
        script.run.evaluated("err", {"err": [3.0, 1.0, 2.0, 2.0][number]})
        script.run.step()
    assert script.run.state.progress.best["step"] == 2
    assert saved_steps(tmp_path) == [2, 4]


def test_roll_back_restores_the_newest_checkpoint(tmp_path):
    """All that is in the state is as it was at the newest checkpoint, in an attempt of its own."""
    script = Script(tmp_path, every_steps=2)
    for _ in script.run.steps(5):
        script.step(torch.ones(1, 2))
        if script.run.global_step == 3 and not script.seen:
            script.seen.append(3)
            script.run.roll_back()
            assert script.run.global_step == 2
    assert {path.name.split("-")[2] for path in tmp_path.glob("step-*")} == {"000001", "000002"}
    fresh = Script(tmp_path / "other")
    with pytest.raises(NoCheckpoint, match="there is no checkpoint to return to yet"):
        for _ in fresh.run.steps(5):
            fresh.run.roll_back()


def test_each_event_is_a_line_of_the_log(tmp_path):
    """A line for each event, with the metrics of the loop."""
    log = {"log": {"every_steps": 2, "jsonl": str(tmp_path / "log.jsonl")}}
    Script(tmp_path / "run", config=log).train(1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["start", "train", "saving", "save", "done"]
    assert records[1]["step"] == 2
    assert {"loss", "lr", "samples/s"} <= records[1].keys()


def test_initialize_is_for_new_runs(tmp_path):
    """It is not called where there is something to resume from."""
    called: list[int] = []
    Script(tmp_path, initialize=lambda: called.append(1)).train(1)
    Script(tmp_path, initialize=lambda: called.append(2)).train(1)
    assert called == [1]


# --- the state -------------------------------------------------------------------------------------------------------


class Counter:
    """What a program may keep for itself."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_anything_with_a_state(tmp_path):
    """A part of its own."""
    Script(tmp_path, extra={"counter": Counter(7)}).train(1)
    counter = Counter()
    Script(tmp_path, extra={"counter": counter})
    assert counter.count == 7


def test_an_optimizer_of_two_modules(tmp_path):
    """Its state is filed under the names of both."""
    for _ in range(2):
        seed_everything(0)
        one, two = nn.Linear(1, 1), nn.Linear(1, 1)
        optimizer = torch.optim.Adam([*one.parameters(), *two.parameters()])
        state = {"one": one, "two": two, "optimizer": optimizer}
        run = Run(tmp_path, state, stop=StopRequest(), config={"log": {"every_steps": None}})
        for _ in run.steps(1):
            two(one(torch.ones(1))).backward()
            optimizer.step()
            run.step()
    assert run.global_step == 1
    assert set(newest(tmp_path)["parts"]["optimizer"]["state"]) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert optimizer.state[two.bias]["step"] == 1


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"thing": object()}, ConfigError, r"thing \(object\) has no state_dict and load_state_dict"),
        (
            {"loader": DataLoader([1])},
            ConfigError,
            "loader .* has no state_dict .*; harness.Loader and torchdata's StatefulDataLoader have them",
        ),
        ({"random": Counter()}, ConfigError, "'random' is the name of a part that harness writes"),
        ({"o": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, Unsupported, "none of its parameters belongs to a module"),
    ],
)
def test_what_cannot_be_a_state(state, error, words):
    with pytest.raises(error, match=words):
        Run(None, state, stop=StopRequest())


def test_a_part_too_many_or_too_few(tmp_path):
    """Both are told of, by name, before anything is touched."""
    Script(tmp_path, extra={"counter": Counter()}).train(1)
    words = "other: not in the checkpoint; the run has Counter.*counter: not in the run.*another URL"
    with pytest.raises(Mismatch, match=f"(?s)^{tmp_path}/step-.*{words}"):
        Script(tmp_path, extra={"other": Counter()})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_steps": 0}, "config: checkpoint.every_steps: expected greater than or equal to 1, found 0"),
        ({"config": {"wachdog": {}}}, "config: wachdog: unknown key .* the nearest known key is watchdog"),
        ({"config": {"log": {"every_steps": "x"}}}, "config: log.every_steps: expected a valid integer"),
    ],
)
def test_settings_that_are_wrong(options, words):
    """One line with the path, what was expected and what was found."""
    with pytest.raises(ConfigError, match=words):
        Run("somewhere", {"counter": Counter()}, stop=StopRequest(), **options)


def test_boundaries_that_are_no_boundaries(tmp_path):
    """A loop without steps, and a step without a loop."""
    script = Script(None)
    with pytest.raises(ConfigError, match="outside of a loop"):
        script.run.step()
    with pytest.raises(ConfigError, match=r"step 1: the loop did not call run\.step\(\)"):
        for _ in script.run.steps(2):
            pass
    with pytest.raises(ConfigError, match=r"epoch 0: the loop did not call run\.step\(\)"):
        for _ in script.run.epochs(2):
            for _ in script.loader:
                pass


def test_epochs_of_somebody_elses_loader():
    """What a resume finds of an epoch may be nothing, once; a whole epoch has steps."""
    run = Run(None, {"counter": Counter()}, stop=StopRequest())
    with pytest.raises(ConfigError, match=r"epoch 1: the loop did not call run\.step\(\)"):
        for _ in run.epochs(3):
            pass


def test_a_loader_takes_its_place_from_the_group(tmp_path, monkeypatch):
    """Where the program has joined one, as under ``torch.multiprocessing.spawn``, whatever the environment says."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    early = Loader(TensorDataset(torch.arange(8.0)), 2)
    assert (early.rank, early.world_size) == (3, 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        late = Loader(TensorDataset(torch.arange(8.0)), 2)
        chosen = Loader(TensorDataset(torch.arange(8.0)), 2, rank=1, world_size=2)
    finally:
        torch.distributed.destroy_process_group()
    assert (late.rank, late.world_size) == (0, 1)
    with pytest.raises(
        ConfigError, match="the Loader is for rank 3 of 4, but this process is rank 0 of 1: make the Loader after"
    ):
        Run(None, {"loader": early}, world=SoloWorld(torch.device("cpu")), stop=StopRequest())
    for loader in (late, chosen):
        Run(None, {"loader": loader}, world=SoloWorld(torch.device("cpu")), stop=StopRequest()).close()


def test_a_loader_that_was_left_out(tmp_path, caplog):
    """Nothing would tell a resume where it was."""
    loader = Loader(TensorDataset(torch.arange(8.0)), 2)
    run = Run(tmp_path, {"counter": Counter()}, stop=StopRequest())
    for _ in run.epochs(1):
        for _ in loader:
            run.step()
    assert caplog.text.count("the Loader is not in the run's state") == 1


@pytest.mark.parametrize("where", ["nowhere", "later", "state", "object"])
def test_a_scheduler_that_was_left_out(tmp_path, caplog, where):
    """The optimizer would go on with the rate that was saved, and the schedule from its beginning."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Pace(Counter):
        """An object of the script's own that has the scheduler."""

    pace, state = Pace(), {"model": model, "optimizer": optimizer}
    if where != "later":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    if where == "state":
        state["scheduler"] = scheduler
    elif where == "object":
        pace.scheduler = scheduler
        state["pace"] = pace
    run = Run(tmp_path, state, stop=StopRequest())
    if where == "later":  # than the run
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in run.steps(3):
        optimizer.step()
        scheduler.step()
        run.step()
    found = caplog.text.count("optimizer has a learning rate scheduler, which is not in the run's state")
    assert found == (where in ("nowhere", "later"))


# --- without a run ---------------------------------------------------------------------------------------------------


def test_save_load_latest(tmp_path):
    """Any dictionaries of tensors, in a script without a process group."""
    assert harness.latest(tmp_path) is None
    tied = torch.randn(3)
    harness.save(tmp_path, {"model": {"a": tied, "b": tied}, "other": {"lr": 0.1, "names": ["x"]}}, step=5)
    harness.save(tmp_path, {"model": {"a": tied + 1}}, step=6, meta={"loss": 1.5})
    assert harness.latest(tmp_path) == 6
    assert torch.equal(harness.load(tmp_path)["model"]["a"], tied + 1)
    found = harness.load(tmp_path, step=5)
    assert found["model"]["a"] is found["model"]["b"]
    assert found["other"] == {"lr": 0.1, "names": ["x"]}


@pytest.mark.parametrize("step", [10**12, -1, True, 2.0, "5", None, torch.tensor(1.5)], ids=repr)
def test_steps_that_save_refuses(tmp_path, step):
    """What the name of a directory cannot hold would be found by nobody: it is refused before anything is written."""
    with pytest.raises(Unsupported, match=r"^step: expected a whole number from 0 to 999999999999, found "):
        harness.save(tmp_path / "run", {"model": {}}, step=step)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [0, 10**12 - 1, np.int64(5), torch.tensor(7)], ids=repr)
def test_steps_that_save_takes(tmp_path, step):
    """Whatever is a whole number, from whatever library."""
    harness.save(tmp_path, {"model": {}}, step=step)
    assert harness.latest(tmp_path) == int(step)


def test_meta_that_save_refuses(tmp_path):
    """What would not be read again as it was given is refused before anything is written, and told in words."""
    for meta in ({"loss": float("nan")}, {1: "a", "1": "b"}, {"a": {True: 1, "true": 2}}, {"lr": np.int64(1)}, ["a"]):
        with pytest.raises(Unsupported, match=r"^meta: expected "):
            harness.save(tmp_path / "run", {"model": {}}, meta=meta)
    assert not (tmp_path / "run").exists()
    harness.save(tmp_path / "run", {"model": {}}, meta={"epoch": 1, 2: ["x", None, {"y": 1e300}]})
    assert harness.latest(tmp_path / "run") == 0


def test_a_save_that_fails_leaves_nothing(tmp_path):
    """The room is free again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            harness.save(tmp_path, {"a": {"x": torch.zeros(10)}, "b": {"x": torch.zeros(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["attempts"]


def test_a_run_that_must_be_there(tmp_path):
    """A URL without a checkpoint is refused, and left as it is; one with a checkpoint is gone on from."""
    with pytest.raises(NoCheckpoint, match=r"expected a run to continue \(checkpoint\.must_exist\), found no checkpoint"):
        harness.Run(tmp_path / "run", {"model": nn.Linear(1, 1)}, must_exist=True, stop=harness.StopRequest())
    assert not (tmp_path / "run").exists()
    for must_exist in (False, True):
        model = {"model": nn.Linear(1, 1)}
        run = harness.Run(tmp_path / "run", model, must_exist=must_exist, every_steps=1, stop=harness.StopRequest())
        for _ in run.steps(run.global_step + 1):
            run.step()
        run.close()
    assert harness.latest(tmp_path / "run") == 2
    with pytest.raises(ConfigError, match="set only one of them"):
        harness.Run(tmp_path / "run", model, must_exist=True, fresh=True, stop=harness.StopRequest())


def test_what_save_refuses(tmp_path):
    """With words, and nothing is committed."""
    with pytest.raises(Unsupported, match=r"weight: expected a dictionary, as in .*, found Tensor"):
        harness.save(tmp_path, nn.Linear(1, 1).state_dict())
    with pytest.raises(Unsupported, match="a value of type"):
        harness.save(tmp_path, {"model": {"function": print}})
    with pytest.raises(NoCheckpoint):
        harness.load(tmp_path)


def test_an_endless_course_shows_no_total(tmp_path, caplog):
    """``run.steps(None)`` goes on until the loop is left; lines say the step alone."""
    caplog.set_level("INFO", "harness")
    model = nn.Linear(1, 1)
    config = {"log": {"every_steps": 1}}
    run = Run(str(tmp_path), {"model": model}, every_steps=2, config=config, stop=StopRequest())
    for step in run.steps(None):
        run.step()
        if step == 3:
            break
    run.finish()
    run.close()
    assert "step 3  epoch 0" in caplog.text
    assert "step 2  saved" in caplog.text
    assert "/9223372036854775807" not in caplog.text


def test_where_a_program_trains(monkeypatch):
    """On the device of the first parameter that lies on an accelerator: an average of the weights may be on the CPU."""
    state = {"rate": 1, "average": nn.Linear(1, 1), "model": nn.Linear(1, 1, device="meta")}
    assert [device_of(each).type for each in (state, {"rate": 1})] == ["cpu", "cpu"]
    there = torch.device("meta")
    monkeypatch.setitem(device.KNOWN, there, LateDevice(there, Late(MODES[0])))
    assert device_of(state) == there
