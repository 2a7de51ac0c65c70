"""Matrix products: rows, columns and batches come out split, a contraction over the axis comes out as a sum."""

import pytest
import torch
from float8 import needs_scales_of_rows
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, placed, values
from strategies import broadcasts, chunk_by_chunk

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Split
from mst_fx.placement.propagate import propagate
from mst_fx.verify.by_chunks import Program, check

aten = torch.ops.aten
SIZES = st.sampled_from([1, 2, 3, 4])

# products of one value with itself or its parts: the axis meets itself in the other dim
WITH_ITSELF = (
    lambda x: aten.mm.default(x, x),
    lambda x: aten.mm.default(x, x.t()),
    lambda x: aten.mm.default(x.t(), x),
    lambda x, w: aten.addmm.default(x, x, w),
    lambda x, w: aten.addmm.default(x, w, x),
    lambda x, w: aten.addmm.default(x.t(), x, w),
    lambda x, w: aten.addmm.default(x.select(1, 0), x, w),
    lambda x, w: aten.addmm.default(x.select(1, 0), w, x),
    lambda x, w: aten.addmm.default(aten.slice.Tensor(x, 1, 0, 1).t(), x, w),
    lambda x, w: aten.addmm.default(x.select(1, 0), w, w),
    lambda x, w: aten.bmm.default(x.unsqueeze(0), w.unsqueeze(0)),
    lambda x, w: aten.baddbmm.default(x.select(0, 0), x.unsqueeze(0), w.unsqueeze(0)),
)


@st.composite
def calls(draw):
    batch, n, k, m = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.sampled_from([2, 3, 4]))
    batched, with_bias = draw(st.booleans()), draw(st.booleans())
    shapes = [[n, k], [k, m]]
    bias = draw(broadcasts([n, m]))
    if batched:
        shapes = [[batch, *shape] for shape in shapes]
        bias = draw(broadcasts([batch, n, m]))
    op = {
        (False, False): aten.mm.default,
        (False, True): aten.addmm.default,
        (True, False): aten.bmm.default,
        (True, True): aten.baddbmm.default,
    }[batched, with_bias]
    return Call(op, [values(*shape, seed=i) for i, shape in enumerate([bias] * with_bias + shapes)])


@st.composite
def calls_with_itself(draw):
    function = draw(st.sampled_from(WITH_ITSELF))
    count = function.__code__.co_argcount
    size = draw(st.integers(2, 4))
    return Call(function, [values(size, size, seed=i) for i in range(count)])


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(calls() | calls_with_itself()))


X, W, BATCHES = values(4, 3), values(3, 5), values(2, 4, 3)
MM, ADDMM, BMM, BADDBMM = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default


@pytest.mark.parametrize(
    ("op", "inputs", "position", "split", "expected"),
    [
        (MM, [X, W], 0, Split(0), Split(0)),
        (MM, [X, W], 1, Split(1), Split(1)),
        (MM, [X, W], 0, Split(1), PARTIAL),
        (MM, [X, W], 1, Split(0), PARTIAL),  # the left operand is split for the right one's sake
        (ADDMM, [values(5), X, W], 1, Split(0, outer=2), Split(0, outer=2)),
        (ADDMM, [values(4, 5), X, W], 1, Split(0), Split(0)),
        (ADDMM, [values(5), X, W], 2, Split(1), Split(1)),
        (ADDMM, [values(1, 5), X, W], 1, Split(0), Split(0)),
        (BMM, [BATCHES, values(2, 3, 5)], 0, Split(0), Split(0)),
        (BMM, [BATCHES, values(2, 3, 5)], 1, Split(0), Split(0)),
        (BMM, [BATCHES, values(2, 3, 5)], 0, Split(1), Split(1)),
        (BMM, [BATCHES, values(2, 3, 5)], 1, Split(2), Split(2)),
        (BMM, [BATCHES, values(2, 3, 5)], 0, Split(2), PARTIAL),
        (BMM, [BATCHES, values(2, 3, 5)], 1, Split(1), PARTIAL),
        (BADDBMM, [values(5), BATCHES, values(2, 3, 5)], 1, Split(1), Split(1)),
        (BADDBMM, [values(2, 1, 5), BATCHES, values(2, 3, 5)], 1, Split(0), Split(0)),
    ],
)
def test_accepted(op, inputs, position, split, expected):
    assert placed(Call(op, inputs), split, position) == [expected]


@pytest.mark.parametrize(
    ("function", "inputs", "split"),
    [
        (lambda x: MM(x, x.t()), [X], Split(0)),
        (lambda x, w, b: ADDMM(b, x, w), [X, W, values(5)], Split(1)),
        (lambda b, x, w: ADDMM(b, x, w), [values(5), X, W], Split(0)),
        # a bias whose own split dim is not the product's
        (lambda x, w: ADDMM(x.select(1, 0), x, w), [values(4, 4), values(4, 4)], Split(0)),
        (lambda x, w: BADDBMM(x, x.unsqueeze(0), w), [values(4, 4), values(1, 4, 4)], Split(1)),
    ],
)
def test_refused(function, inputs, split):
    with pytest.raises(Refusal) as refused:
        placed(Call(function, inputs), split)
    assert refused.value.reason is Reason.AXIS_MIXED


def float8(*shape, seed=0):
    return values(*shape, seed=seed).detach().to(torch.float8_e4m3fn)


def scales(*shape):
    return (values(*shape).detach().abs() + 0.1).float()


@pytest.mark.parametrize("of_rows", [pytest.param(True, marks=needs_scales_of_rows), False])
def test_scales_lie_as_the_rows_and_columns_that_they_belong_to(of_rows):
    program = Program()
    left, right = program.input(float8(6, 16)), program.input(float8(32, 16, seed=1).t())
    given = [program.input(scales(*shape)) for shape in ([(6, 1), (1, 32)] if of_rows else [(), ()])]
    program.outputs = [program.call(aten._scaled_mm.default, left, right, *given, out_dtype=torch.float32)]
    assert propagate(program.graph, {left: Split(0)}).of[program.outputs[0]] == Split(0)
    assert check(program, [left])["accepted"]


def test_a_product_of_weights_stays_whole():
    call = Call(lambda x, a, b: [x + 1, MM(a, b)], [values(4), X, W])
    assert placed(call, Split(0)) == [Split(0), WHOLE]
