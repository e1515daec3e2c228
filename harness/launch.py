"""``harness launch``: stock torchrun with what must be set, and an exit code that launchers can act on.

It adds to torchrun's command line only what is not there, and to the environment:

* ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: otherwise (torch 2.13) a node that joins a running job hangs it;
* a restart budget (torchrun's default is none) and a time to save after a signal;
* a death signal, so that a killed launcher leaves no orphans: launcher → agent → workers;
* deaf ears for SIGUSR1 and SIGUSR2, of which torchrun would die.

torchrun restarts workers whatever made them fail. When the records of the ranks say that starting again cannot help, the
agent is ended at once. And when they say that the ranks have stopped, the agent is not waited for: on several machines it
would wait five minutes for that of the machine which was asked to stop, and which has left without a word.
"""

import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from harness import outcome
from harness.errors import Stopped
from harness.signals import STOP_SIGNALS, die_with_parent, ignore_stop_signals

_LEAVING_SECONDS = 5.0  # that a rank which has stopped well may take to be gone
_DEFAULTS = {"--max-restarts": "3", "--shutdown-timeout": "60"}


def command(torchrun_options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The torchrun command line for ``harness`` with these arguments, or for a script.

    What stands in torchrun's own variables (PET_NNODES for --nnodes; Kubeflow sets them) counts as given.
    """
    given = {option.partition("=")[0].replace("_", "-") for option in torchrun_options if option.startswith("--")}
    given |= {f"--{name[4:].lower().replace('_', '-')}" for name in os.environ if name.startswith("PET_")}
    options = [f"{name}={value}" for name, value in _DEFAULTS.items() if name not in given]
    if not given & {"--nnodes", "--rdzv-endpoint", "--rdzv-backend", "--master-addr", "--standalone"}:
        options.append("--standalone")
    if "--nproc-per-node" not in given:
        options.append("--nproc-per-node=auto")  # one for each GPU, else one for each core
    program = ["-m", "harness", *arguments] if arguments[0] in ("train", "doctor") else arguments
    return [sys.executable, "-m", "harness.agent", *options, *torchrun_options, *program]


def launch(torchrun_options: Sequence[str], arguments: Sequence[str]) -> int:
    """Runs ``harness``, or a script, under torchrun and returns the exit code of the launch."""
    with tempfile.TemporaryDirectory(prefix="harness-") as directory:
        environment = {
            **os.environ,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            outcome.DIRECTORY_VARIABLE: directory,
        }
        agent = subprocess.Popen(  # noqa: S603  # the user's own command line
            command(torchrun_options, arguments),
            env=environment,
            start_new_session=True,  # so that a terminal's ^C comes through here, and only once
            preexec_fn=functools.partial(_prepare_agent, os.getpid()),  # noqa: PLW1509  # no threads have been started here
        )
        received = _forward_signals(agent)
        hopeless, stopped_time = False, math.inf
        while agent.poll() is None:
            time.sleep(outcome.POLL_SECONDS)
            found = outcome.read(directory)
            if not hopeless and any(each.is_final for each in found):
                hopeless = True
                agent.terminate()  # once: a second one would start the agent's grace anew
            if any(each.exit_code == Stopped.exit_code for each in found):
                stopped_time = min(stopped_time, time.monotonic())
            if time.monotonic() > stopped_time + _LEAVING_SECONDS:
                agent.kill()  # while it waits for other machines it hears no other signal
        ignore_stop_signals()
        interrupted = signal.SIGINT in received[1:]
        asked_to_stop = (bool(received) and not interrupted) or stopped_time < math.inf
        outcomes = outcome.read(directory)
        code = outcome.exit_code(agent.returncode, outcomes, asked_to_stop=asked_to_stop)
        failed = code not in (0, Stopped.exit_code)
        if failed and (message := outcome.message(code, outcomes)):  # torchrun has its say after the ranks, and at length
            print(f"harness launch: exit code {code}: {message}", file=sys.stderr)
        return 130 if interrupted and code == 1 else code


def _prepare_agent(launcher: int) -> None:
    """Between fork and exec. Slurm sends its notice to every process of a job step; torchrun would die of it and leave its
    workers behind. They hear it all the same: they have handlers of their own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    die_with_parent(launcher)


def _forward_signals(agent: "subprocess.Popen[bytes]") -> list[int]:
    """Passes stop signals on to the agent; returns where those that have come are listed."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        # For a worker all of them mean the same, and the first one goes on as SIGTERM: of that an agent which does not
        # listen yet dies. A SIGINT would be an exception in the middle of its imports, some of which swallow it.
        if not received:
            agent.terminate()
        elif number == signal.SIGINT:
            agent.kill()  # and with it its workers; whatever else it hears now makes it grant them their grace anew
        received.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    return received
