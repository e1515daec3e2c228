"""``harness doctor``: each thing that it finds really happens here, and a run that is well gets only ``ok``."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import harness as package
from harness import Task
from harness.checkpoint.catalog import Catalog
from harness.config import Config
from harness.distributed import device
from harness.doctor import _read, examine, examine_script
from harness.doctor.examination import _examine
from harness.doctor.findings import Finding, exit_code, named
from harness.storage.store import open_store
from harness.telemetry import crashes
from harness.telemetry.crashes import Crash
from tests.support import servers
from tests.support.cluster import environment, held, hold, launch, play, played, returned, train_here, wait_until

TASK = f"{__file__}:build"


# --- tasks -----------------------------------------------------------------------------------------------------------


def build(width: int = 1, samples: int = 10) -> Task:
    """A checkpoint of it has ``width`` times 8 MB."""
    model = nn.Linear(1000 * width, 1000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dataset = TensorDataset(torch.linspace(-1, 1, samples).unsqueeze(1))
    return Task(model, dataset, optimizer, lambda model, batch: model(batch[0].repeat(1, 1000 * width)).square().mean())


def with_dataset(dataset: Dataset) -> Task:
    task = build()
    return Task(task.model, dataset, task.optimizer, task.loss)


def broken() -> Task:
    raise RuntimeError("a mistake in the recipe")


class Opaque(nn.Linear):
    def get_extra_state(self) -> object:
        return object()


def unsaveable() -> Task:
    model = Opaque(1, 1)
    task = build()
    return Task(model, task.dataset, torch.optim.SGD(model.parameters(), lr=0.1), task.loss)


def random_by_rank() -> Task:
    torch.manual_seed(int(os.environ["RANK"]))
    return build()


def broken_on_rank_1() -> Task:
    return broken() if os.environ["RANK"] == "1" else build()


def deadly() -> Task:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return build()


class Faulty(Dataset):
    def __init__(self, fault) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.fault(index)


def _missing(index: int) -> torch.Tensor:
    raise FileNotFoundError(f"sample-{index}.png")


def _vulnerable(index: int) -> torch.Tensor:
    """As a library does that has handlers of its own."""
    if torch.utils.data.get_worker_info():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return torch.zeros(1)


def _held(index: int) -> torch.Tensor:
    hold(Path("sample"))
    return torch.zeros(1)


def missing_samples() -> Task:
    return with_dataset(Faulty(_missing))


def vulnerable() -> Task:
    subprocess.Popen(["sleep", "71"])
    subprocess.Popen(["sleep", "72"], start_new_session=True)
    subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 73"])
    return with_dataset(Faulty(_vulnerable))


def held_samples() -> Task:
    return with_dataset(Faulty(_held))


def large_samples() -> Task:
    return with_dataset(Faulty(lambda index: torch.zeros(1 << 18)))


# --- means -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a configuration and returns its path; keyword arguments replace its sections."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return lambda **sections: written(tmp_path, **sections)


def written(directory: Path, **sections) -> str:
    sections = {
        "task": TASK,
        "train": {"steps": 4, "global_batch_size": 4},
        "checkpoint": {"url": str(directory / "run"), "every_steps": 2, "keep_last": 2},
        **sections,
    }
    path = directory / "run.yaml"
    path.write_text(json.dumps(sections))
    return str(path)


def examined(path: str, *overrides: str) -> tuple[int, dict[str, list[Finding]]]:
    """The exit code, and by check what was found in this process."""
    told: list[Finding] = []
    code = examine(path, overrides, told.extend)
    return code, by_check(told)


def by_check(told: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in told:
        assert finding.tried
        assert finding.found
        found.setdefault(finding.check, []).append(finding)
    return found


def read(output: str) -> dict[str, list[Finding]]:
    """What was printed as JSON, beside whatever else."""
    start, end = re.search(r"^\[$", output, re.MULTILINE), re.search(r"^\]$", output, re.MULTILINE)
    assert start, output
    assert end, output
    return by_check([Finding(**fields) for fields in json.loads(output[start.start() : end.end()])])


def one(found: dict[str, list[Finding]], check: str) -> Finding:
    (finding,) = found[check]
    return finding


def not_ok(found: dict[str, list[Finding]]) -> list[str]:
    return [str(finding) for each in found.values() for finding in each if finding.level != "ok"]


def only(found: dict[str, list[Finding]], check: str, level: str) -> Finding:
    """The one finding that is not ok."""
    finding = one(found, check)
    assert not_ok(found) == [str(finding)]
    assert finding.level == level
    return finding


def _has_namespaces() -> bool:
    """Whether this process may pretend to be on another machine: with a name and mounts of its own."""
    command = ["unshare", "--mount", "--uts", "sh", "-c", "mount -t tmpfs none /dev/shm && hostname elsewhere"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts filesystems")
needs_namespaces = pytest.mark.skipif(not _has_namespaces(), reason="needs namespaces for mounts and names: root's unshare")


@pytest.fixture
def kept_path():
    """A directory that a reboot does not empty."""
    place = tempfile.mkdtemp(dir="/var/tmp")
    yield Path(place)
    shutil.rmtree(place)


# --- all is well -----------------------------------------------------------------------------------------------------


@pytest.mark.torchrun
def test_a_run_that_is_well_gets_only_ok(s3, tmp_path):
    """Under the launcher, on object storage, with loader workers: everything is looked at, nothing is left."""
    url = s3.url("doctor")
    checkpoint = {"url": url, "every_steps": 2, "keep_last": 2, "storage_options": s3.storage_options}
    path = written(tmp_path, checkpoint=checkpoint, data={"workers": 1}, log={"jsonl": "log.jsonl"})
    command = ("-m", "harness", "launch", "--nproc-per-node=2", "--", "doctor", path, "--json")
    with launch(tmp_path, None, command=command) as run:
        run.succeed()
        found = read(run.output())
    assert not_ok(found) == []
    assert list(found) == [
        *("configuration", "ranks", "device", "task", "versions", "clocks", "group", "storage", "run", "state", "saving"),
        *("restarts", "nodes", "grace", "timeouts", "threads", "log", "batch", "memory", "workers", "processes"),
    ]
    assert "2 ranks on 1 machine" in one(found, "ranks").found
    assert one(found, "restarts").found == "it is 3"
    assert "--shutdown-timeout 60" in one(found, "grace").found
    assert re.search(r"written in [\d.]+ s \(\d+ MB/s\), read in [\d.]+ s \(\d+ MB/s\)", one(found, "storage").found)
    assert open_store(url, s3.storage_options).list() == {}
    assert not (tmp_path / "log.jsonl").exists()


def test_one_plain_process_is_well(write, s3):
    """The same without what takes several ranks; that there is no launcher is one of the lines."""
    checkpoint = {"url": s3.url("plain"), "every_steps": 2, "keep_last": 2, "storage_options": s3.storage_options}
    code, found = examined(write(checkpoint=checkpoint))
    assert (code, not_ok(found)) == (0, [])
    assert one(found, "ranks").found.startswith("there is none; start the doctor as you will start the training")
    assert one(found, "state").found == "a checkpoint has 8.0 MB"
    assert {"clocks", "group", "restarts", "nodes"}.isdisjoint(found)


def test_nothing_is_left_and_nothing_touched(write, kept_path):
    """Neither a file nor a directory more than before; what was there has its bytes and its times."""
    url = kept_path / "deep" / "down" / "run"
    code, found = examined(write(), f"checkpoint.url={url}")
    assert one(found, "storage").level == "ok"
    assert code == 0
    assert list(kept_path.iterdir()) == []
    train_here(build, url=url, train={"steps": 2, "global_batch_size": 4}, checkpoint={"every_steps": 1})

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in url.rglob("*") if path.is_file()}

    before = state()
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "run").found) == (0, "the newest whole one is of step 2")
    assert state() == before
    assert {path.name[:5] for path in url.iterdir()} == {"attem", "metri", "step-"}


def test_an_interrupted_doctor_says_so_and_leaves_nothing(tmp_path):
    """SIGTERM in the middle: what has been found until then is told, exit code 130."""
    path = written(tmp_path, task=f"{__file__}:held_samples")
    with launch(tmp_path, None, command=("-m", "harness", "doctor", path, "--json")) as run:
        run.wait(lambda: held(tmp_path / "sample"), "the first sample")
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.finish() == 130
        found = read(run.output())
    assert found["ranks"][-1].level == "error"
    assert "a signal came" in found["ranks"][-1].found
    assert one(found, "storage").level == "ok"
    assert not (tmp_path / "run").exists()


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_mistakes_in_the_configuration(write):
    """A line for each, exit code 2, and torch is not even imported."""
    path = write(trian=1, seed="x")
    code, found = examined(path)
    assert code == 2
    assert {(each.level, each.exit_code) for each in found["configuration"]} == {("error", 2)}
    assert [each.found.partition(":")[2][:6] for each in found["configuration"]] == [" seed:", " trian"]
    script = f"import sys; from harness.doctor import examine; examine({path!r}, (), list); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("no.such.module:build", "task: there is no module 'no'"),
        (f"{__file__}:nothing", "has no function 'nothing'"),
        (f"{__file__}:broken", "RuntimeError: a mistake in the recipe ("),
    ],
)
def test_a_task_that_cannot_be_built(write, task, words):
    """Exit code 2 and the place in the user's code; the rest is looked at all the same."""
    code, found = examined(write(task=task))
    finding = one(found, "task")
    assert (code, finding.level) == (2, "error")
    assert words in finding.found
    if "mistake" in words:
        assert re.search(r"test_doctor\.py:\d+\)$", finding.found)
    assert one(found, "storage").level == "ok"


def test_an_empty_data_set(write):
    """As train says it."""
    code, found = examined(write(args={"samples": 0}))
    assert (code, one(found, "task").found) == (2, "task: expected a data set with samples, found an empty one")


def test_a_state_that_cannot_be_written(write):
    """Train would say so at its first save; here it is said before."""
    code, found = examined(write(task=f"{__file__}:unsaveable"))
    assert (code, one(found, "state").level) == (2, "error")
    assert "_extra_state" in one(found, "state").found


def test_what_is_not_saved(write):
    """No URL: nothing is. No interval: only the end is."""
    code, found = examined(write(checkpoint={}))
    assert (code, one(found, "saving").level) == (0, "warn")
    assert "nothing is saved" in one(found, "saving").found
    assert "storage" not in found
    code, found = examined(write(), "checkpoint.every_steps=null")
    assert (code, one(found, "saving").level) == (0, "warn")
    assert "only the end is saved" in one(found, "saving").found


def test_a_log_that_cannot_be_written(write):
    """As train would find it, after the ranks have met."""
    code, found = examined(write(), "log.jsonl=missing/log.jsonl")
    assert (code, one(found, "log").found) == (2, "No such file or directory")


# --- the storage -----------------------------------------------------------------------------------------------------


def test_a_directory_that_may_not_be_written(write, public_path, ordinary_user):
    """Exit code 74, who must act, and nothing left."""
    path = written(Path(public_path))
    with ordinary_user():
        code, found = examined(path)
    finding = one(found, "storage")
    assert (code, finding.level, finding.exit_code) == (74, "error", 74)
    assert finding.found == f"put {public_path}/run/{finding.found.split('/')[-2]}/probe: Permission denied"
    assert re.search(r"its owner has to let user \S+ \(rank 0 on \S+\) write", finding.advice)
    assert os.listdir(public_path) == ["run.yaml"]
    assert {"run", "place", "space"}.isdisjoint(found), "nobody looks at what cannot be had"


def quick(server, **options) -> dict:
    """Storage options that give up soon."""
    client = {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 0}}
    return {**server.storage_options, "config_kwargs": client, **options}


def test_a_server_that_is_killed(write, tmp_path):
    """Exit code 74, at once, and where to look."""
    with servers.seaweedfs(tmp_path) as server:
        checkpoint = {"url": server.url("run"), "every_steps": 2, "storage_options": quick(server)}
        path = write(checkpoint=checkpoint)
        assert examined(path)[0] == 0
        server.kill()
        code, found = examined(path)
    finding = only(found, "storage", "error")
    assert (code, finding.exit_code) == (74, 74)
    assert "see that it can be reached from rank 0 on" in finding.advice
    assert server.secret not in str(finding)


def test_a_login_that_is_refused(write, s3):
    """The owner of the storage must act; no secret is told."""
    wrong = "bm90IHRoZSBwYXNzd29yZA=="
    checkpoint = {"url": s3.url("run"), "every_steps": 2, "storage_options": quick(s3, secret=wrong)}
    code, found = examined(write(checkpoint=checkpoint))
    finding = one(found, "storage")
    assert (code, finding.level) == (74, "error")
    assert "its owner has to let" in finding.advice
    assert wrong not in str(not_ok(found))


def test_a_server_that_lets_nobody_delete(write, tmp_path):
    """A run can live with that; its owner should know, also that the probe is still there."""
    pytest.importorskip("paramiko", reason="paramiko is not installed: pip install paramiko")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(servers.sshd(tmp_path, denied="remove"))
        except servers.Missing as missing:
            pytest.skip(str(missing))
        checkpoint = {"url": server.url("run"), "every_steps": 2, "storage_options": server.storage_options}
        code, found = examined(write(checkpoint=checkpoint))
    finding = only(found, "storage", "warn")
    assert (code, finding.found[:7]) == (0, "delete ")
    assert [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()] == ["probe"]


def test_what_a_reboot_takes_away(write, tmp_path):
    """tmpfs, /tmp, and the memory of this very process."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm, tempfile.TemporaryDirectory(dir="/tmp") as tmp:
        code, found = examined(write(), f"checkpoint.url={shm}/run")
        assert (code, one(found, "place").level) == (0, "warn")
        assert one(found, "place").found == "tmpfs: it is memory, and gone after a reboot"
        found = examined(write(), f"checkpoint.url={tmp}/run")[1]
        assert one(found, "place").level == "warn"
    found = examined(write(), "checkpoint.url=memory://run")[1]
    assert "this process's memory" in one(found, "place").found


def test_a_local_disk_and_a_launcher_that_speaks_of_several_machines(write, kept_path, monkeypatch):
    """One process alone cannot try it: it says what the file system is, and how to try it."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    code, found = examined(write(), f"checkpoint.url={kept_path}/run")
    assert code == 0
    assert found["place"][-1].level == "warn"
    assert "is local to each machine, but the launcher starts 3 machines" in found["place"][-1].found
    assert "address" in found


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@needs_root
def test_a_disk_that_is_too_small(write, small_disk):
    """Too small for those that are to be kept: a warning. For a single one: an error, 74."""
    code, found = examined(write(), f"checkpoint.url={small_disk}/run", "checkpoint.keep_last=3")
    assert (code, one(found, "space").level) == (0, "warn")
    assert "with 4 checkpoints of 8.0 MB" in one(found, "space").tried
    code, found = examined(write(), f"checkpoint.url={small_disk}/run", "args.width=4")
    assert (code, one(found, "space").level) == (74, "error")
    assert examined(write(), f"checkpoint.url={small_disk}/run", "checkpoint.keep_last=1")[1]["space"][0].level == "ok"


def test_a_run_whose_checkpoints_are_corrupt(write, kept_path):
    """The newest: a warning that says from where the run would go on. All of them: exit code 66."""
    url = kept_path / "run"
    train_here(build, url=url, train={"steps": 2, "global_batch_size": 4}, checkpoint={"every_steps": 1})
    older, newer = sorted(url.glob("step-*"))
    (newer / "model.safetensors").write_bytes(b"")
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "run").level) == (0, "warn")
    assert one(found, "run").found.startswith("the newest whole one is of step 1; a newer one is not: model.safetensors")
    (older / "model.safetensors").unlink()
    for there in (url, kept_path / "typo"):
        code, found = examined(write(), f"checkpoint.url={there}", "checkpoint.must_exist=true")
        assert (code, one(found, "run").level) == (66, "error")
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "run").level) == (66, "error")
    assert "none of 2 is whole" in one(found, "run").found


@pytest.fixture
def trained(kept_path):
    """The URL of a run of two steps, each saved, and a function that says what lies there."""
    url = kept_path / "run"
    train_here(build, url=url, train={"steps": 2, "global_batch_size": 4}, checkpoint={"every_steps": 1})

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in url.rglob("*") if path.is_file()}

    return url, state


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("args.width=2", "weight: the checkpoint has float32[1000, 1000], the model has float32[1000, 2000]"),
        ("seed=5", "seed: the checkpoint was written with 0, the loader has 5"),
        ("args.samples=12", "samples: the checkpoint was written with 10, the loader has 12"),
    ],
)
def test_a_checkpoint_of_another_run(write, trained, override, words):
    """It is whole, and the start would end with exit code 2: so the doctor does. Nothing there is touched."""
    url, state = trained
    before = state()
    code, found = examined(write(), f"checkpoint.url={url}", override)
    assert (code, one(found, "run").level, one(found, "resume").level) == (2, "ok", "error")
    assert words in one(found, "resume").found
    assert "give it another URL" in one(found, "resume").found
    assert state() == before
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "resume").level) == (0, "ok")
    assert one(found, "resume").found.startswith("step 2, every byte verified, in ")


def test_damage_that_only_reading_shows(write, trained, caplog):
    """A flipped bit: a warning that names the file and says from where the run would go on, told once."""
    url, _ = trained
    newest = sorted(url.glob("step-*"))[1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    caplog.clear()
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "run").level, one(found, "resume").level) == (0, "ok", "warn")
    assert f"NOT resuming from {newest.name}: " in one(found, "resume").found
    assert "model.safetensors" in one(found, "resume").found
    assert one(found, "resume").advice == "know that the run goes back to step 1"
    assert not [each for each in caplog.messages if "NOT resuming" in each]


@pytest.mark.parametrize(("deaths", "code"), [(2, 0), (3, 0), (4, 70)])
def test_a_crash_loop(write, trained, deaths, code):
    """Where the next start takes the checkpoint before, that is said; where it would not start at all, too."""
    url, _ = trained
    catalog = Catalog(open_store(str(url)))
    for _ in range(deaths):
        crashes.record_crash(catalog, catalog.attempts.claim({}), Crash(3, "ValueError: it", 0, [1]))
    found_code, found = examined(write(), f"checkpoint.url={url}")
    assert found_code == code
    if deaths == 2:
        assert one(found, "run").level == "ok"
    elif deaths == 3:
        assert "the next start resumes from the checkpoint before, of step 1" in one(found, "run").found
        assert one(found, "resume").advice == "know that the run goes back to step 1"
    else:
        assert "step 3 failed 4 times in a row" in one(found, "run").found
        assert "resume" not in found


def test_a_url_that_must_hold_a_run(write, kept_path):
    """As ``train --resume`` demands it: nothing is there, and the start would end with exit code 66."""
    code, found = examined(write(), f"checkpoint.url={kept_path}/run", "checkpoint.must_exist=true")
    assert (code, one(found, "run").level) == (66, "error")


def test_a_url_that_is_to_be_fresh(write, trained):
    """As ``train --fresh`` refuses it."""
    url, _ = trained
    told: list[Finding] = []
    assert examine(write(), [f"checkpoint.url={url}"], told.extend, fresh=True) == 2
    assert one(by_check(told), "run").found == f"checkpoint.url: --fresh expects an unused URL, found a run in {url}"
    assert examine(write(), [f"checkpoint.url={url}/other"], list, fresh=True) == 0


def test_a_run_that_is_being_trained(write, trained):
    """Whoever starts it takes it over from somebody who may be alive."""
    url, _ = trained
    attempt = Catalog(open_store(str(url))).attempts.claim({})
    line = {"event": "train", "time": time.time() - 20, "attempt": attempt.id, "step": 3}
    (url / f"metrics/{attempt.id}-000000.jsonl").write_text(json.dumps(line))
    code, found = examined(write(), f"checkpoint.url={url}")
    assert (code, one(found, "run").level) == (0, "warn")
    assert re.match(r"attempt 2 was active 2\d s ago, and has not reported its end", one(found, "run").found)
    (url / f"metrics/{attempt.id}-000001.jsonl").write_text(json.dumps({**line, "event": "done"}))
    assert one(examined(write(), f"checkpoint.url={url}")[1], "run").level == "ok"


@needs_root
def test_a_disk_without_inodes(write, small_disk):
    """There is room for bytes, and none for names: the save would fail all the same."""
    subprocess.run(["mount", "-o", "remount,size=200m,nr_inodes=24", small_disk], check=True)
    code, found = examined(write(), f"checkpoint.url={small_disk}/run", "checkpoint.keep_last=3")
    assert (code, one(found, "space").level) == (0, "warn")
    assert re.search(r"the free inodes of .* with 4 checkpoints of about 10 files: \d+ are free", str(one(found, "space")))
    subprocess.run(["mount", "-o", "remount,nr_inodes=6", small_disk], check=True)
    code, found = examined(write(), f"checkpoint.url={small_disk}/run", "checkpoint.keep_last=1")
    assert (code, one(found, "space").level) == (74, "error")


# --- a script --------------------------------------------------------------------------------------------------------

SCRIPT = """
import argparse, pathlib, torch
import harness

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--width", type=int, default=3)
parser.add_argument("--every", type=int)
parser.add_argument("--no-run", action="store_true")
options = parser.parse_args()
torch.manual_seed(0)
try:
    model = torch.nn.Linear(1, options.width)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = harness.Loader(torch.utils.data.TensorDataset(torch.rand(10, 1)), 4)
    if not options.no_run:
        state = {"model": model, "optimizer": optimizer, "loader": loader}
        run = harness.Run(options.url, state, every_steps=options.every, keep_last=2)
        for step in run.steps(4):
            (batch,) = next(iter(loader))
            model(batch).square().mean().backward()
            optimizer.step()
            run.step()
finally:
    pathlib.Path("ended").touch()
"""


class Left(BaseException):
    """Ends the script in place of the process."""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script under the doctor and returns the exit code and what was found; whatever it changes is put back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "script.py").write_text(SCRIPT)

    def leave(code: int) -> None:
        raise Left(code)

    def examined(*arguments: str, command: tuple[str, ...] = ("script.py",), **options) -> tuple[int, dict]:
        told: list[Finding] = []
        try:
            code = examine_script((*command, *arguments), told.extend, leave, **options)
        except Left as left:
            (code,) = left.args
        return code, by_check(told)

    return examined


def test_a_script_is_examined_where_it_makes_its_run(script, tmp_path, kept_path):
    """With its own state, settings and loader; no step is trained, nothing is left at its URL."""
    code, found = script(f"{kept_path}/run", "--every", "2")
    assert (code, not_ok(found)) == (0, [])
    assert one(found, "configuration").found == "a state of model, optimizer, loader"
    assert one(found, "saving").found == "saved every 2 steps"
    assert one(found, "state").found == "a checkpoint has 0.0 MB, and what the optimizers' first step adds"
    assert {"storage", "run", "space", "grace", "timeouts", "batch", "processes"} <= set(found)
    assert list(kept_path.iterdir()) == []
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text(SCRIPT)
    code, of_module = script(f"{kept_path}/run", "--every", "2", command=("-m", "pkg.train"))
    assert (code, one(of_module, "configuration").tried) == (0, "ran -m pkg.train until it makes its Run")


def test_a_script_whose_url_holds_another_model(script, kept_path):
    """The start would end with exit code 2; one that does not save before its end, or wants a fresh URL, is told so, too."""
    url = f"{kept_path}/run"
    done = subprocess.run([sys.executable, "script.py", url], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code, found = script(url)
    assert (code, one(found, "resume").level, one(found, "saving").level) == (0, "ok", "warn")
    assert one(found, "saving").advice == "give harness.Run every_steps, every_seconds or every_epochs"
    code, found = script(url, "--width", "5")
    assert (code, one(found, "resume").level) == (2, "error")
    assert "weight: the checkpoint has float32[3, 1], the model has float32[5, 1]" in one(found, "resume").found
    code, found = script(url, fresh=True)
    assert (code, one(found, "run").exit_code) == (2, 2)


def test_a_script_that_makes_no_run(script):
    """It has ended, or failed with its own error, or did not like its arguments: exit code 2 and where."""
    code, found = script("x", "--no-run")
    assert (code, one(found, "configuration").found) == (2, "it ended without making a Run")
    code, found = script("x", "--width", "-1")
    assert (code, one(found, "configuration").level) == (2, "error")
    assert re.search(r"RuntimeError: .* \(.*script\.py:\d+\)$", one(found, "configuration").found)
    code, found = script("x", "--widht", "3")
    assert (code, one(found, "configuration").found[:15]) == (2, "SystemExit: 2 (")


def test_none_of_a_scripts_endings_is_run(tmp_path):
    """The process is gone where the Run would have been: an untrained model gets no end."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ("-m", "harness", "doctor", "--json", "--", "script.py", "run", "--every=2")
    with launch(tmp_path, None, command=command) as run:
        assert run.finish() == 0
        assert one(read(run.output()), "saving").level == "ok"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".jsonl", ".txt")) == ["script.py"]


@pytest.mark.soak
@pytest.mark.torchrun
def test_a_script_on_all_ranks(tmp_path):
    """The README's script, with a run to go on from: the ranks resume it together, in DDP, and the code comes through."""
    shutil.copy(Path(package.__file__).parents[1] / "docs/examples/plain.py", tmp_path)
    script = (tmp_path / "plain.py").read_text().replace("EPOCHS = 5", "EPOCHS = 1")
    (tmp_path / "plain.py").write_text(script)
    start = ("-m", "harness", "launch", "--nproc-per-node=2", "--")
    alone = ("-m", "harness", "launch", "--nproc-per-node=1", "--")  # where it makes no difference
    with launch(tmp_path, None, command=(*alone, "plain.py")) as run:
        run.succeed()
    with launch(tmp_path, None, command=(*start, "doctor", "--json", "plain.py")) as run:
        assert run.finish() == 0
        found = read(run.output())
    assert one(found, "resume").found.startswith("step 100, every byte verified")
    assert "2 ranks on 1 machine" in one(found, "ranks").found
    assert len(list((tmp_path / "runs/rings/attempts").iterdir())) == 1
    (tmp_path / "plain.py").write_text(script.replace("nn.Linear(2, 256)", "nn.Linear(2, 128)").replace("256, 4", "128, 4"))
    with launch(tmp_path, None, command=(*alone, "doctor", "--json", "plain.py")) as run:
        assert run.finish() == 2
        assert one(read(run.output()), "resume").level == "error"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_grace_that_is_shorter_than_a_save(write, kept_path):
    """By the speed that was measured where nothing was saved yet, by what the last save took where that is known."""
    url = kept_path / "run"
    tight = (f"checkpoint.url={url}", "stop.grace_seconds=0.0001")
    code, found = examined(write(), *tight)
    assert (code, one(found, "grace").level) == (0, "warn")
    assert re.match(
        r"a save will take about [\d.]+ s, but only 0.0001 s are allowed after a stop signal", one(found, "grace").found
    )
    train_here(build, url=url, train={"steps": 2, "global_batch_size": 4}, checkpoint={"every_steps": 1})
    found = examined(write(), *tight)[1]
    assert re.match(
        r"the last save took [\d.]+ s, but only 0.0001 s are allowed after a stop signal", one(found, "grace").found
    )


def test_a_grace_that_the_launcher_does_not_grant(write, monkeypatch):
    """torchrun's SIGKILL would come first."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "20")
    code, found = examined(write())
    assert (code, one(found, "grace").level) == (0, "warn")
    assert (
        "stop.grace_seconds is 25, but torchrun's --shutdown-timeout is 20; the process would be killed first"
        in one(found, "grace").found
    )


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["world.timeout_seconds=0.0001"], 2, "the other ranks wait only 0.0001 s for rank 0"),
        (["world.timeout_seconds=1800"], 0, "the watchdog ends all ranks after 1800 s"),
        (["world.timeout_seconds=1801", "watchdog.timeout_seconds=null"], 0, "that has lost its network"),
    ],
)
def test_timeouts_in_the_wrong_order(write, overrides, code, words):
    """Shorter than a save: no run would come further. Longer than the watchdog's, or than anybody would wait: warnings."""
    found_code, found = examined(write(), *overrides)
    assert (found_code, one(found, "timeouts").level) == (code, "error" if code else "warn")
    assert words in one(found, "timeouts").found


def test_threads_that_nobody_has_set(write, monkeypatch):
    """torchrun would set them, but not always."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    code, found = examined(write())
    assert (code, one(found, "threads").level) == (0, "warn")


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(write):
    """As train says it."""
    code, found = examined(write(), "world.device=cuda")
    assert (code, one(found, "device").level) == (2, "error")
    assert "expected a CUDA device for each of 1 local ranks, found 0" in one(found, "device").found


def test_too_few_gpus_mean_the_cpu(write, monkeypatch):
    """``auto`` takes the CPU for all where one local rank would go without: not what one wants from a machine with GPUs."""
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(device, "count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    code, found = examined(write())
    assert (code, one(found, "device").level) == (0, "warn")
    assert "1 CUDA devices for 2 processes: all will train on the CPU" in one(found, "device").found


def test_samples_that_cannot_be_fetched(write):
    """What the data set says, and exit code 2."""
    code, found = examined(write(task=f"{__file__}:missing_samples"))
    assert (code, one(found, "batch").level) == (2, "error")
    assert re.match(r"FileNotFoundError: sample-\d.png", one(found, "batch").found)


def test_processes_that_die_of_the_signal_that_stops_the_run(tmp_path):
    """A data set that takes the workers' shield away: the trainer would lose them before it has saved. Of the processes that
    the task has started, one that nobody has shielded is named; one in a session of its own and one that ignores SIGTERM are
    not."""
    path = written(tmp_path, task=f"{__file__}:vulnerable", data={"workers": 1})
    with launch(tmp_path, None, command=("-m", "harness", "doctor", path, "--json")) as run:
        assert run.finish() == 2
        found = read(run.output())
    assert one(found, "workers").level == "error"
    assert one(found, "workers").found.startswith("1 of them died of it (")
    assert one(found, "processes").level == "warn"
    assert re.fullmatch(r"\d+ \(sleep 71\) would be killed by the stop signal, .*", one(found, "processes").found)


@needs_namespaces
def test_shared_memory_that_is_too_small(tmp_path):
    """As in a container: what the workers would have in flight does not fit, and they do die of it."""
    path = written(tmp_path, task=f"{__file__}:large_samples", data={"workers": 2})
    script = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "harness", "doctor", path, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    found = read(done.stdout)
    assert done.returncode == 2
    assert one(found, "memory").level == "error"
    assert re.match(r"16.8 MB are needed, 4.2 MB are free", one(found, "memory").found)
    assert one(found, "workers").level == "error"


# --- the ranks -------------------------------------------------------------------------------------------------------

ONE_RANK_IS_OTHERWISE = """#!/bin/sh
if [ "$RANK" = 1 ]; then {otherwise}; fi
exec {python} -m harness doctor "$@"
"""


def with_an_odd_rank(tmp_path: Path, otherwise: str, *arguments: str, max_restarts: int = 0):
    """torchrun with two ranks, of which the second does something else first."""
    script = tmp_path / "odd.sh"
    script.write_text(ONE_RANK_IS_OTHERWISE.format(otherwise=otherwise, python=sys.executable))
    script.chmod(0o755)
    command = ("--no-python", str(script), *arguments, "--json")
    return launch(tmp_path, None, ranks=2, max_restarts=max_restarts, command=command)


@pytest.mark.torchrun
def test_ranks_with_other_code(tmp_path):
    """Another harness on one rank is named, with the rank, and nothing more is tried with it."""
    other = tmp_path / "other"
    shutil.copytree(Path(package.__file__).parent, other / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "harness" / "metrics.py").open("a") as file:
        file.write("# edited on this machine only\n")
    with with_an_odd_rank(tmp_path, f"export PYTHONPATH={other}", written(tmp_path)) as run:
        assert run.finish() == 1, "torchrun's"
        found = read(run.output())
        assert re.search(r"exitcode  : 2 ", run.output())
        assert "Traceback" not in run.output().partition("ChildFailedError")[0].partition("torch/distributed")[0]
    finding = only(found, "versions", "error")
    assert re.match(
        rf"harness: {package.__version__} \(code \w{{8}}\) \(rank 0 on \S+\), .*\(rank 1 on \S+\)", finding.found
    )
    assert "storage" not in found


def a_mistake(world, place: Path):
    """Rank 1 has a configuration that it cannot read."""
    return examined_by(world, place, **({"seeed": 1} if world.rank else {}))


def a_task_that_fails(world, place: Path):
    """Rank 1 lacks the data."""
    return examined_by(world, place, task=f"{__file__}:broken_on_rank_1")


def a_directory_that_one_cannot_read(world, place: Path):
    """Rank 1 is another user than rank 0."""
    if world.rank == 0:
        os.chmod(place, 0o700)
    world.all_gather(None)
    if world.rank and os.geteuid() == 0:
        os.seteuid(65534)
    try:
        return examined_by(world, place)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def examined_by(world, place: Path, **sections):
    """The exit code, and what was found, as every rank has it in the end."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chmod(directory, 0o755)
    path = written(directory, **{"checkpoint": {"url": str(place / "run"), "every_steps": 2}, **sections})
    config, found = _read(path, ())
    found = _examine(world, world.all_gather(f"host-{world.rank}"), config, named("configuration", found))
    shutil.rmtree(directory)
    return exit_code(found), [asdict(finding) for finding in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return played(__file__, tmp_path_factory.mktemp("ranks"), 2)


def of_all(results: list) -> tuple[int, dict[str, list[Finding]]]:
    """What all ranks have found, which each of them knows."""
    first, second = returned(results)
    assert first == second
    return first[0], by_check([Finding(**fields) for fields in first[1]])


@pytest.mark.torchrun
def test_a_mistake_on_one_rank(results):
    """All end, none hangs, the rank is named, and the exit code is that of all."""
    code, found = of_all(results["a_mistake"])
    finding = only(found, "configuration", "error")
    assert (code, finding.where) == (2, "rank 1 on host-1")
    assert "seeed: unknown key" in finding.found


@pytest.mark.torchrun
def test_a_task_that_fails_on_one_rank(results):
    """The same, and everything else is looked at."""
    code, found = of_all(results["a_task_that_fails"])
    assert (code, one(found, "task").where) == (2, "rank 1 on host-1")
    assert one(found, "storage").level == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.torchrun
def test_a_directory_that_one_rank_cannot_read(results):
    """Rank 0 can, which is why a test on rank 0 alone would not do."""
    _, found = of_all(results["a_directory_that_one_cannot_read"])
    finding = one(found, "storage")
    assert (finding.exit_code, finding.level) == (74, "error")
    assert re.search(r"Permission denied \(rank 1 on host-1\)$", finding.found)


@pytest.mark.torchrun
def test_a_rank_that_dies(tmp_path):
    """The others say what they have found until then; torchrun's restarts do not make it all be said again."""
    path = written(tmp_path, task=f"{__file__}:deadly")
    with launch(tmp_path, None, ranks=2, max_restarts=1, command=("-m", "harness", "doctor", path, "--json")) as run:
        assert run.finish() == 1
        found = read(run.output())
        assert run.output().count('"check": "configuration"') == 1
        assert "harness: the doctor has reported already" in run.output()
    assert found["ranks"][-1].level == "error"
    assert "the doctor could not finish" in found["ranks"][-1].advice


@pytest.mark.torchrun
def test_the_launchs_exit_code_is_the_doctors(tmp_path):
    """Under harness launch the code comes through; everything is said once, for people, without torchrun's report."""
    path = written(tmp_path, checkpoint={"url": "/dev/null/run", "every_steps": 2})
    command = ("-m", "harness", "launch", "--nproc-per-node=2", "--", "doctor", path)
    with launch(tmp_path, None, command=command) as run:
        assert run.finish() == 74
        lines = run.output().splitlines()
    assert all(re.match("ok     |error  ", line) for line in lines)
    (problem,) = [line for line in lines if line.startswith("error")]
    assert re.match(
        r"error  storage        wrote 8 MiB to /dev/null/run, .*: Not a directory; its owner has to let user", problem
    )


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What is found by two ranks on two machines that have little in common: each has a disk of its own, a name, a clock.

    The machines are namespaces; what is mounted, named and set in one is not in the other.
    """
    directory = tmp_path_factory.mktemp("strangers")
    (directory / "disk").mkdir()
    checkpoint = {"url": str(directory / "disk" / "run"), "every_steps": 2}
    path = written(directory, task=f"{__file__}:random_by_rank", checkpoint=checkpoint)
    torchrun = (
        f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=0 --rdzv-backend=c10d "
        "--local-addr=127.0.0.1 --rdzv-endpoint=127.0.0.1:$PORT --rdzv-id=strangers"
    )
    odd = f"""
        export OMP_NUM_THREADS=2 {clock(90)}
        exec {sys.executable} -m harness doctor {path} --json train.steps=5"""
    (directory / "odd.sh").write_text(odd)
    script = f"""
        {torchrun} -m harness doctor {path} --json &
        unshare --mount --uts sh -c 'hostname elsewhere; mount -t tmpfs none disk; exec {torchrun} --no-python sh odd.sh' &
        wait"""
    (directory / "both.sh").write_text(script)
    port = str(servers._free_port())
    command = ("-c", "import os; os.execv('/bin/sh', ['sh', 'both.sh'])")
    with launch(directory, None, command=command, env={"PORT": port, "GLOO_SOCKET_IFNAME": "lo"}) as run:
        run.finish(120)
        return read(run.output())


def clock(ahead_seconds: int) -> str:
    """What a shell exports to give a process a clock of its own; nothing where that cannot be had."""
    if shutil.which("faketime") is None:
        return ""
    done = subprocess.run(["faketime", "-f", "+0s", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=True)
    return f"FAKETIME={ahead_seconds:+}s LD_PRELOAD='{done.stdout.strip()}'"


needs_faketime = pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")


@needs_namespaces
@pytest.mark.torchrun
def test_a_disk_of_each_machines_own(strangers):
    """What rank 0 wrote is not there for the other one: an error, whatever the file system is called."""
    finding = one(strangers, "storage")
    assert (finding.level, finding.exit_code) == ("error", 2)
    assert re.search(r"what rank 0 on \S+ wrote: it is not there \(rank 1 on elsewhere\)", finding.found) or re.search(
        r"what rank 0 on elsewhere wrote: it is not there \(rank 1 on ", finding.found
    )


@needs_faketime
@needs_namespaces
@pytest.mark.torchrun
def test_a_clock_of_each_machines_own(strangers):
    """It is off by what it is off, to some milliseconds."""
    finding = one(strangers, "clocks")
    assert finding.level == "error"
    by = re.search(r"is (\d+\.\d+) s \(± (\d+\.\d+)\) (ahead of|behind) that of", finding.found)
    assert by, finding.found
    assert abs(float(by[1]) - 90) <= float(by[2]) + 0.001
    assert float(by[2]) < 1


@needs_namespaces
@pytest.mark.torchrun
def test_a_configuration_of_each_machines_own(strangers):
    """The keys that differ are named, with both values and whose they are, and so is a model that is built at random; the
    threads only as a warning."""
    wrong = {finding.found.partition(":")[0]: finding for finding in strangers["versions"]}
    assert {key: finding.level for key, finding in wrong.items()} == {
        "model": "error",
        "train.steps": "error",
        "threads": "warn",
    }
    assert re.search(r"5 \(rank \d on elsewhere\)", wrong["train.steps"].found)


@needs_namespaces
@pytest.mark.torchrun
def test_torchruns_own_defaults(strangers):
    """No restarts, and a store in which a machine that comes back finds old addresses."""
    assert (one(strangers, "restarts").level, one(strangers, "rendezvous").level) == ("warn", "warn")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in one(strangers, "rendezvous").advice


@needs_faketime
@pytest.mark.torchrun
def test_a_machine_that_torchrun_takes_for_dead(tmp_path):
    """A clock 20 s behind: torchrun begins with one machine of two, and says nothing. The doctor does."""
    path = written(tmp_path)
    torchrun = (
        f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=0 --rdzv-backend=c10d "
        f"--local-addr=127.0.0.1 --rdzv-endpoint=127.0.0.1:$PORT --rdzv-id=late -m harness doctor {path} --json"
    )
    script = f"""
        {torchrun} > first.txt &
        first=$!
        ( export {clock(-20)}; exec {torchrun} > second.txt ) &
        wait $first"""
    (tmp_path / "both.sh").write_text(script)
    port = str(servers._free_port())
    command = ("-c", "import os; os.execv('/bin/sh', ['sh', 'both.sh'])")
    said = tmp_path / "first.txt"
    said.touch()
    with launch(tmp_path, None, command=command, env={"PORT": port}):
        wait_until(lambda: "\n]" in said.read_text(), "the first machine's doctor")
        finding = one(read(said.read_text()), "nodes")
    assert (finding.level, finding.found) == ("error", "1 of 2 came, and torchrun started without the others")


def test_every_key_that_is_advised_exists():
    """What the doctor says of keys of the configuration is about those that there are."""
    sections = {
        name: field.annotation for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    named = set()
    for path in (Path(package.__file__).parent / "doctor").glob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        for text in texts:
            named |= set(re.findall(rf"\b({'|'.join(sections)})\.([a-z_]+)", text)) if isinstance(text, str) else set()
    assert len(named) > 8
    for section, key in named:
        assert key in sections[section].model_fields, f"{section}.{key}"


if __name__ == "__main__":
    play([a_mistake, a_task_that_fails, a_directory_that_one_cannot_read], Path(sys.argv[1]))
