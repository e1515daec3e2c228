"""Curves in Weights & Biases and in MLflow, each step once however often the run dies.

The events beside the checkpoints are the truth. A process of its own reads them there, and gives a tracker what a checkpoint
stands on: steps that are trained again reach it once. Where it begins, it asks the tracker for its last step and continues
there, also after events that no tracker was there to take.

Training never waits for a tracker. Whatever a library does, hangs, raises or registers, it does in that other process, which
ends when the trainer does; if it ends before, the next save starts another one.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.checkpoint.kept import where
from harness.config import RunConfig
from harness.errors import ConfigError
from harness.runtime import console
from harness.secrecy import without_secrets
from harness.storage.store import Store, open_store
from harness.telemetry.dashboards import numbers_of
from harness.telemetry.journal import OPENINGS, Record, opening_of, read_records

_NAME = "harness.telemetry.trackers"  # also where it is run as a program
log = logging.getLogger(_NAME)

_LEAVE_SECONDS = 10.0  # for the end of the curves, when the process is about to end,
_DONE_SECONDS = 30.0  # and when the run is done: nobody starts it again
_TAKE_OVER_SECONDS = 20.0  # for the process of an attempt that has died, which is ending
_LOOK_SECONDS = 0.5
_BATCH = 500  # MLflow takes up to 1,000 values at once
_NOT_MLFLOW = re.compile(r"[^\w\-. /:]")  # in a metric's name
_OF_SAVE = {"seconds": "save_seconds", "blocked_seconds": "save_blocked_seconds"}


def wanted(config: RunConfig) -> bool:
    """Whether a run has a tracker. Raises ``ConfigError`` for one that could not be fed."""
    metrics = config.metrics
    asked = [name for name, each in (("wandb", metrics.wandb), ("mlflow", metrics.mlflow)) if each is not None]
    for name in asked:
        if config.checkpoint.url is None or metrics.every_seconds is None:
            raise ConfigError(
                f"metrics.{name}: curves come from the events beside the checkpoints; set checkpoint.url and "
                "metrics.every_seconds"
            )
        if (found := importlib.util.find_spec(name)) is None or found.origin is None:  # W&B's own files lie in ./wandb
            raise ConfigError(f"metrics.{name}: {name} is not installed; pip install 'trainharness[{name}]'")
    return bool(asked)


class Trackers:
    """Tells the process of the trackers how far the checkpoints are. Only the end waits for it, for a moment."""

    def __init__(self, config: RunConfig, attempt: str) -> None:
        self._config, self._attempt = config, attempt
        self._line: Sequence[tuple[str, int | None]] = ()
        self._until, self._is_over = 0, False
        self._leave_seconds = _LEAVE_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, record: Record) -> None:
        """Takes note of an attempt's opening, and of what is saved."""
        if record["event"] in OPENINGS:
            self._line = [*map(tuple, record.get("lineage", ())), (self._attempt, None)]
            self._thread = threading.Thread(target=self._work, name="harness-trackers", daemon=True)
            self._thread.start()
        elif record["event"] not in ("save", "done"):
            return
        if record["event"] == "done":
            self._leave_seconds = _DONE_SECONDS
        self._until = record["step"]
        self._wake.set()

    def close(self) -> None:
        """Has the rest be taken, if that is soon possible. The journal is written."""
        if self._thread is None:
            return
        self._is_over = True
        self._wake.set()
        self._thread.join(self._leave_seconds)
        if (process := self._process) is not None and process.poll() is None:
            process.kill()
            log.warning(
                "the tracker did not take the end of the curves within %g s; the next start of this run sends it",
                self._leave_seconds,
            )

    def _work(self) -> None:
        is_over = False
        while not is_over:
            self._wake.wait()
            self._wake.clear()
            is_over = self._is_over
            try:
                self._tell()
            except OSError:  # it has ended; the next save starts another one
                continue
            except Exception as error:  # whatever does not let it start: training continues
                log.warning("the tracker cannot be started; training continues: %s", without_secrets(str(error)))
                return
        self._close_pipe()
        if self._process is not None:
            self._process.wait()

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._process.stdin.close()

    def _tell(self) -> None:
        if self._process is None or self._process.poll() is not None:
            is_first = self._process is None
            self._close_pipe()
            path = os.pathsep.join(each for each in sys.path if each)
            self._process = subprocess.Popen(  # noqa: S603  # it is this file
                [sys.executable, "-P", "-m", _NAME],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # a stop signal to all of them is none to it
            )
            assert self._process.stdin is not None, "it is a pipe"
            pickle.dump({"config": self._config, "line": self._line, "is_first": is_first}, self._process.stdin)
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(b"%d\n" % self._until)
        self._process.stdin.flush()


# --- the other process -----------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """What takes curves."""

    def add(self, rows: Sequence["Row"], notes: Mapping[str, str]) -> None:
        """Takes rows of ascending steps, and what is known of each attempt. What it has already, it does not take again."""

    def close(self, *, is_done: bool) -> None:
        """Nothing more comes in this attempt."""


Row = tuple[int, float, Mapping[str, float]]  # a step, when it was, and values by their names


def main() -> None:
    """Follows a run, as the trainer tells through the standard input, until that ends."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    setup = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that has started this one
    config: RunConfig = setup["config"]
    console.begin("harness")
    console.speak(config.log.format)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    _end_with(os.getppid())
    try:
        _follow(config, setup["line"])
    except Exception as error:  # whatever it is: the curves are late, and training continues
        if setup["is_first"]:
            text = without_secrets(f"{type(error).__name__}: {error}")
            log.warning("the tracker failed; training continues, and the next save tries again: %s", text)
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    """Ends this process, also where a library would wait for something."""
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent: the next attempt has one of its own."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        time.sleep(_LEAVE_SECONDS)  # what was begun may be ended
        _leave(1)

    threading.Thread(target=look, daemon=True).start()


def _follow(config: RunConfig, line: Sequence[tuple[str, int | None]]) -> None:
    assert config.checkpoint.url is not None, "it was checked"
    store = open_store(config.checkpoint.url, config.checkpoint.storage_options)
    curves = Curves(store, line)
    first = min(Catalog(store).attempts.all())
    name = hashlib.sha256(f"{where(store)}\0{first.id}".encode()).hexdigest()[:16]
    with open(os.open(_lock_of(name), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600), "rb") as lock:
        _take_over(lock.fileno())
        makers = ((config.metrics.wandb, WeightsAndBiases), (config.metrics.mlflow, MLflow))
        trackers: list[Tracker] = [make(options, name) for options, make in makers if options is not None]
        until = 0
        for until in map(int, sys.stdin.buffer):
            _add(trackers, curves, until)
        _add(trackers, curves, until)  # what was written after it
        for tracker in trackers:
            tracker.close(is_done=curves.is_done)


def _add(trackers: Sequence[Tracker], curves: "Curves", until: int) -> None:
    rows = list(curves.rows(until))
    for tracker in trackers:
        tracker.add(rows, curves.notes)


def _lock_of(name: str) -> str:
    return os.path.join(tempfile.gettempdir(), f"harness-tracker-{os.getuid()}-{name}")


def _take_over(lock: int) -> None:
    """Waits for the process of the attempt before this one, which may be ending."""
    give_up = time.monotonic() + _TAKE_OVER_SECONDS
    while time.monotonic() < give_up:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOOK_SECONDS / 5)
        else:
            return


class Curves:
    """What the journal says of a run whose attempts are a ``line``, each with the last step that counts."""

    def __init__(self, store: Store, line: Sequence[tuple[str, int | None]]) -> None:
        self._store = store
        self._until = dict(line)
        self._own = line[-1][0]
        self._known: set[str] = set()  # segments that were read
        self._waiting: dict[int, tuple[float, dict[str, float]]] = {}  # by step
        self._ends: dict[Attempt, tuple[Record | None, Record | None]] = {}  # how attempts began, and how they ended
        self.is_done = False

    def rows(self, until: int) -> Iterator[Row]:
        """What is new, up to a step."""
        for attempt, records in read_records(self._store, known=self._known).items():
            opening, end = self._ends.get(attempt, (None, None))
            last = next((each for each in reversed(records) if each["event"] in ("done", "stop", "error")), end)
            self._ends[attempt] = (opening or opening_of(records), last)
            for record in records:
                self._take(attempt, record)
        self.is_done = any(end and end["event"] == "done" for own, (_, end) in self._ends.items() if own.id == self._own)
        for step in sorted(each for each in self._waiting if each <= until):
            yield step, *self._waiting.pop(step)

    @property
    def notes(self) -> dict[str, str]:
        """How each attempt began, and how it ended."""
        return {f"harness/attempt {each.number}": self._about(each) for each in sorted(self._ends)}

    def _about(self, attempt: Attempt) -> str:
        opening, end = self._ends[attempt]
        begin = f"{opening['event']} at step {opening.get('step', 0)}" if opening else "did not begin to train"
        if end is not None:
            why = end.get("reason", end.get("error", ""))
            return f"{begin}; {end['event']} at step {end.get('step')}" + (f": {why}" if why else "")
        return begin if attempt.id == self._own else f"{begin}; killed"

    def _take(self, attempt: Attempt, record: Record) -> None:
        event, step = record["event"], record.get("step")
        if attempt.id not in self._until or step is None:
            return
        last = self._until[attempt.id]
        if event in OPENINGS:  # a row that is full is written: that of the step is
            step, values = step + 1, {"harness/attempt": float(attempt.number)}
        elif event in ("train", "evaluate"):
            values = {f"{event}/{name}": value for name, value in numbers_of(record).items()}
        elif event == "save":
            values = {f"harness/{name}": float(record[key]) for key, name in _OF_SAVE.items()}
        else:
            return
        if last is None or step <= last:
            at, row = self._waiting.get(step, (record["time"], {}))
            self._waiting[step] = at, {**row, **values}


class WeightsAndBiases:
    """A run of Weights & Biases; a later attempt continues it."""

    def __init__(self, options: Mapping[str, Any], name: str) -> None:
        import wandb  # noqa: PLC0415  # an extra

        settings = {"console": "off", **options.get("settings", {})}
        self._run: Any = wandb.init(**{"id": name, "resume": "allow", **options, "settings": settings})
        # Its rows are of ascending steps. A row is written when the next one begins: then it is whole.
        self._next = self._next_offline() if self._run.offline else self._run.starting_step
        self._notes: Mapping[str, str] = {}

    def add(self, rows: Sequence[Row], notes: Mapping[str, str]) -> None:
        """Rows that it has are left out."""
        for step, at, values in rows:
            if step >= self._next:
                self._run.log({**values, "_timestamp": at}, step=step)
                self._next = step  # what else is of this step belongs to the same row
        if notes != self._notes:
            self._run.summary.update(notes)
            self._notes = notes

    def close(self, *, is_done: bool) -> None:
        """Writes the last row, and has the run be over, or not."""
        self._run.finish(exit_code=0 if is_done else 1)
        import wandb  # noqa: PLC0415  # likewise

        wandb.teardown()

    def _next_offline(self) -> int:
        """The step after those that earlier attempts have left here, in files that were or will be uploaded."""
        settings, found = self._run.settings, 0
        for file in Path(settings.wandb_dir).glob(f"offline-run-*-{self._run.id}*/run-{self._run.id}.wandb"):
            if str(file) != settings.sync_file:
                command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(file)]
                done = subprocess.run(  # noqa: S603  # W&B's own reader
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
                )
                for each in map(json.loads, done.stdout.splitlines()):
                    found = max(found, int(each["history"]["step"]["num"]) + 1 if each.get("type") == "history" else 0)
        return found


class MLflow:
    """A run of MLflow, which has the name of the harness run in a tag; a later attempt continues it."""

    def __init__(self, options: Mapping[str, Any], name: str) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415  # an extra

        self._client: Any = MlflowClient(tracking_uri=options.get("tracking_uri"))
        experiment, tags = options.get("experiment_name", "Default"), {"harness.run": name}
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([place], f"tags.`harness.run` = '{name}'")
        run = runs[0] if runs else self._client.create_run(place, tags=tags, run_name=options.get("run_name"))
        self._id = run.info.run_id
        self._client.update_run(self._id, "RUNNING")
        self._last: dict[str, int] = {}  # step of each curve
        self._notes: Mapping[str, str] = {}

    def add(self, rows: Sequence[Row], notes: Mapping[str, str]) -> None:
        """Values that it has are left out."""
        from mlflow.entities import Metric  # noqa: PLC0415  # likewise

        values = [
            Metric(_NOT_MLFLOW.sub("_", name), value, int(at * 1000), step)
            for step, at, values in rows
            for name, value in values.items()
        ]
        new = [each for each in values if each.step > self._last_of(each.key)]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self._id, metrics=new[start : start + _BATCH])
        self._last |= {each.key: each.step for each in new}
        for key, text in notes.items():
            if self._notes.get(key) != text:
                self._client.set_tag(self._id, key, text)
        self._notes = notes

    def close(self, *, is_done: bool) -> None:
        """A run that may go on stays open."""
        if is_done:
            self._client.set_terminated(self._id)

    def _last_of(self, key: str) -> int:
        if key not in self._last:
            self._last[key] = max((each.step for each in self._client.get_metric_history(self._id, key)), default=-1)
        return self._last[key]


if __name__ == "__main__":
    main()
