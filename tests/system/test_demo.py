"""What lies in ``launch/``: the demo, at a size that takes seconds, and the script for one machine."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import PATIENCE_SECONDS, environment

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "launch" / "demo.py"
TINY = ["args.layers=1", "args.width=16", "args.context=16", "checkpoint.every_steps=30", "args.validation_share=0.01"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo after 200 tiny steps: its folder, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(DEMO), "--steps", "200", *TINY],
        cwd=directory,
        env=environment(str(directory)),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = directory.glob("runs/demo-*")
    return folder, done.stdout


def table_in(output: str) -> dict[str, str]:
    """The first column of the table beside its name."""
    return dict(re.findall(r"^  (\S.*?)(?:  +|:  +)(\S.*)$", output, re.MULTILINE))


def test_the_demo_kills_resumes_and_compares(demo):
    """It kills rank 0 past the middle, resumes from the save before, and finds both ends equal."""
    _, output = demo
    table = table_in(output)
    killed, resumed = int(table["rank 0 was killed after step"]), int(table["resumed from the checkpoint of step"])
    assert 100 <= killed < 200
    assert resumed % 30 == 0
    assert killed - 30 <= resumed <= killed  # the kill may have met the save
    assert float(table["seconds from the kill to the next step"]) > 0
    assert table["final digests"] == "equal"
    assert table["losses, step by step"].startswith("equal")
    assert output.count("SIGKILL to process") == 1


def test_the_demo_shows_the_training(demo):
    """Of the training's own lines, every twentieth step's is seen, and each that tells of something else."""
    _, output = demo
    steps = [int(step) for step in re.findall(r"^\d\d:\d\d:\d\d step (\d+)/200 .* loss ", output, re.MULTILINE)]
    assert {20, 100, 200} <= set(steps)
    assert all(step % 20 == 0 for step in steps)
    assert len(re.findall(r"attempt 2: resuming from step-", output)) == 1


def test_the_demo_fails_when_the_ends_differ(demo, tmp_path, monkeypatch, capsys):
    """A run that ends elsewhere is told of in the table and by the exit code."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    folder = shutil.copytree(demo[0], tmp_path / "demo")
    (last,) = (folder / "whole" / "checkpoints").glob("step-000000000200-*")
    shutil.rmtree(last)

    runs = [module.Run(folder / name, []) for name in ("killed", "whole")]
    for run in runs:
        run.read_events()
    runs[0].killed_time = runs[0].first("resume")["time"]
    assert module.report(*runs) == 1
    assert table_in(capsys.readouterr().out)["final digests"] == "NOT EQUAL"


def test_the_local_script_trains(tmp_path):
    """``launch/local.sh`` takes a configuration and overrides, and ends with 0 when the training is done."""
    config = REPOSITORY / "configs" / "linear.yaml"
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        [REPOSITORY / "launch" / "local.sh", config, "train.epochs=3", f"checkpoint.url={tmp_path}/run"],
        cwd=tmp_path,
        env={**environment(str(tmp_path)), "PATH": path, "RANKS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: step 3" in done.stderr
    assert len(list(tmp_path.glob("run/step-000000000003-*/manifest.json"))) == 1
