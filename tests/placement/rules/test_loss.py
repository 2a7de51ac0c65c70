"""aten's negative log-likelihood."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, indices, placed, values
from strategies import chunk_by_chunk

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Split

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
IGNORED = -100


def nll(scores, target, weight=None, reduction=SUM, op=aten.nll_loss_forward.default):
    loss, count = op(scores, target, weight, reduction, IGNORED)
    return loss if reduction == NONE else (loss, count)  # without reduction the count means nothing


def targets(rows, classes):
    """Some are ignored."""
    found = indices(*rows, below=classes)
    return torch.where(indices(*rows, below=4, seed=1) == 0, IGNORED, found)


@st.composite
def calls(draw):
    rows, classes = draw(st.sampled_from([[], [4], [5], [6]])), draw(st.integers(2, 5))
    reduction = draw(st.sampled_from([NONE, SUM, SUM, MEAN]))
    weight = [values(classes, seed=2).abs()] if draw(st.booleans()) else []
    return Call(
        lambda s, t, w=None: nll(s, t, w, reduction),
        [values(*rows, classes), targets(rows, classes), *weight],
    )


@st.composite
def images(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3).filter(lambda s: max(s) > 1))
    classes, reduction = draw(st.integers(2, 4)), draw(st.sampled_from([NONE, SUM, SUM, MEAN]))
    weight = [values(classes, seed=2).abs()] if draw(st.booleans()) else []
    return Call(
        lambda s, t, w=None: nll(s, t, w, reduction, aten.nll_loss2d_forward.default),
        [values(sizes[0], classes, *sizes[1:]), targets(sizes, classes), *weight],
    )


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(calls() | images()))


SCORES, TARGETS, WEIGHT = values(6, 3), targets([6], 3), values(3).abs()


@pytest.mark.parametrize("inputs", [[SCORES, TARGETS], [SCORES, TARGETS, WEIGHT]])
def test_a_sum_and_its_count_are_partial(inputs):
    assert placed(Call(nll, inputs), Split(0, outer=2)) == [PARTIAL, PARTIAL]


def test_without_reduction_rows_stay_split():
    assert placed(Call(lambda s, t: nll(s, t, reduction=NONE), [SCORES, TARGETS]), Split(0)) == [Split(0)]


def test_scores_are_split_with_their_targets():
    assert placed(Call(nll, [SCORES, TARGETS]), Split(0), 1) == [PARTIAL, PARTIAL]


def test_whole_operands_stay_whole():
    call = Call(lambda x, s, t: [x + 1, *nll(s, t)], [values(4), SCORES, TARGETS])
    assert placed(call, Split(0)) == [Split(0), WHOLE, WHOLE]


@pytest.mark.parametrize(
    ("function", "inputs", "position", "split"),
    [
        (nll, [SCORES, TARGETS], 0, Split(1)),
        (nll, [values(3), targets([], 3)], 0, Split(0)),
        (nll, [SCORES, TARGETS, WEIGHT], 2, Split(0)),  # class weights that are split, with whole scores
        (lambda s, t: nll(s, t, reduction=MEAN), [SCORES, TARGETS], 0, Split(0)),
        (lambda s, t: nll(s, t, s.select(1, 0)), [values(3, 3), targets([3], 3)], 0, Split(0)),
        (lambda s, t: nll(s, aten.argmax.default(s, 0)), [values(3, 3), targets([3], 3)], 0, Split(1)),
    ],
)
def test_refused(function, inputs, position, split):
    with pytest.raises(Refusal) as refused:
        placed(Call(function, inputs), split, position)
    assert refused.value.reason is Reason.AXIS_MIXED
