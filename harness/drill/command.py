"""``harness drill`` on the command line."""

import json
import secrets
import signal
import sys
from collections.abc import Sequence

import click

from harness.drill import words
from harness.drill.drill import Drill, scratch_folder
from harness.drill.launches import Job
from harness.drill.page import page
from harness.drill.results import Result
from harness.drill.trials import QUICK
from harness.errors import ConfigError, StoreError
from harness.launcher.launch import halves
from harness.report.page import write
from harness.runtime.console import printable
from harness.runtime.signals import STOP_SIGNALS


def job_of(arguments: Sequence[str]) -> Job:
    """The job that a command line names. Raises ``ConfigError`` where it names none.

    A configuration is launched on two ranks where nothing else is said, a script as one plain process.
    """
    given = list(arguments)
    start = next((index for index, word in enumerate(given) if word == "--" or not word.startswith("-")), len(given))
    is_config = start < len(given) and given[start].endswith((".yaml", ".yml"))
    if is_config:
        given[start:start] = ["--", "train"]
    options, command = halves(given)
    if command[0] == "doctor":
        raise ConfigError("harness drill: expected CONFIG.yaml, SCRIPT.py or -m MODULE, found doctor")
    launched = options or (["--nproc-per-node=2"] if command[0] == "train" else None)
    return Job(tuple(command), None if launched is None else tuple(launched))


def run_drill(
    arguments: Sequence[str],
    *,
    quick: bool,
    soak_seconds: float,
    seed: int | None,
    steps: int,
    every_steps: int,
    url: str | None,
    page_path: str | None,
    between_deaths_seconds: float,
    patience_seconds: float,
    as_json: bool,
) -> int:
    """Drills a job, tells of it, and returns the exit code."""
    job = job_of(arguments)
    if steps < 3 * every_steps:
        raise ConfigError(f"harness drill: expected --steps of at least three times --every-steps, found {steps}")
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)  # each ends it as ^C does, with everything cleaned up

    def emit(what: str, result: Result | None) -> None:
        if as_json:
            return
        if result is not None:
            _live("")
            click.echo(printable(words.line(result)))
        else:
            _live(f"{what} …")

    with scratch_folder() as folder:
        drill = Drill(
            job,
            folder,
            steps=steps,
            every_steps=every_steps,
            patience_seconds=patience_seconds,
            url=url,
            emit=emit,
        )
        try:
            findings = drill.run(QUICK if quick else None, soak_seconds=soak_seconds, seed=seed)
        except OSError as error:
            raise StoreError(f"harness drill: {error.strerror}: {error.filename}; let TMPDIR name another folder") from None
        _live("")
        if page_path is not None:
            write(page_path, page(findings, between_deaths_seconds))
    if as_json:
        click.echo(json.dumps(findings.as_json(), indent=1))
    else:
        click.echo(words.summary(findings, between_deaths_seconds))
        if quick:
            click.echo(
                "--quick tries few deaths. Without it, a drill also tries saves, evaluations, epoch ends and other ranks."
            )
        if soak_seconds:
            click.echo(f"The random deaths are those of --seed {seed}.")
    return findings.exit_code


def _live(text: str) -> None:
    """The line that says what is under way, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
