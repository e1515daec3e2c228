"""A drill: two runs without any death, then one for each trial, each compared with the first, step by step."""

import contextlib
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.drill import trials
from harness.drill.causes import cause
from harness.drill.launches import Job, JobFailure, last_words, see_through
from harness.drill.plan import Plan, is_path
from harness.drill.record import Record
from harness.drill.results import Costs, Curve, Findings, Result, deaths
from harness.drill.trials import Trial
from harness.errors import ConfigError

_PREFIX = "harness-drill-"

Emit = Callable[[str, Result | None], None]


class Drill:
    """Runs the trials of one job in a folder. ``emit`` gets what begins, and then what has become of it."""

    def __init__(
        self, job: Job, folder: Path, *, steps: int, every_steps: int, patience_seconds: float, url: str | None, emit: Emit
    ) -> None:
        self._job, self._folder, self._url, self._emit = job, folder, url, emit
        self._steps, self._every_steps, self._patience_seconds = steps, every_steps, patience_seconds
        self._curves: dict[str, Curve] = {}

    def run(self, names: Sequence[str] | None = None, *, soak_seconds: float = 0.0, seed: int = 0) -> Findings:
        """All trials, or those that are named; afterwards random deaths for some time.

        Raises ``JobFailure`` where the job does not come to an end without any death.
        """
        reference, again = (self._reference(name) for name in ("reference", "reference again"))
        noise = reference.noise(again)
        unlike = next(again.differences(reference, noise), None)
        wanted = trials.of_job(
            reference, self._every_steps, is_launched=self._job.options is not None, is_local=self._is_local
        )
        wanted = wanted if names is None else [each for each in wanted if each.name in (*names, "control")]
        if unlike is not None:
            wanted = [*trials.of_irreproducible(reference, self._every_steps)] if self._is_local else []
        results = [self._try(each, reference, noise) for each in wanted]
        deadline, draws = time.monotonic() + soak_seconds, random.Random(seed)
        while time.monotonic() < deadline:
            results.append(self._try(trials.drawn(draws, reference, self._every_steps), reference, noise))
        metric = self._metric(reference)
        return Findings(
            command=" ".join(self._job.command),
            steps=reference.last_step,
            ranks=reference.ranks,
            irreproducible=f"{unlike}" if unlike is not None else "",
            results=results,
            costs=Costs.of(reference, results),
            metric=metric,
            curve=reference.curve(metric),
            curves=self._curves,
        )

    @staticmethod
    def _metric(reference: Record) -> str:
        """What the curves show: the first metric that the job tells of."""
        return next(iter(reference.of_rank(0)[0]["metrics"]), "")

    @property
    def _is_local(self) -> bool:
        return self._url is None or is_path(self._url)

    def _plan(self, name: str) -> Plan:
        folder = self._folder / str(len([*self._folder.iterdir()]))  # a short name: sockets may lie below it
        (folder / "t").mkdir(parents=True)
        url = f"{self._url.rstrip('/')}/{re.sub(r'[^a-z0-9]+', '-', name)}" if self._url else str(folder / "run")
        launched = self._job.options is not None
        return Plan(str(folder), url, self._steps, self._every_steps, has_launcher=launched)

    def _reference(self, name: str) -> Record:
        self._emit(name, None)
        plan = self._plan(name)
        see_through(self._job, plan, patience_seconds=self._patience_seconds)
        record = Record.of(plan)
        if record.last_step < 2 * self._every_steps:
            raise JobFailure(
                f"the job has made {record.last_step} steps, and a drill takes {2 * self._every_steps} at least. It has to "
                f"train in a loop with a harness.Run:\n{last_words(plan)}"
            )
        return record

    def _try(self, trial: Trial, reference: Record, noise: frozenset[str]) -> Result:
        if trial.why_not:
            result = Result(trial, "not tried", why=trial.why_not)
        else:
            self._emit(trial.what, None)
            result = self._tried(trial, reference, noise)
        self._emit(trial.what, result)
        return result

    def _tried(self, trial: Trial, reference: Record, noise: frozenset[str]) -> Result:
        plan = replace(self._plan(trial.name), faults=trial.faults, leaves_out=trial.leaves_out)
        try:
            if trial.from_step:
                _copy_until(trial.from_step, self._folder / "0" / "run", Path(plan.url))
            if trial.other_ranks:
                stopped = replace(plan, stop_at=trial.faults[0].step + 1, faults=())
                see_through(self._job, stopped, patience_seconds=self._patience_seconds)
                plan = replace(plan, faults=())
            see_through(self._job, plan, patience_seconds=self._patience_seconds, ranks=trial.other_ranks)
        except JobFailure as failure:
            return Result(trial, "failed", [*deaths(Record.of(plan))], why=str(failure))
        finally:
            shutil.rmtree(plan.url if self._is_local else plan.folder, ignore_errors=True)
        run = Record.of(plan)
        if trial.faults and not run.all_at("fault") and not trial.other_ranks:
            return Result(trial, "not tried", why="the job did not come to that")
        if not trial.is_control and not trial.other_ranks:
            self._curves[trial.what] = run.curve(self._metric(reference))
        if trial.other_ranks:
            return _same_samples(trial, reference, run)
        found = next(run.differences(reference, noise), None)
        if found is None:
            return Result(trial, "exact", [*deaths(run)])
        return Result(trial, "different", [*deaths(run)], str(found), cause(found, reference, run, noise))


def _same_samples(trial: Trial, reference: Record, run: Record) -> Result:
    """Other ranks share the samples out otherwise, and add up in another order: the samples must be the same."""
    batches = sorted({line["batch"] for line in run.all_at("begun")})
    if len(batches) > 1:
        why = f"the job chooses the global batch by the number of ranks ({batches[0]} or {batches[1]} samples)"
        return Result(trial, "not tried", [*deaths(run)], why=why)
    expected, found = reference.samples(), run.samples()
    step = next((step for step in sorted(found) if found[step] != expected.get(step)), None)
    if step is None:
        return Result(trial, "exact", [*deaths(run)])
    what = f"step {step}: the samples of all ranks are not those of the uninterrupted run"
    return Result(
        trial, "different", [*deaths(run)], what, "the data does not follow the number of ranks: use a harness.Loader"
    )


def _copy_until(step: int, run: Path, to: Path) -> None:
    """A run as it was when it had saved a step."""
    to.mkdir(parents=True)
    for each in run.iterdir():
        found = re.match(r"step-(\d+)-", each.name)
        if (found is None and each.is_dir()) or (found is not None and int(found[1]) <= step):
            shutil.copytree(each, to / each.name)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards; those that killed drills have left go first.

    Raises ``ConfigError`` where there can be none.
    """
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another drill deletes it at this moment
            if left.stat().st_uid == os.getuid() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    except OSError as error:
        raise ConfigError(f"harness drill needs a folder for its runs ({error}); let TMPDIR name one") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
