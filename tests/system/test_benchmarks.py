"""The benchmarks run, and their tables say what was measured."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    """benchmarks/report.py, which finds what lies beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "report", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run(contender, repeat, *, durable, blocked=1.0):
    """Figures that nobody measured."""
    saved = {
        "blocked_seconds": blocked,
        "durable_seconds": durable,
        "stored_bytes": 5000,
        "payload_bytes": 4000,
        "tensors": 20,
    }
    memory = {"extra_memory_bytes": 3_000_000, "children_memory_bytes": 2_000_000}
    return {"contender": contender, "state": "1MB", "repeat": repeat, "save": {**saved, **memory}}


@pytest.fixture
def results():
    runs = [
        *(run("harness", repeat, durable=value) for repeat, value in enumerate([2.0, 4.0, 3.0])),
        *(run("torch.save", repeat, durable=1.0, blocked=0.5) for repeat in range(3)),
        *(run("torch.save, safe", repeat, durable=value) for repeat, value in enumerate([4.0, 4.0, 6.0])),
        {"contender": "floors", "state": "1MB", "repeat": 0, "s3": False, "floors": {"write": 2.0, "write_direct": 1.5}},
    ]
    failures = [{"contender": "DCP save", "state": "1MB", "repeat": 0, "reason": "RuntimeError: a | b"}]
    about = {"cpu": "a chip", "cores": 2, "memory_gb": 8, "filesystem": "ext4", "kernel": "6", "load_before": 0.0}
    return {"machine": {**about, "versions": {}, "date": "today", "minutes": 1}, "runs": runs, "failures": failures}


def row(text, begins):
    """The cells of the first row with such a first cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {begins} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_and_who_is_compared(report, results):
    """What is not fsynced is no measure for what is; ratios are those of the medians, their spread that of the rounds."""
    text = report.tables(results)
    _, own, peer, its, ratio, floor, to_floor = row(text, "1MB, durable")
    assert (own, peer) == ("3.00 (2.00 to 4.00)", "torch.save, safe")
    assert (its, ratio) == ("4.00 (4.00 to 6.00)", "**0.75** (0.50 to 1.00)")
    assert (floor, to_floor) == ("1.50 (1.50 to 1.50)", "**2.00** (1.33 to 1.33)")
    assert row(text, "1MB, blocked")[2] == "torch.save"
    assert row(text, "torch.save")[3] == "1.00 (1.00 to 1.00)† · 0.25 · 0.67"
    memory = text.partition("### Memory")[2]
    assert row(memory, "**harness**")[1:4] == ["5 MB (1MB)", "-", "1.250"]


def test_a_failure_is_shown(report, results):
    """Where its figures would be, and with its reason."""
    text = report.tables(results)
    assert row(text, "DCP save")[1] == "failed"
    assert "| DCP save | 1MB | 1 | RuntimeError: a \\| b |" in text


def test_publishing(report, results, tmp_path, monkeypatch):
    """What stands around the tables stays, and what was published before goes."""
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}published before\n{report.END}after\n")
    for name, path in (("README", page), ("RESULTS", tmp_path / "results.json"), ("PICTURE", tmp_path / "x.png")):
        monkeypatch.setattr(report, name, path)
    monkeypatch.setattr(report, "draw", lambda *_: None)
    report.publish(results)
    first = page.read_text()
    report.publish(results)
    assert page.read_text() == first
    assert first.startswith("before\n")
    assert first.endswith("after\n")
    assert "published before" not in first
    assert "### 1MB" in first
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_labels_keep_apart(report):
    """None lies over another, and their order is that of the lines."""
    heights = {"a": 1.0, "b": 1.01, "c": 1.02, "d": 50.0}
    placed = report.spaced(heights, least_ratio=1.5)
    assert sorted(placed, key=placed.get) == ["a", "b", "c", "d"]
    values = [placed[name] for name in "abcd"]
    assert all(above / below >= 1.499 for below, above in itertools.pairwise(values))
    assert placed["d"] == pytest.approx(50.0)


def test_our_contender(tmp_path, monkeypatch):
    """It saves and restores by the functions that the loop itself uses."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contender = importlib.import_module("contenders.ours").Harness(str(tmp_path))
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    models[0](torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    contender.prepare(models[0], optimizers[0])
    contender.save(3)
    contender.fence()
    contender.wait()
    contender.restore(models[1], optimizers[1], 3)
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(
        *(optimizer.state[model.weight]["exp_avg"] for model, optimizer in zip(models, optimizers, strict=True))
    )


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "arguments", "tells"),
    [
        ("many", "--checkpoints 30 --attempts 3", "disk  prune"),
        ("frozen", "--gigabytes 0.2 --saves 2 --rounds 1", "floor"),
        ("order", "--sizes 1000 --rounds 1", "feistel"),
        ("long_run", "--steps 2000 --attempts 2 --parts 2", "resident"),
        ("restart", "--rounds 1 --kills 1 --layers 1", "ratio"),
        ("ranks", "--ranks 2 4 --up-to 8", "a save"),
        ("sharded", "--states 1MB --ranks 2 --repeats 1", "DCP"),
    ],
)
def test_the_others_run(tmp_path, name, arguments, tells):
    """On what is small: the code that they call moves on."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert tells in done.stdout


@pytest.mark.soak
def test_a_step_is_measured():
    """Under torchrun, as its docstring says."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(BENCHMARKS / "step.py")]
    command = [sys.executable, *command, "--rounds", "1", "--steps", "40"]
    assert "harness train" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.soak
def test_a_quick_benchmark_runs(tmp_path):
    """The floors, harness and torch.save with a small state; what fails is told of and does not end the others."""
    results = tmp_path / "results.json"
    contenders = ["harness", "torch.save", "Accelerate save_state"]  # the last is not installed here
    command = [sys.executable, str(BENCHMARKS / "checkpoint.py"), "--quick", "--states", "1MB", "--results", str(results)]
    command += ["--scratch", str(tmp_path / "scratch"), "--threads", "1", "--contenders", *contenders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(results.read_text())
    runs = {run["contender"]: run for run in found["runs"]}
    assert set(runs) == {"floors", "harness", "torch.save"}
    assert all(value > 0 for name, value in runs["floors"]["floors"].items() if name.startswith(("copy", "read", "hash")))
    saves = {run["contender"]: run["save"] for run in found["runs"] if "save" in run}
    restores = {run["contender"]: run["restore"] for run in found["runs"] if "restore" in run}
    for name in ("harness", "torch.save"):
        assert 0 < saves[name]["blocked_seconds"] <= saves[name]["wall_seconds"]
        assert 0 < saves[name]["durable_seconds"] <= saves[name]["wall_seconds"]
        assert saves[name]["stored_bytes"] > saves[name]["payload_bytes"] > 500_000
        assert {restores[name][how]["digest"] for how in ("warm", "backed", "cold")} == {saves[name]["digest"]}
    (failure,) = found["failures"]
    assert failure["reason"].startswith("ModuleNotFoundError")
    assert "| **harness** |" in done.stdout
    assert list((tmp_path / "scratch").iterdir()) == [tmp_path / "scratch/log"]
