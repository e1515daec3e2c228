"""Weights & Biases and MLflow beside a run that is killed: each step once, read back by their own programs."""

import contextlib
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import harness
from harness.errors import ConfigError
from harness.telemetry import trackers
from tests.support.cluster import launch, wait_until
from tests.support.integrations import LIBRARIES, PATIENCE_SECONDS, ROOT, require

SCRIPT = """
import os
import time
import torch
import harness

harness.join_world()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
metrics = {"wandb": {"project": "p", "mode": "offline"}, "mlflow": {"tracking_uri": "sqlite:///mlflow.db"}}
run = harness.Run("runs/tracked", {"model": model, "optimizer": optimizer}, every_steps=7,
                  config={"log": {"every_steps": 1}, "metrics": metrics})
began = run.global_step
for step in run.steps(400):
    while step - began >= 80 and not os.path.exists("hurry"):
        time.sleep(0.1)
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0 if os.path.exists("hurry") else 0.1)
    if (step + 1) % 10 == 0:
        run.evaluated("val", {"val": loss.item()})
    run.step(loss=loss)
"""


@pytest.fixture(autouse=True)
def _installed():
    require("wandb", "mlflow")


def in_a_process(code: str, *arguments: str, cwd: Path) -> str:
    """What a program prints, with the libraries that are tried."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([LIBRARIES, str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wandb_rows(file: Path) -> list[dict]:
    """The rows of a file that would be uploaded, as W&B's own reader prints them."""
    code = "import sys; from wandb.cli.cli import cli; sys.argv = ['wandb', *sys.argv[1:]]; cli()"
    lines = in_a_process(code, "leet", "inspect", "--json", str(file), cwd=file.parent).splitlines()
    return [each["history"]["item"] for each in map(json.loads, lines) if each.get("type") == "history"]


MLFLOW = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
runs = [run for each in client.search_experiments() for run in client.search_runs([each.experiment_id])]
found = {key: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)]
         for run in runs for key in run.data.metrics}
print(json.dumps({"runs": len(runs), "status": runs[0].info.status, "curves": found, "tags": runs[0].data.tags}))
"""


def last_step(directory: Path) -> int:
    """That MLflow has, read from its data base."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{directory}/mlflow.db?mode=ro", uri=True)) as base:
            return base.execute("select max(step) from metrics where key = 'train/loss'").fetchone()[0] or 0
    except sqlite3.OperationalError:  # it is being made
        return 0


def first_save(directory: Path, attempt: int) -> float:
    """The step of an attempt's first save; infinite before there is one."""
    found = directory.glob(f"runs/tracked/step-*-{attempt:06}-*/manifest.json")
    return min((int(each.parent.name.split("-")[1]) for each in found), default=math.inf)


@pytest.mark.torchrun
def test_each_step_once_after_three_deaths(tmp_path):
    """The curves of both, their events, and what is said of each attempt, which dies when they have some of it."""
    script = tmp_path / "tracked.py"
    script.write_text(SCRIPT)
    env = {"PYTHONPATH": os.pathsep.join([LIBRARIES, str(ROOT)])}
    command = ("-m", "harness", "launch", "--max-restarts=3", "--nproc-per-node=2", "--", str(script))
    with launch(tmp_path, None, command=command, env=env) as started:
        for number, rank in enumerate((0, 1, 0, None), 1):
            is_there = lambda number=number: last_step(tmp_path) >= first_save(tmp_path, number)
            started.wait(is_there, f"steps of attempt {number} in MLflow", PATIENCE_SECONDS)
            if rank is not None:
                started.kill_rank(rank)
                resumed = lambda number=number: started.output().count("resuming from step-") == number
                started.wait(resumed, f"attempt {number + 1}", PATIENCE_SECONDS)
        (tmp_path / "hurry").touch()
        wait_until(lambda: started.process.poll() is not None, "the end", PATIENCE_SECONDS)
        output = started.output()
    assert started.process.returncode == 0, output[-6000:]
    assert output.count("resuming from step-") == 3, output[-6000:]
    steps, evaluations = list(range(1, 401)), list(range(10, 401, 10))
    files = [wandb_rows(each) for each in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    rows = [row for each in files for row in each]
    assert sum(bool(each) for each in files) > 1, "more than one attempt has written"
    assert [row["_step"] for row in rows if "train/loss" in row] == steps, output
    assert [row["_step"] for row in rows if "evaluate/val" in row] == evaluations
    found = json.loads(in_a_process(MLFLOW, cwd=tmp_path))
    assert (found["runs"], found["status"]) == (1, "FINISHED")
    curves = {name: dict(points) for name, points in found["curves"].items()}
    assert all(len(points) == len(curves[name]) for name, points in found["curves"].items()), "no step comes twice"
    assert list(curves["train/loss"]) == steps
    assert list(curves["evaluate/val"]) == evaluations
    # MLflow orders by time, and a save may end after later steps.
    for name in ("train/loss", "harness/attempt", "harness/save_seconds"):
        assert {row["_step"]: row[name] for row in rows if name in row} == curves[name], name
    assert list(curves["harness/attempt"].values()) == [1, 2, 3, 4]
    about = [found["tags"][f"harness/attempt {number}"] for number in (1, 2, 3, 4)]
    assert about[0] == "start at step 0; killed"
    assert about[3].endswith("done at step 400")


def trained(directory: Path, steps: int, *, each=lambda step: None, **metrics) -> float:
    """Trains in this process, with a save at every second step. Returns the seconds without those of the end."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = {"log": {"every_steps": 1}, "metrics": metrics}
    began = time.monotonic()
    run = harness.Run(str(directory), {"model": model, "optimizer": optimizer}, every_steps=2, config=config)
    with contextlib.closing(run):
        for step in run.steps(steps):
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            run.step(loss=1 / (step + 1))
            each(step)
        return time.monotonic() - began


def curve(uri: str) -> list[int]:
    code = "import json, sys; from mlflow import MlflowClient; client = MlflowClient(sys.argv[1]); "
    code += "run, = client.search_runs([each.experiment_id for each in client.search_experiments()]); "
    code += "print([each.step for each in client.get_metric_history(run.info.run_id, 'train/loss')])"
    return json.loads(in_a_process(code, uri, cwd=ROOT))


def test_a_tracker_that_hangs_takes_no_time(tmp_path, caplog):
    """A server that answers nothing: training and its end go on. The next start sends everything to one that answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        seconds = trained(tmp_path / "run", 20, mlflow={"tracking_uri": uri})
        assert seconds < trackers._LEAVE_SECONDS
        assert time.monotonic() - began < seconds + trackers._DONE_SECONDS + trackers._LEAVE_SECONDS
    assert "the next start of this run sends it" in caplog.text
    good = f"sqlite:///{tmp_path}/good.db"
    trained(tmp_path / "run", 24, mlflow={"tracking_uri": good})
    assert curve(good) == list(range(1, 25))


def test_a_tracker_that_raises(tmp_path, capfd):
    """It is said once, and training continues."""
    failures = []

    def each(step: int) -> None:
        if step in (10, 20):
            wait_until(lambda: trackers_here() == [], "the end of the process", 60)
        failures.extend(line for line in capfd.readouterr().err.splitlines() if "the tracker failed" in line)

    trained(tmp_path / "run", 30, each=each, wandb={"mode": "offline", "nonsense": 1})
    assert len(failures) == 1
    assert "nonsense" in failures[0]


def trackers_here() -> list[int]:
    """The processes of trackers that this one has started."""
    found = []
    for about in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = about.read_text().rpartition(") ")[2].split()[:2]
            if (
                int(parent) == os.getpid()
                and state != "Z"
                and b"harness.telemetry.trackers" in (about.parent / "cmdline").read_bytes()
            ):
                found.append(int(about.parent.name))
    return found


def test_a_tracker_that_dies_is_started_again(tmp_path):
    """With the next save, and takes what it has missed, but nothing twice."""

    def each(step: int) -> None:
        if step == 10:
            wait_until(lambda: last_step(tmp_path) > 0, "steps in MLflow", 60)
            (process,) = trackers_here()
            os.kill(process, signal.SIGKILL)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    trained(tmp_path / "run", 100, each=each, mlflow={"tracking_uri": uri})
    assert curve(uri) == list(range(1, 101))


def test_what_it_needs(tmp_path):
    """The events beside the checkpoints."""
    config = {"metrics": {"mlflow": {}, "every_seconds": None}}
    with pytest.raises(ConfigError, match=r"metrics\.mlflow: curves come from the events beside the checkpoints"):
        harness.Run(str(tmp_path), {"model": torch.nn.Linear(1, 1)}, config=config)
