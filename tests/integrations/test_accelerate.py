"""Accelerate's plain loop under ``resilient``: killed in the middle of an epoch, it ends as the run that was left alone."""

import pytest
import torch

from harness.errors import ConfigError
from tests.support.integrations import EXAMPLES, LIBRARIES, end_of, require, run


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    require("accelerate")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)


@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Three ranks are killed, one after the other; gradients are accumulated, also over the last batches of an epoch."""
    run(tmp_path / "straight", EXAMPLES / "accelerated.py", ranks=ranks)
    run(tmp_path / "killed", EXAMPLES / "accelerated.py", ranks=ranks, kills=3)
    straight, killed = end_of(tmp_path / "straight"), end_of(tmp_path / "killed")
    per_epoch = -(-600 // (4 * ranks))
    assert killed["step"] == straight["step"] == 4 * -(-per_epoch // 4)
    for name in ("model", "optimizer", "scheduler"):
        assert killed["digests"][name] == straight["digests"][name], name


def test_what_it_refuses():
    """A loader that Accelerate has not prepared, and a call that comes too early."""
    from accelerate import Accelerator

    from harness.integrations.accelerate import resilient

    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader([1, 2, 3])
    with pytest.raises(ConfigError, match=r"pass it through accelerator.prepare"):
        resilient(accelerator, loader, None)
    with pytest.raises(ConfigError, match=r"after accelerator.prepare"):
        resilient(accelerator, accelerator.prepare(loader), None)
