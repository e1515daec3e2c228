"""Why a run that was killed is not the one that was not: from the first difference to a sentence that says what to change.

Each look knows one kind of mistake. Those that leave most of a trace are asked first. A cause is the most likely one, and no
proof.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.drill.record import Difference, Line, Record

_INTO_STATE = "put it into the state of the run, or compute it from run.global_step"


@dataclass(frozen=True)
class _Case:
    """A difference, and what is known of it."""

    difference: Difference
    reference: Record
    run: Record
    noise: frozenset[str]

    @property
    def step(self) -> int:
        return self.difference.step

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn otherwise."""
        return any(path.startswith("random/") for path in self.difference.kinds.get("parts", ()))

    @property
    def first(self) -> Line:
        """The first step of the start in which the difference is: what is wrong there is no consequence."""
        own = self.run.of_rank(self.difference.rank)
        return next(line for line in own if line["start"] == self.difference.start)

    @property
    def uninterrupted(self) -> list[Line]:
        """The steps of the rank in the run without a death."""
        return self.reference.of_rank(self.difference.rank)


def cause(difference: Difference, reference: Record, run: Record, noise: frozenset[str]) -> str:
    """The most likely cause of a difference, and what to do."""
    case = _Case(difference, reference, run, noise)
    looks: tuple[Callable[[_Case], str], ...] = (_seeds, _evaluation, _batch, _variable, _random_numbers)
    unknown = "not known; look for what a step uses and nothing in the state has"
    return next((found for look in looks if (found := look(case))), unknown)


def _batch(case: _Case) -> str:
    """Another batch than the uninterrupted run has in this step."""
    kinds, found, step = case.difference.kinds, case.difference.found, case.step
    if not kinds.keys() & {"samples", "inputs"}:
        return ""
    if found["samples"] and "samples" not in kinds:
        if any(not (each.is_large or each.is_fixed) for each in _suspects(case)):
            return ""  # the program has changed what the loader gave it
        some = ", ".join(map(str, found["samples"][:3]))
        return (
            f"the data of a sample is another one each time it is fetched (samples {some}, …). Let the data set draw from "
            "the generators of torch, NumPy or Python, which a harness.Loader seeds for each sample, and keep nothing itself"
        )
    key = "samples" if found["samples"] else "inputs"
    same = [line["step"] for line in case.uninterrupted if line[key] == found[key]]
    earlier, later = [each for each in same if each < step], [each for each in same if each > step]
    if earlier and _begins_epoch(case, earlier[0]):
        return (
            f"the data starts over: step {step} has the batch of step {earlier[0]}, and nothing in the state knows the "
            'position. Add the loader: state={..., "loader": loader} (harness.Loader, or torchdata\'s StatefulDataLoader)'
        )
    if earlier or later:
        other = (later or earlier)[0]
        what = "skips a batch" if later else "trains a batch twice"
        return (
            f"a restart {what}: step {step} has the batch of step {other}. Fetch each batch within the step that trains it, "
            "not before the loop and not at the end of the step before"
        )
    return (
        f"step {step} has a batch that the uninterrupted run never has: each start draws another order of the data. Use a "
        "harness.Loader, or put a sampler or loader with a state of its own into the state of the run"
    )


def _begins_epoch(case: _Case, step: int) -> bool:
    before, line = (case.reference.at(case.difference.rank, each) for each in (step - 1, step))
    return before is None or (line is not None and line["epoch"] != before["epoch"])


def _seeds(case: _Case) -> str:
    """Generators that are seeded after Run has restored them."""
    if not case.draws or not case.first["seeded"]:
        return ""
    return (
        f"{case.first['seeded'][0]} seeds a generator that Run has restored: each start draws the same numbers again. Seed "
        "before Run is made"
    )


def _evaluation(case: _Case) -> str:
    """An evaluation that only one of the two runs has made, and that draws random numbers."""
    found, expected = case.difference.found["evaluations"], case.difference.expected["evaluations"]
    if not case.draws or bool(found) == bool(expected):
        return ""
    who = "resumed" if found else "uninterrupted"
    return (
        f"an evaluation before step {case.step} draws random numbers, and only the {who} run has made it. Evaluate before "
        "run.step(), or restore the generators after it"
    )


def _variable(case: _Case) -> str:
    """Something that the program holds, and the state does not."""
    suspects = sorted(_suspects(case), key=lambda each: (each.is_fixed, each.is_large, len(each.name)))
    if not suspects:
        return ""
    name, values = suspects[0].name, suspects[0].values
    others = f" (the next suspects: {', '.join(each.name for each in suspects[1:3])})" if suspects[1:] else ""
    if name.endswith("'s hooks"):
        return f"{name} differ in number: {values}. Register hooks before Run is made, at every start{others}"
    if suspects[0].is_fixed:
        return (
            f"code that runs only at the first start sets {name}: {values}. Let every start do it, or {_INTO_STATE}{others}"
        )
    return f"{name} starts over: {values}. No state_dict of the state has it; {_INTO_STATE}{others}"


@dataclass(frozen=True)
class _Suspect:
    """A variable that is another one when the loop begins again, in two words."""

    name: str
    found: str
    expected: str
    is_fixed: bool
    """Whether the uninterrupted run never changes it."""

    @property
    def is_large(self) -> bool:
        """Whether it is more than a number: a number says most, and comes first."""
        return self.expected.startswith(("tensor", "array", "list", "set", "tuple", "deque"))

    @property
    def values(self) -> str:
        if self.is_large:
            return "it is another one than in the uninterrupted run"
        return f"it is {self.found} after the resume, and {self.expected} in the uninterrupted run"


def _suspects(case: _Case) -> Iterator[_Suspect]:
    """The variables that are there when the loop begins again, and differ from those of the run that went on."""
    rank, start = case.difference.rank, case.difference.start
    begun = next((line for line in case.run.all_at("loop") if (line["rank"], line["start"]) == (rank, start)), None)
    expected = case.reference.at(rank, begun["step"]) if begun else None
    if begun is None or expected is None:
        return
    first, last = case.uninterrupted[0]["reach"], case.uninterrupted[-1]["reach"]
    for name, word in expected["reach"].items():
        found = begun["reach"].get(name)
        if found not in (None, word) and name not in case.noise and not word.startswith("generator"):
            yield _Suspect(name, found, word, is_fixed=first.get(name) == word == last.get(name))


def _random_numbers(case: _Case) -> str:
    """Random numbers that only one of the two runs has drawn."""
    if not case.draws:
        return ""
    return (
        "other random numbers are drawn than in the uninterrupted run, by code that runs at each start or between two "
        "steps. Let it draw from a generator of its own, or before Run is made"
    )
