"""Copies of a captured graph: regions replaced, values dropped and detached, and the original as it was."""

from __future__ import annotations

import pytest
import torch
from graphs import sketched, text
from looping import returned
from torch.fx import Graph, GraphModule

from mst_fx.capture.lower import lower
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import Edit, nodes_of, rebuilt
from mst_fx.recognise.region import close

T, D = 6, 4


def graph_of(fn):
    gm = sketched(fn, torch.randn(T, D, requires_grad=True))
    return gm, [node for node in gm.graph.nodes if node.op.startswith("call")]


def region(gm, *nodes):
    return close(Reader(gm), nodes, nodes[0].all_input_nodes[0])


def doubling(of):
    """An edit that puts a multiplication in place of a region."""

    def make(owner, place, node_of):
        with owner.graph.inserting_before(place):
            return [owner.graph.call_function(torch.mul, (node_of[of.stream], 2))]

    return make


def test_a_region_is_replaced_in_a_copy():
    gm, (_, sin, cos, _) = graph_of(lambda x: x.exp().sin().cos().tan())
    gm.meta["kept"] = True
    before, replaced = text(gm), region(gm, sin, cos)
    copy = rebuilt(gm, [Edit(replaced, doubling(replaced))])
    x = torch.randn(T, D)
    torch.testing.assert_close(copy(x), (x.exp() * 2).tan())
    assert text(gm) == before
    assert copy.meta == {"kept": True}
    (product,) = copy.graph.find_nodes(op="call_function", target=torch.mul)
    assert product.meta["example_value"] is cos.meta["example_value"]


def test_a_later_edit_reads_what_an_earlier_one_has_made():
    gm, (exp, sin, cos, tan) = graph_of(lambda x: x.exp().sin().cos().tan())
    first, second = region(gm, exp, sin), region(gm, cos, tan)
    copy = rebuilt(gm, [Edit(each, doubling(each)) for each in (first, second)])
    x = torch.randn(T, D)
    torch.testing.assert_close(copy(x), x * 4)


def test_late_live_ins_move_in_front_of_the_replacement():
    def late(x):
        first = x.exp()
        read = first.sum()
        return first * x.sin().tanh(), read

    gm, (exp, _, _, _, product) = graph_of(late)
    replaced = region(gm, exp, product)
    assert len(replaced.moved_ahead) == 2
    lowered = lower(gm, replaced.nodes, replaced.live_ins, replaced.outputs, replaced.modes)
    copy = rebuilt(gm, [Edit(replaced, lambda *where: nodes_of(*where, replaced, lowered))])
    x = torch.randn(T, D)
    torch.testing.assert_close(copy(x), gm(x))


def test_nodes_of_a_lowered_region_hold_captured_values_and_take_any_layout():
    gm, (exp, flat, double) = graph_of(lambda x: x.exp().view(-1) * 2)
    exp.meta["stack_trace"] = "the line of the user"
    replaced = region(gm, exp, flat, double)
    lowered = lower(gm, replaced.nodes, replaced.live_ins, replaced.outputs, replaced.modes)
    copy = rebuilt(gm, [Edit(replaced, lambda *where: nodes_of(*where, replaced, lowered))])
    first, shaped, last = (node for node in copy.graph.nodes if node.op == "call_function")
    assert first.meta["stack_trace"] == "the line of the user"
    assert shaped.target == torch.ops.aten.reshape.default
    assert [tuple(node.meta["example_value"].shape) for node in (first, shaped, last)] == [(T, D), (T * D,), (T * D,)]
    assert not any("val" in node.meta for node in copy.graph.nodes)


@pytest.mark.parametrize("read_again", [False, True])
def test_none_is_returned_in_place_of_dropped_values(read_again):
    def program(x):
        logits = x.exp()
        return logits, (logits if read_again else x).sum()

    gm, (logits, total) = graph_of(program)
    copy = rebuilt(gm, [], dropped=[logits])
    x = torch.randn(T, D)
    dropped, kept = copy(x)
    assert dropped is None
    assert torch.equal(kept, gm(x)[1])
    assert bool(copy.graph.find_nodes(op="call_method", target="exp")) == read_again
    assert returned(gm) == [logits, total]


def test_dead_nodes_are_left_out_in_any_order():
    gm, (exp, sin, result) = graph_of(lambda x: (x.exp().sin(), x.cos())[1])
    copy = rebuilt(gm, [], dead=[exp, sin])
    assert [node.target for node in copy.graph.nodes if node.op == "call_method"] == [result.target]


def test_new_subgraphs_are_attributes_of_the_copy_alone():
    gm, _ = graph_of(lambda x: x.exp())
    child = GraphModule({}, Graph())
    copy = rebuilt(gm, [], children={"child": child})
    assert copy.child is child
    assert not hasattr(gm, "child")


def test_detached_values_are_returned_without_a_gradient():
    """And so is what the caller alone gets of them; other readers have the gradient."""

    def program(x):
        logits = x.exp()
        return logits, logits.t(), logits.sin().sum()

    gm, (logits, *_) = graph_of(program)
    replaced = region(gm, logits)
    copy = rebuilt(gm, [Edit(replaced, doubling(replaced), detached=(logits,))])
    given = copy(torch.randn(T, D, requires_grad=True))
    assert [value.requires_grad for value in given] == [False, False, True]
