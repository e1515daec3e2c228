"""Somebody's program, run in this process."""

import os
import runpy
import sys
from collections.abc import Sequence


def run_program(command: Sequence[str]) -> None:
    """Runs a script, or ``-m`` and a module, with its arguments, as Python would."""
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        sys.path.insert(0, "")
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    runpy.run_path(command[0], run_name="__main__")
