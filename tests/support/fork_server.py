"""Starts ``python -m harness`` many times without importing torch each time: from a process that has imported it once.

Each start is a process of its own, forked before anything of ours ran in it, with its own arguments, environment, working
directory and streams. What it shares is the import, which takes longer than most of what the tests look at.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_HERE = ("PYTHONPATH", "LD_PRELOAD", "OMP_NUM_THREADS")  # what is read while Python and torch start


def harness(*arguments: str, env: Mapping[str, str], cwd: Path | None, stdin: str, seconds: float) -> Any:
    """As ``subprocess.run`` of ``python -m harness``: the exit code and what it said."""
    asked_for, ours = ({name: each.get(name) for name in NOT_HERE} for each in (env, _environment()))
    assert asked_for == ours, "start a process of its own"
    with tempfile.TemporaryDirectory() as place:
        streams = [str(Path(place, name)) for name in ("stdin", "stdout", "stderr")]
        Path(streams[0]).write_text(stdin)
        order = {"arguments": arguments, "env": dict(env), "cwd": str(cwd or os.getcwd()), "streams": streams}
        code = _server().start({**order, "seconds": seconds})
        out, err = (Path(name).read_text() for name in streams[1:])
        return subprocess.CompletedProcess(arguments, code, out, err)


def _environment() -> dict[str, str]:
    from tests.support.cluster import environment

    return environment()


class _ForkServer:
    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert self.process.stdin
        assert self.process.stdout
        self.orders, self.codes = self.process.stdin, self.process.stdout
        atexit.register(self.end)

    def start(self, order: Mapping[str, Any]) -> int:
        self.orders.write(json.dumps(order) + "\n")
        self.orders.flush()
        return int(self.codes.readline())

    def end(self) -> None:
        self.orders.close()
        self.process.wait()
        self.codes.close()


@functools.cache
def _server() -> _ForkServer:
    return _ForkServer()


def _serve() -> dict[str, Any]:
    """Forks for each order and answers with the exit code; returns the order in a process that is to carry it out."""
    while line := sys.stdin.readline():
        order: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            return order
        pidfd = os.pidfd_open(child)
        if not select.select([pidfd], [], [], order["seconds"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(pidfd)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import select
    import signal

    from harness.runtime.torch_import import import_torch

    import_torch()
    order = _serve()
    write = os.O_WRONLY | os.O_CREAT
    for number, (name, flags) in enumerate(zip(order["streams"], (os.O_RDONLY, write, write), strict=True)):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # it lasts; the one that is there may have read ahead
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = ["harness", *order["arguments"]]
    sys.path[0] = os.getcwd()
    runpy.run_module("harness", run_name="__main__", alter_sys=True)
