"""One run on three hosts, and what happens to hosts: each test leaves it training for the next, and its end is exact.

The hosts are network namespaces, the launchers ``launch/multinode.sh``, the checkpoints lie on a disk that all hosts see.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import Task
from harness.data.schedule import Cursor, Schedule
from tests.support import slow_task
from tests.support.cluster import Impatient, newest, path_with_harness, records, train_undisturbed, wait_until
from tests.support.hosts import Host, hosts, what_is_missing
from tests.support.opens import opens
from tests.support.slow_task import MOST_STEPS

pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "-")]

LAUNCH = Path(__file__).parents[2] / "launch"
FINAL = {2, 65, 66, 70, 77}
BATCH = 6
SAVE_EVERY_STEPS = 40
TENSORS = "*.safetensors"


def build(trained: str | None = None, **args) -> Task:
    """The task of the stops, which writes down what each step trains."""
    task = slow_task.build(**args)
    if trained is None:
        return task
    parameter, loss = next(task.model.parameters()), task.loss

    def noting_loss(model: nn.Module, batch) -> torch.Tensor:
        step = int(task.optimizer.state.get(parameter, {}).get("step", 0))
        indices = ((batch[0].flatten() + 1) * 31.5).round().int().tolist()
        with open(trained, "a") as file:  # one write: the ranks share the file
            file.write(json.dumps([step, indices]) + "\n")
        return loss(model, batch)

    return dataclasses.replace(task, loss=noting_loss)


def config(url: Path, log: Path) -> dict:
    """Steps of some milliseconds, and a save now and then."""
    return {
        "task": f"{__file__}:build",
        "args": {"pause_seconds": 0.004},
        "train": {"steps": MOST_STEPS, "global_batch_size": BATCH},
        "checkpoint": {"url": str(url), "every_steps": SAVE_EVERY_STEPS, "keep_last": 3},
        "log": {"every_steps": 1, "jsonl": str(log)},
        "world": {"timeout_seconds": 12},
        "stop": {"grace_seconds": 8},
    }


class Cluster:
    """Three hosts that train, one to spare, and one that only keeps the rendezvous."""

    def __init__(self, place: Path, made: dict[str, Host]) -> None:
        place.mkdir(exist_ok=True)
        self.place, self.hosts = place, made
        self.url, self.log, self.path = place / "run", place / "log.jsonl", place / "config.json"
        self.path.write_text(json.dumps(config(self.url, self.log)))
        self.path_variable = path_with_harness(place)
        self.training: dict[str, subprocess.Popen[bytes]] = {}

    def join(
        self, *names: str, job: str = "1", nodes: str = "3", head: str | None = None, overrides: tuple[str, ...] = ()
    ) -> None:
        """Starts the launcher on some hosts."""
        where = {"HEAD": head} if head else {"RENDEZVOUS": "store:29400"}
        env = {
            **where,
            "JOB": job,
            "NODES": nodes,
            "NPROC_PER_NODE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PATH": self.path_variable,
        }
        for name in names:
            command = ["bash", str(LAUNCH / "multinode.sh"), str(self.path), *overrides]
            self.training[name] = self.hosts[name].start(*command, env=env)

    def events(self, name: str) -> list[dict]:
        return records(self.log, name)

    def position(self) -> tuple[str, int]:
        """The attempt and the step that trained last."""
        last = (self.events("train") or [{"attempt": "", "step": 0}])[-1]
        return last["attempt"], last["step"]

    def trains_between_saves(self) -> None:
        """Waits until no save is near: the checkpoint of a boundary, if it is there, is as good as what is kept of it."""
        resumed = max((record["step"] for record in self.events("resume")), default=0)
        quiet = range(SAVE_EVERY_STEPS // 8, SAVE_EVERY_STEPS // 2)
        self.wait(lambda: (at := self.position()[1]) > resumed + quiet[0] and at % SAVE_EVERY_STEPS in quiet, "a quiet step")

    def trains_on(self, attempt: str, began: float, ranks: int = 3) -> float:
        """Waits for a step of a later attempt than this one; the seconds that it took."""
        self.wait(lambda: self.position()[0] > attempt, "the next attempt")
        (resumed,) = [record for record in self.events("resume") if record["attempt"] == self.position()[0]]
        assert resumed["world_size"] == ranks
        return time.monotonic() - began

    def ends(self, *names: str) -> list[int]:
        """The exit codes of these hosts' launchers, which are waited for."""
        processes = [self.training.pop(name) for name in names]
        for name, process in zip(names, processes, strict=True):
            self.wait(lambda p=process: p.poll() is not None, f"the end on {name}")
        return [process.returncode for process in processes]

    def wait(self, found: Callable[[], bool], what: str) -> None:
        try:
            wait_until(found, what)
        except Impatient as error:
            raise Impatient(f"{error}\n{self.output()}") from None

    def output(self, most_characters: int = 1500) -> str:
        """What each host's launchers have said last."""
        said = {name: host.output_path.read_text()[-most_characters:] for name, host in self.hosts.items()}
        return "\n".join(f"== {name}\n{text}" for name, text in said.items())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    place = tmp_path_factory.mktemp("hosts")
    with hosts(["store", "a", "b", "c", "spare"]) as made:
        made["store"].start(sys.executable, str(LAUNCH / "rendezvous.py"), env={})
        cluster = Cluster(place, made)
        cluster.join("a", "b", "c")
        cluster.wait(lambda: cluster.position()[1] > 20, "the first steps")
        yield cluster


def test_a_worker_is_killed(cluster):
    """All ranks on all hosts start again."""
    attempt, began = cluster.position()[0], time.monotonic()
    os.kill(cluster.hosts["b"].worker(), signal.SIGKILL)
    print("seconds to the next step:", cluster.trains_on(attempt, began))


def test_a_cable_that_is_put_back_in_time(cluster):
    """The ranks wait for each other, and go on without a restart."""
    attempt, _ = cluster.position()
    cluster.hosts["c"].cut()
    time.sleep(3)
    _, step = cluster.position()
    cluster.hosts["c"].heal()
    cluster.wait(lambda: cluster.position()[1] > step + 5, "steps after the cut")
    assert cluster.position()[0] == attempt


def test_a_launcher_is_killed(cluster):
    """Its rank ends with it; the others wait until the host is there again."""
    attempt, began = cluster.position()[0], time.monotonic()
    cluster.training["c"].kill()
    wait_until(lambda: not cluster.hosts["c"].pids(), "the end of what it had started", 20)
    cluster.join("c")
    print("seconds to the next step:", cluster.trains_on(attempt, began))


def test_a_host_is_lost_and_a_spare_takes_its_place(cluster):
    """Whichever host it is, the one with rank 0 included. At most one step is lost, since the others have kept the last one,
    and give it to the spare. No tensor is read from the store."""
    cluster.trains_between_saves()
    attempt, began = cluster.position()[0], time.monotonic()
    with opens(cluster.url, TENSORS) as opened:
        cluster.hosts["a"].lose()
        cluster.training.pop("a")
        assert not any(cluster.hosts["spare"].memory.iterdir())
        cluster.join("spare")
        print("seconds to the next step:", cluster.trains_on(attempt, began))
    finished = max(record["step"] for record in cluster.events("train") if record["attempt"] == attempt)
    resumed, kept = cluster.events("resume")[-1], cluster.events("kept")[-1]
    print("steps lost:", finished - resumed["step"])
    assert (kept["attempt"], kept["host"] in ("b", "c")) == (resumed["attempt"], True)
    assert resumed["step"] >= finished - 1
    assert not opened


@pytest.mark.soak
def test_a_cable_that_stays_out(cluster):
    """The host that is cut off gives itself up and leaves nothing behind; when it comes back, the run goes on."""
    attempt, began = cluster.position()[0], time.monotonic()
    host = cluster.hosts["b"]
    host.cut()
    assert cluster.ends("b")[0] not in FINAL | {0}
    wait_until(lambda: not host.pids(), "the end of everything on the host", 30)
    host.heal()
    cluster.join("b")
    print("seconds to the next step:", cluster.trains_on(attempt, began))


def test_a_stop_on_one_host_stops_all(cluster):
    """Every launcher asks to be started again, and the step at which they stopped is saved."""
    cluster.training["b"].terminate()
    assert cluster.ends("b", "c", "spare") == [75, 75, 75]
    said = re.findall(r"asked to stop \(.*\) at step (\d+), which is saved", cluster.output(most_characters=1 << 30))
    assert [int(step) for step in said] == [newest(cluster.url)["step"]]


def test_the_host_of_the_rendezvous_is_lost(cluster, tmp_path):
    """Without a host of its own for that, the job ends everywhere, with a code that asks for a new start, which goes on; the
    end has the bits of a run on one machine that nobody disturbed."""
    stopped_at, attempt = newest(cluster.url)["step"], cluster.position()[0]
    with opens(cluster.url, TENSORS) as opened:
        cluster.join("a", "b", "c", job="2", head="a")
        cluster.trains_on(attempt, time.monotonic())
    assert cluster.events("resume")[-1]["step"] == stopped_at
    assert opened, "after a stop nothing is kept"
    cluster.hosts["a"].lose()
    cluster.training.pop("a")
    assert not FINAL & set(cluster.ends("b", "c"))
    end = newest(cluster.url)["step"] + 30
    cluster.join("a", "b", "c", job="3", head="a", overrides=(f"train.steps={end}",))
    assert cluster.ends("a", "b", "c") == [0, 0, 0]
    plain = {
        **config(tmp_path / "run", tmp_path / "log.jsonl"),
        "args": {},
        "train": {"steps": end, "global_batch_size": BATCH},
    }
    train_undisturbed(tmp_path, plain, ranks=3, seconds=300)
    assert newest(cluster.url)["digests"] == newest(tmp_path / "run")["digests"]


@pytest.mark.soak
def test_fewer_hosts_train_the_same_batches(cluster):
    """With ``NODES=2:3`` a run goes on without a lost host, with the same samples in the same global batches."""
    elastic = Cluster(cluster.place / "elastic", cluster.hosts)
    trained = elastic.place / "trained.jsonl"
    elastic.join("a", "b", "c", job="4", nodes="2:3", overrides=(f"args.trained={trained}",))
    elastic.wait(lambda: elastic.position()[1] > 20, "the first steps")
    attempt, began = elastic.position()[0], time.monotonic()
    elastic.hosts["c"].lose()
    print("seconds to the next step:", elastic.trains_on(attempt, began, ranks=2))
    resumed_at = elastic.events("resume")[-1]["step"]
    elastic.wait(lambda: elastic.position()[1] > resumed_at + 30, "steps of two ranks")
    elastic.training["a"].terminate()
    assert elastic.ends("a", "b") == [75, 75]
    found: dict[int, set[int]] = {}
    for step, indices in map(json.loads, trained.read_text().splitlines()):
        found.setdefault(step, set()).update(indices)
    plan = Schedule(64, 0, BATCH, None).steps(Cursor(), 0, 1)
    expected = [set(next(plan)[0].indices) for _ in range(newest(elastic.url)["step"])]
    assert len(expected) > resumed_at + 30
    assert [found[step] for step in range(len(expected))] == expected
