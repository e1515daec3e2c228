"""What a run tells about itself."""

import json
import logging

import pytest

from harness.config import LogConfig, RunConfig
from harness.errors import ConfigError
from harness.telemetry.events import EventLog, check_metric_names, metrics_in_words


@pytest.fixture
def told(tmp_path):
    """A function that makes an event log, and one that reads what was written."""
    path = tmp_path / "log.jsonl"

    def event_log(**options) -> EventLog:
        return EventLog(RunConfig(log=LogConfig(jsonl=str(path))), **{"active": True, **options})

    def read() -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return event_log, read


def test_an_event_is_one_console_line_and_one_json_line(told, caplog):
    """The message is for people, the values are for programs."""
    make, read = told
    events = make(attempt="000001-aaaaaaaa")
    with caplog.at_level(logging.INFO):
        events.emit("train", "step 1/2  loss 0.5", step=1, loss=0.5)
    assert [record.message for record in caplog.records] == ["step 1/2  loss 0.5"]
    (record,) = read()
    assert isinstance(record.pop("time"), float)
    assert record == {"event": "train", "attempt": "000001-aaaaaaaa", "step": 1, "loss": 0.5}


def test_each_line_is_there_at_once(told):
    """What was told before a SIGKILL can be read after it."""
    make, read = told
    events = make()
    for step in range(3):
        events.emit("train", "", step=step)
        assert len(read()) == step + 1


def test_a_restart_appends(told):
    """The file tells the whole life of a run."""
    make, read = told
    for attempt in ("first", "second"):
        make(attempt=attempt).emit("start", "")
    assert [record["attempt"] for record in read()] == ["first", "second"]


def test_other_ranks_say_nothing(told, caplog):
    """They do not even make a file."""
    make, read = told
    with caplog.at_level(logging.INFO):
        make(active=False).emit("train", "hello")
    assert read() == []
    assert caplog.records == []


def test_the_file_is_optional(tmp_path, caplog):
    """Without ``log.jsonl`` there is the console."""
    with caplog.at_level(logging.INFO):
        EventLog(RunConfig(), active=True).emit("train", "hello")
    assert caplog.messages == ["hello"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tmp_path):
    """One line that names the key and the path."""
    with pytest.raises(ConfigError, match=r"log\.jsonl: cannot append to .*missing/log\.jsonl: No such file or directory"):
        EventLog(RunConfig(log=LogConfig(jsonl=str(tmp_path / "missing" / "log.jsonl"))), active=True)


def test_numbers_that_json_has_not(told, tmp_path):
    """A loss that is not a number is news, too; the line stays one that strict readers take."""
    make, _ = told
    make().emit("train", "", loss=float("nan"), limit=float("inf"))
    line = (tmp_path / "log.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {"loss", "limit"} <= record.keys()


def test_metrics_in_words():
    """Five digits, name before value."""
    assert metrics_in_words({"loss": 0.123456789, "lr": 1e-05}) == "loss 0.12346  lr 1e-05"
    assert metrics_in_words({}) == ""


@pytest.mark.parametrize(
    "name", ["step", "event", "message", "time", "attempt", "lr", "samples/s", "steps/s", "host", "rank"]
)
def test_a_metric_with_a_name_of_the_records_own(name):
    """It is refused in words: its value, or the record's, would be lost."""
    with pytest.raises(ConfigError, match=rf"run\.step: the name '{name}' is harness's own; give .* 'my_{name}'"):
        check_metric_names(["loss", name])


def test_any_other_name_will_do():
    """But for one that no file can hold."""
    check_metric_names(["loss", "name", "self", "val/acc@1", "R$^2_$_", "損失", ""])
    with pytest.raises(ConfigError, match="not valid Unicode"):
        check_metric_names(["a\ud800"])
