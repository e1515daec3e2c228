"""Data that libraries stream: killed three times in a plain loop, it is the data of the run that was left alone."""

import os
import subprocess
import sys

import pytest

from tests.support.cluster import newest
from tests.support.integrations import EXAMPLES, LIBRARIES, PATIENCE_SECONDS, ROOT, require

# mosaicml-streaming imports it for data sets of pictures, which nobody needs here; it comes without torch's build for CPUs.
TORCHVISION = {
    "torchvision/__init__.py": "",
    "torchvision/datasets.py": "class VisionDataset: ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def to_tensor(picture): ...\n",
}
# Runs an example in forks of a process that has imported what takes long: once alone, and killed after the first save of
# each attempt, with time between two steps, until the last attempt comes to its end.
DRIVER = """
import os, runpy, signal, sys, time
from pathlib import Path
import torch, harness, torchdata.stateful_dataloader, torchdata.nodes
example, kind, library = sys.argv[1:]
__import__(library)
step = harness.Run.step

def slow_step(run, **metrics):
    time.sleep(0.05)
    step(run, **metrics)

def start(kills_after):
    pid = os.fork()
    if pid:
        return pid
    harness.Run.step = slow_step if kills_after else step
    sys.argv = [example, kind]
    runpy.run_path(example, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)

for name, kills in (("straight", 0), ("killed", 3)):
    os.mkdir(name)
    os.chdir(name)
    for number in range(1, kills + 1):
        pid = start(number)
        while not any(Path().glob(f"runs/stream/step-*-{number:06}-*/manifest.json")):
            time.sleep(0.01)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it has ended"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(start(0), 0)[1] == 0
    os.chdir("..")
"""


@pytest.mark.parametrize(
    ("kind", "library"), [("nodes", "torchdata"), ("datasets", "datasets"), ("web", "webdataset"), ("mosaic", "streaming")]
)
def test_killed_in_the_middle_of_an_epoch(tmp_path, kind, library):
    """The same samples in the same order, over two epochs, and the same weights."""
    require(library)
    for name, text in TORCHVISION.items() if kind == "mosaic" else ():
        (tmp_path / "beside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "beside" / name).write_text(text)
    path = os.pathsep.join([LIBRARIES, str(tmp_path / "beside"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", DRIVER, str(EXAMPLES / "streams.py"), kind, library]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr.count("resuming from step-") == 3
    straight, killed = (newest(tmp_path / name / "runs" / "stream") for name in ("straight", "killed"))
    assert killed["step"] == straight["step"] == 150
    for name in ("trained", "model", "optimizer"):
        assert killed["digests"][name] == straight["digests"][name], name
