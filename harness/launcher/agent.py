"""``python -m harness.launcher.agent``: torchrun as it is, but that it tells ``harness launch`` and the ranks what it does.

``harness launch`` starts it. Python's garbage collector does not look through its imports: its ranks start after 1.2 s
instead of 1.7 s. Where the launcher gives a directory (``harness.launcher.outcome``):

* before torchrun ends ranks because another one has failed, here or elsewhere, it is noted there. A rank cannot tell that
  from a stop: both are SIGTERM;
* a restart is told of in one line, and the restarts before it are forgotten when the ranks have come further since.

On a terminal it takes the live line of its ranks away before it writes.

Both hang on methods of torchrun that are not public (``harness.torch_private``). Where a torch does not have them,
one line says what is missing.
"""

import functools
import os
import sys
from typing import TextIO, cast

from harness.launcher import outcome
from harness.runtime.console import Clearing
from harness.runtime.torch_import import import_torch

COUNTS_PROGRESS_VARIABLE = "HARNESS_RESTARTS_WITHOUT_PROGRESS"  # set where --max-restarts is harness's own


class Restarts:
    """How many restarts are left: all of them, when the ranks have started from a later step than ever before."""

    def __init__(self, allowed: int, *, renewed: bool) -> None:
        self._allowed = allowed
        self._renewed = renewed
        self._furthest: int | None = None

    def left(self, left: int, step: int | None) -> int:
        """As ``left``, of which ranks that went on from ``step`` have come to their end."""
        if step is None or (self._furthest is not None and step <= self._furthest):
            return left
        is_first, self._furthest = self._furthest is None, step
        return left if is_first or not self._renewed else self._allowed

    def describe(self, left: int) -> str:
        """What follows the failure of a rank."""
        kind = "in a row without a newer checkpoint" if self._renewed else "(--max-restarts)"
        if left:
            return f"a rank failed: restart {self._allowed - left + 1} of at most {self._allowed} {kind}"
        return f"a rank failed after {self._allowed} restarts {kind}: the launch ends"


def _watch(directory: str, *, renewed: bool) -> None:
    """Has torchrun note in the directory why it ends ranks, and count its restarts."""
    from harness import torch_private  # noqa: PLC0415  # imports torch

    restarts: Restarts | None = None

    def left(allowed: int, now: int) -> int:
        nonlocal restarts
        restarts = restarts or Restarts(allowed, renewed=renewed)
        now = restarts.left(now, outcome.resumed_step(directory))
        print(f"harness launch: {restarts.describe(now)}", file=sys.stderr, flush=True)
        return now

    torch_private.before_ranks_are_ended(functools.partial(outcome.say_ended, directory))
    torch_private.when_ranks_fail(left)


def main() -> None:
    """torchrun's own command line and exit code."""
    import_torch("torch.distributed.run")
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.run import main as torchrun  # noqa: PLC0415

    if (directory := os.environ.get(outcome.DIRECTORY_VARIABLE)) is not None:
        renewed = os.environ.pop(COUNTS_PROGRESS_VARIABLE, "") == "1"
        _watch(directory, renewed=renewed)
    try:
        torchrun()
    except SignalException:  # it has said which one
        sys.exit(1)


if __name__ == "__main__":
    if sys.stderr.isatty():
        sys.stderr = cast("TextIO", Clearing(sys.stderr))
    main()
