"""What the report of a run says: exact numbers from records made by hand, and a real run beside a stopwatch."""

import io
import json
import re
import statistics
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.format import Ancestor, Attempt
from harness.report import numbers, page, units, words
from harness.storage.store import open_store
from harness.telemetry import journal
from tests.support.cluster import Run, harness, launch, read_json

FIRST, SECOND, THIRD = (Attempt(f"{number:06}-aaaaaaaa") for number in (1, 2, 3))


def told(*events) -> list[dict]:
    """Records from (event, time, values) each."""
    return [{"event": event, "time": float(time), **values} for event, time, values in events]


def claim(began: float, started: float) -> dict:
    return {"began": began, "started": datetime.fromtimestamp(started, UTC).isoformat(), "host": "a", "world_size": 2}


def saved(step: int, seconds: float = 4.0, blocked: float = 1.0) -> dict:
    return {"step": step, "bytes": 8_000_000_000, "seconds": seconds, "blocked_seconds": blocked, "retries": 1}


def lineage(*pairs) -> list:
    return [[attempt.id, step] for attempt, step in pairs]


MOMENTS = [(FIRST, 1000, 1010), (SECOND, 1100, 1105), (THIRD, 1150, 1155)]
CLAIMS = {attempt: claim(began, started) for attempt, began, started in MOMENTS}
RECORDS = {
    FIRST: told(
        ("start", 1020, {"step": 0, "lineage": []}),
        ("train", 1030, {"step": 10, "loss": 3.0}),
        ("saving", 1040, {"step": 20}),
        ("train", 1045, {"step": 22, "loss": 2.5}),
        ("save", 1045, saved(20)),
        ("beat", 1070, {"step": 45}),
    ),
    SECOND: told(("error", 1120, {"error": "StoreError: no answer"})),
    THIRD: told(
        ("fallback", 1158, {"attempt": THIRD.id, "directory": "step-20", "why": "it is missing"}),
        ("resume", 1160, {"step": 20, "lineage": lineage((FIRST, 20))}),
        ("train", 1170, {"step": 30, "loss": 2.0}),
        ("saving", 1180, {"step": 40}),
        ("save", 1184, saved(40, blocked=4.0)),
        ("done", 1185, {"step": 40}),
    ),
}


@pytest.fixture
def report() -> numbers.RunReport:
    """Of a run that was killed after step 45, failed to load once, and went on from step 20 to its end."""
    return numbers.of("there", CLAIMS, RECORDS, {}, now=9999)


def test_the_time_is_divided(report):
    """All of it, once: from the first start to the last word."""
    assert [(span.kind, span.begin, span.end) for span in report.spans] == [
        ("starting", 1000, 1010),
        ("loading", 1010, 1020),
        ("training", 1020, 1040),
        ("saving", 1040, 1041),
        ("lost", 1041, 1070),
        ("down", 1070, 1100),
        ("starting", 1100, 1105),
        ("loading", 1105, 1120),
        ("down", 1120, 1150),
        ("starting", 1150, 1155),
        ("loading", 1155, 1160),
        ("training", 1160, 1180),
        ("saving", 1180, 1184),
        ("training", 1184, 1185),
    ]
    assert report.wall_seconds == 185 == sum(report.seconds(kind) for kind in numbers.KINDS)
    assert report.goodput == 41 / 185


def test_the_numbers_are_those_of_the_docs(report):
    """All of them; docs/guides/report.md defines those that are measured."""
    assert report.as_json() == {
        "url": "there",
        "step": 40,
        "ending": "done",
        "attempts": 3,
        "deaths": 2,
        "unclaimed_deaths": 0,
        "wall_seconds": 185,
        "goodput": 41 / 185,
        "training_seconds": 41,
        "saving_seconds": 5,
        "loading_seconds": 30,
        "starting_seconds": 20,
        "lost_seconds": 29,
        "down_seconds": 60,
        "lost_steps": 25,
        "lost_steps_are_exact": False,
        "mean_time_to_recovery_seconds": 90,
        "saves": 2,
        "save_stall_seconds_median": 2.5,
        "save_seconds_median": 4,
        "save_gigabytes_per_second_median": 2,
        "save_retries": 2,
        "failed_saves": 0,
        "skipped_saves": 0,
        "fallbacks": 1,
        "nonfinite_steps": 0,
        "stragglers": 0,
        "kept_states": 0,
        "known_deaths": [
            {
                "attempt": number,
                "ending": ending,
                "last_step": last_step,
                "lost_steps": lost,
                "lost_steps_are_exact": is_exact,
                "kept_by": None,
                "recovery_seconds": seconds,
            }
            for number, ending, last_step, lost, is_exact, seconds in [
                (1, "killed", 45, 25, False, 90),
                (2, "StoreError: no answer", None, 0, True, 40),
            ]
        ],
        "doubts": [],
    }


def test_a_run_that_still_goes_on(report):
    """What it trained since its last save is not lost yet; once nothing was heard of it for a while, it is."""
    records = {**RECORDS, THIRD: [*RECORDS[THIRD][:-1], *told(("beat", 1200, {"step": 55}))]}
    running, dead = (numbers.of("there", CLAIMS, records, {}, now=now) for now in (1250, 1261))
    assert (running.lives[-1].ending, running.step, running.seconds("lost")) == ("running", 55, 29)
    assert (dead.lives[-1].ending, dead.step, dead.seconds("lost")) == ("killed", 40, 29 + 16)


def test_a_run_that_was_asked_to_stop(report):
    """A stop is no death, and what lies between it and the next start is no recovery."""
    stopped = [*RECORDS[FIRST][:-1], *told(("stop", 1046, {"step": 20}))]
    found = numbers.of("there", CLAIMS, {**RECORDS, FIRST: stopped, SECOND: []}, {}, now=9999)
    assert [life.ending for life in found.lives] == ["stopped", "killed", "done"]
    assert found.recoveries_seconds == [1160 - 1105]


def test_a_death_that_a_survivor_has_seen_through():
    """The report says who kept the step, that nothing was lost, and how soon training went on."""
    records = {
        FIRST: RECORDS[FIRST],
        SECOND: told(
            ("kept", 1108, {"step": 47, "rank": 1, "host": "b", "why": "RuntimeError"}),
            ("resume", 1110, {"step": 47, "lineage": lineage((FIRST, 47))}),
            ("done", 1120, {"step": 60}),
        ),
    }
    report = numbers.of("there", {FIRST: CLAIMS[FIRST], SECOND: CLAIMS[SECOND]}, records, {}, now=9999)
    (death,) = report.as_json()["known_deaths"]
    assert (death["last_step"], death["lost_steps"], death["kept_by"]) == (47, 0, {"rank": 1, "host": "b"})
    assert death["recovery_seconds"] == 40
    assert "step 47, 0 lost; training continued from what rank 1 on b kept after 40.0 s" in words.short(report)


def test_what_a_rank_died_of():
    """The error that a rank has left beside the checkpoints is the cause, whatever rank 0 could say about it."""
    found = numbers.of("there", CLAIMS, RECORDS, {SECOND: "ZeroDivisionError: x"}, now=9999)
    assert [life.ending for life in found.lives] == ["killed", "ZeroDivisionError: x", "done"]


def test_attempts_that_overlap():
    """One that was believed dead and was not: its time ends where that of its successor begins."""
    late = [*RECORDS[FIRST], *told(("train", 1130, {"step": 90, "loss": 1.0}))]
    found = numbers.of("there", CLAIMS, {**RECORDS, FIRST: late}, {}, now=9999)
    assert found.lives[0].ended == found.lives[1].began == 1100
    assert found.wall_seconds == 185 == sum(found.seconds(kind) for kind in numbers.KINDS)


# --- clocks ----------------------------------------------------------------------------------------------------------


def uptimes(records: list[dict], *, set_by: float, after: int) -> list[dict]:
    """The records with the uptime beside each time, and a clock that is set after so many of them."""
    began = records[0]["time"]
    return [
        {**each, "time": each["time"] + (set_by if index >= after else 0), "uptime_seconds": each["time"] - began}
        for index, each in enumerate(records)
    ]


def of(claims, records) -> numbers.RunReport:
    return numbers.of("there", claims, records, {}, now=9999)


@pytest.mark.parametrize("set_by", [-900, 900])
def test_a_clock_that_is_set_within_an_attempt(set_by, report):
    """Times within an attempt are those that passed, whatever the clock was set to; the attempts after it follow on."""
    ahead = {attempt: {**claim(began + set_by, started + set_by)} for attempt, began, started in MOMENTS[1:]}
    late = {attempt: [{**each, "time": each["time"] + set_by} for each in RECORDS[attempt]] for attempt in (SECOND, THIRD)}
    found = of({**CLAIMS, **ahead}, {**late, FIRST: uptimes(RECORDS[FIRST], set_by=set_by, after=3)})
    assert found.spans == report.spans
    which = "back" if set_by < 0 else "ahead"
    assert found.doubts == [f"the clock was set {which} by about 15 min 0 s within attempt 1"]
    assert found.doubts[0] in found.as_json()["doubts"]


def test_an_older_journal_has_no_uptimes():
    """A clock that was set back within an attempt makes no time negative, and is told of with what that costs."""
    records = [{**each, "time": each["time"] - (900 if index > 2 else 0)} for index, each in enumerate(RECORDS[FIRST])]
    found = of({FIRST: CLAIMS[FIRST]}, {FIRST: records})
    assert found.doubts == ["the clock was set back by about 14 min 55 s within attempt 1; some of its time may be missing"]
    assert found.wall_seconds == 65, "of 70, 5 until the record after the clock was set"


def test_a_clock_that_is_set_back_between_two_attempts(report):
    """The time between them is unknown, and counts as none; all else is as it was."""
    back = {attempt: claim(began - 900, started - 900) for attempt, began, started in MOMENTS[1:]}
    early = {attempt: [{**each, "time": each["time"] - 900} for each in RECORDS[attempt]] for attempt in (SECOND, THIRD)}
    found = of({**CLAIMS, **back}, {**RECORDS, **early})
    assert found.doubts == ["the clock was set back between attempts 1 and 2: down time unknown"]
    assert found.wall_seconds == 185 - 30
    assert [life.ended - life.began for life in found.lives] == [life.ended - life.began for life in report.lives]


def test_an_attempt_cannot_begin_before_the_save_that_it_stands_on():
    """Also where the clock was set back by less than the attempt before took."""
    back = [{**each, "time": each["time"] - 128} for each in RECORDS[THIRD]]
    found = of({FIRST: CLAIMS[FIRST], THIRD: claim(1022, 1027)}, {FIRST: RECORDS[FIRST], THIRD: back})
    assert found.doubts == ["the clock was set back between attempts 1 and 3: down time unknown"]
    assert found.lives[1].began == found.lives[0].ended == 1070


def test_a_launcher_that_has_waited_for_long():
    """That of a spare machine began long before its ranks were the run: until then the attempt before it was."""
    waited = {**CLAIMS, SECOND: claim(1001, 1105)}
    found = of(waited, RECORDS)
    assert found.lives[0].ended == found.lives[1].began == 1070
    assert (found.doubts, found.wall_seconds) == ([], 185)


def test_clocks_of_two_machines():
    """The attempts were on different hosts: nobody has set a clock."""
    back = {**claim(500, 505), "host": "b"}
    found = of({FIRST: CLAIMS[FIRST], SECOND: back}, {FIRST: RECORDS[FIRST]})
    assert found.doubts[0] == "the clocks of the hosts of attempts 1 and 2 differ: down time unknown"


def test_two_that_overlap_are_told_of():
    """Nobody knows whether both trained, or a clock was set."""
    late = [*RECORDS[FIRST], *told(("train", 1130, {"step": 90, "loss": 1.0}))]
    (doubt,) = of(CLAIMS, {**RECORDS, FIRST: late}).doubts
    assert doubt.startswith("attempts 1 and 2 overlap by 25.0 s: either two trained at once, or the clock was set back")


# --- what cannot be known --------------------------------------------------------------------------------------------


def test_the_steps_lost_to_a_kill_are_not_known(report):
    """Of an attempt that said how it ended the lost steps are known; of one that was killed only the least."""
    assert not report.is_lost_exact
    assert "at least 25 steps lost" in words.short(report)
    assert "steps 0 to 45, at least 25 lost" in words.short(report)
    spoken = {**RECORDS, FIRST: [*RECORDS[FIRST], *told(("error", 1071, {"step": 46, "error": "ValueError: x"}))]}
    found = of(CLAIMS, spoken)
    assert (found.lost_steps, found.is_lost_exact) == (26, True)
    assert "; 26 steps lost" in words.short(found)


def test_starts_that_die_before_they_have_an_attempt_are_counted():
    """torchrun counts them: two restarts before the first claim, three between the second and the third of one launch."""
    about = {"launch": "x", "launcher_began": 900.0}
    claims = {
        FIRST: {**CLAIMS[FIRST], **about, "restarts": 2},
        SECOND: {**CLAIMS[SECOND], **about, "restarts": 3},
        THIRD: {**CLAIMS[THIRD], **about, "restarts": 7},
    }
    found = of(claims, RECORDS)
    assert (found.unclaimed_deaths, found.deaths) == (2 + 3, 2 + 5)
    assert "3 attempts, 7 deaths (5 of them before the ranks had an attempt)" in words.headline(found)
    assert (found.spans[0].kind, found.spans[0].begin, found.spans[0].end) == ("down", 900, 1000)
    again = {**claims, THIRD: {**claims[THIRD], "launch": "y", "restarts": 0}}
    assert of(again, RECORDS).unclaimed_deaths == 2
    rolled_back = {**claims, THIRD: {**claims[THIRD], "restarts": 3}}
    assert of(rolled_back, RECORDS).unclaimed_deaths == 2


def test_a_line_that_was_left_is_not_the_runs():
    """An attempt that got further, from which the run went away again, neither counts nor says how far the run is."""
    records = {
        FIRST: RECORDS[FIRST],
        SECOND: told(
            ("resume", 1106, {"step": 400, "lineage": lineage((FIRST, 400))}),
            ("train", 1108, {"step": 420, "loss": 1.0}),
            ("error", 1110, {"step": 420, "error": "it"}),
        ),
        THIRD: RECORDS[THIRD],
    }
    found = of(CLAIMS, records)
    assert (found.step, [life.is_in_line for life in found.lives]) == (40, [True, False, True])
    assert "steps 400 to 420, 20 lost, abandoned" in words.short(found)
    assert [record["step"] for record in journal.merged(records)] == [10, 30]


def test_a_commit_that_the_kill_left_no_word_of():
    """The checkpoint is there, so its steps are not lost."""
    records = {FIRST: RECORDS[FIRST][:4]}
    about = {FIRST: CLAIMS[FIRST]}
    without, found = (
        numbers.of("there", about, records, {}, now=9999, lineage=each) for each in ([], [Ancestor(FIRST.id, 20)])
    )
    assert (without.step, found.step, found.lost_steps) == (0, 20, 2)


def test_a_newer_checkpoint_whose_attempt_told_nothing():
    """The run stands on it, not on the line of the last attempt that told something; that this is missing is said."""
    fourth = Attempt("000004-aaaaaaaa")
    stands_on = [Ancestor(FIRST.id, 20), Ancestor(fourth.id, 60)]
    claims = {**CLAIMS, fourth: claim(1300, 1301)}
    found = numbers.of("there", claims, RECORDS, {}, now=9999, lineage=stands_on)
    assert [life.is_in_line for life in found.lives] == [True, False, False, True]
    assert found.doubts == ["the run continues attempt 4, whose events are missing"]
    assert [record["step"] for record in journal.merged(RECORDS, stands_on)] == [10]
    assert [record["step"] for record in journal.merged(RECORDS, stands_on[:1])] == [10, 30]


@given(seed=st.integers(0, 1 << 32))
def test_no_time_is_counted_twice(seed):
    """Whatever the attempts have left, the kinds add up to the wall time, and no span is negative."""
    random = Random(seed)
    attempts = [Attempt(f"{number:06}-{random.randrange(1 << 32):08x}") for number in range(1, random.randint(2, 8))]
    names = ["start", "train", "saving", "save", "beat", "stop", "done", "error"]
    claims, records, now = {}, {}, 1000.0
    for index, attempt in enumerate(attempts):
        now += random.uniform(-20, 20)
        claims[attempt] = claim(now, now + random.uniform(-1, 10)) if random.random() < 0.9 else {}
        events = []
        for event in random.choices(names, k=random.randint(0, 12)):
            now += random.uniform(0, 5)
            step = random.randint(0, 100)
            values = {
                **saved(step, blocked=random.uniform(0, 9)),
                "lineage": lineage(*((each, step) for each in attempts[:index])),
            }
            events.append((event, now, {**values, "error": "it", "loss": 1.0}))
        records[attempt] = told(*events)
    if any(records.values()):
        found = numbers.of("there", claims, records, {}, now=now)
        assert all(span.end >= span.begin for span in found.spans)
        assert all(before.end == after.begin for before, after in pairwise(found.spans))
        assert sum(found.seconds(kind) for kind in numbers.KINDS) == pytest.approx(found.wall_seconds)


def test_durations_in_words():
    """In units that suit them."""
    seconds = (0.0131, 41.23, 723, 25_500, 183_700)
    assert [units.duration(each) for each in seconds] == ["0.013 s", "41.2 s", "12 min 3 s", "7 h 5 min", "2 d 3 h"]


# --- a real run, beside a stopwatch ----------------------------------------------------------------------------------

SLOW = """
import time
import torch
from harness import Task

def build():
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    x = torch.rand(512, 4)

    def loss(model, batch):
        time.sleep(0.05)
        x, y = batch
        return torch.nn.functional.mse_loss(model(x), y)

    dataset = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    return Task(model=model, dataset=dataset, optimizer=torch.optim.SGD(model.parameters(), 0.02), loss=loss)
"""


@dataclass
class Watched:
    """What somebody saw who stood beside a run: when it was started, when each step was over, and when it had ended."""

    began: float = field(default_factory=time.time)
    steps: dict[tuple[str, int], float] = field(default_factory=dict)  # by attempt and step
    resumed: dict[str, tuple[int, float]] = field(default_factory=dict)  # attempt: step, time
    ended: float = 0.0
    looked: float = field(default_factory=time.time)
    late_seconds: float = 0.0  # by which something may have been seen too late: on a busy machine the turns are rare

    def look(self, run: Run) -> None:
        """Notes what the run has told since the last look, by this watch."""
        now = time.time()
        self.late_seconds = max(self.late_seconds, now - self.looked)
        self.looked = now
        for record in run.events():
            attempt, step = record["attempt"], record.get("step")
            if record["event"] in ("start", "resume"):
                self.resumed.setdefault(attempt, (step, now))
            if record["event"] == "train":
                self.steps.setdefault((attempt, step), now)
            if record["event"] == "done":  # Python takes another second to end
                self.ended = self.ended or now

    def lost_steps(self) -> int:
        """How many steps were trained again."""
        return len(self.steps) - len({step for _, step in self.steps})

    def goodput(self) -> float:
        """The time of the steps that were not trained again, over all the time."""
        attempts = sorted(self.resumed)
        productive = 0.0
        for attempt, successor in zip(attempts, [*attempts[1:], None], strict=True):
            until = self.resumed[successor][0] if successor else 1 << 60
            counted = [moment for (each, step), moment in self.steps.items() if each == attempt and step <= until]
            productive += max(counted, default=self.resumed[attempt][1]) - self.resumed[attempt][1]
        return productive / (self.ended - self.began)

    def about(self) -> Any:
        """What the report's goodput must equal: within 2 %, or what each attempt loses or gains when it is seen late."""
        late = len(self.resumed) * self.late_seconds / (self.ended - self.began)
        return pytest.approx(self.goodput(), rel=0.02, abs=late)


def killed_run(folder: Path, kills: list[int], steps: int, every: int, ranks: int | None = None) -> Watched:
    """Trains to the end, with a SIGKILL after each of these steps; by torchrun, or as a process that is started again."""
    folder.mkdir(exist_ok=True)
    (folder / "slow.py").write_text(SLOW)
    config = {
        "task": "slow.py:build",
        "train": {"steps": steps, "global_batch_size": 8},
        "checkpoint": {"url": "run", "every_steps": every},
        "metrics": {"every_seconds": 0.2},
        "world": {"device": "cpu"},
    }
    watched, pending = Watched(), list(kills)
    while not watched.ended:
        with launch(folder, config, ranks=ranks, max_restarts=len(kills)) as run:
            watched.looked = time.time()  # until now there was nothing to see
            while run.process.poll() is None and not watched.ended:
                watched.look(run)
                newest = max(watched.steps, default=("", 0))
                if pending and newest[1] >= pending[0] and newest[0] == max(watched.resumed):
                    pending.pop(0)
                    if ranks is None:
                        run.kill()
                    else:
                        run.kill_rank(len(pending) % ranks)
                        run.wait_for("resume", attempt=len(watched.resumed) + 1)
                        watched.looked = time.time()
                time.sleep(0.005)
            if watched.ended:
                run.succeed()
    return watched


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory):
    """A run in one plain process that was killed twice, and what a stopwatch says about it."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, killed_run(folder, [38, 58], steps=90, every=10)


@pytest.mark.torchrun
def test_goodput_agrees_with_a_stopwatch(killed_twice):
    """As exactly as that can be read, and the report knows of both deaths."""
    folder, watched = killed_twice
    found = read_json("report", str(folder / "run"))
    assert (found["deaths"], found["attempts"], found["ending"], found["step"]) == (2, 3, "done", 90)
    assert found["goodput"] == watched.about()
    assert 0 < found["lost_steps"] <= watched.lost_steps()


def test_each_step_is_told_once(killed_twice):
    """Merged, the metrics are those of a run that was never killed: in a kill those of no committed step are lost."""
    folder, _ = killed_twice
    lines = harness("report", str(folder / "run"), "--metrics").stdout.splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 91))


def test_the_report_in_the_terminal(killed_twice):
    """In half a page."""
    done = harness("report", str(killed_twice[0] / "run"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"run: step 90, done; 3 attempts, 2 deaths\n\ngoodput +\d+\.\d%  of ", done.stdout)
    assert len(re.findall(r"^attempt \d .* killed$", done.stdout, re.MULTILINE)) == 2
    assert len(done.stdout.splitlines()) < 25


def test_nothing_to_report(tmp_path):
    """An empty URL, and a run that keeps nothing there, are told from a run that did nothing."""
    done = harness("report", str(tmp_path))
    assert (done.returncode, done.stdout) == (66, "")
    assert "metrics/ holds no events to report on" in done.stderr


DIES_TWICE = """
import os, pathlib, signal
starts = pathlib.Path("starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.soak
@pytest.mark.torchrun
def test_ranks_that_die_before_they_have_an_attempt(tmp_path):
    """Killed twice while they start: two deaths that no attempt tells of, and the time since the launcher began."""
    (tmp_path / "slow.py").write_text(DIES_TWICE + SLOW)
    config = {
        "task": "slow.py:build",
        "train": {"steps": 4, "global_batch_size": 8},
        "checkpoint": {"url": "run", "every_steps": 2},
        "world": {"device": "cpu"},
    }
    began = time.time()
    with launch(tmp_path, config, ranks=1, max_restarts=3) as run:
        run.succeed()
    found = read_json("report", str(tmp_path / "run"))
    assert (found["attempts"], found["deaths"], found["unclaimed_deaths"], found["ending"]) == (1, 2, 2, "done")
    assert 0 < found["down_seconds"] < found["wall_seconds"] <= time.time() - began


def test_what_the_command_says_of_lines_that_it_cannot_read(tmp_path):
    """A line on the error output beside the metrics, whose lines stay JSON; a page that cannot be written."""
    (tmp_path / "metrics").mkdir()
    records = [*RECORDS[FIRST], {"event": "train"}, {"event": "train", "time": 1045, "step": 23, "loss": float("nan")}]
    (tmp_path / f"metrics/{FIRST.id}-000000.jsonl").write_text("\n".join(map(json.dumps, records)))
    done = harness("report", str(tmp_path), "--metrics")
    steps = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["step"]
        for line in done.stdout.splitlines()
    ]
    assert (done.returncode, steps, done.stderr) == (0, [10, 22, 23], "harness: 1 line could not be read\n")
    done = harness("report", str(tmp_path), str(tmp_path / "missing" / "page.html"))
    assert done.returncode == 2
    assert done.stderr == f"harness: {tmp_path}/missing/page.html: cannot be written: No such file or directory\n"


# --- the page --------------------------------------------------------------------------------------------------------


def boxes(page, prefix: str) -> dict[str, dict]:
    """Where the drawn things are whose names begin so, and how large."""
    found = page.eval_on_selector_all(
        f"svg [id^='{prefix}-']",
        "all => all.map(each => { const box = each.getBoundingClientRect(); "
        "return [each.id, {x: box.x, y: box.y, width: box.width, height: box.height}] })",
    )
    return dict(found)


def colour_at(page, x: float, y: float) -> tuple[int, ...]:
    """What is really painted at a place."""
    from PIL import Image

    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        return image.convert("RGB").getpixel((round(x), round(y)))


def test_the_page_in_a_browser(killed_twice, opened, tmp_path):
    """Both deaths and resumes are on the curve and on the time line, where they happened, and nothing else is loaded."""
    folder, _ = killed_twice
    path = tmp_path / "report.html"
    assert harness("report", str(folder / "run"), str(path)).returncode == 0
    page, heard = opened(path)
    assert heard == [path.as_uri()]
    assert path.stat().st_size < 300_000
    assert page.locator("#deaths b").inner_text() == "2"
    found = read_json("report", str(folder / "run"))
    assert page.locator("#goodput b").inner_text() == f"{found['goodput']:.1%}"
    deaths, resumes, kept, down = (boxes(page, name) for name in ("death", "resume", "kept", "down"))
    assert [*deaths] == ["death-1", "death-2"]
    assert [*resumes] == ["resume-2", "resume-3"]
    assert [*kept] == ["kept-1", "kept-2", "kept-3"]
    assert [*down] == ["down-1", "down-2"]
    told = [*journal.read_records(open_store(str(folder / "run"))).values()]
    for number in (1, 2):
        death, resume = deaths[f"death-{number}"], resumes[f"resume-{number + 1}"]
        assert 5 < death["width"] < 20
        died = max(record["step"] for record in told[number - 1] if record["event"] == "train")
        went_back = died > next(record["step"] for record in told[number] if record["event"] == "resume")
        assert resume["x"] < death["x"] if went_back else resume["x"] == death["x"], "it went back to a checkpoint"
        assert abs(kept[f"kept-{number + 1}"]["x"] - resume["x"] - resume["width"] / 2) < 3, "the curve goes on from there"
    assert deaths["death-1"]["x"] < resumes["resume-3"]["x"]
    training = boxes(page, "training")["training-3"]
    middle = training["y"] + training["height"] / 2
    colours = [colour_at(page, training["x"] + training["width"] * tenth / 10, middle) for tenth in range(1, 10)]
    assert statistics.mode(colours) == (0, 0x72, 0xB2), "between the saves"
    texts = page.eval_on_selector_all("svg text", "all => all.map(each => each.textContent.trim())")
    assert {"step", "loss", "attempt", "time since the start (seconds)", "time (seconds)"} <= {*texts}


def test_no_text_covers_another(report, opened, tmp_path):
    """Nor does any leave the page; a long run is drawn as well as a short one."""
    begins = {Attempt(f"{number:06}-aaaaaaaa"): 1000 * number for number in range(1, 200)}
    claims = {attempt: claim(began, began + 1) for attempt, began in begins.items()}
    records, ancestors = {}, []
    for attempt, began in begins.items():
        step = 10 * len(ancestors)
        records[attempt] = told(
            ("resume", began + 2, {"step": step, "lineage": lineage(*ancestors)}),
            *(("train", began + 30 * each, {"step": step + each, "loss": 1e3 / (step + each)}) for each in range(1, 15)),
            ("saving", began + 310, {"step": step + 10}),
            ("save", began + 400, saved(step + 10)),
        )
        ancestors.append((attempt, step + 10))
    path = tmp_path / "many.html"
    path.write_text(page.page(numbers.of("s3://bucket/" + "long/" * 40, claims, records, {}, now=1e9), records))
    shown, _ = opened(path)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1000
    overlapping = shown.evaluate(
        """() => [...document.querySelectorAll('svg')].flatMap(svg => {
            const all = [...svg.querySelectorAll('text')].map(each => [each.textContent, each.getBoundingClientRect()]);
            return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([b, q]) =>
                p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom).map(([b]) => [a, b]));
        })"""
    )
    assert overlapping == []


def test_the_page_needs_its_extra(killed_twice, tmp_path):
    """Without matplotlib the numbers are there, and the page says what to install."""
    blocked = tmp_path / "matplotlib.py"
    blocked.write_text("raise ImportError('no matplotlib')")
    url, env = str(killed_twice[0] / "run"), {"PYTHONPATH": str(tmp_path)}
    assert harness("report", url, env=env).returncode == 0
    done = harness("report", url, str(tmp_path / "report.html"), env=env)
    assert done.returncode == 2
    assert "pip install matplotlib" in done.stderr


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [None, 2])
def test_five_deaths_are_in_the_report(ranks, tmp_path, opened):
    """Each is in the report, and goodput agrees with a stopwatch."""
    watched = killed_run(tmp_path / "run", [70, 130, 220, 310, 390], steps=500, every=25, ranks=ranks)
    url, path = str(tmp_path / "run/run"), tmp_path / "report.html"
    found = read_json("report", url, str(path))
    assert (found["deaths"], found["attempts"], found["ending"], found["step"]) == (5, 6, "done", 500)
    assert found["goodput"] == watched.about()
    shown, _ = opened(path)
    assert [*boxes(shown, "death")] == [f"death-{number}" for number in range(1, 6)]
