"""``launch/slurm.sbatch`` in a real Slurm: what ends a job there, and how it comes back."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.cluster import newest, path_with_harness, records, train_undisturbed, wait_until
from tests.support.slow_task import TASK
from tests.support.slurm import Slurm, slurm, what_is_missing

pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "-")]

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
STEPS = 900  # some forty seconds: Slurm looks every thirty whether the time of a job is over
OPTIONS = ("--export=ALL,NPROC_PER_NODE=2", "--cpus-per-task=4")


def config(place: Path) -> dict:
    return {
        "task": TASK,
        "args": {"pause_seconds": 0.04},
        "train": {"steps": STEPS, "global_batch_size": 6},
        "checkpoint": {"url": str(place / "run"), "every_steps": 50, "keep_last": 2},
        "log": {"every_steps": 1, "jsonl": str(place / "log.jsonl")},
    }


class Job:
    """A training job, as a user hands it in."""

    def __init__(self, cluster: Slurm, place: Path, *options: str, overrides: tuple[str, ...] = ()) -> None:
        place.mkdir()
        self.cluster, self.place = cluster, place
        (place / "config.yaml").write_text(json.dumps(config(place)))
        self.number = cluster.submit(
            SCRIPT, str(place / "config.yaml"), *overrides, options=(*OPTIONS, *options), log=place / "output.txt"
        )

    def events(self, name: str) -> list[dict]:
        return records(self.place / "log.jsonl", name)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return any(record["step"] >= step for record in self.events("train"))

        wait_until(reached, f"step {step} of {self.cluster.job(self.number)}\n{self.output()}", 120)

    def stops(self) -> list[int]:
        """The steps at which it was stopped and saved."""
        return [int(step) for step in re.findall(r"asked to stop \(.*\) at step (\d+), which is saved", self.output())]

    def output(self) -> str:
        path = self.place / "output.txt"
        return path.read_text() if path.exists() else ""

    def end(self) -> dict[str, str]:
        return self.cluster.wait(self.number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=240)

    def digests(self) -> dict[str, str]:
        found = newest(self.place / "run")
        assert found["step"] == STEPS
        return found["digests"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Four nodes, on which ``harness`` is the one of this interpreter."""
    with slurm(4, path_with_harness(tmp_path_factory.mktemp("bin"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """Several jobs side by side, each with a fate of its own; they mostly wait."""
    place = tmp_path_factory.mktemp("jobs")
    jobs = {
        "preempted": Job(cluster, place / "preempted", "--nodelist=n1"),
        "limited": Job(cluster, place / "limited", "--nodelist=n2"),
        "lost": Job(cluster, place / "lost", "--exclude=n1,n2"),
    }
    jobs["preempted"].wait_for_step(60)
    (place / "urgent.sh").write_text("#!/bin/sh\nsleep 1\n")
    cluster.submit(place / "urgent.sh", options=("--partition=high", "--nodelist=n1", "--exclusive"))
    jobs["limited"].wait_for_step(60)
    cluster.call("scontrol", "update", f"JobId={jobs['limited'].number}", "TimeLimit=1")
    jobs["lost"].wait_for_step(60)
    cluster.lose(cluster.job(jobs["lost"].number)["NodeList"])
    wait_until(jobs["limited"].stops, "the notice", 150)
    cluster.call("scontrol", "update", f"JobId={jobs['limited'].number}", "TimeLimit=60")  # for the rest of it
    return jobs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digests of the same run outside of Slurm."""
    place = tmp_path_factory.mktemp("plain")
    train_undisturbed(place, {**config(place), "args": {}}, ranks=2, seconds=300)
    return newest(place / "run")["digests"]


@pytest.mark.parametrize("fate", ["preempted", "limited"])
def test_a_notice_stops_saves_and_requeues(jobs, undisturbed, fate):
    """A job of a higher partition, or the end of the time: all ranks stop at one step, which is saved; the job is requeued,
    goes on from exactly there, and completes with the bits of a run that nobody disturbed."""
    job = jobs[fate]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.output()
    (stopped_at,) = job.stops()
    assert [record["step"] for record in job.events("resume")] == [stopped_at]
    steps = [record["step"] for record in job.events("train")]
    assert steps == list(range(1, STEPS + 1)), "each step was trained once"
    assert job.digests() == undisturbed


def test_a_lost_node(jobs, undisturbed):
    """Slurm notices that the node is gone and starts the job on another, where it goes on from its newest checkpoint."""
    job = jobs["lost"]
    end = job.end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.output()
    (resumed,) = job.events("resume")
    assert resumed["step"] >= 50
    assert job.stops() == []
    assert job.digests() == undisturbed


def test_a_mistake_is_not_requeued(cluster, tmp_path):
    """The job fails at once with the code that says so."""
    job = Job(cluster, tmp_path / "mistake", "--nodelist=n1", overrides=("seeed=1",))
    end = job.end()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), job.output()


def test_a_cancelled_job_is_saved_and_does_not_come_back(cluster, tmp_path):
    """scancel stops it as a preemption does, and for good."""
    job = Job(cluster, tmp_path / "cancelled", "--nodelist=n2")
    job.wait_for_step(10)
    cluster.call("scancel", job.number)
    assert job.end()["JobState"] == "CANCELLED"
    wait_until(job.stops, f"the stop\n{job.output()}", 30)
    assert newest(job.place / "run")["step"] == job.stops()[0]
    assert cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.soak
def test_the_doctor_asks_slurm(cluster, tmp_path):
    """Within a job it compares the grace with what the cluster's configuration grants."""
    (tmp_path / "config.yaml").write_text(json.dumps({**config(tmp_path), "args": {}}))
    script = tmp_path / "doctor.sh"
    script.write_text(f"#!/bin/sh\nharness doctor {tmp_path}/config.yaml stop.grace_seconds=$GRACE\n")
    for grace_seconds in (15, 25):
        log = tmp_path / f"{grace_seconds}.txt"
        number = cluster.submit(script, options=(f"--export=ALL,GRACE={grace_seconds}",), log=log)
        assert cluster.wait(number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()
    assert re.search(
        r"^ok +grace .*: 15 s; Slurm's KillWait 20; GraceTime of Slurm's partition low 60;", *said(tmp_path / "15.txt")
    )
    assert re.search(
        r"^warn +grace .*: stop.grace_seconds is 25, but Slurm's KillWait is 20; the process would be killed first;",
        *said(tmp_path / "25.txt"),
    )


def said(log: Path) -> tuple[str, int]:
    return log.read_text(), re.MULTILINE


def test_ranks_that_srun_would_start(cluster, tmp_path):
    """A batch script of several tasks may train in one plain process; a step of several tasks is refused, task by task."""
    (tmp_path / "config.yaml").write_text(json.dumps(config(tmp_path)))
    ask = f"{sys.executable} -c 'from harness.runtime.environment import ranks; print(ranks())'"
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\n{ask}\nsrun --ntasks=2 harness train {tmp_path}/config.yaml\nsrun --ntasks=1 {ask}\n")
    number = cluster.submit(script, options=("--ntasks=2", "--nodelist=n1"), log=tmp_path / "output.txt")
    assert cluster.wait(number, "COMPLETED", "FAILED", seconds=120)["JobState"] == "COMPLETED"
    lines = [line for line in (tmp_path / "output.txt").read_text().splitlines() if not line.startswith("srun:")]
    assert (lines[0], lines[-1]) == ("None", "None"), lines
    assert len(lines) == 4
    for line in lines[1:3]:
        assert line.startswith("harness: environment: srun has started 2 processes (SLURM_STEP_NUM_TASKS=2)")
    assert not (tmp_path / "run").exists()
