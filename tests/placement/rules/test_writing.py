"""Writes at indices: along another dim than the split one, with values that are split alike."""

from __future__ import annotations

import pytest
import torch
from looping import Call, indices, operands_placed, placed, values

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split

aten = torch.ops.aten
X, COLUMNS = values(4, 6), indices(4, 3, below=6)
SOME = torch.tensor([4, 0, 2])


def scattered(x, index, written):
    return aten.scatter.src(x, -1, index, written)


def added_columns(x, index, written):
    return aten.index_add.default(x, 1, index, written)


def put_columns(x, index, written):
    return aten.index_put.default(x, [None, index], written)


def put_rows(x, index, written):
    return aten.index_put.default(x, [index], written, True)


def put_at(counting, *shape):
    """A write to one class of each row that a range counts, with values of this shape."""

    def op(x, classes, written):
        rows = torch.arange(4).view(4, *(1,) * (classes.dim() - 1))
        return aten.index_put.default(x, [counting(rows), classes], written)

    return op, [X, indices(4, *shape[1:], below=6), values(*shape)]


def as_they_are(rows):
    return rows


def backwards(rows):
    return rows.flip(0)


def put_two_dims(x, classes, written):
    return aten.index_put.default(x, [None, torch.arange(3), classes], written)


def put_both(x, written):
    return aten.index_put.default(x, [torch.arange(4), torch.arange(4)], written)


def sliced(x, written):
    return aten.slice_scatter.default(x, written, 1, 2, 5)


def selected(x, written):
    return aten.select_scatter.default(x, written, 0, 1)


# all operands are split with the one that is: the op, its operands, the split of each of them (None: whole)
ALIKE = [
    (scattered, [X, COLUMNS, values(4, 3)], [Split(0)] * 3),
    (lambda x, i: aten.scatter.value(x, 1, i, 7.0), [X, COLUMNS], [Split(0)] * 2),
    (lambda x, i, y: aten.scatter_reduce.two(x, 1, i, y, "amax"), [X, COLUMNS, values(4, 3)], [Split(0)] * 3),
    (added_columns, [X, SOME, values(4, 3)], [Split(0), None, Split(0)]),
    (lambda x, i: aten.index_fill.int_Scalar(x, -1, i, 7.0), [X, SOME], [Split(0), None]),
    (put_columns, [X, SOME, values(4, 3)], [Split(0), None, Split(0)]),
    (put_columns, [X, SOME, values(1, 3)], [Split(0), None, None]),  # the values broadcast
    (put_columns, [X, SOME, values(3)], [Split(0), None, None]),
    (put_rows, [values(6, 4), SOME, values(3, 4)], [Split(1), None, Split(1)]),
    (put_rows, [values(6, 4), SOME, values(4)], [Split(1), None, Split(0)]),
    (put_rows, [values(6, 4), indices(2, 3, below=6), values(2, 3, 4)], [Split(1), None, Split(2)]),
    (*put_at(as_they_are, 4), [Split(0)] * 3),
    (*put_at(as_they_are, 4, 2), [Split(0)] * 3),  # several classes of each row
    (put_at(as_they_are, 4, 2)[0], [X, indices(4, 2, below=6), values(4, 1)], [Split(0)] * 3),
    (put_at(as_they_are, 4, 2)[0], [X, indices(4, 2, below=6), values(2)], [Split(0), Split(0), None]),
    (put_at(as_they_are, 4, 2)[0], [X, indices(4, 2, below=6), values(1, 2)], [Split(0), Split(0), None]),
    (put_at(as_they_are, 4)[0], [X, indices(4, below=6), values()], [Split(0), Split(0), None]),
    (put_two_dims, [values(2, 3, 6), indices(3, below=6), values(2, 3)], [Split(1), Split(0), Split(1)]),
    (put_two_dims, [values(2, 3, 6), indices(3, below=6), values(3)], [Split(1), Split(0), Split(0)]),
    (sliced, [X, values(4, 3)], [Split(0), Split(0)]),
    (selected, [X, values(6)], [Split(1), Split(0)]),
    (lambda x, y: aten.select_scatter.default(x, y, -1, 1), [X, values(4)], [Split(0), Split(0)]),
]


@pytest.mark.parametrize(("op", "inputs", "splits"), ALIKE)
def test_operands_are_split_with_the_one_that_is(op, inputs, splits):
    """From the value alone, and from each of the other operands: its demand goes back to the value."""
    for position, split in enumerate(splits):
        if split is not None:
            assert placed(Call(op, inputs), split, position) == [splits[0]]
            assert operands_placed(Call(op, inputs), split, position) == [own or WHOLE for own in splits]


@pytest.mark.parametrize(("op", "inputs", "splits"), ALIKE)
def test_a_result_that_is_needed_split(op, inputs, splits):
    other = torch.zeros_like(inputs[0])
    assert placed(Call(lambda y, *inputs: y + op(*inputs), [other, *inputs]), splits[0]) == [splits[0]]


@pytest.mark.parametrize(
    ("op", "inputs", "position", "split", "why"),
    [
        (scattered, [X, COLUMNS, values(4, 3)], 0, Split(1), "writes along the split dim"),
        (scattered, [X, COLUMNS[:2], values(4, 3)], 0, Split(0), "has fewer indices than rows"),
        (scattered, [X, COLUMNS[:2], values(4, 3)], 1, Split(0), "has fewer indices than rows"),
        (added_columns, [X, SOME, values(4, 3)], 0, Split(1), "writes along the split dim"),
        (added_columns, [X, SOME, values(4, 3)], 1, Split(0), "writes to rows that a split index names"),
        (put_columns, [X, SOME, values(4, 3)], 0, Split(1), "writes along the split dim"),
        (put_columns, [X, SOME, values(4, 3)], 1, Split(0), "writes where split indices say"),
        (put_columns, [X, SOME, values(4, 3)], 2, Split(1), "writes split values to rows"),
        (put_columns, [X, X[0] > 0, values()], 0, Split(0), "picks by a mask"),
        (*put_at(backwards, 4), 0, Split(0), "writes along the split dim"),
        (*put_at(as_they_are, 4), 0, Split(1), "joins values that are split differently"),
        (*put_at(as_they_are, 4, 2), 1, Split(1), "is not as long as the tokens there"),
        (
            put_at(as_they_are, 4, 2)[0],
            [X, indices(4, 2, below=6), values(2)],
            2,
            Split(0),
            "that are split differently",
        ),
        (put_both, [values(4, 4), values(4)], 0, Split(0), "writes along the split dim"),
        (sliced, [X, values(4, 3)], 0, Split(1), "writes along the split dim"),
        (sliced, [X, values(4, 3)], 1, Split(1), "writes along the split dim"),
        (selected, [X, values(6)], 0, Split(0), "writes along the split dim"),
    ],
)
def test_refused(op, inputs, position, split, why):
    with pytest.raises(Refusal) as refused:
        placed(Call(op, inputs), split, position)
    assert refused.value.reason is Reason.AXIS_MIXED
    assert why in refused.value.text


@pytest.mark.parametrize(
    "op",
    [
        lambda x, i: aten.scatter.src(x, -1, i.expand(4, 4), x.t()),
        lambda x, i: aten.index_add.default(x, 1, i, x.t()),
        lambda x, i: aten.index_put.default(x, [None, i], x.t()),
        lambda x, i: aten.index_put.default(x, [None, i], x.sum(1).view(1, 4)),  # one row for all: it cannot be split
        lambda x, i: aten.slice_scatter.default(x, x.t(), 1),
    ],
)
def test_values_that_are_split_another_way_are_refused(op):
    with pytest.raises(Refusal, match="joins values that are split differently"):
        placed(Call(op, [values(4, 4), torch.arange(4)]), Split(0))


def test_a_write_to_whole_values_stays_whole():
    def written(x, y, columns, some):
        part = y[:, :3]
        return [
            x + 1,
            scattered(y, columns, y),
            added_columns(y, some, part),
            put_rows(y, some, y[:3]),
            sliced(y, part),
        ]

    call = Call(written, [values(4), values(5, 6), indices(5, 6, below=6), SOME])
    assert placed(call, Split(0)) == [Split(0), *[WHOLE] * 4]
