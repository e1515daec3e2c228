"""From the first difference between two runs to its cause: records made by hand."""

from typing import Any

import pytest

from harness.drill.causes import cause
from harness.drill.record import Record

STEPS, RESUMED = 12, 5


def line(step: int, start: int = 0, **values: Any) -> dict[str, Any]:
    """What a step of a right run leaves."""
    made = {"at": "step", "step": step, "start": start, "time": float(step + 100 * start), "epoch": (step - 1) // 6}
    made |= {"metrics": {"loss": 1 / step}, "lr": [0.1], "samples": [step, step + 50], "inputs": f"input {step}"}
    made |= {
        "parts": {"model/weight": f"weight {step}", "random/torch": f"state {step}"},
        "evaluations": 0,
        "seeded": [],
        "is_half": False,
    }
    return {**made, "reach": {"main: step": str(step), "model.0.p": "0.5"}, **values}


def run(**changes: Any) -> Record:
    """A run that died after step 8, and went on from step 5; ``changes`` are functions of the step, after the resume."""
    first = [line(step) for step in range(1, 9)]
    second = []
    for step in range(RESUMED + 1, STEPS + 1):
        own = {name: change(step) for name, change in changes.items()}
        second.append(
            line(
                step,
                1,
                **{key: {**line(step)[key], **value} if isinstance(value, dict) else value for key, value in own.items()},
            )
        )
    begun = [{"at": "begun", "step": step, "start": start, "time": 100.0 * start} for start, step in enumerate((0, RESUMED))]
    reach = changes["reach"](RESUMED) if "reach" in changes else {}
    loop = {
        "at": "loop",
        "step": RESUMED,
        "start": 1,
        "rank": 0,
        "time": 100.0,
        "reach": {**line(RESUMED)["reach"], **reach},
    }
    return Record([[begun[0], *first, begun[1], loop, *second]])


REFERENCE = Record([[line(step) for step in range(1, STEPS + 1)]])


def found(reference: Record = REFERENCE, noise: frozenset[str] = frozenset(), **changes: Any) -> str:
    other = run(**changes)
    difference = next(other.differences(reference, noise))
    return cause(difference, reference, other, noise)


def test_a_right_run_has_no_difference():
    assert list(run().differences(REFERENCE)) == []


OTHER = {"parts": lambda step: {"random/torch": "other"}}
WORSE = {"metrics": lambda step: {"loss": 0}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": lambda step: [step + 1], "inputs": lambda step: f"input {step + 1}"}, "each start draws another order"),
        ({"samples": lambda step: [step + 1, step + 51]}, "skips a batch: step 6 has the batch of step 7"),
        ({"samples": lambda step: [step - 1, step + 49]}, "trains a batch twice: step 6 has the batch of step 5"),
        ({"samples": lambda step: [step - 5, step + 45]}, "the data starts over: step 6 has the batch of step 1"),
        ({"inputs": lambda step: f"other {step}"}, "the data of a sample is another one"),
        (
            OTHER | {"seeded": lambda step: ["torch.manual_seed (a.py:3)"]},
            "torch.manual_seed (a.py:3) seeds",
        ),
        (OTHER | {"evaluations": lambda step: 1}, "only the resumed run has made it"),
        (OTHER, "other random numbers are drawn"),
        (WORSE | {"reach": lambda step: {"model.0.p": "0.1"}}, "only at the first start sets model.0.p"),
        (WORSE, "not known"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(changes, words):
    assert words in found(**changes)


def counting(step: int) -> dict[str, str]:
    return {"main: count": str(step), "main: t": f"clock {step}", "main: loss": f"tensor {step}"}


def test_a_counter_that_starts_over_is_named_before_its_consequences():
    """Neither a clock, which differs in any two runs, nor the loss, which differs because of it."""
    reference = Record([[line(step, reach=counting(step)) for step in range(1, STEPS + 1)]])
    changed = {
        "metrics": lambda step: {"loss": 0},
        "reach": lambda step: counting(step - RESUMED),
    }
    text = found(reference, frozenset({"main: t"}), **changed)
    assert text.startswith("main: count starts over: it is 0 after the resume, and 5 in the uninterrupted run.")


def test_what_is_not_the_same_in_two_runs_anyway_is_no_difference():
    """Clocks, and generators that nobody has seeded; but not the model."""
    again = Record(
        [[line(step, parts={"model/weight": f"weight {step}", "random/torch": "x"}) for step in range(1, STEPS + 1)]]
    )
    noise = REFERENCE.noise(again)
    assert noise == {"random/torch"}
    assert list(again.differences(REFERENCE, noise)) == []
    assert next(again.differences(REFERENCE)).step == 1
