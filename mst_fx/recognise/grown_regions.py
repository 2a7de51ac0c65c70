"""The regions that a growth becomes: all of it, up to one scalar, or what is behind values that are returned."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from mst_fx.core.graph_walk import ancestors
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.values import has_gradient, is_view
from mst_fx.recognise.fragments import leaving
from mst_fx.recognise.growth import Growth, obstacle_to
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close, needs_gradient, with_items
from mst_fx.recognise.sorted_rows import with_permutations


def best_region(reader: Reader, growth: Growth, stream: Node) -> Region:
    """Return the best region in a growth; `smaller` of each holds the next best.

    The best one goes up to one scalar; the next holds the growth alone; the last, the nodes after returned values.

    Args:
        reader: reads the graph.
        growth: of a wide projection; its outputs are small.
        stream: the value that carries the tokens.

    Raises:
        Refusal: none of these can be closed.
    """
    chain = [(growth.nodes, stream)]
    scalar = to_a_scalar(reader, growth)
    if scalar is not None and scalar != growth.nodes:
        chain.insert(0, (scalar, stream))
    if growth.returned:
        chain += _behind_returned(reader, scalar or growth.nodes, growth.returned)
    region, refusal = None, None
    for nodes, its_stream in reversed(chain):
        try:
            region = close(reader, nodes, its_stream, growth.returned, region)
        except Refusal as error:
            refusal = error
    if region is None:
        assert refusal is not None
        raise refusal
    return region


def whole_region(reader: Reader, growth: Growth, stream: Node, smaller: Region | None = None) -> Region:
    """Return all nodes of a growth as one region, with the sorts and permutations of their rows.

    Args:
        reader: reads the graph.
        growth: its outputs become those of the region.
        stream: the value that carries the tokens.
        smaller: a region inside it, to loop where this one cannot be looped.

    Raises:
        Refusal: there is an obstacle, a large value is returned (ESCAPES, DDP), or the nodes cannot be closed (see
            `close`).
    """
    if growth.obstacle is not None:
        raise growth.obstacle
    for node in growth.returned:
        if reader.borders.fragment:
            raise leaving(node)
        raise Refusal(Reason.ESCAPES, node, f"{op_name(node)} is returned")
    nodes = with_permutations(reader, growth.nodes, stream)
    while stream in nodes and stream.all_input_nodes:  # rows that a permutation picked: the rows that they come from
        stream = stream.all_input_nodes[0]
    return close(reader, nodes, stream, smaller=smaller)


def to_a_scalar(reader: Reader, growth: Growth) -> frozenset[Node] | None:
    """Return the nodes with those that make one scalar of their outputs; None if other outputs carry gradients, too.

    Large values that are returned do not count as outputs here.
    """
    nodes = growth.nodes
    if not any(map(has_gradient, nodes)):
        return None
    grown, late = set(nodes), set[Node]()
    first = min(map(reader.order.__getitem__, nodes))
    scalars = []
    for node in reader.owner.graph.nodes:
        if reader.order[node] <= first or node.op == "output":
            continue
        if node not in nodes:
            operands = set(node.all_input_nodes)
            if operands.isdisjoint(grown | late):
                continue
            if not operands.isdisjoint(late) or obstacle_to(reader, node) is not None:
                late.add(node)
                continue
            grown.add(node)
        if reader.numel(node) == 1 and has_gradient(node):
            scalars.append(node)
    for scalar in scalars:
        nodes_to_scalar = with_items(nodes | ancestors([scalar], stop=lambda node: node not in grown))
        ends = {node for node in nodes_to_scalar if needs_gradient(node, nodes_to_scalar)}
        if ends - {*growth.returned} == {scalar}:
            return frozenset(nodes_to_scalar)
    return None


def _behind_returned(
    reader: Reader, nodes: Iterable[Node], returned: tuple[Node, ...]
) -> list[tuple[frozenset[Node], Node]]:
    """Return the nodes that depend on returned values, and such a value (or a view of it) as their stream."""
    given, dependent = set(returned), set[Node]()
    for node in sorted(nodes, key=reader.order.__getitem__):
        operands = set(node.all_input_nodes)
        if node not in given and not operands.isdisjoint(given | dependent):
            (given if operands <= given and is_view(node) else dependent).add(node)
    ordered = sorted(given, key=reader.order.__getitem__)
    streams = [value for value in ordered if not dependent.isdisjoint(value.users)]
    return [(frozenset(dependent), max(streams, key=reader.numel))] if streams else []
