"""Boxes: which part of a tensor each rank of a mesh has."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.boxes import Box, Cut, box_of, spans, why_not_tiles
from harness.checkpoint.format import Boxes, box_text
from harness.errors import Corrupt

SIZES = (0, 1, 2, 3, 5, 7, 8, 13)


def chunk(size: int, count: int, index: int) -> tuple[int, int]:
    """Where ``torch.chunk`` begins its piece of so many, and how long it is. Past the last one there is nothing."""
    pieces = torch.arange(size).chunk(count)
    if size == 0 or index >= len(pieces):
        return size, 0
    return int(pieces[index][0]), len(pieces[index])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_one_cut_is_that_of_chunk(ranks):
    """Uneven ones, empty ones, and tensors that are smaller than the world."""
    for size, rank in itertools.product(SIZES, range(ranks)):
        start, length = chunk(size, ranks, rank)
        assert box_of((size, 3), (ranks,), [Cut(0)], (rank,)) == Box((start, 0), (length, 3))


def test_two_cuts_of_one_dimension_are_undone_in_their_order():
    """Tensor parallelism cuts first, on the inner dimension of the mesh, and fully_shard cuts what that has left: the case
    in which torch's own offsets are wrong. The items themselves say where they are."""
    for data, tensor, size in itertools.product(range(1, 5), range(1, 5), (1, 2, 5, 7, 13, 16)):
        for row, column in itertools.product(range(data), range(tensor)):
            there = torch.arange(size).chunk(tensor)
            there = there[column].chunk(data) if column < len(there) else ()
            items = there[row].tolist() if row < len(there) else []
            found = box_of((size,), (data, tensor), [Cut(0, after=tensor), Cut(0)], (row, column))
            assert list(range(found.offset[0], found.offset[0] + found.shape[0])) == items


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    mesh=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_the_boxes_of_all_ranks_tile_the_tensor(shape, mesh, data):
    """Whatever cuts what: each item is in one box, and ranks that have the same items have the same box."""
    cuts = [data.draw(st.none() | st.integers(0, len(shape) - 1).map(Cut)) for _ in mesh]
    boxes = {box_of(shape, mesh, cuts, each) for each in itertools.product(*map(range, mesh))}
    assert why_not_tiles(shape, tuple(sorted(box for box in boxes if box.items))) is None


def test_what_does_not_tile_is_named():
    """A hole, an overlap, a box that is not in the tensor."""
    whole, left, right = Box((0, 0), (4, 6)), Box((0, 0), (4, 3)), Box((0, 3), (4, 3))
    assert why_not_tiles((4, 6), (left, right)) is None
    assert why_not_tiles((4, 6), (whole,)) is None
    assert why_not_tiles((4, 6), (left,)) == "12 items are in none of them"
    assert why_not_tiles((4, 6), (left, whole)) == "[0:4, 0:3] and [0:4, 0:6] overlap"
    assert why_not_tiles((4, 6), (left, Box((0, 3), (5, 3)))) == "[0:5, 3:6] is not in a tensor of shape [4, 6]"
    # As many items as there are, in the wrong places.
    assert why_not_tiles((4, 6), (left, Box((0, 2), (4, 3)))) == "[0:4, 0:3] and [0:4, 2:5] overlap"


def test_cuts_that_nothing_explains_are_refused():
    """Rather than guessed."""
    with pytest.raises(ValueError, match="none multiply to 4"):
        box_of((8,), (2, 2), [Cut(0, after=4), Cut(0)], (0, 0))


@given(shape=st.lists(st.integers(1, 5), max_size=3).map(tuple), data=st.data())
@settings(deadline=None, max_examples=150)
def test_spans_are_the_items_in_order(shape, data):
    """A stretch of a file, as boxes of the tensor that lies there."""
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    items = np.arange(size).reshape(shape)
    found = [items[box.within(Box.whole(shape))].ravel() for box in spans(shape, start, stop)]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(start, stop))


@given(dims=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=100)
def test_what_two_boxes_have_in_common(dims, data):
    """Is what both have, item by item."""
    shape = (6,) * dims

    def drawn() -> Box:
        starts = [data.draw(st.integers(0, 5)) for _ in range(dims)]
        return Box(tuple(starts), tuple(data.draw(st.integers(1, 6 - start)) for start in starts))

    one, other = drawn(), drawn()
    marks = np.zeros(shape, int)
    for box in (one, other):
        marks[box.within(Box.whole(shape))] += 1
    common = one.common(other)
    both = np.zeros(shape, int)
    if common is not None:
        both[common.within(Box.whole(shape))] = 1
    assert ((marks == 2) == (both == 1)).all()


# --- in a manifest ---------------------------------------------------------------------------------------------------


def test_boxes_come_back_from_a_manifest():
    """Each with the number of its file."""
    places = {Box((0, 0), (2, 3)): 1, Box((2, 0), (2, 3)): 0}
    boxes = Boxes("float32", [4, 3], [f"{box_text(box)}@{file}" for box, file in places.items()])
    assert boxes.boxes == ["0,0:2,3@1", "2,0:2,3@0"]
    boxes.check("w", 2)
    assert boxes.places == places


@pytest.mark.parametrize(
    "forged",
    [
        ["0,0:2,3@0"],
        ["0,0:2,3@0", "1,0:3,3@0"],
        ["0,0:2,3@0", "2,0:3,3@0"],
        ["0,0:2,3@0", "2,0:2,3@2"],
        ["0,0:4,3@0", "0,0:4,3@0"],
        ["0,0:2,3@0", "2:2@0"],
        ["0,0:2,3@0", "-1,0:2,3@0"],
        ["0,0:2,3@0", "2,0:2,3"],
        ["0,0:0,3@0", "0,0:4,3@0"],
        [7],
        [],
        "0,0:4,3@0",
    ],
)
def test_boxes_that_lie_are_corrupt(forged):
    """A hole, an overlap, beyond the tensor, in no file, twice, of other dimensions, no boxes at all."""
    with pytest.raises(Corrupt, match="w: impossible boxes"):
        Boxes("float32", [4, 3], forged).check("w", 2)


def test_boxes_beyond_all_measure_are_refused_quickly():
    """A manifest may say anything; it must not keep a reader busy for hours."""
    left = [f"{row},0:1,1000@0" for row in range(1000)]
    right = [f"0,{1000 + column}:1000,1@0" for column in range(1000)]
    with pytest.raises(Corrupt, match="too irregular"):
        Boxes("uint8", [1000, 2000], left + right).check("w", 1)
