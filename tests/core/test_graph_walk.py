"""What is reached in a graph: a -> b -> d -> output, a -> c -> d."""

from __future__ import annotations

import pytest
from torch.fx import Graph

from mst_fx.core.graph_walk import ancestors, between, descendants, in_order, walk


@pytest.fixture
def nodes():
    graph = Graph()
    a = graph.placeholder("a")
    b, c = graph.call_function(abs, (a,)), graph.call_function(abs, (a,))
    d = graph.call_function(max, (b, c))
    graph.output(d)
    return a, b, c, d


def test_ancestors(nodes):
    a, b, c, d = nodes
    assert ancestors([d]) == {a, b, c, d}
    assert ancestors([b, a]) == {a, b}
    assert ancestors([d], lambda node: node.all_input_nodes[:1]) == {a, b, d}
    assert ancestors([d], stop=lambda node: node is b) == {a, c, d}
    assert ancestors([d], stop=lambda node: node in (b, c)) == {d}
    assert ancestors([b], stop=lambda node: True) == {b}


def test_descendants(nodes):
    _, b, c, d = nodes
    output = d.graph.output_node()
    assert descendants([b]) == {b, d, output}
    assert descendants([b, c], lambda node: {d}.intersection(node.users)) == {b, c, d}


def test_between(nodes):
    a, b, c, d = nodes
    assert between([], d) == between([a], d) == (b, c, d)
    assert between([b], d) == (c, d)
    assert between([d], d) == between([], a) == ()


def test_in_order(nodes):
    a, b, _, d = nodes
    assert in_order(a.graph, {d, a, b}) == (a, b, d)


def test_a_walk_asks_for_neighbours_late(nodes):
    """Who walks may end the walk at a node before what is behind it is looked at."""
    asked = []
    for node in walk([nodes[3]], lambda node: asked.append(node) or node.all_input_nodes):
        if node is nodes[2]:
            break
    assert asked == [nodes[3]]
