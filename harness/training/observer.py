"""Where a program that runs somebody else's training hears of its ``Run``: the doctor and the drill do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig
from harness.distributed.world import World

if TYPE_CHECKING:
    from harness.training.run import Run


class Observer:
    """Hears of a Run on each rank. This one does nothing: it is there where nobody listens."""

    def settings(self, config: RunConfig) -> RunConfig:
        """The settings that count, in place of those that the program has given."""
        return config

    def making(self, config: RunConfig, state: Mapping[str, Any], world: World | None, fresh: bool) -> None:
        """A Run is about to be made; nothing has been opened."""

    def begun(self, run: "Run") -> None:
        """A Run was made, and holds what it resumes from."""

    def looping(self, run: "Run") -> None:
        """A loop begins; the random states are those of the checkpoint."""

    def reached(self, run: "Run", metrics: Mapping[str, Any]) -> None:
        """A step boundary."""

    def saving(self, directory: str) -> None:
        """A save into a directory of the run's URL begins, on a rank that writes."""


current = Observer()
