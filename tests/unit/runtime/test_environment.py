"""What the launcher says, read from real processes."""

import math
import os
import subprocess
import sys

import pytest
import torch

from harness.errors import ConfigError
from harness.runtime.environment import Ranks, is_first_of_node, max_restarts, nodes, rank, ranks, size
from harness.runtime.signals import StopRequest
from harness.training.run import Run
from tests.support.cluster import environment, harness

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
CHILD = "from harness.runtime.environment import shutdown_grace_seconds; print(shutdown_grace_seconds())"


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
    child = "from harness.runtime.environment import least_nodes; print(least_nodes())"
    for option, least in (("--nnodes=2", "2"), ("--nnodes=1:4", "1"), ("--standalone", "1")):
        command = [sys.executable, "-c", PARENT.format(child=child), option]
        variables = {**environment(), "TORCHELASTIC_RUN_ID": "x"}
        assert subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout == f"{least}\n"


# --- ranks -----------------------------------------------------------------------------------------------------------

FOUR = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
PLAIN = [
    {},
    {"WORLD_SIZE": "1"},
    {"WORLD_SIZE": "1", "RANK": "0"},
    {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": "", "MASTER_PORT": " ", "LOCAL_RANK": ""},
    {"MASTER_ADDR": "here", "MASTER_PORT": "29500"},  # which many a shell exports
    {"LOCAL_RANK": "0"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script, or salloc: no step of several tasks
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000"},  # srun --pty bash
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "WORLD_SIZE": "1"},  # each trains a run of its own
    {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
]
WRONG = {
    "a size alone": ({"WORLD_SIZE": "4"}, "expected RANK, MASTER_ADDR, MASTER_PORT beside WORLD_SIZE, found none"),
    "a rank alone": ({"RANK": "0"}, "expected WORLD_SIZE, MASTER_ADDR, MASTER_PORT beside RANK, found none"),
    "no port": ({**FOUR, "MASTER_PORT": ""}, "expected MASTER_PORT beside RANK, WORLD_SIZE, MASTER_ADDR, found none"),
    "no size": ({**FOUR, "WORLD_SIZE": ""}, "expected WORLD_SIZE beside RANK, MASTER_ADDR, MASTER_PORT, found none"),
    "a word for a rank": ({**FOUR, "RANK": "one"}, "RANK: expected a number from 0 on, found 'one'"),
    "a negative rank": ({**FOUR, "RANK": "-1"}, "RANK: expected a number from 0 on, found '-1'"),
    "a word for a port": ({**FOUR, "MASTER_PORT": "$PORT"}, "MASTER_PORT: expected a number from 0 on, found '$PORT'"),
    "a rank too many": ({**FOUR, "RANK": "4"}, "expected RANK to be from 0 to WORLD_SIZE - 1, found RANK=4, WORLD_SIZE=4"),
    "no ranks": ({**FOUR, "RANK": "0", "WORLD_SIZE": "0"}, "found RANK=0, WORLD_SIZE=0"),
    "a local rank too many": ({**FOUR, **LOCAL, "LOCAL_RANK": "2"}, "found LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
    "a local rank alone": ({**FOUR, "LOCAL_RANK": "0"}, "expected LOCAL_WORLD_SIZE (the number of ranks on this machine)"),
    "a local rank without a rank": ({"LOCAL_RANK": "2"}, "expected LOCAL_WORLD_SIZE"),
    "srun": ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"}, "srun has started 3 processes (SLURM_STEP_NUM_TASKS=3)"),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
    "MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec has started 2 processes"),
}


@pytest.fixture
def environ(monkeypatch):
    """Sets the variables of a launcher, and no others."""

    def be(variables: dict[str, str]) -> None:
        for name in [*os.environ]:
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "LOCAL_", "MASTER_", "TORCHELASTIC_")) or name in (
                "RANK",
                "WORLD_SIZE",
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return be


@pytest.mark.parametrize("variables", PLAIN, ids=lambda variables: " ".join(f"{k}={v}" for k, v in variables.items()))
def test_one_plain_process(environ, variables):
    """Nothing says that there are others, or somebody says that each is alone; what is empty is not given."""
    environ(variables)
    assert ranks() is None
    assert (rank(), size(), is_first_of_node()) == (0, 1, True)


def test_one_of_several(environ):
    """All four are there; those of the machine may be missing together."""
    environ({**FOUR, **LOCAL})
    assert ranks() == Ranks(1, 4, 1, 2, "here", 29500)
    environ(FOUR)
    assert ranks() == Ranks(1, 4, 0, 1, "here", 29500)
    environ({**FOUR, "RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert ranks() == Ranks(0, 1, 0, 1, "here", 29500), "torchrun, started once on each node"


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_environment_is_refused(environ, case):
    """It is named, with what is there and what is missing; and it never keeps harness from being imported."""
    variables, words = WRONG[case]
    environ(variables)
    with pytest.raises(ConfigError) as caught:
        ranks()
    assert str(caught.value).startswith("environment: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(rank(), int)


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_the_verbs_say_so(tmp_path, verb):
    """In one line, before torch is imported, whichever rank it is."""
    (tmp_path / "config.yaml").write_text("task: harness.tasks.linear:build\ntrain: {steps: 1, global_batch_size: 1}\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for variables in ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}):
        done = harness(verb, "config.yaml", cwd=tmp_path, env=variables)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "harness: environment: " in line


@pytest.mark.torchrun
def test_several_torchruns_that_do_not_know_each_other(tmp_path):
    """Each trains alone, which somebody may have meant: it is warned of."""
    (tmp_path / "config.yaml").write_text("task: harness.tasks.linear:build\ntrain: {steps: 1, global_batch_size: 1}\n")
    agent = ["-m", "harness.launcher.agent", "--standalone", "--nproc-per-node=1", "-m", "harness", "train", "config.yaml"]
    variables = {**environment(), "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(
        [sys.executable, *agent], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("srun has started 2 processes (SLURM_STEP_NUM_TASKS=2), but this torchrun knows of no other") == 1
    )


def test_a_loop_of_ones_own(environ):
    """A ``Run`` in a process of mpirun that has not joined the others is refused, too."""
    environ({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="mpirun has started 2 processes"):
        Run(None, {"model": torch.nn.Linear(1, 1)}, stop=StopRequest())
