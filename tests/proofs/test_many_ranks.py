"""Sixty-four real ranks on one machine, beside two and eight: what grows with their number, and that it works at all."""

import time

import pytest

from harness.tasks import linear
from tests.support.cluster import launch, newest

STEPS = 200


def config() -> dict:
    return {
        "task": f"{linear.__name__}:build",
        "args": {"slope": 2.0, "intercept": 1.0},
        "train": {"steps": STEPS, "global_batch_size": 128},
        "checkpoint": {"url": "run", "every_steps": 50},
        "log": {"every_steps": 10, "jsonl": "log.jsonl"},
    }


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_they_start_save_lose_one_and_resume(tmp_path, ranks, capsys):
    """The end has the samples, and on as many ranks the bits, of the run that lost none."""
    command = ("-m", "harness", "launch", f"--nproc-per-node={ranks}", "--", "train")
    with launch(tmp_path / "straight", config(), command=command) as run:
        run.succeed(seconds=900)
    began = time.monotonic()
    with launch(tmp_path / "killed", config(), command=command) as run:
        run.wait_for("train", step=10, seconds=900)
        started = time.monotonic() - began
        saved = run.wait_for("save", step=50, seconds=900)
        run.wait_for("train", step=60, seconds=900)
        run.kill_rank(ranks - 1)
        killed = time.monotonic()
        resumed = run.wait_for("resume", attempt=2, seconds=900)
        run.wait_for("train", step=resumed["step"] + 10, attempt=2, seconds=900)
        again = time.monotonic() - killed
        run.succeed(seconds=900)
    assert newest(tmp_path / "killed" / "run")["digests"] == newest(tmp_path / "straight" / "run")["digests"]
    with capsys.disabled():
        figures = f"training waited {saved['blocked_seconds']:.3f} s for a save, durable after {saved['seconds']:.3f} s"
        print(f"\n    {ranks} ranks: 10 steps after {started:.1f} s; {figures}; 10 steps more {again:.1f} s after a kill")
