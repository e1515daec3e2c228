"""``transformers.Trainer`` under ``resilient``: killed in the middle of an epoch, it ends as the run that was left alone."""

import json

import pytest

from tests.support.integrations import EXAMPLES, killed_thrice, require

pytestmark = pytest.mark.torchrun
PARTS = ("model", "optimizer", "scheduler")  # weights and moments, bit for bit; the history is compared apart
TIMES = ("_runtime", "_per_second")


@pytest.fixture(autouse=True)
def _installed():
    require("transformers", "accelerate")


def log_of(end):
    """The history of a trainer's log, without what a clock has said."""
    history = json.loads(end["parts"]["trainer"]["state"]["state"])["log_history"]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in history]


def test_an_adapter(tmp_path):
    """LoRA, with tokens masked at random."""
    require("peft")
    straight, killed = killed_thrice(tmp_path, EXAMPLES / "trainer_lora.py", 2, alike=PARTS)
    assert log_of(killed) == log_of(straight)


def test_a_stream(tmp_path):
    """A shuffled stream of ``datasets``, whose batches rank 0 reads for all, with tokens masked at random."""
    require("datasets")
    straight, killed = killed_thrice(tmp_path, EXAMPLES / "trainer_stream.py", 3, alike=PARTS)
    assert log_of(killed) == log_of(straight)


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Three ranks are killed, one after the other; they die between two lines of the log, which is the same, too."""
    straight, killed = killed_thrice(tmp_path, EXAMPLES / "trainer.py", ranks, alike=PARTS)
    assert len(log_of(straight)) > 10
    assert log_of(killed) == log_of(straight)
