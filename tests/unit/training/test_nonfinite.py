"""A loss or gradients that are not finite: found on all ranks at the same step, and what becomes of the run."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Task
from harness.checkpoint.catalog import Catalog
from harness.config import Config
from harness.data.position import SkippedBatch
from harness.data.schedule import Cursor, Schedule
from harness.errors import NonFinite
from harness.launcher import outcome
from harness.report import numbers
from harness.storage.store import open_store
from harness.telemetry import journal
from tests.support.cluster import newest, play, played, returned, train_here

SEED, SAMPLES, BATCH, BAD = 86, 10, 4, 7  # three steps an epoch; the bad sample is in steps 3, 6 and 8
TRAIN = {"steps": 9, "global_batch_size": BATCH}


def samples(bad: int | None = BAD) -> TensorDataset:
    """Points on a line, and which they are; one has no number."""
    x = torch.linspace(-1, 1, SAMPLES).view(-1, 1)
    y = 3 * x + 1
    if bad is not None:
        y[bad] = math.nan
    return TensorDataset(x, y)


def loss(model: nn.Module, batch) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def task(**options) -> Task:
    model = options.pop("model", net)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    return Task(
        **{"model": model, "dataset": samples(), "optimizer": optimizer, "loss": loss, "scheduler": scheduler, **options}
    )


def run(url: Path, world=None, *, policy: str, task=task, limit: int = 10, **config):
    """Trains in this process with a checkpoint after every second step."""
    sections = {"seed": SEED, "train": TRAIN, "checkpoint": {"every_steps": 2}, **config}
    return train_here(task, world, url=url, nonfinite={"policy": policy, "limit": limit}, **sections)


def positions(steps: int = TRAIN["steps"]) -> list[SkippedBatch]:
    """Where the batches with the bad sample begin, of so many steps."""
    schedule, cursor, found = Schedule(SAMPLES, SEED, BATCH, None), Cursor(), []
    for _ in range(steps):
        if BAD in schedule.order(cursor.epoch)[cursor.offset : cursor.offset + BATCH].tolist():
            found.append(SkippedBatch(cursor.epoch, cursor.offset, schedule.size(cursor)))
        cursor = schedule.after(cursor)
    return found


def skipped(url: Path) -> list[SkippedBatch]:
    """What the newest checkpoint says."""
    return [SkippedBatch(*each) for each in newest(url)["parts"]["loader"]["state"]["gaps"]]


def by_hand() -> nn.Module:
    """The same training in plain torch, without the bad batches."""
    torch.manual_seed(SEED)
    plain, schedule, cursor, data = task(), Schedule(SAMPLES, SEED, BATCH, None), Cursor(), samples()
    for _ in range(TRAIN["steps"]):
        order = schedule.order(cursor.epoch)[cursor.offset : cursor.offset + BATCH]
        if BAD not in order.tolist():
            plain.optimizer.zero_grad()
            loss(plain.model, data[order]).backward()
            plain.optimizer.step()
        plain.scheduler.step()
        cursor = schedule.after(cursor)
    return plain.model


def test_stop_names_the_samples(tmp_path):
    """The run ends with an error that no restart can mend, before the optimizer has seen the step."""
    bad = positions()[0]
    with pytest.raises(NonFinite) as caught:
        run(tmp_path, policy="stop")
    share = Schedule(SAMPLES, SEED, BATCH, None).order(0)[bad.offset : bad.offset + BATCH].tolist()
    assert f"step 3: the loss on rank 0 is not finite; epoch 0, samples {share};" in str(caught.value)
    assert outcome.of(caught.value).exit_code == 70
    assert 70 in outcome.FINAL_EXIT_CODES
    assert newest(tmp_path)["step"] == 2


def test_stop_is_what_is_done_unless_something_else_is_asked_for(tmp_path):
    """Nobody has to know of the section to be spared a poisoned model."""
    with pytest.raises(NonFinite):
        train_here(task, url=tmp_path, seed=SEED, train=TRAIN)


def test_skip_leaves_the_batch_out(tmp_path):
    """The bits are those of a training without the bad batches; schedule and position move on; the manifest tells."""
    progress = run(tmp_path, policy="skip")
    assert progress.step == 9
    assert progress.skipped == positions()
    assert len(positions()) == 3
    assert skipped(tmp_path) == positions()
    for name, value in by_hand().state_dict().items():
        assert torch.equal(value, newest(tmp_path)["parts"]["model"][name])


def test_rollback_goes_back_and_passes_over(tmp_path):
    """Each time an attempt of its own begins at the newest checkpoint, and trains again what was trained since; the end has
    the bits of a run without the batches."""
    log = tmp_path / "log.jsonl"
    run(tmp_path / "back", policy="rollback", log={"jsonl": str(log)})
    run(tmp_path / "skip", policy="skip")
    assert newest(tmp_path / "back")["digests"]["optimizer"] == newest(tmp_path / "skip")["digests"]["optimizer"]
    assert newest(tmp_path / "back")["digests"]["model"] == newest(tmp_path / "skip")["digests"]["model"]
    assert skipped(tmp_path / "back") == skipped(tmp_path / "skip")
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["step"], record["policy"]) for record in told if record["event"] == "nonfinite"] == [
        (step, "rollback") for step in (3, 6, 8)
    ]
    assert [record["step"] for record in told if record["event"] == "resume"] == [2, 4, 6]
    assert len({record["attempt"] for record in told}) == 4
    catalog = Catalog(open_store(str(tmp_path / "back")))
    report = numbers.read_report(catalog, journal.read_records(catalog.store), time.time())
    assert [life.ending for life in report.lives] == ["rolled back"] * 3 + ["done"]
    assert [(life.from_step, life.last_step, life.lost_steps) for life in report.lives] == [
        (0, 2, 0),
        (2, 5, 1),
        (4, 7, 1),
        (6, 9, 0),
    ]
    assert report.as_json()["nonfinite_steps"] == 3
    assert sum(report.seconds(kind) for kind in numbers.KINDS) == pytest.approx(report.wall_seconds)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def spoilt_input() -> TensorDataset:
    x, y = samples(bad=None).tensors
    x = x.clone()
    x[BAD] = math.nan
    return TensorDataset(x, y)


def test_skip_refuses_a_model_that_the_batch_has_spoilt(tmp_path):
    """The running averages of a batch norm have taken the NaN in: to train on would be to keep it."""
    with pytest.raises(
        NonFinite, match=r"skipping does not repair the NaN in 1.running_mean, 1.running_var: set .* rollback"
    ):
        run(tmp_path, policy="skip", task=lambda: task(model=normed, dataset=spoilt_input()))


def test_rollback_mends_a_model_that_the_batch_has_spoilt(tmp_path):
    """What the checkpoint holds replaces the running averages, too."""
    run(tmp_path, policy="rollback", task=lambda: task(model=normed, dataset=spoilt_input()), checkpoint={"every_steps": 1})
    assert all(value.isfinite().all() for value in newest(tmp_path)["parts"]["model"].values())


def test_rollback_needs_a_checkpoint(tmp_path):
    """There is none before the first save, and none at all without a URL."""
    with pytest.raises(NonFinite, match="there is no checkpoint to return to yet"):
        run(tmp_path, policy="rollback", checkpoint={})
    with pytest.raises(ValueError, match="expected checkpoint"):
        Config.model_validate({"task": "a:b", "train": TRAIN, "nonfinite": {"policy": "rollback"}})


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_batches_that_are_passed_over_are_bounded(tmp_path, policy):
    """A training that has diverged ends, and keeps its last checkpoint."""
    with pytest.raises(NonFinite, match=r"2 batches were skipped before this one, as many as nonfinite.limit allows"):
        run(tmp_path, policy=policy, limit=2, checkpoint={"every_steps": 1})
    assert all(value.isfinite().all() for value in newest(tmp_path)["parts"]["model"].values())


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_restart_remembers(tmp_path, policy):
    """A run that is stopped after a bad batch and goes on later ends like one that was not stopped."""
    interval = {"checkpoint": {"every_steps": 1}}
    run(tmp_path / "whole", policy=policy, **interval)
    run(tmp_path / "halves", policy=policy, train={**TRAIN, "steps": 5}, **interval)
    run(tmp_path / "halves", policy=policy, **interval)
    assert skipped(tmp_path / "halves") == skipped(tmp_path / "whole")
    assert newest(tmp_path / "halves")["digests"]["model"] == newest(tmp_path / "whole")["digests"]["model"]


def test_ignore_does_as_plain_torch(tmp_path):
    """The NaN goes into the model."""
    run(tmp_path, policy="ignore")
    assert any(value.isnan().any() for value in newest(tmp_path)["parts"]["model"].values())


def infinite_gradient(model: nn.Module, batch) -> torch.Tensor:
    """Finite, with gradients that are not: the slope of a root at 0."""
    x, y = batch
    distance = torch.where(y.isnan(), 0 * model(x), model(x) - y.nan_to_num())
    return distance.abs().sqrt().mean()


def loss_without_gradient(model: nn.Module, batch) -> torch.Tensor:
    """Not finite, with gradients that are."""
    x, y = batch
    known = ~y.isnan()
    return F.mse_loss(model(x)[known], y[known]) + y.sum() * 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (infinite_gradient, "every loss is finite and the gradients are not finite"),
        (loss_without_gradient, "the loss on rank 0"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_either_is_enough(tmp_path, loss, words, clip):
    """A loss that spoils no gradient, or a gradient that no loss tells of."""
    with pytest.raises(NonFinite, match=words):
        run(tmp_path, policy="stop", task=lambda: task(loss=loss), train={**TRAIN, "clip_grad_norm": clip})


class Rows(nn.Module):
    """Looks rows up, with sparse gradients, beside a layer with dense ones and one that has none to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 2, sparse=True)
        self.out = nn.Linear(2, 1)
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return self.out(self.rows((x > 0).long().view(-1))) + self.none.sum()


def test_sparse_and_empty_gradients(tmp_path):
    """They are looked at like all others."""

    def rows(bad: int | None) -> Task:
        model = Rows()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Task(model=model, dataset=samples(bad), optimizer=optimizer, loss=loss)

    with pytest.raises(NonFinite):
        run(tmp_path / "bad", policy="stop", task=lambda: rows(BAD))
    assert run(tmp_path / "good", policy="stop", task=lambda: rows(None)).step == 9


# --- fp16 ------------------------------------------------------------------------------------------------------------


def steep(model: nn.Module, batch) -> torch.Tensor:
    """Its gradients overflow in fp16 until the scale is small."""
    return loss(model, batch) * 1000


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")  # the first steps are the scaler's
def test_the_scalers_own_skips_are_its_own(tmp_path):
    """An overflow while the scaler looks for its scale is neither a reason to stop nor a batch that counts."""
    progress = run(
        tmp_path,
        policy="stop",
        task=lambda: task(loss=steep, dataset=samples(bad=None)),
        train={**TRAIN, "precision": "fp16"},
    )
    assert progress.skipped == []
    assert newest(tmp_path)["parts"]["scaler"]["state"]["scale"] < 65536


def gentle(model: nn.Module, batch) -> torch.Tensor:
    """Its gradients do not overflow in fp16."""
    return loss(model, batch) / 1000


def test_a_bad_loss_in_fp16_does_not_move_the_scale(tmp_path):
    """The batch is passed over and the scale, which is not to blame, stays."""
    progress = run(tmp_path, policy="skip", task=lambda: task(loss=gentle), train={**TRAIN, "precision": "fp16"})
    assert progress.skipped == positions()
    assert newest(tmp_path)["parts"]["scaler"]["state"]["scale"] == 65536


# --- three ranks -----------------------------------------------------------------------------------------------------


def on_three(world, place: Path, policy: str) -> list:
    """Two micro-batches for each rank and step; the bad sample is on one rank only."""
    train = {"steps": 6, "global_batch_size": 5, "micro_batch_size": 1}
    progress = run(place, world, policy=policy, train=train, checkpoint={"every_steps": 1})
    digest = newest(place)["digests"]["model"]
    return [progress.step, [[each.epoch, each.offset] for each in progress.skipped], digest]


def stop_on_three(world, place: Path) -> str:
    try:
        on_three(world, place, "stop")
    except NonFinite as error:
        return str(error)
    return ""


def skip_on_three(world, place: Path) -> list:
    return on_three(world, place, "skip")


def rollback_on_three(world, place: Path) -> list:
    return on_three(world, place, "rollback")


def gradient_on_three(world, place: Path) -> list:
    """A gradient that is bad on one rank, where every loss is finite."""
    progress = run(
        place, world, policy="skip", task=lambda: task(loss=infinite_gradient), train={"steps": 2, "global_batch_size": 10}
    )
    return [progress.step, len(progress.skipped)]


def fp16_on_three(world, place: Path) -> list:
    progress = run(place, world, policy="skip", train={"steps": 4, "global_batch_size": 5, "precision": "fp16"})
    return [progress.step, len(progress.skipped)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return played(__file__, tmp_path_factory.mktemp("ranks"), 3)


@pytest.mark.torchrun
def test_three_ranks_decide_alike(results):
    """All pass over the same batches, though only one of them has seen anything bad."""
    for scenario in ("skip_on_three", "rollback_on_three"):
        ranks = returned(results[scenario])
        assert ranks[0] == ranks[1] == ranks[2]
        assert ranks[0][0] == 6
        assert len(ranks[0][1]) == 3  # one in each epoch of two steps
    assert returned(results["skip_on_three"])[0] == returned(results["rollback_on_three"])[0]
    assert returned(results["gradient_on_three"]) == [[2, 2]] * 3
    assert returned(results["fp16_on_three"]) == [[4, 2]] * 3


@pytest.mark.torchrun
def test_the_rank_with_the_bad_sample_is_named(results):
    """On every rank, with that rank's samples alone."""
    ranks = returned(results["stop_on_three"])
    assert ranks[0] == ranks[1] == ranks[2]
    assert "the loss on rank " in ranks[0]
    named = ranks[0].partition("samples ")[2].partition(";")[0]
    assert BAD in json.loads(named)
    assert len(json.loads(named)) == 2


if __name__ == "__main__":
    play([stop_on_three, skip_on_three, rollback_on_three, gradient_on_three, fp16_on_three], Path(sys.argv[1]))
