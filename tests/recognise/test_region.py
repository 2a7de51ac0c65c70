"""Whether one call can stand in the place of nodes, where it goes, and what moves in front of it."""

from __future__ import annotations

import pytest
import torch
from graphs import captured, sketched
from looping import returned

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import close, needs_gradient, with_items

T, D = 6, 4


def graph_of(fn, inputs=2, capture=sketched):
    """Its graph, its inputs, its calls and what it returns."""
    gm = capture(fn, *(torch.randn(T, D, requires_grad=True) for _ in range(inputs)))
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    return gm, gm.graph.find_nodes(op="placeholder"), calls, returned(gm)


def test_a_region_knows_what_it_reads_and_what_is_read_of_it():
    gm, (x, y), (first, second, third, last), _ = graph_of(lambda x, y: ((x.exp() + y) - x).sum())
    region = close(Reader(gm), {third, first, second}, x)
    assert region.nodes == (first, second, third)
    assert region.live_ins == (x, y)
    assert region.outputs == (third,)
    assert (region.before, region.moved_ahead) == (third, ())
    assert (region.last, region.name) == (third, "the top")
    assert region.modes.keys() == {first, second, third}
    assert last not in region.nodes


def test_what_nobody_reads_is_no_region():
    gm, (x, _), (first, *_), _ = graph_of(lambda x, y: (x.exp(), y.exp())[1])
    with pytest.raises(Refusal) as refusal:
        close(Reader(gm), [first], x)
    assert refusal.value.reason == Reason.UNREAD


def test_the_tokens_come_from_outside():
    gm, _, calls, _ = graph_of(lambda x, y: (x * 2).exp() + y)
    with pytest.raises(Refusal) as refusal:
        close(Reader(gm), calls, calls[0])
    assert refusal.value.reason == Reason.MUTATION


def test_items_come_in_with_their_tuple_and_are_live_ins_without_it():
    def halves(x, y):
        first, second = x.chunk(2, -1)
        return first * second.exp()

    gm, (x, _), (chunk, first, second, exp, product), _ = graph_of(halves)
    assert with_items([chunk, exp]) == {chunk, first, second, exp}
    assert close(Reader(gm), [chunk, exp, product], x).nodes == (chunk, first, second, exp, product)
    apart = close(Reader(gm), [first, exp, product], first)
    assert apart.nodes == (exp, product)
    assert apart.live_ins == (second, first)


def refusal_for(gm, nodes, stream):
    with pytest.raises(Refusal) as refusal:
        close(Reader(gm), nodes, stream)
    return refusal.value


def test_a_tuple_that_is_read_as_a_whole_is_made_inside():
    gm, (x, _), (chunk, joined), _ = graph_of(lambda x, y: torch.cat(x.chunk(2)))
    assert close(Reader(gm), [chunk, joined], x).live_ins == (x,)
    with_stream, (x, _), (double, chunk, joined, total), _ = graph_of(
        lambda x, y: (lambda z: torch.cat(z.chunk(2)) + z)(x * 2)
    )
    refusal = refusal_for(with_stream, [joined, total], double)
    assert (refusal.reason, refusal.node) == (Reason.UNKNOWN_OP, joined)
    assert "reads several values at once, which Tensor.chunk makes" in refusal.text


def test_what_is_no_tensor_does_not_leave():
    gm, (x, _), (exp, size, product), _ = graph_of(lambda x, y: (lambda z: z * z.size(0))(x.exp()))
    refusal = refusal_for(gm, [exp, size], x)
    assert (refusal.reason, refusal.node) == (Reason.ESCAPES, size)
    assert close(Reader(gm), [exp, size, product], x).outputs == (product,)


def test_a_view_that_is_returned_with_its_base_stays_outside():
    """The caller may write to one and read the other."""
    gm, (x, _), (exp, view), _ = graph_of(lambda x, y: (lambda z: (z, z.t()))(x.exp()))
    assert close(Reader(gm), [exp, view], x).nodes == (exp,)
    gm, (x, _), (exp, view), _ = graph_of(lambda x, y: x.exp().t())
    assert close(Reader(gm), [exp, view], x).nodes == (exp, view)


def test_a_loop_goes_in_front_of_the_first_reader_and_late_live_ins_move_ahead_of_it():
    def late(x, y):
        first = x.exp()
        read = first.sum()
        z = (y * 2).tanh()
        return first * z, read

    gm, (x, _), (exp, read, double, tanh, product), _ = graph_of(late)
    region = close(Reader(gm), [exp, product], x)
    assert (region.before, region.moved_ahead) == (read, (double, tanh))
    assert region.live_ins == (x, tanh)


@pytest.mark.parametrize(
    "between",
    [
        lambda total, y: (total * y).exp(),  # depends on the region
        lambda total, y: torch.rand_like(y),  # draws random numbers, in the order of the program
    ],
)
def test_a_value_that_comes_back_or_cannot_move_is_refused(between):
    def back(x, y):
        first = x.exp()
        total = first.sum()
        return first * between(total, y)

    gm, (x, _), (first, total, *_, product), _ = graph_of(back)
    refusal = refusal_for(gm, [first, product], x)
    assert (refusal.reason, refusal.node) == (Reason.NOT_CONVEX, total)


def recorded(x, y):
    z = x.exp()
    with torch.no_grad():
        total = z.sum()
    return z.sin(), total * y


def unrecorded(x, y):
    with torch.no_grad():
        z = x.exp()
    total = z.sum() * y
    with torch.no_grad():
        return z.sin(), total


@pytest.mark.parametrize("program", [recorded, unrecorded])
def test_a_loop_goes_in_front_of_a_block_of_another_mode(program):
    gm, (x, _), _, _ = graph_of(program, capture=captured)
    first, reader, last = (gm.graph.find_nodes(op="call_method", target=name)[0] for name in ("exp", "sum", "sin"))
    region = close(Reader(gm), [first, last], x)
    assert region.before is reader.prev
    assert region.before.target is torch._C._set_grad_enabled
    assert {mode.grad for mode in region.modes.values()} == {program is recorded}


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch cannot capture it")
def test_what_is_differentiated_within_the_graph_is_left_alone():
    def differentiated(x, y):
        (grad,) = torch.autograd.grad(x.exp().sum(), [x])
        return grad * y, y.exp()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        gm, (x, y), calls, (_, other) = graph_of(differentiated, capture=captured)
    assert refusal_for(gm, calls[:1], x).reason == Reason.GRAD_MODE
    assert close(Reader(gm), [other], y).nodes == (other,)


def test_sizes_that_depend_on_data_are_refused():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm, _, _, (exp,) = graph_of(lambda x, y: (x[x[:, 0] > 0] * 2).exp(), 1, lambda fn, x: captured(fn, x, x))
    refusal = refusal_for(gm, [exp], exp.all_input_nodes[0])
    assert (refusal.reason, refusal.node) == (Reason.DATA_DEPENDENT, exp)


def test_a_gradient_comes_back_from_readers_outside_that_have_one():
    def read(x, y):
        kept, shown, inner = x.exp(), x.tanh(), x.cos()
        return kept * y, shown.detach().sum(), inner + 1

    _, _, (kept, shown, inner, *_), _ = graph_of(read)
    (reader_of_inner,) = inner.users
    inside = {kept, shown, inner, reader_of_inner}
    assert [needs_gradient(node, inside) for node in (kept, shown, inner, reader_of_inner)] == [
        True,
        False,
        False,
        True,
    ]
