"""A program that mypy accepts as a user's (``public_api.py``) also runs."""

import torch

import harness
from tests.support import public_api


def test_a_users_program_trains_and_resumes(tmp_path):
    """Interrupted after one of two epochs, it ends as the one that was not."""
    whole = public_api.train(str(tmp_path / "whole"), stop=harness.StopRequest())
    assert whole[1] == 8
    assert public_api.train(str(tmp_path / "halves"), epochs=1, stop=harness.StopRequest())[1] == 4
    assert public_api.train(str(tmp_path / "halves"), stop=harness.StopRequest()) == whole


def test_checkpoints_without_a_run(tmp_path):
    """What was saved is found, and loaded under the same names."""
    directory, *parts = public_api.without_a_run(str(tmp_path))
    assert directory.startswith("step-000000000001")
    assert parts == ["notes", "weights"]


def test_one_plain_process():
    """It is rank 0 of 1."""
    assert public_api.who() == (0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def test_every_public_name_is_used():
    """A name that is added to ``harness.__all__`` is used in the program, too."""
    with open(public_api.__file__) as file:
        program = file.read()
    assert [name for name in harness.__all__ if f"harness.{name}" not in program] == []
