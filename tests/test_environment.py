"""What the launcher says, read from real processes."""

import math
import subprocess
import sys

import pytest
from cluster import environment

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
