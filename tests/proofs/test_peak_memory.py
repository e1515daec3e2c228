"""Saving does not copy the state, and loading takes no more than the state: measured as the process's peak memory."""

import json
import shutil
import subprocess
import sys
import time
from typing import Any

import torch
from safetensors.torch import load_file

from harness.checkpoint import commit, load
from harness.checkpoint.format import Attempt
from harness.storage.store import open_store
from tests.support.process_memory import forget_the_peak, memory_bytes

STATE_BYTES, EXTRA_BYTES = 1 << 30, 64 << 20
TINY = 5_000  # as many parameters with a scalar of their own as a large model has


def state_of(size_bytes: int, tiny_count: int) -> dict[str, dict[str, Any]]:
    """Mostly one large tensor; one that is a view with strides; thousands that are tiny."""
    eighth = size_bytes // 8
    strided = torch.arange(eighth // 4, dtype=torch.float32).reshape(-1, 1024).t()
    tiny = {f"layer.{number}.bias": torch.full((16,), number, dtype=torch.bfloat16) for number in range(tiny_count)}
    steps = {name: {"step": torch.tensor(float(number)), "exp_avg": tiny[name] + 1} for number, name in enumerate(tiny)}
    large = torch.full((7 * eighth // 2,), 1.5, dtype=torch.bfloat16)
    return {"model": {"large": large, "strided": strided, **tiny}, "optimizer": {"state": steps}}


def measure(url: str, size_bytes: int) -> dict[str, float]:
    """Saves and loads a state, the large tensor in pieces; how much memory each took beside it, and how long."""
    store, attempt = open_store(url), Attempt.after([])
    small = state_of(1 << 20, 1)
    load.read(store, *commit.write(store, small, step=1, attempt=attempt))  # everything is imported now
    state = state_of(size_bytes, TINY)
    before, began = forget_the_peak(), time.monotonic()
    directory, manifest = commit.write(store, state, step=2, attempt=attempt, shard_bytes=size_bytes // 4)
    assert "large" in manifest.parts["model"].slices
    saving, saved = memory_bytes("VmHWM") - before, time.monotonic()
    expected = float(state["model"]["strided"][5, 7])
    del state
    before = forget_the_peak()
    began_loading = time.monotonic()
    parts = load.read(store, directory, manifest)
    loading, loaded = memory_bytes("VmHWM") - before - manifest.bytes, time.monotonic()
    assert float(parts["model"]["strided"][5, 7]) == expected, "it is the state"
    seconds = {"save_seconds": saved - began, "load_seconds": loaded - began_loading}
    return {"bytes": manifest.bytes, "saving": saving, "loading": loading, **seconds}


WEIGHTS = """
import resource, sys
import torch, torch.distributed.checkpoint as dcp
from harness import interchange
from harness.checkpoint.catalog import Catalog
from harness.storage.store import open_store
from tests.support.process_memory import memory_bytes

place = sys.argv[1]
model = {f"{number}.weight": torch.full((1 << 21,), float(number)) for number in range(64)}
dcp.save({"model": model}, checkpoint_id=f"{place}/dcp")
del model
limit_bytes = memory_bytes("VmData") + (192 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
try:
    torch.zeros(1 << 26)
    raise SystemExit("512 MB are there: the limit does not hold")
except RuntimeError:
    store = open_store(f"{place}/run")
directory, _ = interchange.import_run(f"{place}/dcp", store, trust=True)
interchange.export_model(store, directory, Catalog(store).open(directory), f"{place}/out/")
"""


def test_weights_larger_than_memory(tmp_path):
    """Half a gigabyte of weights is imported and exported by a process that may have 192 MB."""
    command = [sys.executable, "-W", "ignore", "-c", WEIGHTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(file)["63.weight"].unique().tolist() == [63.0]
    shutil.rmtree(tmp_path)


def test_memory_beside_the_state(tmp_path, capsys):
    """A save of 1 GB takes less than 64 MB beside the state, and so does loading it."""
    url = str(tmp_path / "run")
    try:
        command = [sys.executable, __file__, url, str(STATE_BYTES)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=200).stdout)
    finally:
        shutil.rmtree(url, ignore_errors=True)
    with capsys.disabled():
        text = "{saving:.1f} MB to save, {loading:.1f} MB to load {bytes:.0f} MB"
        in_mb = {name: found[name] / 1e6 for name in ("saving", "loading", "bytes")}
        print(f"\n    {text.format(**in_mb)}; {found['save_seconds']:.1f} and {found['load_seconds']:.1f} s", end="")
    assert found["bytes"] >= STATE_BYTES
    assert found["saving"] < EXTRA_BYTES
    assert found["loading"] < EXTRA_BYTES


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
