"""``transformers.Trainer`` under ``resilient``: killed in the middle of an epoch, it ends as the run that was left alone."""

import json

import pytest

from tests.support.integrations import EXAMPLES, end_of, require, run

pytestmark = pytest.mark.torchrun
TIMES = ("_runtime", "_per_second")


@pytest.fixture(autouse=True)
def _installed():
    require("transformers", "accelerate")


def log_of(end):
    """The history of a trainer's log, without what a clock has said."""
    history = json.loads(end["parts"]["trainer"]["state"]["state"])["log_history"]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in history]


def assert_alike(killed, straight):
    """The same weights and moments, schedule and trainer's state, bit for bit, and the same history."""
    assert log_of(killed) == log_of(straight)
    for name in ("model", "optimizer", "scheduler"):
        assert killed["digests"][name] == straight["digests"][name], name
    assert killed["step"] == straight["step"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_adapter_and_a_stream(tmp_path, ranks):
    """LoRA over a shuffled stream of ``datasets``, whose batches rank 0 reads for all, with tokens masked at random."""
    require("peft", "datasets")
    run(tmp_path / "straight", EXAMPLES / "lora_stream.py", ranks=ranks)
    run(tmp_path / "killed", EXAMPLES / "lora_stream.py", ranks=ranks, kills=3)
    assert_alike(end_of(tmp_path / "killed"), end_of(tmp_path / "straight"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Three ranks are killed, one after the other; they die between two lines of the log, which is the same, too."""
    run(tmp_path / "straight", EXAMPLES / "trainer.py", ranks=ranks)
    run(tmp_path / "killed", EXAMPLES / "trainer.py", ranks=ranks, kills=3)
    straight = end_of(tmp_path / "straight")
    assert len(log_of(straight)) > 10
    assert_alike(end_of(tmp_path / "killed"), straight)
