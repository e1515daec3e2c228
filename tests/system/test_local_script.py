"""The launch script for one machine."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.cluster import PATIENCE_SECONDS, environment

REPOSITORY = Path(__file__).parents[2]


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
