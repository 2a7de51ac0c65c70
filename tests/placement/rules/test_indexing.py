"""Gathers and look-ups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, indices, placed, values
from strategies import chunk_by_chunk, dims, shapes

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split

aten = torch.ops.aten


@st.composite
def gathers(draw):
    shape = draw(shapes())
    dim = draw(dims(shape))
    index = [draw(st.sampled_from([size, size, size, 1])) for size in shape]  # an index may be shorter than the source
    index[dim] = draw(st.integers(1, 3))
    return Call(
        lambda x, i: aten.gather.default(x, dim, i),
        [values(*shape), indices(*index, below=shape[dim])],
    )


@st.composite
def look_ups(draw):
    rows, shape = draw(st.integers(2, 6)), draw(shapes(max_dims=3))
    return Call(aten.embedding.default, [values(rows, 3), indices(*shape, below=rows)])


@st.composite
def selections(draw):
    shape = draw(shapes())
    dim = draw(dims(shape))
    return Call(
        lambda x, i: aten.index_select.default(x, dim, i),
        [values(*shape), indices(draw(st.integers(1, 4)), below=shape[dim])],
    )


@st.composite
def row_picks(draw):
    shape = draw(shapes())
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    return Call(lambda x, i: aten.index.Tensor(x, [i]), [values(*shape), indices(*rows, below=shape[0])])


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(gathers() | look_ups() | selections() | row_picks()))


def gather(x, i):
    return aten.gather.default(x, -1, i)


def rows(x, i):
    return aten.index.Tensor(x, [i])


def select(x, i):
    return aten.index_select.default(x, -1, i)


X, TABLE, LABELS, IDS = values(4, 6), values(6, 3), indices(4, 1, below=6), indices(2, 4, below=6)


@pytest.mark.parametrize(
    ("op", "inputs", "position", "split", "expected"),
    [
        (gather, [X, LABELS], 0, Split(0), Split(0)),
        (gather, [X, LABELS], 1, Split(0, outer=2), Split(0, outer=2)),
        (aten.embedding.default, [TABLE, IDS], 1, Split(1), Split(1)),
        (aten.embedding.default, [TABLE, IDS], 1, Split(0), Split(0)),
        (aten.embedding.default, [TABLE, IDS], 0, Split(1), Split(2)),
        (select, [X, indices(3, below=6)], 0, Split(0), Split(0)),
        (select, [X, indices(3, below=6)], 1, Split(0), Split(1)),
        (lambda x, i: aten.index.Tensor(x, [i, i]), [X, indices(3, below=4)], 1, Split(0), Split(0)),
        (lambda x, i: aten.index.Tensor(x, [None, i]), [X, indices(3, below=4)], 1, Split(0), Split(1)),
        (lambda x, i: aten.index.Tensor(x, [None, i]), [X, indices(3, below=4)], 0, Split(0), Split(0)),
        (lambda x, i: aten.index.Tensor(x, [i, None, i]), [values(6, 5, 6), IDS], 0, Split(1), Split(2)),
        (rows, [TABLE, IDS], 1, Split(1), Split(1)),
        (rows, [TABLE, IDS], 0, Split(1), Split(2)),
    ],
)
def test_accepted(op, inputs, position, split, expected):
    assert placed(Call(op, inputs), split, position) == [expected]


@pytest.mark.parametrize(
    ("op", "inputs", "position", "split"),
    [
        (gather, [X, LABELS], 0, Split(1)),
        (aten.embedding.default, [TABLE, IDS], 0, Split(0)),
        (select, [X, indices(3, below=6)], 0, Split(1)),
        (rows, [TABLE, IDS], 0, Split(0)),
        (lambda x, i: aten.index.Tensor(x, [i, i]), [X, indices(3, below=4)], 0, Split(0)),
        (lambda x, i: aten.index.Tensor(x, [i > 2]), [X, indices(4, below=4)], 1, Split(0)),  # rows in unknown number
        (lambda x, i: aten.gather.default(x, -1, i, sparse_grad=True), [X, LABELS], 0, Split(0)),
        (gather, [X, indices(2, 1, below=6)], 0, Split(0)),  # fewer indices than rows: chunks would not pair up
    ],
)
def test_refused(op, inputs, position, split):
    with pytest.raises(Refusal) as refused:
        placed(Call(op, inputs), split, position)
    assert refused.value.reason is Reason.AXIS_MIXED


def test_an_index_along_the_dim_of_the_look_up():
    assert placed(Call(gather, [X, X.argsort()]), Split(1), 1) == [Split(1)]
    assert placed(Call(gather, [values(6), indices(4, below=6)]), Split(0), 1) == [Split(0)]


def test_a_look_up_whose_gradient_counts_the_indices_is_refused():
    # scale_grad_by_freq: a chunk does not know how often an index occurs in the others
    with pytest.raises(Refusal):
        placed(Call(lambda table, ids: aten.embedding.default(table, ids, -1, True), [TABLE, IDS]), Split(1), 1)


def test_a_gather_of_whole_values_stays_whole():
    call = Call(lambda x, w, i: [x + 1, gather(w, i)], [values(4), X, LABELS])
    assert placed(call, Split(0)) == [Split(0), WHOLE]


def labels_of(x, labels):
    return aten.index.Tensor(x, [torch.arange(x.shape[0]), labels])


def labels_of_batches(x, labels):
    return x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1]), labels]


@st.composite
def labelled_rows(draw):
    batch, rows, classes = draw(st.integers(2, 3)), draw(st.integers(2, 4)), draw(st.integers(2, 4))
    if draw(st.booleans()):
        return Call(labels_of, [values(rows, classes), indices(rows, below=classes)])
    return Call(labels_of_batches, [values(batch, rows, classes), indices(batch, rows, below=classes)])


@given(st.data())
def test_each_row_is_picked_from_by_its_own_label(data):
    chunk_by_chunk(data, data.draw(labelled_rows()))


@pytest.mark.parametrize("position", [0, 1])
def test_rows_and_their_labels_are_cut_alike(position):
    assert placed(Call(labels_of, [X, indices(4, below=6)]), Split(0), position) == [Split(0)]
    call = Call(labels_of_batches, [values(2, 4, 6), indices(2, 4, below=6)])
    assert placed(call, Split(1), position) == [Split(1)]


def diagonal(x):
    counted = torch.arange(x.shape[0])
    return x[counted, counted]


def diagonal_of_two_counts(x):
    return x[torch.arange(x.shape[0]), torch.arange(x.shape[1])]


@pytest.mark.parametrize("pick", [diagonal, diagonal_of_two_counts])
def test_rows_that_are_counted_along_two_dims_are_refused(pick):
    with pytest.raises(Refusal, match="counts rows of two dims at once"):
        placed(Call(pick, [values(5, 5)]), Split(0))


@pytest.mark.parametrize("count", [lambda: torch.arange(1, 5), lambda: torch.arange(0, 8, 2), lambda: torch.arange(3)])
def test_what_does_not_count_all_rows_picks_some_of_them(count):
    with pytest.raises(Refusal):
        placed(Call(lambda x: aten.index.Tensor(x, [count()]), [values(8, 2)]), Split(0))
