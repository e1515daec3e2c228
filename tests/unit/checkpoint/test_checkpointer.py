"""The engine without a run: saves beside a program that goes on, what it raises when, and what is there afterwards."""

import os
import resource
import threading

import pytest
import torch

from harness import Checkpointer
from harness.checkpoint.catalog import Catalog
from harness.errors import NoCheckpoint, StoreError, Superseded, Unsupported
from harness.storage.store import open_store
from tests.support.saving import held_up


def parts(value: float) -> dict[str, dict[str, object]]:
    return {"model": {"weight": torch.full((100,), value), "bias": torch.zeros(3)}, "other": {"lr": value}}


def value_of(found: dict) -> float:
    assert {float(each) for each in found["model"]["weight"]} == {found["other"]["lr"]}
    return found["other"]["lr"]


def test_what_was_begun_is_the_state_of_then(tmp_path):
    """The program goes on at once, and may change everything."""
    checkpoints, state = Checkpointer(tmp_path), parts(1.0)
    assert (checkpoints.latest(), checkpoints.wait()) == (None, None)
    checkpoints.begin(state, step=10, meta={"loss": 0.5})
    state["model"]["weight"].zero_()
    saved = checkpoints.wait()
    assert (saved.step, checkpoints.latest()) == (10, 10)
    assert value_of(checkpoints.load()) == 1.0
    assert Catalog(open_store(str(tmp_path))).newest().manifest.meta == {"loss": 0.5}


def test_steady_tensors_are_copied_until_the_fence(tmp_path, monkeypatch):
    """Who calls it may change them after it; who does not has no checkpoint of a mixture."""
    checkpoints, state = Checkpointer(tmp_path), parts(1.0)
    with held_up(monkeypatch) as (begun, gate):
        checkpoints.begin(state, step=1, is_steady=lambda tensor: True)
        assert begun.wait(30)
        threading.Timer(0.1, gate.set).start()
        checkpoints.fence()
        state["model"]["weight"].fill_(2.0)
    assert checkpoints.wait() is not None
    assert value_of(checkpoints.load()) == 1.0
    with held_up(monkeypatch) as (begun, _gate):
        checkpoints.begin(state, step=2, is_steady=lambda tensor: True)
        assert begun.wait(30)
        state["model"]["weight"].fill_(3.0)
    assert (checkpoints.wait(), checkpoints.latest()) == (None, 1)


def test_the_last_save_is_the_newest_whatever_its_step(tmp_path):
    """Also from another process, and after a checkpoint that was loaded."""
    with Checkpointer(tmp_path) as checkpoints:
        for step, value in ((5, 1.0), (9, 2.0), (3, 3.0)):
            checkpoints.begin(parts(value), step=step)
    assert value_of(Checkpointer(tmp_path).load()) == 3.0
    other = Checkpointer(tmp_path)
    assert value_of(other.load(9)) == 2.0
    other.save(parts(4.0), step=10)
    assert (other.latest(), value_of(Checkpointer(tmp_path).load())) == (10, 4.0)
    lineage = Catalog(open_store(str(tmp_path))).newest().manifest.lineage
    assert [ancestor.until_step for ancestor in lineage] == [9]


def test_one_writer_keeps_the_last_ones(tmp_path):
    """It deletes older ones and what another has left unfinished, and stops when another has begun."""
    (tmp_path / "step-000000000001-000001-00000000-00000001").mkdir()
    checkpoints = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(parts(step), step=step)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")) == [3, 4]
    Checkpointer(tmp_path, keep_last=2).save(parts(5.0), step=5)
    checkpoints.begin(parts(6.0), step=6)
    with pytest.raises(Superseded, match="has taken over this run"):
        checkpoints.wait()
    assert value_of(Checkpointer(tmp_path).load()) == 5.0


def test_writers_without_retention_leave_each_other_alone(tmp_path):
    """As for ``harness.save`` in several programs: all of it stays."""
    first, second = Checkpointer(tmp_path), Checkpointer(tmp_path)
    first.begin(parts(1.0), step=1)
    second.begin(parts(2.0), step=2)
    assert (first.wait().step, second.wait().step) == (1, 2)
    first.save(parts(3.0), step=3)
    assert len([*tmp_path.glob("step-*")]) == 3


def test_what_fails_is_raised_by_whoever_asks_next(tmp_path):
    """And by the end of a ``with``, unless another error is under way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    large = {"model": {"weight": torch.zeros(10_000)}}
    try:
        checkpoints = Checkpointer(tmp_path)
        checkpoints.begin(large)
        with pytest.raises(StoreError, match="File too large"):
            checkpoints.begin(parts(1.0), step=1)
        with pytest.raises(StoreError, match="File too large"), Checkpointer(tmp_path) as checkpoints:
            checkpoints.begin(large)
        with pytest.raises(KeyError), Checkpointer(tmp_path) as checkpoints:
            checkpoints.begin(large)
            raise KeyError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(parts(1.0), step=1)
    assert checkpoints.latest() == 1


def test_who_reads_leaves_nothing_behind(tmp_path):
    """Not even a directory; and what is refused is refused before anything is written."""
    checkpoints = Checkpointer(tmp_path / "run")
    with pytest.raises(NoCheckpoint):
        checkpoints.load()
    with pytest.raises(Unsupported, match="expected a dictionary"):
        checkpoints.begin({"weight": torch.ones(1)})
    with pytest.raises(Unsupported, match=r"^step: expected"):
        checkpoints.begin(parts(1.0), step=-1)
    assert os.listdir(tmp_path) == []


def test_on_an_object_store_it_sends_several_shards_at_once(s3):
    """In shards of the size that suits it, as a run does."""
    url = s3.url("checkpointer")
    with Checkpointer(url, shard_bytes=1 << 10, storage_options=s3.storage_options) as checkpoints:
        checkpoints.begin({"model": {str(index): torch.full((200,), float(index)) for index in range(8)}}, step=1)
    manifest = Catalog(open_store(url, s3.storage_options)).newest().manifest
    assert (checkpoints._streams, Checkpointer(url, storage_options=s3.storage_options)._shard_bytes) == (8, 128 << 20)
    assert len(manifest.parts["model"].files) == 8
    assert float(checkpoints.load()["model"]["7"][0]) == 7.0
