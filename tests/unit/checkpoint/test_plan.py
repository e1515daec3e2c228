"""Who writes which box: planned once for a layout, from what each rank has said once."""

import contextlib
import time
from typing import Any

import pytest
import torch

from harness.checkpoint import plan
from harness.checkpoint.boxes import Cut, box_of
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.plan import SavePlan, Writers, nothing_is_steady, planned
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saver, SaveRequest
from harness.checkpoint.sharding import agreed
from harness.checkpoint.tree import Encoded, Placed
from harness.storage.store import open_store


def parts_of(rank: int, ranks: int, tensors: int = 5, more_rows: int = 0) -> dict[str, Encoded]:
    """What a rank has of a model whose tensors are cut by rows."""
    part = Encoded({})
    for index in range(tensors):
        rows = 1024 + 8 * (index % 7) + more_rows
        shape = (rows, 2) if index % 4 else (rows,)
        box = box_of(shape, (ranks,), [Cut(0)], (rank,))
        part.tensors[f"layers.{index}.weight"] = torch.zeros(box.shape)
        part.placed[f"layers.{index}.weight"] = Placed(shape, box)
    return {"model": part}


class Enough(Exception):
    pass


class Said:
    """What a rank says first, and what it says when it is asked for its boxes."""

    def __init__(self, parts: dict[str, Encoded]) -> None:
        self.boxes: Any = None
        with contextlib.suppress(Enough):
            agreed(self, parts)

    def all_gather_text(self, text: str) -> list[str]:
        self.text = text
        return [text]

    def all_gather(self, value: Any) -> list[Any]:
        self.boxes = value
        raise Enough


class Meeting:
    """Ranks that all have said what they have; and how many bytes one rank has sent in each answer."""

    def __init__(self, everyone: list[dict[str, Encoded]]) -> None:
        self.said, self.sent = [*map(Said, everyone)], list[int]()

    def all_gather_text(self, text: str) -> list[str]:
        self.sent.append(len(text))
        return [each.text for each in self.said]

    def all_gather(self, value: Any) -> list[Any]:
        self.sent.append(len(repr(value)))
        return [each.boxes for each in self.said]


def test_a_second_save_plans_nothing_anew(tmp_path, monkeypatch):
    """Nor does it ask a rank for its boxes: each sends a checksum, and nothing else until its layout has changed."""
    made = []

    class Counted(SavePlan):
        def __init__(self, *given: Any) -> None:
            made.append(given)
            super().__init__(*given)

    monkeypatch.setattr(plan, "SavePlan", Counted)
    catalog = Catalog(open_store(str(tmp_path / "run")))
    writers = Writers((0, 1, 2), 2)  # this one waits for nobody
    saver = Saver(catalog, catalog.attempts.claim({}), (), Retention(None), 1 << 30, 0, writers=writers)
    sharding, questions = None, []
    for step, more_rows in enumerate([0, 0, 0, 8, 8], start=1):
        everyone = [parts_of(rank, 3, more_rows=more_rows) for rank in writers.ranks]
        meeting = Meeting(everyone)
        sharding, _ = agreed(meeting, everyone[2], sharding)
        saver.save(everyone[2], SaveRequest(step, directory=saver.new_directory(step), sharding=sharding))
        questions.append(len(meeting.sent))
        assert meeting.sent[0] < 100
    assert questions == [2, 1, 1, 2, 1]
    assert len(made) == 2


@pytest.mark.soak
def test_many_ranks_are_planned_for_in_seconds():
    """The boxes of 200 ranks for 1,000 tensors, on one core: what all have said, who writes what, and, on the rank that
    commits, where each box will be."""
    ranks = 200
    everyone = [parts_of(rank, ranks, 1000) for rank in range(ranks)]
    meeting = Meeting(everyone)
    began = time.process_time()  # of this process alone: the machine may be busy
    sharding, _ = agreed(meeting, everyone[0])
    found = planned(None, everyone[0], 1 << 30, Writers((*range(ranks),)), nothing_is_steady, sharding)
    boxes = found.boxes("model")
    seconds = time.process_time() - began
    print(f"{seconds:.2f} s, {sum(meeting.sent)} bytes from each rank")
    assert len(meeting.sent) == 2
    assert sum(len(each.boxes) for each in boxes.values()) == sum(len(each) for each in sharding.boxes.values()) > 150_000
    assert seconds <= 3
