"""What the launcher says, read from real processes."""

import math
import subprocess
import sys

import pytest
from cluster import environment

from harness.environment import max_restarts, nodes

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
CHILD = "from harness.environment import shutdown_grace_seconds; print(shutdown_grace_seconds())"


def granted(*options: str, **variables: str) -> float:
    """What a worker believes whose parent was started with such options and variables."""
    command = [sys.executable, "-c", PARENT.format(child=CHILD), *options]
    done = subprocess.run(command, env={**environment(), **variables}, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize(
    ("options", "variables", "seconds"),
    [
        ((), {}, 30),
        (("--shutdown-timeout=7",), {}, 7),
        (("--shutdown_timeout", "8"), {"PET_SHUTDOWN_TIMEOUT": "9"}, 8),
        ((), {"PET_SHUTDOWN_TIMEOUT": "9", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}, 9),
        ((), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}, 10),
    ],
)
def test_what_torchrun_grants_after_a_signal(options, variables, seconds):
    """Its option, its environment, its default, in this order."""
    assert granted(*options, **variables, TORCHELASTIC_RUN_ID="x") == seconds


def test_without_torchrun_no_limit_is_known():
    """A plain process is not killed by anybody that it knows of."""
    assert granted("--shutdown-timeout=7") == math.inf


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"PET_NNODES": "3"}, 3),
        ({"PET_NNODES": "1:4"}, 4),
        ({"SLURM_JOB_NUM_NODES": "2"}, 2),
        ({"SKYPILOT_NUM_NODES": "2"}, 2),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 2),
        ({"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "SLURM_JOB_NUM_NODES": "2"}, 1),
    ],
)
def test_how_many_machines_there_are(monkeypatch, variables, count):
    """torchrun knows; without it, whoever speaks of the most."""
    for name in ("PET_NNODES", "SLURM_JOB_NUM_NODES", "SKYPILOT_NUM_NODES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert nodes() == count


def test_how_often_torchrun_restarts(monkeypatch):
    """What it tells its workers, or what it will be told; nothing is not 0."""
    assert max_restarts() is None
    monkeypatch.setenv("PET_MAX_RESTARTS", "2")
    assert max_restarts() == 2
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert max_restarts() == 0


def test_how_many_machines_torchrun_waits_for():
    """At least: ``--nnodes`` may be a range."""
    child = "from harness.environment import least_nodes; print(least_nodes())"
    for option, least in (("--nnodes=2", "2"), ("--nnodes=1:4", "1"), ("--standalone", "1")):
        command = [sys.executable, "-c", PARENT.format(child=child), option]
        variables = {**environment(), "TORCHELASTIC_RUN_ID": "x"}
        assert subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout == f"{least}\n"
