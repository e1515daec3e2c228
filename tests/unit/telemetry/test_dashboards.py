"""What a run tells, as TensorBoard and Prometheus read it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness import Task
from harness.config import RunConfig
from harness.errors import ConfigError
from harness.telemetry.dashboards import Prometheus
from harness.telemetry.events import EventLog
from tests.support.cluster import train_here


def train(url: Path, steps: int, *, dies_at: int | None = None, **metrics) -> None:
    """Trains to a step, and saves each fourth; or dies while it trains a step, counted from where it begins."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == dies_at:
            raise ZeroDivisionError
        return model(batch[0]).square().mean()

    def build() -> Task:
        model = nn.Linear(2, 1)
        return Task(model, TensorDataset(torch.rand(8, 2)), torch.optim.SGD(model.parameters(), 0.1), loss)

    train_config = {"steps": steps, "global_batch_size": 4}
    sections = {"checkpoint": {"every_steps": 4}, "log": {"every_steps": 1}, "metrics": metrics}
    train_here(build, url=url, train=train_config, **sections)


def test_tensorboards_curves_go_on_without_overlap(tmp_path):
    """What was drawn of steps that are trained again is replaced; the other values stand."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 10, dies_at=8, tensorboard=True)
    train(tmp_path, 10, tensorboard=True)
    # In a process of its own: its modules warn of what is no business of ours.
    code = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
curves = EventAccumulator(sys.argv[1]).Reload()
print(*(event.step for event in curves.Scalars("train/loss")))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "tensorboard")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(step) for step in range(1, 11)]


@pytest.mark.parametrize("url", [None, "memory://run"])
def test_tensorboard_beside_remote_checkpoints_needs_a_directory(url):
    """Its files are appended to, which an object store cannot."""
    config = RunConfig.model_validate({"checkpoint": {"url": url}, "metrics": {"tensorboard": True}})
    with pytest.raises(ConfigError, match=r"metrics\.tensorboard: expected a directory"):
        EventLog(config, active=True)


def test_prometheus_reads_the_newest_numbers(tmp_path):
    """Its own parser finds them, under names that it allows."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    path = tmp_path / "run.prom"
    train(tmp_path / "run", 10, prometheus=str(path))
    found = {family.name: family for family in parser.text_string_to_metric_families(path.read_text())}
    assert {family.type for family in found.values()} == {"gauge"}
    values = {name: family.samples[0].value for name, family in found.items()}
    assert values["harness_train_step"] == values["harness_save_step"] == values["harness_done_step"] == 10
    assert {
        "harness_train_loss",
        "harness_train_lr",
        "harness_train_samples_per_second",
        "harness_save_seconds",
    } <= values.keys()
    assert [name.name for name in tmp_path.iterdir() if "partial" in name.name] == []


def test_nan_and_infinity_in_prometheus(tmp_path):
    """In its own words."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    Prometheus(str(tmp_path / "x.prom")).write(
        {"event": "train", "time": 1.0, "step": 1, "loss": "nan", "worst": "inf", "name": "x"}
    )
    found = {family.name: family for family in parser.text_string_to_metric_families((tmp_path / "x.prom").read_text())}
    assert math.isnan(found["harness_train_loss"].samples[0].value)
    assert found["harness_train_worst"].samples[0].value == math.inf
    assert "harness_train_name" not in found


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    """One warning, and training goes on."""
    train(tmp_path / "run", 6, prometheus=str(tmp_path / "missing" / "run.prom"))
    assert [record.message for record in caplog.records if "Prometheus" in record.message] != []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
