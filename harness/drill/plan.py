"""What the ranks of one launch of a drill are to do: how far to train, where to save, and how to die. Imports no torch."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

VARIABLE = "HARNESS_DRILL"  # names the file of a rank's plan

Control = Literal["", "random", "scheduler", "optimizer"]


@dataclass(frozen=True)
class Fault:
    """Something that is done to a run, once: ``what`` happens, ``when``, and in which ``start`` of the ranks, from 0."""

    what: Literal["kill", "kill launcher", "stop", "refuse save"]
    when: Literal["step", "begun", "saving", "evaluation", "epoch end"] = "step"
    step: int = 0
    """For ``step`` this step; for the others the first one after it at which it may be."""
    start: int = 0
    ranks: tuple[int, ...] = ()
    """The ranks that do it; empty: all."""


@dataclass(frozen=True)
class Plan:
    """One launch, as its ranks read it."""

    folder: str
    """Where the records go; a local one."""
    url: str
    steps: int
    every_steps: int
    faults: tuple[Fault, ...] = ()
    stop_at: int | None = None
    """The step at which the launch ends although it could go on."""
    leaves_out: Control = ""
    """What a resume is to leave out on purpose."""
    has_launcher: bool = True
    """Whether there is another process that is signalled for the ranks."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls) -> Self:
        """The plan that the environment names."""
        found = json.loads(Path(os.environ[VARIABLE]).read_text())
        faults = [Fault(**{**each, "ranks": tuple(each["ranks"])}) for each in found.pop("faults")]
        return cls(**found, faults=tuple(faults))

    @property
    def is_local(self) -> bool:
        """Whether the run is saved in a folder that its files can be looked for in."""
        return is_path(self.url)

    @property
    def events(self) -> Path:
        """The records of the run's events, by rank 0."""
        return Path(self.folder, "events.jsonl")

    def launcher_pid(self) -> int | None:
        """The launcher's process, which writes down who it is."""
        return int(Path(self.folder, "launcher").read_text()) if self.has_launcher else None

    def records(self, rank: int) -> Path:
        """The records of a rank: a line for each start, each loop, each step."""
        return Path(self.folder, f"rank-{rank}.jsonl")


def is_path(url: str) -> bool:
    """Whether a URL is a path."""
    return "://" not in url


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; the last one may be cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
