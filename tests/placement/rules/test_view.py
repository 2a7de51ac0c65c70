"""Ops that move, add, remove, cut or join dims."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, placed, values
from strategies import chunk_by_chunk, dims, shapes, views

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split
from mst_fx.placement.rules import Spans

aten = torch.ops.aten


def view(draw, shape):
    after = draw(views(shape))
    op = draw(st.sampled_from([aten.view.default, aten._unsafe_view.default]))
    return lambda x: op(x, after)


def unsqueeze(draw, shape):
    dim = draw(st.integers(-len(shape) - 1, len(shape)))
    return lambda x: aten.unsqueeze.default(x, dim)


def squeeze(draw, shape):
    dim = draw(dims(shape))
    return draw(
        st.sampled_from(
            [aten.squeeze.default, lambda x: aten.squeeze.dim(x, dim), lambda x: aten.squeeze.dims(x, [dim])]
        )
    )


def transpose(draw, shape):
    a, b = draw(dims(shape)), draw(dims(shape))
    return lambda x: aten.transpose.int(x, a, b)


def permute(draw, shape):
    order = draw(st.permutations(range(len(shape))))
    negative = [dim - len(shape) for dim in order]
    order = draw(st.sampled_from([order, negative]))
    return lambda x: aten.permute.default(x, order)


def expand(draw, shape):
    added = draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = [*added, *(3 if size == 1 else draw(st.sampled_from([size, -1])) for size in shape)]
    return lambda x: aten.expand.default(x, sizes)


def repeat(draw, shape):
    added = draw(st.lists(st.integers(1, 2), max_size=1))
    times = [*added, *(draw(st.integers(1, 3)) for _ in shape)]
    return lambda x: aten.repeat.default(x, times)


def cut(draw, shape):
    dim = draw(dims(shape))
    start, end = sorted(draw(st.tuples(*[st.integers(0, shape[dim])] * 2)))
    step = draw(st.integers(1, 2))
    return lambda x: aten.slice.Tensor(x, dim, start, max(end, 1), step)


def split(draw, shape):
    dim = draw(dims(shape))
    size = draw(st.integers(1, shape[dim]))
    sizes = [size, shape[dim] - size]
    return draw(
        st.sampled_from(
            [lambda x: aten.split.Tensor(x, size, dim), lambda x: aten.split_with_sizes.default(x, sizes, dim)]
        )
    )


def pick(draw, shape):
    dim = draw(dims(shape))
    index = draw(st.integers(-shape[dim], shape[dim] - 1))
    return draw(st.sampled_from([lambda x: aten.select.int(x, dim, index), lambda x: aten.unbind.int(x, dim)]))


def join(draw, shape):
    dim, new_dim = draw(dims(shape)), draw(st.integers(-len(shape) - 1, len(shape)))
    return draw(
        st.sampled_from(
            [lambda x, *others: aten.cat.default([x, *others, x], dim), lambda *xs: aten.stack.default(xs, new_dim)]
        )
    )


def write_part(draw, shape):
    dim = draw(dims(shape))
    start, end = sorted(draw(st.tuples(*[st.integers(0, shape[dim])] * 2)))
    index = draw(st.integers(0, shape[dim] - 1))
    return draw(
        st.sampled_from(
            [
                lambda x: aten.slice_scatter.default(x, x.narrow(dim, start, end - start).exp(), dim, start, end),
                lambda x: aten.select_scatter.default(x, x.select(dim, index).exp(), dim, index),
                lambda x: aten.slice_scatter.default(torch.zeros_like(x), x.narrow(dim, 0, end), dim, 0, end),
            ]
        )
    )


def turn(draw, shape):
    return aten.t.default if len(shape) < 3 else lambda x: x


KINDS = (view, unsqueeze, squeeze, transpose, permute, expand, repeat, cut, split, pick, join, write_part, turn)


@st.composite
def calls(draw):
    kind = draw(st.sampled_from(KINDS))
    shape = draw(shapes())
    count = draw(st.integers(1, 2)) if kind is join else 1
    inputs = [values(*shape, seed=i) for i in range(count)]
    return Call(kind(draw, shape), inputs)


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(calls()))


@pytest.mark.parametrize(
    ("function", "split", "expected"),
    [
        (lambda x: aten.view.default(x, [12, 2]), Split(1), Split(0, outer=3)),
        (lambda x: aten._unsafe_view.default(x, [12, 2]), Split(0), Split(0, inner=4)),
        (lambda x: aten.unsqueeze.default(x, -1), Split(1), Split(1)),
        (lambda x: aten.unsqueeze.default(x, 0), Split(1, 2), Split(2, 2)),
        (lambda x: aten.squeeze.default(x[:, :, :1]), Split(1), Split(1)),
        (lambda x: aten.squeeze.dim(x, 1), Split(1), Split(1)),
        (lambda x: aten.squeeze.dims(x[:1], [0]), Split(1), Split(0)),
        (lambda x: aten.t.default(x.select(0, 0)), Split(1), Split(1)),
        (lambda x: aten.transpose.int(x, -1, 0), Split(0), Split(2)),
        (lambda x: aten.permute.default(x, [1, -1, 0]), Split(1, 2), Split(0, 2)),
        (lambda x: aten.expand.default(x, [2, 3, 4, 2]), Split(1), Split(2)),
        (lambda x: aten.slice.Tensor(x, 1, 1, 3), Split(0), Split(0)),
        (lambda x: aten.slice.Tensor(x, 0, 0, 9), Split(0), Split(0)),
        (lambda x: aten.split.Tensor(x, 3, 1)[1], Split(0), Split(0)),
        (lambda x: aten.split_with_sizes.default(x, [1, 3], 1)[0], Split(2), Split(2)),
        (lambda x: aten.select.int(x, 0, 1), Split(1), Split(0)),
        (lambda x: aten.unbind.int(x, 2)[1], Split(1), Split(1)),
        (lambda x: aten.cat.default([x, x], 2), Split(1), Split(1)),
        (lambda x: aten.stack.default([x, x], 1), Split(1), Split(2)),
        (lambda x: aten.stack.default([x, x], -1), Split(1), Split(1)),
    ],
)
def test_accepted(function, split, expected):
    assert placed(Call(function, [values(3, 4, 2)]), split) == [expected]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: aten.slice.Tensor(x, 1, 1, 3),
        lambda x: aten.slice.Tensor(x, 1, 0, 4, 2),
        lambda x: aten.split.Tensor(x, 2, 1)[0],
        lambda x: aten.split_with_sizes.default(x, [1, 3], 1)[0],
        lambda x: aten.select.int(x, 1, 0),
        lambda x: aten.unbind.int(x, 1)[0],
        lambda x: aten.cat.default([x, x], 1),
        lambda x: aten.stack.default([x, aten.transpose.int(x, 0, 1)], 0),
    ],
)
def test_the_split_dim_itself_is_neither_cut_nor_joined(function):
    with pytest.raises(Refusal) as refused:
        placed(Call(function, [values(4, 4, 4)]), Split(1))
    assert refused.value.reason is Reason.AXIS_MIXED


def test_a_view_that_spreads_the_axis_names_its_parts():
    with pytest.raises(Spans) as spans:
        placed(Call(lambda x: aten.view.default(x, [2, 3, 4]), [values(6, 4)]), Split(0))
    assert spans.value.factors == [(1, 3), (2, 1)]


def test_whole_operands_stay_whole():
    call = Call(lambda x, w: [x + 1, aten.stack.default(aten.split.Tensor(w, 2, 1), 0)], [values(4), values(4, 4)])
    assert placed(call, Split(0)) == [Split(0), WHOLE]


def test_all_joined_parts_are_split_alike():
    call = Call(lambda x, y: aten.cat.default([x, y], 1), [values(4, 2), values(4, 3)])
    assert placed(call, Split(0), position=1) == [Split(0)]
    with pytest.raises(Refusal):
        placed(call, Split(1))


def test_an_empty_joined_part_of_another_rank_is_refused():
    # cat takes an empty tensor of any rank; it has no dim that could be split
    with pytest.raises(Refusal):
        placed(Call(lambda x, y: aten.cat.default([x, y], 1), [values(4, 2), values(0)]), Split(0))
