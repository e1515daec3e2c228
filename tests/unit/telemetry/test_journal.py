"""What a run tells lies beside its checkpoints, and is read as the story of one run, however often it died."""

import json
import logging
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness import Task
from harness.checkpoint.format import Attempt
from harness.errors import StoreError
from harness.storage.filesystem import LocalDisk
from harness.storage.store import open_store
from harness.telemetry import journal
from harness.telemetry.journal import Journal
from tests.support.cluster import train_here, wait_until

FIRST, SECOND, THIRD = (Attempt(f"{number:06}-aaaaaaaa") for number in (1, 2, 3))


def train(url, steps: int, **config) -> None:
    """Trains to a step, from wherever the run is; every step is logged, and each second one saved."""

    def build() -> Task:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Task(model, TensorDataset(torch.rand(8, 2)), optimizer, lambda model, batch: model(batch[0]).square().mean())

    checkpoint = {"every_steps": 2, **config.pop("checkpoint", {})}
    train_config = {"steps": steps, "global_batch_size": 4}
    train_here(build, url=url, train=train_config, checkpoint=checkpoint, log={"every_steps": 1}, **config)


def steps_told(url) -> list[int]:
    return [record["step"] for record in journal.merged(journal.read_records(open_store(str(url))))]


def lines(*events) -> bytes:
    """A segment of (event, step, values)."""
    records = ({"event": event, "time": 0.0, "step": step, **values} for event, step, values in events)
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def put(store, attempt: Attempt, number: int, data: bytes) -> None:
    store.put(f"metrics/{attempt.id}-{number:06}.jsonl", lambda: [data], len(data))


# --- one line through many attempts ----------------------------------------------------------------------------------


def test_an_attempt_replaces_what_earlier_ones_told_of_later_steps(tmp_path):
    """It says from where it goes on; a line that it does not stand on is left out altogether."""
    store = open_store(str(tmp_path))
    put(store, FIRST, 0, lines(("start", 0, {}), ("train", 1, {}), ("train", 2, {})))
    put(store, FIRST, 1, lines(("train", 3, {"from": 1}), ("evaluate", 3, {"from": 1}), ("train", 4, {"from": 1})))
    put(
        store,
        SECOND,
        0,
        lines(("resume", 3, {"lineage": [[FIRST.id, 3]]}), ("train", 4, {"from": 2}), ("train", 5, {"from": 2})),
    )
    put(store, THIRD, 0, lines(("resume", 2, {"lineage": [[FIRST.id, 2]]}), ("train", 3, {"from": 3})))
    assert [(each["step"], each.get("from")) for each in journal.merged(journal.read_records(store))] == [
        (1, None),
        (2, None),
        (3, 3),
    ]
    (tmp_path / f"metrics/{THIRD.id}-000000.jsonl").unlink()
    found = [(each["event"], each["step"], each.get("from")) for each in journal.merged(journal.read_records(store))]
    assert found[2:] == [("train", 3, 1), ("evaluate", 3, 1), ("train", 4, 2), ("train", 5, 2)]


def test_an_attempt_that_never_trained_replaces_nothing(tmp_path):
    """It died while it read the checkpoint."""
    store = open_store(str(tmp_path))
    put(store, FIRST, 0, lines(("start", 0, {}), ("train", 1, {})))
    put(store, SECOND, 0, lines(("error", 0, {})))
    assert len([*journal.merged(journal.read_records(store))]) == 1


def test_what_is_no_line_of_a_journal_is_passed_over(tmp_path):
    """Lines that were put twice count once; damage costs the lines that it hit; files of others are no segments."""
    store = open_store(str(tmp_path))
    opening, first, second = lines(("start", 0, {})), lines(("train", 1, {})), lines(("train", 2, {}))
    put(store, FIRST, 0, opening + first)
    put(store, FIRST, 1, first + b'{"event": "tr\xff\n[1]\n{}\n' + second)
    (tmp_path / "metrics/notes.txt").write_text("mine")
    (tmp_path / "metrics/notes-000001.jsonl").write_bytes(second)
    assert [each["step"] for each in journal.merged(journal.read_records(store))] == [1, 2]


@pytest.mark.parametrize("kind", ["memory", "local", "s3"])
def test_a_run_that_is_prolonged(kind, request, tmp_path):
    """In any store, the steps of both attempts are there once, in order."""
    options = {}
    if kind == "s3":
        server = request.getfixturevalue("s3")
        url, options = server.url("journal"), {"storage_options": server.storage_options}
    else:
        url = f"memory://{tmp_path}" if kind == "memory" else str(tmp_path)
    train(url, 5, checkpoint=options)
    train(url, 8, checkpoint=options)
    found = [*journal.merged(journal.read_records(open_store(url, options.get("storage_options"))))]
    assert [each["step"] for each in found] == [*range(1, 9)]
    assert len({each["attempt"] for each in found}) == 2


def test_a_fallback_is_told_of_and_replaces_what_it_passes_over(tmp_path):
    """The steps after the older checkpoint are those that were trained again."""
    train(tmp_path, 6)
    (newest,) = tmp_path.glob("step-000000000006-*")
    (newest / "model.safetensors").write_bytes(b"")
    train(tmp_path, 8)
    assert steps_told(tmp_path) == [*range(1, 9)]
    records = journal.read_records(open_store(str(tmp_path)))
    first, second = records
    assert [each["attempt"] for each in journal.merged(records)] == [first.id] * 4 + [second.id] * 4
    (fallback,) = (each for each in records[second] if each["event"] == "fallback")
    assert fallback["directory"] == newest.name
    assert "model.safetensors" in fallback["why"]


# --- a long run ------------------------------------------------------------------------------------------------------


def put_long(store, attempt: Attempt, begin: int, steps: int) -> None:
    """Segments of 100 steps each, with a save at every 1000th."""
    put(store, attempt, 0, lines(("resume" if begin else "start", begin, {"lineage": []})))
    for number in range(steps // 100):
        first = begin + 100 * number + 1
        told = [("train", step, {"loss": 1.0 + step % 7 / 100, "lr": 0.1}) for step in range(first, first + 100)]
        put(store, attempt, number + 1, lines(*told, *([("saving", first + 99, {})] if number % 10 == 9 else [])))


def test_a_long_journal_is_read_in_bounded_memory(tmp_path):
    """Of too many records of steps some are left out, evenly over all attempts. The first, the last, the highest and the
    lowest stay, what is no number, and all other events."""
    store = open_store(str(tmp_path))
    put_long(store, FIRST, 0, 9000)
    put_long(store, SECOND, 9000, 7000)
    peaks = {"loss": 50.0}, {"loss": "nan"}, {"loss": 0.01}
    put(store, SECOND, 500, lines(*(("train", 16001 + index, each) for index, each in enumerate(peaks))))
    put_long(store, THIRD, 16003, 4000)
    records = journal.read_records(store, most=800)
    trained = {attempt: [each for each in found if each["event"] == "train"] for attempt, found in records.items()}
    assert 350 <= sum(map(len, trained.values())) <= 800
    assert [found[0]["step"] for found in trained.values()] == [1, 9001, 16004]
    assert [found[-1]["step"] for found in trained.values()] == [9000, 16003, 20003]
    assert {50.0, "nan", 0.01} <= {each["loss"] for each in trained[SECOND]}
    steps = [each["step"] for found in trained.values() for each in found]
    assert steps == sorted(steps)
    assert max(after - before for before, after in pairwise(steps)) <= 6 * 20000 / len(steps)
    others = [[each["event"] for each in found if each["event"] != "train"] for found in records.values()]
    assert others == [["start", *["saving"] * 9], ["resume", *["saving"] * 7], ["resume", *["saving"] * 4]]
    assert sum(map(len, journal.read_records(store).values())) == 20_003 + 23, "without a limit all are there"


def test_the_steps_of_a_long_journal_are_told_without_holding_them(tmp_path):
    """``--metrics`` gives each of them; in memory is a segment at a time."""
    store = open_store(str(tmp_path))
    put_long(store, FIRST, 0, 20_000)
    told = journal.Told(store)
    tracemalloc.start()
    try:
        assert sum(1 for _ in journal.merged(told)) == 20_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 << 20, "all of them take about 15 MB"


def test_the_end_of_an_attempt_is_found_at_its_end(tmp_path):
    """Who asks how an attempt ended does not read what it told in a year; what it trained after an end counts."""
    store = open_store(str(tmp_path))
    put_long(store, FIRST, 0, 300)
    put(store, FIRST, 10, lines(("done", 300, {}), ("evaluate", 300, {}), ("beat", 300, {})))
    told = journal.Told(store)
    (tmp_path / f"metrics/{FIRST.id}-000001.jsonl").unlink()
    assert journal.last_word(told.backwards(FIRST)) == "done"
    with pytest.raises(StoreError, match="was deleted while it was read"):
        list(told.backwards(FIRST))
    put(store, FIRST, 11, lines(("train", 301, {})))
    assert journal.last_word(journal.Told(store).backwards(FIRST)) == ""
    assert [each["step"] for each in journal.Told(store).backwards(FIRST)][:4] == [301, 300, 300, 300]
    assert journal.last_word(journal.Told(store).backwards(SECOND)) == ""


# --- in time, and never in the way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_no_step_is_committed_before_it_is_told(mode, tmp_path, monkeypatch):
    """When a manifest is put, every step up to its own is in the journal already: a kill after that loses none of them."""
    seen = []
    put = LocalDisk.put

    def look_first(disk, path, *rest):
        if path.endswith("manifest.json"):
            told = steps_told(tmp_path)
            seen.append((int(Path(path).parent.name.split("-")[1]), told[-1]))
            assert told == [*range(1, told[-1] + 1)]
        put(disk, path, *rest)

    monkeypatch.setattr(LocalDisk, "put", look_first)
    train(tmp_path, 9, checkpoint={"mode": mode}, metrics={"every_seconds": 3600})
    assert [step for step, _ in seen] == [2, 4, 6, 8, 9]
    assert all(step <= told for step, told in seen)


def test_a_store_that_refuses_is_no_obstacle(tmp_path, caplog):
    """Training ends well, with its checkpoints; one warning says what is missing."""
    (tmp_path / "metrics").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 8)
    assert len(list(tmp_path.glob("step-*"))) == 4
    (warning,) = [each.message for each in caplog.records if "could not write events" in each.message]
    assert str(tmp_path) in warning


def test_what_a_store_refused_is_put_later(tmp_path):
    """Nothing is lost by an outage, and nothing is there twice."""
    store = open_store(str(tmp_path), tries=1)
    (tmp_path / "metrics").write_text("in the way")
    kept = Journal(store, FIRST.id, every_seconds=3600)
    kept.write({"event": "start", "time": 0.0, "step": 0})
    for step in (1, 2):
        kept.write({"event": "train", "time": 0.0, "step": step})
        kept.flush()
    (tmp_path / "metrics").unlink()
    kept.write({"event": "train", "time": 0.0, "step": 3})
    kept.close()
    assert steps_told(tmp_path) == [1, 2, 3]


def test_nothing_is_kept_where_nobody_wants_it(tmp_path):
    """``metrics.every_seconds: null``."""
    train(tmp_path, 4, metrics={"every_seconds": None})
    assert not (tmp_path / "metrics").exists()


def test_an_interval_says_how_far_the_training_is(tmp_path):
    """Also where no line is logged: that is how the report knows when an attempt died, and at which step."""
    store = open_store(str(tmp_path))
    kept = Journal(store, FIRST.id, every_seconds=0.05)
    kept.reached(7)
    told = wait_until(lambda: len(found := journal.read_records(store).get(FIRST, ())) >= 2 and found, "two intervals")
    kept.close()
    assert {(each["event"], each["step"]) for each in told} == {("beat", 7)}
