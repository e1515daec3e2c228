"""What all ranks decide together at a step boundary: to stop, or to save."""

from dataclasses import dataclass

from harness.distributed.world import Maximum, World
from harness.errors import ConfigError
from harness.runtime.preemption import Watcher
from harness.runtime.signals import StopRequest


@dataclass(frozen=True)
class Decision:
    """What was agreed on since the last step boundary. The same on all ranks."""

    stop: bool = False
    save: bool = False
    settled: int = 0  # the step of rank 0's newest save that has ended, twice, and 1 if it is durable; 0: nothing new


class NoLoop:
    """Between two loops."""

    def decide(self, *, save_is_wanted: bool, settled: int = 0) -> Decision:  # noqa: ARG002
        raise ConfigError("run.step() was called outside of a loop over run.epochs() or run.steps(); call it inside")

    def finish(self) -> None:
        """Nothing is under way."""


class Agreement:
    """Makes one decision of all ranks' stop requests, notices from the cloud, and wishes for a save."""

    def __init__(self, world: World, stop: StopRequest, watcher: Watcher) -> None:
        self._rounds = Maximum(world, wants=3)
        self._stop, self._watcher = stop, watcher

    def decide(self, *, save_is_wanted: bool, settled: int = 0) -> Decision:
        """What is to be done at this step boundary; this rank's wish counts now or at one of the next ones. ``settled`` is
        that of ``Decision``, as far as this rank knows."""
        if (notice := self._watcher.poll()) is not None and notice.kind == "stop":
            self._stop.ask(notice.text)
        stop, save, settled = self._rounds.exchange(bool(self._stop), save_is_wanted, settled)
        if stop:
            self._stop.settled = "stop"
        return _DECISIONS[bool(stop), bool(save)] if not settled else Decision(bool(stop), bool(save), settled)

    def finish(self) -> None:
        """Waits for what is under way, after the last step."""
        self._rounds.finish()


_DECISIONS = {(stop, save): Decision(stop, save) for stop in (False, True) for save in (False, True)}
