"""Flips, pads, pools and searches: the dims that they mix stay whole, any other one is split."""

from __future__ import annotations

import pytest
import torch
from looping import Call, operands_placed, placed, values

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split

aten = torch.ops.aten
IMAGES = (2, 4, 4, 6)

# an op, the shape of its operand, the dims that it mixes
MOVES = [
    (lambda x: aten.flip.default(x, [0, -1]), (4, 5, 6), {0, 2}),
    (lambda x: aten.rot90.default(x, 1, [0, 2]), (4, 5, 4), {0, 2}),
    (lambda x: aten.roll.default(x, [1], [-2]), (4, 5, 6), {1}),
    (lambda x: aten.roll.default(x, [1]), (4, 5, 6), {0, 1, 2}),  # as one row
    (lambda x: aten.unfold.default(x, -2, 3, 1), (4, 5, 6), {1}),
    (lambda x: aten.constant_pad_nd.default(x, [1, 0]), (4, 5, 6), {2}),
    (lambda x: aten.constant_pad_nd.default(x, [0, 0, -1, 2]), (4, 5, 6), {1}),
    (lambda x: aten.constant_pad_nd.default(x, [0, 0, 0, 0, 0, 1]), (4, 5, 6), {0}),
    (aten.tril.default, (4, 5, 6), {1, 2}),
    (lambda x: aten.reflection_pad1d.default(x, [1, 1]), (4, 5, 6), {2}),
    (lambda x: aten.avg_pool2d.default(x, [2, 2]), IMAGES, {2, 3}),
    (lambda x: list(aten.max_pool2d_with_indices.default(x, [2, 2])), IMAGES, {2, 3}),
    (lambda x: aten.avg_pool3d.default(x, [2, 2, 2]), (2, *IMAGES), {2, 3, 4}),
    (lambda x: aten.channel_shuffle.default(x, 2), IMAGES, {1}),
    (lambda x: aten.pixel_shuffle.default(x, 2), IMAGES, {1, 2, 3}),
]


@pytest.mark.parametrize(("op", "shape", "mixed"), MOVES)
def test_any_dim_that_is_not_mixed_may_be_split(op, shape, mixed):
    call = Call(op, [values(*shape)])
    results = len(op(*call.inputs)) if isinstance(op(*call.inputs), list) else 1
    for dim in range(len(shape)):
        if dim not in mixed:
            assert placed(call, Split(dim)) == [Split(dim)] * results
            continue
        with pytest.raises(Refusal, match="mixes the split dim") as refused:
            placed(call, Split(dim))
        assert refused.value.reason is Reason.AXIS_MIXED


def test_factors_of_the_axis_stay():
    assert placed(Call(lambda x: x.flip(1), [values(6, 4)]), Split(0, outer=2)) == [Split(0, outer=2)]


def test_a_result_that_is_needed_split_asks_for_its_operand():
    call = Call(lambda x, y: x + y.flip(1), [values(4, 5), values(4, 5)])
    assert placed(call, Split(0)) == [Split(0)]
    with pytest.raises(Refusal, match="mixes the split dim"):
        placed(call, Split(1))


def test_a_dim_that_the_op_makes_is_none_of_the_operand():
    windows = Call(lambda x, y: x + y.unfold(0, 3, 1), [values(4, 5, 3), values(6, 5)])
    assert placed(windows, Split(1)) == [Split(1)]
    with pytest.raises(Refusal, match="makes the dim that is needed split"):
        placed(windows, Split(2))


ROW, ROWS = values(6).sort()[0], values(4, 6).sort()[0]
SEARCHES = [
    lambda row, x: aten.bucketize.Tensor(x, row),
    lambda row, x: aten.isin.Tensor_Tensor(x, row),
    aten.searchsorted.Tensor,
]


@pytest.mark.parametrize("search", SEARCHES)
def test_values_are_looked_up_in_whole_ones(search):
    for dim in (0, 1):
        assert placed(Call(search, [ROW, values(4, 5)]), Split(dim), 1) == [Split(dim)]
        both = Call(lambda row, x, y: x + search(row, y), [ROW, values(4, 5), values(4, 5)])
        assert placed(both, Split(dim), 1) == [Split(dim)]
    with pytest.raises(Refusal, match="looks values up among split ones"):
        placed(Call(search, [ROW, values(4, 5)]), Split(0))


def in_rows(rows, x):
    return aten.searchsorted.Tensor(rows, x)


def test_each_row_is_looked_up_in_its_own():
    call = Call(in_rows, [ROWS, values(4, 3)])
    for position in range(2):
        assert placed(call, Split(0), position) == [Split(0)]
        assert operands_placed(call, Split(0), position) == [Split(0), Split(0)]
    assert operands_placed(call, Split(1), 1) == [WHOLE, Split(1)]
    with pytest.raises(Refusal, match="looks values up among split ones"):
        placed(call, Split(1), 0)
    with pytest.raises(Refusal, match="looks values up in rows that are split differently"):
        placed(Call(lambda x: in_rows(x, x.transpose(0, 1)), [values(4, 4, 5)]), Split(0))


def test_rows_that_are_sorted_by_an_index():
    def indirect(rows, x, order):
        return aten.searchsorted.Tensor(rows, x, sorter=order)

    unsorted = values(4, 6)
    for position in range(3):
        call = Call(indirect, [unsorted, values(4, 3), unsorted.argsort()])
        assert placed(call, Split(0), position) == [Split(0)]
        assert operands_placed(call, Split(0), position) == [Split(0)] * 3


def test_moves_and_searches_of_whole_values_stay_whole():
    call = Call(lambda x, y, rows: [x + 1, in_rows(rows, y), y.flip(0)], [values(4), values(4, 3), ROWS])
    assert placed(call, Split(0)) == [Split(0), WHOLE, WHOLE]
