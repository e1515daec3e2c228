"""Launches somebody's job as it is, with a plan for its ranks, and sees it through its deaths to the end."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.drill.plan import VARIABLE, Plan
from harness.drill.record import Record
from harness.errors import HarnessError, Stopped, StoreError
from harness.runtime.signals import die_with_parent

_POLL_SECONDS = 0.05
_MOST_LAUNCHES = 6  # of one trial: each fault takes one
_LEAST_FREE_BYTES = 1 << 20
_MOST_LINES = 12  # of a job's last words


class JobFailure(HarnessError):
    """The job does not do what it would have to do even without a drill."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """Somebody's training: ``train CONFIG.yaml …`` or a script with its arguments, and how it is launched."""

    command: tuple[str, ...]
    options: tuple[str, ...] | None
    """Those of ``harness launch``; None: it is one plain process."""

    def command_line(self, plan: Plan, ranks: int = 0) -> list[str]:
        """What starts it; on another number of ranks, where one is given."""
        inside = ["-m", "harness.drill.inside", *self.command]
        if self.command[0] == "train":  # which opens its URL before a Run is made
            url = plan.url.replace("$", "$$")
            inside += [f"checkpoint.url={url}", "checkpoint.must_exist=false", "checkpoint.storage_options={}"]
            inside += [f"evaluation.every_steps={2 * plan.every_steps}", "evaluation.every_epochs=null"]
        if self.options is None:
            return [sys.executable, *inside]
        options = [*self.options, *([f"--nproc-per-node={ranks}"] if ranks else [])]
        return [sys.executable, "-m", "harness", "launch", *options, "--", *inside]


def see_through(job: Job, plan: Plan, *, patience_seconds: float, ranks: int = 0) -> int:
    """Launches a job, again after each death that the plan has for it, until it has come to its end. Returns how often.

    Raises ``JobFailure`` where it ends otherwise, or hangs, and ``StoreError`` where the drill's own folder is full.
    """
    for count in range(1, _MOST_LAUNCHES + 1):
        deaths = len(Record.of(plan).deadly)
        code = _launch(job, plan, patience_seconds, ranks)
        record = Record.of(plan)
        if code == 0 or (code == Stopped.exit_code and record.last_step >= (plan.stop_at or plan.steps)):
            return count
        if shutil.disk_usage(plan.folder).free < _LEAST_FREE_BYTES:
            raise StoreError(
                f"harness drill: no room left in {plan.folder}; let TMPDIR name a folder with more, or use --url"
            )
        if len(record.deadly) == deaths:
            raise JobFailure(f"the job ended with exit code {code} at step {record.last_step}:\n{last_words(plan)}")
    raise JobFailure(f"the job has not come to its end in {_MOST_LAUNCHES} launches:\n{last_words(plan)}")


def last_words(plan: Plan) -> str:
    """The end of a job's output, indented."""
    lines = _output(plan).read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_MOST_LINES:])


def _output(plan: Plan) -> Path:
    return Path(plan.folder, "output.txt")


def _launch(job: Job, plan: Plan, patience_seconds: float, ranks: int) -> int:
    """One launch, and its exit code. Nothing that it has started is alive afterwards."""
    path = Path(plan.folder, "plan.json")
    plan.write(path)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, VARIABLE: str(path), "TMPDIR": str(Path(plan.folder, "t"))}
    with _output(plan).open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # the user's own command
            job.command_line(plan, ranks),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # ^C is the drill's
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509  # no threads have been started here
        )
    try:
        Path(plan.folder, "launcher").write_text(str(process.pid))
        _wait(process, plan, patience_seconds)
    finally:
        _end_all(process, str(path))
    return process.returncode


def _wait(process: "subprocess.Popen[bytes]", plan: Plan, patience_seconds: float) -> None:
    """Waits for the end of a launch, as long as something happens in it."""
    seen, changed = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        size = sum(each.stat().st_size for each in Path(plan.folder).glob("*.*"))
        if size != seen:
            seen, changed = size, time.monotonic()
        elif time.monotonic() - changed > patience_seconds:
            raise JobFailure(
                f"the job hangs: nothing has happened for {patience_seconds:.0f} s (--patience) after step "
                f"{Record.of(plan).last_step}:\n{last_words(plan)}"
            )


def _end_all(process: "subprocess.Popen[bytes]", plan: str) -> None:
    """Kills everything that has the plan in its environment, and waits for the launcher."""
    deadline = time.monotonic() + 10
    while (left := [*_with_plan(plan)]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.01)
    process.wait()


def _with_plan(plan: str) -> Iterator[int]:
    """The processes of a launch, by their environment (Linux)."""
    entry = f"{VARIABLE}={plan}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
