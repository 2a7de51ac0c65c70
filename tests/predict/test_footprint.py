"""Bytes of one loop: results at the whole length, sums in their dtypes, and temporaries along a straight line."""

from __future__ import annotations

import pytest
import torch
from looping import Call, aten_graph, placeholders

from mst_fx.bodies.body import Gradients, forward_body, gradient_body
from mst_fx.bodies.chunk import axis_of
from mst_fx.capture.decompositions import decompositions
from mst_fx.core.sizes import hint
from mst_fx.placement.partition import partition
from mst_fx.predict.footprint import Footprint, alive, by_result, footprint, whole_nodes
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.result_kinds import Cat, Grouped, Outer, Rows, Sum

B, T, D, FF, E = 3, 12, 4, 16, 8


def test_temporaries_grow_with_the_chunk():
    loop = Footprint(results=100, sums=50, cast=30, returned=25, fixed=7, each=2.5)
    assert [loop.temporaries(positions) for positions in (0, 1, 10)] == [7, 9, 32]
    assert loop.peak(10) == 100 + 50 + 32
    assert loop.peak(4) == 100 + 50 + 30  # sums are cast when the temporaries are gone
    assert loop.left == 125


def stages_of(fn, *shapes, dtype=torch.float32):
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    module = aten_graph(Call(fn, inputs), decompositions())
    return partition(module, placeholders(module)[0])


def forward(stages, chunk):
    body = forward_body(stages, chunk)
    ins = tuple(axis_of(stages, node) for node in stages.operands)
    return footprint(body, tuple(LoopSpec(VERSION, chunk, ins, body.literals)), stages.length, hint), body


def backward(stages, chunk, accumulate="float32", wanted=(1,)):
    body = gradient_body(stages, Gradients(wanted, (0,), False, accumulate), chunk)
    ins = (axis_of(stages, stages.results[0]), *(axis_of(stages, node) for node in stages.operands))
    return footprint(body, tuple(LoopSpec(VERSION, chunk, ins, body.literals)), stages.length, hint), body


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def test_results_have_the_whole_length_whatever_the_chunk():
    stages = stages_of(lambda x, w: (x @ w).tanh(), (T, D), (D, FF))
    for chunk in (3, T):
        found, body = forward(stages, chunk)
        assert [type(kind) for kind in body.outs] == [Cat]
        assert (found.results, found.sums, found.left) == (T * FF * 4, 0, T * FF * 4)


def test_products_that_the_loop_writes_in_place_are_results_too():
    found, body = forward(stages_of(mlp, (T, D), (D, FF), (FF, D)), 4)
    assert [(type(kind), len(nodes)) for kind, nodes in by_result(body)] == [(Rows, 2)]
    assert found.results == T * D * 4


WEIGHT = D * FF


@pytest.mark.parametrize(
    ("chunk", "accumulate", "sums", "cast"),
    [
        (4, "float32", 4 * WEIGHT, 2 * WEIGHT),
        (4, "native", 2 * WEIGHT, 0),
        (T, "float32", 2 * WEIGHT, 0),  # one chunk adds nothing up
    ],
)
def test_sums_in_the_dtype_that_they_add_up_in(chunk, accumulate, sums, cast):
    stages = stages_of(lambda x, w: (x @ w).tanh(), (T, D), (D, FF), dtype=torch.bfloat16)
    found, body = backward(stages, chunk, accumulate)
    assert [type(kind) for kind in body.outs] == [Outer]
    assert (found.results, found.sums, found.cast) == (0, sums, cast)
    assert (found.returned, found.native, found.left) == (2 * WEIGHT, 2 * WEIGHT, 2 * WEIGHT)


def experts(x, up, keys):
    order = keys.argsort(stable=True)
    ends = torch.histc(keys.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
    rows = torch._grouped_mm(x[order], up, offs=ends).tanh()
    return torch.zeros(T, FF, dtype=x.dtype, device=x.device).index_add(0, order, rows)


@pytest.mark.parametrize(
    ("device", "accumulate", "itemsize", "made"),
    [
        ("cpu", "float32", 4, 1),  # one group after the other
        ("cpu", "native", 2, 0),
        ("meta", "float32", 4, 0),  # the kernel multiplies into the sum
    ],
)
def test_products_of_groups_are_not_made_before_they_are_added(device, accumulate, itemsize, made):
    matrix = 2 * D * FF
    x, up = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in ((T, 2 * D), (E, 2 * D, FF)))
    module = aten_graph(Call(experts, [x, up, torch.zeros(T, dtype=torch.int64, device=device)]), decompositions())
    stages = partition(module, placeholders(module)[0])
    wanted = stages.operands.index(placeholders(module)[1])
    found, body = backward(stages, 2, accumulate, wanted=(wanted,))
    assert [type(kind) for kind in body.outs] == [Grouped]
    assert (found.sums, found.native, found.returned) == tuple(E * matrix * size for size in (itemsize, 2, 2))
    assert found.apart == (2 * E * matrix if made else 0)
    assert made * matrix * (2 + 4) <= found.temporaries(2) < (made + 1) * matrix * (2 + 4)


def test_a_sum_of_rows_is_no_product():
    stages = stages_of(lambda x, w, scale: (x @ w * scale).tanh(), (T, D), (D, FF), (FF,))
    found, body = backward(stages, 4, wanted=(2,))
    assert [type(kind) for kind in body.outs] == [Sum]
    assert found.sums == found.returned == FF * 4
    (total,) = whole_nodes(body, hint) & set(body.module.graph.output_node().all_input_nodes)
    assert total.meta["val"].numel() == FF


def test_temporaries_are_a_straight_line_through_two_lengths_of_a_chunk():
    stages = stages_of(mlp, (T, D), (D, FF), (FF, D))
    short, long = (forward(stages, chunk)[0] for chunk in (3, 6))
    assert (short.fixed, short.each) == (long.fixed, long.each) == (0, FF * 4)
    _, body = forward(stages, 3)
    once, twice = (alive(body, set(), times, hint, reductions_apart=True, ordered=True) for times in (1, 2))
    assert (once, twice) == (3 * FF * 4, 6 * FF * 4)


def test_what_does_not_grow_with_the_chunk_is_told_apart():
    """The product that a body gives in another dtype than the sum's is there once, as made and as cast."""
    stages = stages_of(lambda x, w: (x @ w).tanh(), (T, D), (D, 64 * FF), dtype=torch.bfloat16)
    cast, native = (backward(stages, 3, accumulate)[0] for accumulate in ("float32", "native"))
    assert cast.each == native.each
    assert cast.fixed >= 64 * WEIGHT * (2 + 4) > native.fixed


def test_a_chunk_that_is_not_contiguous_is_copied():
    rows, batch = (stages_of(lambda x, w: (x @ w).tanh(), shape, (D, FF)) for shape in ((T, D), (B, T, D)))
    assert axis_of(batch, batch.operands[0]) == (1, 1, 1)
    plain, copied = forward(rows, 3)[0], forward(batch, 3)[0]
    assert copied.each == B * (plain.each + D * 4)
