"""``python -m harness.drill.inside``: a rank of a launch of a drill, which runs the user's program as Python would."""

import sys

from harness.drill.plan import Plan
from harness.runtime.scripts import run_program
from harness.runtime.torch_import import import_torch


def main() -> None:
    """Takes the program and its arguments, ``train CONFIG.yaml …`` or a script, from the command line."""
    plan, command = Plan.read(), sys.argv[1:]
    import_torch()
    from harness.drill.recorder import Recorder  # noqa: PLC0415  # torch: seconds, beside a collector that waits
    from harness.training import observer  # noqa: PLC0415

    observer.current = Recorder(plan)
    run_program(["-m", "harness", *command] if command[0] == "train" else command)


if __name__ == "__main__":
    main()
