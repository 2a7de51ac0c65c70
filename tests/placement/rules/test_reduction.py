"""Reductions, scans and normalisations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, placed, values
from strategies import chunk_by_chunk, dims, shapes
from torch.fx import Graph

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Split
from mst_fx.placement.propagate import propagate

aten = torch.ops.aten

# op(x, dims, keepdim)
OVER_DIMS = (
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.mean.dim,
    lambda x, dims, keep: aten.var.correction(x, dims, correction=0, keepdim=keep),
    lambda x, dims, keep: aten.var_mean.correction(x, dims, correction=0, keepdim=keep),
    lambda x, dims, keep: aten.linalg_vector_norm.default(x, 2, dims, keep),
)
# op(x, dim, keepdim)
OVER_ONE_DIM = (
    aten.prod.dim_int,
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.min.dim,
    lambda x, dim, keep: aten.any.dim(x > 1, dim, keep),
    lambda x, dim, keep: aten.all.dim(x > -1, dim, keep),
)
OVER_ALL = (
    aten.sum.default,
    aten.mean.default,
    aten.amax.default,
    aten.argmax.default,
    aten.linalg_vector_norm.default,
    lambda x: aten.var.correction(x, correction=0),
    lambda x: aten.sum.dim_IntList(x, []),
    lambda x: aten.sum.default(x > 0),
)
# op(x, dim)
ALONG = (
    lambda x, dim: aten._softmax.default(x, dim, False),
    lambda x, dim: aten._log_softmax.default(x, dim, False),
    aten.cumsum.default,
    aten.sort.default,
    lambda x, dim: aten.topk.default(x, 1, dim),
)
ALONG_LAST = (aten.sort.default, lambda x: aten.topk.default(x, 1))


def layer_norm(x, weight, bias):
    return aten.native_layer_norm.default(x, weight.shape, weight, bias, 1e-5)


@st.composite
def calls(draw):
    shape = draw(shapes())
    x, dim, keep = values(*shape), draw(dims(shape)), draw(st.booleans())
    some = draw(st.lists(dims(shape), min_size=1, unique_by=lambda d: d % len(shape)))
    kind = draw(st.sampled_from(["dims", "dim", "all", "along", "last", "norm"]))
    if kind == "dims":
        op = draw(st.sampled_from(OVER_DIMS))
        return Call(lambda x: op(x, some, keep), [x])
    if kind == "dim":
        op = draw(st.sampled_from(OVER_ONE_DIM))
        return Call(lambda x: op(x, dim, keep), [x])
    if kind == "along":
        op = draw(st.sampled_from(ALONG))
        return Call(lambda x: op(x, dim), [x])
    if kind == "norm":
        normalized = shape[dim % len(shape) :]
        return Call(layer_norm, [x, values(*normalized, seed=1), values(*normalized, seed=2)])
    return Call(draw(st.sampled_from(OVER_ALL if kind == "all" else ALONG_LAST)), [x])


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(calls()))


@pytest.mark.parametrize("op", OVER_DIMS)
def test_over_other_dims(op):
    x = values(2, 3, 4)
    assert set(placed(Call(lambda x: op(x, [0, -1], False), [x]), Split(1))) == {Split(0)}
    assert set(placed(Call(lambda x: op(x, [0, -1], True), [x]), Split(1))) == {Split(1)}


@pytest.mark.parametrize("op", OVER_ONE_DIM)
def test_over_another_dim(op):
    x = values(2, 3, 4)
    assert set(placed(Call(lambda x: op(x, 0, False), [x]), Split(2, outer=2))) == {Split(1, outer=2)}
    assert set(placed(Call(lambda x: op(x, -1, True), [x]), Split(1))) == {Split(1)}


@pytest.mark.parametrize("op", ALONG)
def test_along_another_dim(op):
    assert set(placed(Call(lambda x: op(x, -1), [values(3, 4)]), Split(0))) == {Split(0)}


@pytest.mark.parametrize("op", ALONG_LAST)
def test_along_the_last_dim_by_default(op):
    assert set(placed(Call(op, [values(3, 4)]), Split(0))) == {Split(0)}
    with pytest.raises(Refusal):
        placed(Call(op, [values(3, 4)]), Split(1))


def test_norm_over_features():
    inputs = [values(2, 3, 4), values(4), values(4)]
    assert set(placed(Call(layer_norm, inputs), Split(1))) == {Split(1)}
    for split, position in ((Split(2), 0), (Split(0), 1)):
        with pytest.raises(Refusal):
            placed(Call(layer_norm, inputs), split, position)


@pytest.mark.skipif(not hasattr(aten, "_fused_rms_norm"), reason="this torch has no such op")
def test_fused_norm_over_features():
    graph = Graph()  # by hand: only some devices leave this op in one piece
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    norm = graph.call_function(aten._fused_rms_norm.default, (x, [4], weight, 1e-5))
    x.meta["val"], weight.meta["val"], norm.meta["val"] = values(2, 3, 4), values(4), (values(2, 3, 4), values(2, 3, 1))
    assert propagate(graph, {x: Split(1)}).of[norm] == (Split(1), Split(1))
    with pytest.raises(Refusal):
        propagate(graph, {x: Split(2)})


@pytest.mark.parametrize(
    "op",
    [
        aten.sum.default,
        lambda x: aten.sum.dim_IntList(x, [0]),
        lambda x: aten.sum.dim_IntList(x, [-2, 1], True),
        lambda x: aten.sum.dim_IntList(x, None),
        lambda x: aten.sum.dim_IntList(x, []),
    ],
)
def test_a_sum_over_the_axis_is_partial(op):
    assert placed(Call(op, [values(3, 4)]), Split(0)) == [PARTIAL]


@pytest.mark.parametrize(
    "op",
    [
        *(lambda x, op=op: op(x, [0], False) for op in OVER_DIMS[1:]),
        *(lambda x, op=op: op(x, 0, False) for op in OVER_ONE_DIM),
        *(lambda x, op=op: op(x, 0) for op in ALONG),
        *OVER_ALL[1:6],
    ],
)
def test_over_the_axis_is_refused(op):
    with pytest.raises(Refusal) as refused:
        placed(Call(op, [values(3, 4)]), Split(0))
    assert refused.value.reason is Reason.AXIS_MIXED


def test_reductions_of_weights_stay_whole():
    call = Call(lambda x, w: [x + 1, w.sum(), *aten.max.dim(w, 0), aten.cumsum.default(w, 0)], [values(4), values(4)])
    assert placed(call, Split(0)) == [Split(0)] + [WHOLE] * 4
