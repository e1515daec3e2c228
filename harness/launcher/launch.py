"""``harness launch``: stock torchrun with what must be set, and an exit code that launchers can act on.

It adds to torchrun's command line only what is not there, and to the environment:

* ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: otherwise (torch 2.13) a node that joins a running job hangs it;
* ``TORCH_NCCL_ASYNC_ERROR_HANDLING=3``, torch's own default: with torchrun's, a rank of which a peer has died aborts the
  collective, and computes on with what that has left, while its state is kept;
* three restarts (torchrun's default is none), counted again from zero when the ranks start from a newer checkpoint (see
  ``harness.launcher.agent``), and a time to save after a signal;
* on one machine the address ``localhost``: the machine's own name need not lead anywhere;
* a death signal, so that a killed launcher leaves no orphans: launcher → agent → workers;
* SIGUSR1 and SIGUSR2 ignored, which would end torchrun;
* a file for what torchrun prints about itself. It is kept, and named in the last line, where the ranks have failed.
  ``--verbose`` shows it instead. The ranks' own output is never touched.

torchrun restarts workers whatever made them fail. If the records of the ranks say that a restart cannot help, the agent
is ended at once. If they say that the ranks have stopped, the launcher does not wait for the agent: on several machines
it would wait five minutes for the agent of the machine that was asked to stop, which has left already.

A stop request is noted before the signal is passed on: a SIGTERM alone may also mean that another rank has died.
"""

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self

from harness.errors import ConfigError, Stopped
from harness.launcher import outcome
from harness.launcher.agent import COUNTS_PROGRESS_VARIABLE, SUSPENDED_VARIABLE
from harness.launcher.fork_server import Preload
from harness.launcher.outcome import Outcome
from harness.runtime.console import print_error
from harness.runtime.signals import STOP_SIGNALS, die_with_parent, ignore_stop_signals

_LEAVING_SECONDS = 5.0  # that a rank which has stopped well may take to be gone
_DEFAULTS = {"--max-restarts": "3", "--shutdown-timeout": "60"}
VERBOSE, PRELOAD, SUSPENDED = "--verbose", "--preload", "--suspended-seconds"  # harness's own
_SUSPENDED_SECONDS = 60.0  # unless the user says otherwise
_FLAGS = frozenset({"--standalone", "--no-python", "--run-path", "--virtual-local-rank", "--module", VERBOSE})  # no value
_PROGRAM = "train CONFIG.yaml, doctor CONFIG.yaml, SCRIPT.py or -m MODULE"
_Process = subprocess.Popen[bytes]


def halves(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """torchrun's options, and the program with its own. Raises ``ConfigError`` where there is no program."""
    start = _first_word(arguments)
    options, program = list(arguments[:start]), list(arguments[start:])
    if program and program[0] == "--":
        program = program[1:]
    is_any = "--no-python" in _names(options)
    if program and not is_any and re.fullmatch(r"(.*/)?python[\d.]*", program[0]):
        program = program[1:]  # torchrun starts Python by itself
    if program and not is_any and program[0] == "harness":
        program = program[1:]
    if not program:
        raise ConfigError(f"harness launch: expected [torchrun options] -- {_PROGRAM}; found no program")
    name = program[0]
    is_known = name in ("train", "doctor", "-m") or _names(options) & {"-m", "--module"}
    if not is_any and not is_known and not os.path.isfile(name):
        found = f"there is no file {name!r}" if name.endswith(".py") else f"found {name!r}"
        raise ConfigError(f"harness launch: expected [torchrun options] -- {_PROGRAM}; {found}")
    return options, program


def _first_word(words: Sequence[str]) -> int:
    """Where the program begins: at "--", or at the first word that is neither an option nor the value of one."""
    before = ""
    for index, word in enumerate(words):
        is_value = before.startswith("-") and "=" not in before and _name(before) not in _FLAGS
        if word in ("--", "-m") or (not word.startswith("-") and not is_value):
            return index
        before = "" if is_value else word
    return len(words)


def _name(option: str) -> str:
    return option.partition("=")[0].replace("_", "-")


def _names(options: Sequence[str]) -> set[str]:
    return {_name(option) for option in options if option.startswith("-")}


def _given(torchrun_options: Sequence[str]) -> set[str]:
    """The options that somebody has given. Those in torchrun's own variables (PET_NNODES for --nnodes; Kubeflow sets them)
    count, too."""
    variables = {f"--{name[4:].lower().replace('_', '-')}" for name in os.environ if name.startswith("PET_")}
    return _names(torchrun_options) | variables


class Own(NamedTuple):
    """The options that torchrun does not know."""

    is_verbose: bool = False
    preload: tuple[str, ...] = ()
    suspended_seconds: float = _SUSPENDED_SECONDS

    @classmethod
    def of(cls, options: Sequence[str]) -> tuple[Self, list[str]]:
        """Them, and torchrun's. Raises ``ConfigError`` for a value that cannot be."""
        own, rest, words = cls(), [], iter(options)
        for word in words:
            name, equals, value = word.partition("=")
            if name in (PRELOAD, SUSPENDED) and not (value := value if equals else next(words, "")):
                raise ConfigError(f"harness launch: {name}: expected a value, found none")
            if word == VERBOSE:
                own = own._replace(is_verbose=True)
            elif name == PRELOAD:
                own = own._replace(preload=(*own.preload, value))
            elif name == SUSPENDED:
                own = own._replace(suspended_seconds=_seconds(name, value))
            else:
                rest.append(word)
        return own, rest


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"harness launch: {name}: expected seconds (0: never), found {value!r}")
    return seconds


def command(torchrun_options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The torchrun command line for ``harness`` with these arguments, or for a script."""
    given = _given(torchrun_options)
    options = [f"{name}={value}" for name, value in _DEFAULTS.items() if name not in given]
    if not given & {"--nnodes", "--rdzv-endpoint", "--rdzv-backend", "--master-addr", "--standalone"}:
        options.append("--standalone")
    if "--standalone" in {*given, *options} and "--local-addr" not in given:
        options.append("--local-addr=localhost")
    if "--nproc-per-node" not in given:
        options.append("--nproc-per-node=auto")  # one for each GPU, else one for each core
    program = ["-m", "harness", *arguments] if arguments[0] in ("train", "doctor") else arguments
    return [sys.executable, "-u", "-m", "harness.launcher.agent", *options, *torchrun_options, *program]


def launch(options: Sequence[str], arguments: Sequence[str], carry: Callable[[str], None] = lambda _path: None) -> int:
    """Runs ``harness``, or a script, under torchrun and returns the exit code of the launch.

    ``carry`` is called where the launch fails and a rank has kept a state on this machine, with the path to that.
    """
    own, torchrun_options = Own.of(options)
    is_script = os.path.isfile(arguments[0]) if arguments else False
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-"))
            if not own.is_verbose:
                Path(directory, outcome.TORCHRUN_LOG).touch()
        except OSError as error:
            raise ConfigError(
                f"harness launch: cannot create temporary files ({error}); set TMPDIR to a folder that can be written"
            ) from None
        environment = {
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
            **os.environ,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            outcome.DIRECTORY_VARIABLE: directory,
            COUNTS_PROGRESS_VARIABLE: "" if "--max-restarts" in _given(torchrun_options) else "1",
            SUSPENDED_VARIABLE: str(own.suspended_seconds),
            **Preload(own.preload, os.path.dirname(os.path.realpath(arguments[0])) if is_script else "").leave(),
        }
        agent = subprocess.Popen(  # noqa: S603  # the user's own command line
            command(torchrun_options, arguments),
            env=environment,
            start_new_session=True,  # so that a terminal's ^C comes through here, and only once
            preexec_fn=functools.partial(_prepare_agent, os.getpid()),  # noqa: PLW1509  # no threads have been started here
        )
        received = _forward_signals(agent, directory)
        has_stopped = _wait(agent, directory)
        ignore_stop_signals()
        interrupted = signal.SIGINT in received[1:]
        asked_to_stop = (bool(received) and not interrupted) or has_stopped
        outcomes = outcome.read_outcomes(directory)
        code = outcome.exit_code(agent.returncode, outcomes, asked_to_stop=asked_to_stop)
        code = 130 if interrupted and code == 1 else code
        if code and not interrupted and (path := outcome.kept_path(directory)):
            carry(path)
        is_verdict = any(each.verdict and each.exit_code == code for each in outcomes)
        if code and not is_verdict:  # where it is the doctor's, it has been printed
            end = _describe_end(code, agent.returncode, outcomes, directory)
            colour = "cyan" if code == Stopped.exit_code else "red"
            print_error(f"harness launch: exit code {code}: {end}", for_all=True, colour=colour)
        return code


def _wait(agent: _Process, directory: str) -> bool:
    """Waits for the end of the agent, ends it where it has nothing more to do, and says whether the ranks have stopped."""
    hopeless, stopped_time = False, math.inf
    while agent.poll() is None:
        time.sleep(outcome.POLL_SECONDS)
        found = outcome.read_outcomes(directory)
        if not hopeless and any(each.is_final for each in found):
            hopeless = True
            outcome.say_ended(directory, [outcome.EVERY_RANK])
            agent.terminate()  # once: a second one would start the agent's grace anew
        if any(each.exit_code == Stopped.exit_code for each in found):
            stopped_time = min(stopped_time, time.monotonic())
        if time.monotonic() > stopped_time + _LEAVING_SECONDS:
            agent.kill()  # while it waits for other machines it hears no other signal
    return stopped_time < math.inf


def _describe_end(code: int, torchrun: int, outcomes: Sequence[Outcome], directory: str) -> str:
    """Why the launch ended, for people: what the ranks have reported, else what is known of their deaths, or of torchrun."""
    if code == Stopped.exit_code:
        return "stopped as requested; start the same command again to continue"
    message = outcome.message(code, outcomes)
    if message and code in outcome.FINAL_EXIT_CODES:
        return message
    if code == 130:
        return "interrupted twice and ended at once; the steps since the last checkpoint will be trained again"
    log = _TorchrunLog.keep(directory)
    if death := outcome.death(directory):
        return f"{death}; mend the cause, or allow more (--max-restarts), and start the same command again{log.where}"
    return (message or f"no rank reported an error; torchrun ended with {torchrun}{log.last}") + log.where


class _TorchrunLog(NamedTuple):
    """What torchrun has printed about itself, for the last line: its own last line, and the file that holds all of it."""

    last: str = ""
    where: str = ""

    @classmethod
    def keep(cls, directory: str) -> Self:
        """Moves it to where it outlives the launch."""
        try:
            text = Path(directory, outcome.TORCHRUN_LOG).read_text(errors="replace").rstrip()
        except OSError:  # it was shown
            return cls()
        if not text:
            return cls()
        last = f": {text.splitlines()[-1]}"
        try:
            with tempfile.NamedTemporaryFile("w", prefix="harness-launch-", suffix=".log", delete=False) as kept:
                kept.write(text + "\n")
        except OSError as error:
            return cls(last, f" (torchrun's output was lost: {error})")
        return cls(last, f" (torchrun's output: {kept.name})")


def _prepare_agent(launcher: int) -> None:
    """Between fork and exec. Slurm sends its notice to every process of a job step; torchrun would die of it and leave its
    workers behind. They hear it all the same: they have handlers of their own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    die_with_parent(launcher)


def _forward_signals(agent: _Process, directory: str) -> list[int]:
    """Passes stop signals on to the agent; returns where those that have come are listed."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        # For a worker all of them mean the same, and the first one goes on as SIGTERM: of that an agent which does not
        # listen yet dies. A SIGINT would be an exception in the middle of its imports, some of which swallow it.
        if not received:
            outcome.say_stop(directory, signal.Signals(number).name)
            agent.terminate()
        elif number == signal.SIGINT:
            agent.kill()  # and with it its workers; whatever else it hears now makes it grant them their grace anew
        received.append(number)

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, forward)
    return received
