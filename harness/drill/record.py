"""What the ranks of a launch have written down, and where two such records differ."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.drill.plan import Plan, read_records

Line = Mapping[str, Any]

KINDS = ("samples", "inputs", "metrics", "lr", "parts")  # what counts, in the order in which a step comes to it
_KINDS_OF_HALF = KINDS[3:]  # of a step that was trained before a death, and evaluated after it


@dataclass(frozen=True)
class Difference:
    """The first step at which a run is not as the other was, on its first such rank."""

    rank: int
    step: int
    start: int
    """How many starts of the rank came before."""
    found: Line
    expected: Line
    kinds: Mapping[str, list[str]]
    """What differs, by kind: names of metrics, paths of the state."""

    def __str__(self) -> str:
        what = [self._in_words(kind, names) for kind, names in self.kinds.items()]
        return f"step {self.step}, rank {self.rank}: {'; '.join(what)}"

    def _in_words(self, kind: str, names: Sequence[str]) -> str:
        found, expected = self.found[kind], self.expected[kind]
        match kind:
            case "metrics":
                return ", ".join(f"{name} {found.get(name)} in place of {expected.get(name)}" for name in names)
            case "parts":
                return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            case "lr":
                return f"learning rate {found} in place of {expected}"
        return {"samples": "other samples", "inputs": "other inputs of the model"}[kind]


@dataclass
class Record:
    """The record of one run, over all of its starts."""

    lines: Sequence[Sequence[Line]]  # by rank
    events: Sequence[Line] = ()

    @classmethod
    def of(cls, plan: Plan) -> "Record":
        paths = sorted(Path(plan.folder).glob("rank-*.jsonl"), key=lambda path: int(path.stem[5:]))
        return cls([read_records(path) for path in paths], read_records(plan.events))

    @property
    def ranks(self) -> int:
        return len(self.lines)

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.of_rank(0)), default=0)

    def of_rank(self, rank: int) -> list[Line]:
        """The steps of a rank, in order; some of them twice."""
        return [line for line in self.lines[rank] if line["at"] == "step"] if rank < self.ranks else []

    def at(self, rank: int, step: int) -> Line | None:
        """What a rank did in a step, the first time."""
        return next((line for line in self.of_rank(rank) if line["step"] == step), None)

    def all_at(self, what: str) -> list[Line]:
        """The lines of all ranks that are no steps: ``begun``, ``loop``, ``fault``; by time."""
        return sorted((line for lines in self.lines for line in lines if line["at"] == what), key=lambda line: line["time"])

    @property
    def deadly(self) -> list[Line]:
        """The faults that have ended ranks, or asked them to stop."""
        return [line for line in self.all_at("fault") if line["what"] != "refuse save"]

    def resumed_from(self, rank: int, start: int) -> int:
        """The step from which a start of a rank went on."""
        return next((line["step"] for line in self.lines[rank] if (line["at"], line["start"]) == ("begun", start)), 0)

    @property
    def evaluated(self) -> list[int]:
        """The steps with forward passes in ``eval()``."""
        return [line["step"] for line in self.of_rank(0) if line["evaluations"]]

    @property
    def epoch_ends(self) -> list[int]:
        """The steps at whose end an epoch does."""
        own = self.of_rank(0)
        return [line["step"] for before, line in itertools.pairwise(own) if line["epoch"] != before["epoch"]]

    def differences(self, other: "Record", noise: frozenset[str] = frozenset()) -> Iterator[Difference]:
        """Where this run, step by step, is not as ``other`` was; the earliest first."""
        entries = [(line, rank) for rank in range(self.ranks) for line in self.of_rank(rank)]
        for line, rank in sorted(entries, key=_order):
            expected = other.at(rank, line["step"])
            if expected is not None and (kinds := _kinds(line, expected, noise)):
                yield Difference(rank, line["step"], line["start"], line, expected, kinds)

    def noise(self, other: "Record") -> frozenset[str]:
        """The names of what is not the same in two runs anyway, and changes nothing: the program's clocks and process ids,
        and generators that nobody has seeded and nobody draws from."""
        found = set()
        for rank in range(self.ranks):
            for line in self.of_rank(rank):
                twin = other.at(rank, line["step"]) or line
                found |= {name for name, value in line["reach"].items() if twin["reach"].get(name) != value}
                generators = [path for path in line["parts"] if path.startswith("random/")]
                found |= {path for path in generators if twin["parts"].get(path) != line["parts"][path]}
        return frozenset(found)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """A metric of rank 0 over the steps, in the order in which they were trained."""
        return [(line["step"], line["metrics"][metric]) for line in self.of_rank(0) if metric in line["metrics"]]

    def samples(self) -> dict[int, list[int]]:
        """The samples that all ranks together have trained in each step, the last time."""
        found: dict[int, dict[int, list[int]]] = {}
        for rank in range(self.ranks):
            for line in self.of_rank(rank):
                found.setdefault(line["step"], {})[rank] = line["samples"]
        return {step: sorted(sample for own in by_rank.values() for sample in own) for step, by_rank in found.items()}


def _order(entry: tuple[Line, int]) -> tuple[int, int, int]:
    line, rank = entry
    return line["step"], line["start"], rank


def _kinds(line: Line, expected: Line, noise: frozenset[str]) -> dict[str, list[str]]:
    """What differs between two lines of one step."""
    found: dict[str, list[str]] = {}
    for kind in _KINDS_OF_HALF if line["is_half"] else KINDS:
        one, other = line[kind], expected[kind]
        if isinstance(one, Mapping):
            names = [
                name
                for name in dict.fromkeys([*one, *other])
                if _word(one.get(name)) != _word(other.get(name)) and name not in noise
            ]
        else:
            names = [kind] if _word(one) != _word(other) else []
        if names:
            found[kind] = names
    return found


def _word(value: Any) -> str:
    return json.dumps(value)  # in which NaN is equal to itself
