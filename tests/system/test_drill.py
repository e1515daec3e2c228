"""``harness drill`` of real jobs, which die for real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import PATIENCE_SECONDS, environment, wait_until

MISTAKES = Path(__file__).with_name("mistakes.py")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
GPT = Path(__file__).parents[2] / "configs" / "gpt.yaml"
NAMES = {
    "a batch that is fetched before the loop": "skips a batch",
    "seeding anew at each start": "seeds a generator that Run has restored",
    "code that runs only at the first start": "only at the first start sets model.3.p",
    "a sampler without a state": "the data starts over",
    "a loader that is not in the state": "the data starts over",
    "a scheduler that is not in the state": "scheduler.",
    "data that is no function of the sample": "the data of a sample is another one",
    "a BatchNorm that is changed by hand": "model.1.momentum starts over",
    "a counter of the script's own": "main: count starts over",
    "weights that the state has not": "shadow",
    "an evaluation that draws random numbers": "an evaluation before step",
}


def drill(folder: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a drill to its end, in a folder that also has its temporary files."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "harness", "drill", *map(str, arguments)],
        cwd=folder,
        env={**environment(str(folder)), "TMPDIR": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A quick drill of a script with a counter of its own: what it said, and its page."""
    folder = tmp_path_factory.mktemp("drill")
    done = drill(folder, "--quick", "--json", "--page=page.html", "--", MISTAKES, "a counter of the script's own")
    assert done.returncode == 79, done.stdout + done.stderr
    return folder, json.loads(done.stdout)


def test_a_mistake_is_found_and_named(mistaken):
    """The script survives, and a counter that starts over makes other steps of it; the control shows."""
    _, found = mistaken
    assert (found["survives"], found["exact"], found["could_tell"]) == (True, False, True)
    *tried, control = found["results"]
    assert [each["outcome"] for each in tried] == ["different"] * 3
    assert all("main: count starts over" in each["cause"] for each in tried)
    assert control["trial"]["leaves_out"] == "random"
    first = tried[0]["deaths"][0]
    assert (first["step"], first["resumed_from"]) == (13, 10)
    assert first["seconds_to_next_step"] > 0
    assert found["costs"]["save_seconds"] > 0


def test_it_leaves_nothing_behind(mistaken):
    folder, _ = mistaken
    assert [path.name for path in folder.iterdir()] == ["page.html"]


def test_its_page_in_a_browser(mistaken, opened):
    """A row for each trial, both curves, and nothing from elsewhere."""
    folder, found = mistaken
    page, heard = opened(folder / "page.html")
    assert heard == [(folder / "page.html").as_uri()]
    assert page.locator("#trials tr").count() == 1 + len(found["results"])
    assert "main: count starts over" in page.locator("#trials").inner_text()
    assert page.locator("svg").count() == 1


def test_a_job_that_fails_by_itself(tmp_path):
    """It is said so, with its last words; and what is no job at all is a mistake of the command line."""
    (tmp_path / "job.py").write_text("raise SystemExit('no data')")
    done = drill(tmp_path, "--", "job.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert "harness: the job ended with exit code 1 at step 0:\nharness:     no data\n" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.py"]


@pytest.mark.parametrize("arguments", [["doctor", "a.yaml"], ["--steps=12", "--", "a.py"], ["--", "missing.py"], []])
def test_a_command_line_that_is_wrong(tmp_path, arguments):
    done = drill(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("harness: harness ")


@pytest.mark.soak
@pytest.mark.torchrun
def test_a_sharded_model(tmp_path):
    """Each rank compares what it has of each tensor."""
    done = drill(tmp_path, "--quick", "--json", "--nproc-per-node=2", "--", EXAMPLES / "fsdp.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["survives"], found["exact"], found["could_tell"]) == (True, True, True)


@pytest.mark.soak
def test_a_job_that_hangs(tmp_path):
    """It is killed, and said so."""
    (tmp_path / "job.py").write_text("import time; time.sleep(600)")
    done = drill(tmp_path, "--patience=3", "--", "job.py")
    assert done.returncode == 1
    assert "the job hangs: nothing has happened for 3 s (--patience) after step 0" in done.stderr


@pytest.mark.soak
def test_a_full_disk(tmp_path):
    """A real one, of a megabyte: that is not the job's fault, and it is said so in a line."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs leave to mount a tmpfs")
    try:
        done = drill(tmp_path, "--quick", "--", MISTAKES, "none", TMPDIR=str(small))
        left = [*small.iterdir()]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 74
    assert "no room left in" in done.stderr or "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert left == []


def test_what_a_killed_drill_has_left_goes_with_the_next(tmp_path):
    """A folder of a process that is no more; not one of a process that is alive."""
    gone, alive = tmp_path / "harness-drill-999999999-a", tmp_path / f"harness-drill-{os.getpid()}-a"
    for folder in (gone, alive):
        folder.mkdir()
    (tmp_path / "job.py").write_text("raise SystemExit(1)")
    drill(tmp_path, "--", "job.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "job.py"]


def test_an_interrupt_leaves_neither_processes_nor_files(tmp_path):
    """In the middle of a launch."""
    command = [sys.executable, "-m", "harness", "drill", "--", str(MISTAKES), "none"]
    env = {**environment(str(tmp_path)), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: [*tmp_path.glob("harness-drill-*/0/rank-0.jsonl")], "the first steps")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 130
    assert [*tmp_path.iterdir()] == []
    plan = f"HARNESS_DRILL={tmp_path}".encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if os.access(path, os.R_OK) and plan in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# --- the proofs that take long ---------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_is_named(tmp_path, name):
    done = drill(tmp_path, "--quick", "--", MISTAKES, name)
    assert done.returncode == 79, done.stdout + done.stderr
    assert NAMES[name] in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_right_script_passes_the_whole_drill(tmp_path, example):
    done = drill(tmp_path, "--nproc-per-node=2", "--", example)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_a_right_script_passes_as_one_plain_process(tmp_path):
    done = drill(tmp_path, "--", MISTAKES, "none")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_the_task_passes_the_whole_drill(tmp_path):
    done = drill(tmp_path, GPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rank in place of 2" in done.stdout
