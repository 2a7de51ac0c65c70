"""Which pattern has a node, what becomes of refusals and errors of patterns, and which subgraphs are entered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import captured, sketched
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.recognise.discover import discover, nested
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import close

higher = torch.ops.higher_order


class Asked:
    """A pattern that gives what it is told for a node, and remembers what it was asked about."""

    def __init__(self, name, answers):
        self.name, self.answers, self.asked = name, answers, []

    def match(self, reader, node):
        self.asked.append(node)
        answer = self.answers.get(node)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def reader():
    return Reader(sketched(lambda x: x.exp().sin().cos().tan(), torch.randn(4, 3)))


def calls(reader):
    return [node for node in reader.owner.graph.nodes if node.op.startswith("call")]


def region(reader, *nodes):
    return close(reader, nodes, nodes[0].all_input_nodes[0])


def test_the_first_pattern_that_takes_a_node_has_it(reader):
    exp, sin, cos, tan = calls(reader)
    last, first = region(reader, cos, tan), region(reader, exp)
    before, after = Asked("before", {cos: last}), Asked("after", {exp: first, cos: last})
    found = discover(reader, [before, after])
    assert [(each.pattern, each.outcome) for each in found] == [("after", first), ("before", last)]  # in graph order
    assert before.asked == [exp, sin, cos]  # neither inputs and outputs, nor what is taken
    assert after.asked == [exp, sin]


def test_a_region_whose_nodes_are_all_taken_leaves_a_note(reader):
    exp, sin, _, _ = calls(reader)
    discover(reader, [Asked("first", {sin: region(reader, sin)}), Asked("second", {exp: region(reader, exp, sin)})])
    note = reader.unmatched.about(exp)
    assert note.reason is Reason.TAKEN
    assert note.text == "a region of second at Tensor.exp needs nodes of another one, which has them"


def test_of_a_region_whose_nodes_are_taken_a_smaller_one_is_left(reader):
    exp, sin, cos, tan = calls(reader)
    smaller = region(reader, exp, sin)
    whole = replace(region(reader, exp, sin, cos), smaller=smaller)
    taking = Asked("taking", {cos: region(reader, cos, tan)})
    assert discover(reader, [taking, Asked("late", {exp: whole})])[0].outcome is smaller
    alone = replace(whole, smaller=None)
    assert [each.pattern for each in discover(reader, [taking, Asked("late", {exp: alone})])] == ["taking"]


def test_a_refusal_is_told_once_and_costs_no_other_node(reader):
    exp, sin, cos, tan = calls(reader)
    refusals = [Refusal(Reason.RANDOM, tan, "one"), Refusal(Reason.RANDOM, tan, "one"), Refusal(Reason.RANDOM, sin, "")]
    pattern = Asked("it", {**dict(zip((exp, sin, cos), refusals, strict=True)), tan: region(reader, tan)})
    outcomes = [each.outcome for each in discover(reader, [pattern])]
    assert outcomes == [refusals[0], refusals[2], pattern.answers[tan]]


def test_an_error_of_a_pattern_is_a_refusal_once(reader, caplog):
    exp, sin, cos, _ = calls(reader)
    pattern = Asked("it", {exp: KeyError("a"), sin: KeyError("b"), cos: ValueError("c")})
    outcomes = [each.outcome for each in discover(reader, [pattern])]
    assert [(refusal.reason, refusal.node) for refusal in outcomes] == [(Reason.INTERNAL, exp), (Reason.INTERNAL, cos)]
    assert "the pattern 'it': KeyError: 'a'" in outcomes[0].text
    with pytest.raises(KeyError):
        discover(reader, [pattern], strict=True)


def calling(*targets):
    """A graph that calls subgraphs: each is given as an operator and the name of its subgraph."""
    child = Graph()
    child.output(child.placeholder("x"))
    graph = Graph()
    x = graph.placeholder("x")
    for target, name in targets:
        x = graph.call_function(target, (graph.get_attr(name), x))
    graph.output(x)
    names = dict.fromkeys(name for _, name in targets)
    return GraphModule({name: GraphModule({}, child) for name in names}, graph)


def test_subgraphs_that_run_as_if_they_stood_in_the_graph_are_entered():
    gm = calling(
        (higher.tag_activation_checkpoint, "a"),
        (higher.invoke_subgraph, "b"),
        (higher.cond, "c"),
        (higher.invoke_subgraph, "d"),
        (higher.map_impl, "d"),
        (higher.tag_activation_checkpoint, "a"),
    )
    found = {child.name: child for child in nested(gm)}
    assert found.keys() == {"a", "b"}
    assert [len(child.callers) for child in found.values()] == [2, 1]
    assert [child.repeated for child in found.values()] == [True, False]
    assert found["a"].module is gm.a


@pytest.mark.parametrize(
    ("blocks", "read", "last"),
    [(2, True, [False, True]), (2, False, [False, False]), (1, True, [False])],
)
def test_the_last_of_several_checkpointed_blocks_is_the_one_whose_results_are_read(blocks, read, last):
    class Blocks(nn.Module):
        def forward(self, x):
            for block in (torch.sin, torch.cos)[:blocks]:
                x = checkpoint(block, x, use_reentrant=False)
            return x * 2 if read else x

    found = list(nested(captured(Blocks(), torch.randn(3, requires_grad=True))))
    assert [child.last for child in found] == last
    assert all(child.repeated for child in found)
