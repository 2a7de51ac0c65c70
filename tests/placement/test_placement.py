"""Splits and views, against brute force: every element is marked with its position on the axis."""

from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import shapes, splits, views

from mst_fx.placement.placement import Split, refinements, through_view
from mst_fx.verify.by_chunks import all_splits


def marks(split, shape):
    """For each element its position on the axis."""
    length = split.axis_length(shape)
    behind = split.inner * prod(shape[split.dim + 1 :])
    return (torch.arange(prod(shape)) // behind % length).reshape(shape)


@st.composite
def viewed_splits(draw):
    before = draw(shapes())
    return draw(splits(before)), before, draw(views(before))


def test_axis_length_leaves_out_merged_factors():
    assert Split(1, outer=2, inner=3).axis_length([5, 24]) == 4


def test_moved_keeps_the_factors():
    assert Split(1, 2, 3).moved(0) == Split(0, 2, 3)


def test_chunk_shape_keeps_the_factors():
    assert Split(1, outer=2, inner=3).chunk_shape([5, 24], 1) == [5, 6]


@given(st.data())
def test_chunk_shape_counts_the_marked_elements(data):
    shape = data.draw(shapes())
    split = data.draw(splits(shape))
    length = data.draw(st.integers(1, split.axis_length(shape)))
    assert prod(split.chunk_shape(shape, length)) == (marks(split, shape) < length).sum()


@pytest.mark.parametrize(
    ("split", "before", "after", "expected"),
    [
        (Split(1), (3, 4, 5), (12, 5), Split(0, outer=3)),
        (Split(0), (3, 4, 5), (12, 5), Split(0, inner=4)),
        (Split(1), (2, 3, 4), (24,), Split(0, outer=2, inner=4)),
        (Split(0, outer=3), (12, 5), (3, 4, 5), Split(1)),
        (Split(0, inner=4), (12, 5), (3, 4, 5), Split(0)),
        (Split(0), (4, 6), (1, 4, 2, 3), Split(1)),
        (Split(0), (12, 5), (3, 4, 5), None),
        (Split(0), (4, 6), (8, 3), Split(0, inner=2)),
        (Split(1), (4, 6), (8, 3), None),
    ],
)
def test_through_view(split, before, after, expected):
    assert through_view(split, before, after) == expected


@given(viewed_splits())
def test_a_view_keeps_every_element_at_its_position(case):
    split, before, after = case
    expected = marks(split, before).reshape(after)
    found = through_view(split, before, after)
    if found is not None:
        assert torch.equal(marks(found, after), expected)
    else:  # then really no single dim holds the axis
        assert not any(torch.equal(marks(other, after), expected) for other in all_splits(after))


@given(viewed_splits())
def test_there_and_back_gives_the_same_split(case):
    split, before, after = case
    found = through_view(split, before, after)
    assume(found is not None)
    assert through_view(found, after, before) == split


@pytest.mark.parametrize(
    ("split", "before", "after", "expected"),
    [
        (Split(0), (12, 5), (3, 4, 5), [Split(0, inner=4), Split(0, outer=3)]),
        (Split(1), (5, 12), (5, 2, 1, 6), [Split(1, inner=6), Split(1, outer=2)]),
        (Split(0), (8,), (2, 2, 2), [Split(0, 1, 4), Split(0, 2, 2), Split(0, 4, 1)]),
        (Split(0, inner=3), (12, 5), (2, 6, 5), [Split(0, inner=6)]),
        (Split(0, outer=3), (24, 5), (6, 4, 5), [Split(0, outer=6)]),
    ],
)
def test_refinements(split, before, after, expected):
    assert refinements(split, before, after) == expected


@given(viewed_splits())
def test_a_refinement_is_a_factor_of_the_axis(case):
    split, before, after = case

    axis = marks(split, before)
    for part in refinements(split, before, after):
        assert part.outer % split.outer == 0
        assert part.inner % split.inner == 0
        behind = part.inner // split.inner
        assert torch.equal(marks(part, before), axis // behind % part.axis_length(before))
        assert through_view(part, before, after) is not None


@given(st.data())
def test_refinements_of_a_cut_axis_make_up_the_axis(data):
    before = data.draw(shapes())
    split = data.draw(splits(before).filter(lambda split: split.outer == split.inner == 1))
    length = before[split.dim]
    first = data.draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0]))
    after = [*before[: split.dim], first, length // first, *before[split.dim + 1 :]]
    parts = refinements(split, before, after)
    assert prod(part.axis_length(before) for part in parts) == length
