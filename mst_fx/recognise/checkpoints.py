"""Checkpoints that large values cross are opened: their nodes join the graph around them, so that a loop takes them.

A checkpoint saves what it reads, and recomputes the rest for backward. So does a loop, chunk by chunk: where loops take
all that a checkpoint recomputes, it is not missed. One that is left over, in part or whole, has to be closed again.

Terms
  body    the subgraph that a checkpoint runs
  opened  of a body: its nodes stand in the graph in place of the checkpoint; each of them knows the body
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from mst_fx.core.graph_modules import module_over
from mst_fx.core.values import fake_value, has_gradient
from mst_fx.recognise.discover import Nested, nested
from mst_fx.recognise.effects import writes
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import OPENED_FROM
from mst_fx.recognise.region import Region


def openable(reader: Reader) -> set[GraphModule]:
    """Return the bodies whose nodes mean the same outside: they only compute, and no policy says what they save.

    The values of both graphs have to be the same: which share memory is told by them.
    """
    found = set()
    for child in nested(reader.owner):
        told = "_checkpoint_context_fn" in child.module.meta
        if (
            child.repeated
            and not told
            and _only_computes(child.module)
            and all(_hands_on(child, c) for c in child.callers)
        ):
            found.add(child.module)
    return found


def _only_computes(body: GraphModule) -> bool:
    inside = [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]
    calls = all(node.op in ("call_function", "call_method") and not writes(node) for node in inside)
    return calls and not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in inside)


def _hands_on(child: Nested, caller: Node) -> bool:
    """Return whether a checkpoint reads and gives the values that its body was traced with."""
    placeholders = [node for node in child.module.graph.nodes if node.op == "placeholder"]
    results: Any = child.module.graph.output_node().args[0]
    given = caller.args[1:]
    if len(given) != len(placeholders) or not isinstance(results, (tuple, list)):
        return False
    pairs = list(zip(given, placeholders, strict=True))
    for user in caller.users:
        item: Any = user.args[1] if user.target is operator.getitem else None
        if item is None or not isinstance(results[item], Node):
            return False
        pairs.append((user, results[item]))
    return all(not isinstance(a, Node) or fake_value(a) is fake_value(b) for a, b in pairs)


def opened(gm: GraphModule, bodies: Collection[GraphModule]) -> GraphModule:
    """Return a copy of the graph, over the same attributes, with these bodies opened."""
    graph, node_of = Graph(), dict[Node, Node]()
    results: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        body = _body_of(gm, node)
        if body in bodies:
            assert body is not None
            results[node] = _copied(graph, body, map_arg(node.args[1:], node_of.__getitem__))
        elif node.target is operator.getitem and node.args[0] in results:
            node_of[node] = results[node.args[0]][node.args[1]]
        elif not (node.op == "get_attr" and node.users and all(_body_of(gm, user) in bodies for user in node.users)):
            node_of[node] = graph.node_copy(node, node_of.__getitem__)
    copy = module_over(gm, graph)
    copy.meta = dict(gm.meta)
    graph.lint()
    copy.recompile()
    return copy


def _body_of(gm: GraphModule, node: Node) -> GraphModule | None:
    first = node.args[0] if node.op == "call_function" and node.args else None
    attribute = first.target if isinstance(first, Node) and first.op == "get_attr" else None
    body = getattr(gm, str(attribute), None) if attribute is not None else None
    return body if isinstance(body, GraphModule) else None


def _copied(graph: Graph, body: GraphModule, given: Iterable[object]) -> list[Node]:
    """Copy the nodes of a body to the end of a graph; return its results there."""
    operands = iter(given)
    env: dict[Node, Any] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(operands)
        elif node.op != "output":
            env[node] = copy = graph.node_copy(node, env.__getitem__)
            copy.meta[OPENED_FROM] = frozenset([body])
    returned: Any = body.graph.output_node().args[0]
    results: list[Node] = map_arg(list(returned), env.__getitem__)
    return results


def crossed(reader: Reader, regions: Iterable[Region]) -> set[GraphModule]:
    """Return the opened bodies that a large value of a region comes from, or goes into, across their bounds."""
    found = set[GraphModule]()
    for region in regions:
        for node in region.nodes:
            for operand in node.all_input_nodes:
                large = operand in region.nodes and reader.numel(operand) > reader.numel(region.stream)
                found |= _opened_from(node) ^ _opened_from(operand) if large else set()
    return found


def is_opened(region: Region) -> bool:
    """Return whether a region has nodes of opened checkpoints: what they make is not to be saved for backward."""
    return any(map(_opened_from, region.nodes))


def left_over(reader: Reader, regions: Collection[Region]) -> set[GraphModule]:
    """Return the opened bodies that make more outside of these regions than the tokens of one region are.

    Such values would be saved for backward, as no checkpoint recomputes them any more. Views, copies and casts do not
    count.

    Args:
        reader: of a graph with opened bodies.
        regions: those that are looped.
    """
    taken = {node for region in regions for node in region.nodes}
    tokens = max((reader.numel(reader.unviewed(region.stream)) for region in regions), default=0)
    made = Counter[GraphModule]()
    for node in reader.owner.graph.nodes:
        bodies = _opened_from(node)
        if bodies and node not in taken and has_gradient(node) and reader.unviewed(node) is node:
            made.update(dict.fromkeys(bodies, reader.numel(node)))
    return {body for body, elements in made.items() if elements > tokens}


def _opened_from(node: Node) -> frozenset[GraphModule]:
    bodies: frozenset[GraphModule] = node.meta.get(OPENED_FROM, frozenset())
    return bodies
