"""What single nodes of a captured graph open into: the aten ops that each amounts to, by itself.

A trace costs milliseconds, one op in it a fraction of one: so all nodes are traced together, yet apart from each other,
each on the values that were captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from mst_fx.capture.decompositions import openings
from mst_fx.capture.lower import execute, lower, mutates, tracing
from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.modes import Mode
from mst_fx.core.values import fake_value


@dataclass(frozen=True)
class Opened:
    """The aten graph of one node.

    Attributes:
        position_of: for each placeholder which of the node's operands (`all_input_nodes`) it stands for.
        ops: the nodes of the graph but placeholders, in its order.
    """

    position_of: dict[Node, int]
    ops: tuple[Node, ...]


def open_alone(owner: GraphModule, node: Node, result: Node) -> Opened | None:
    """What one node opens into, None where it cannot be traced.

    Args:
        owner: the module that the node's graph belongs to.
        node: it may write to an operand.
        result: the node itself, or the operand that it writes to if it has no value of its own.
    """
    try:
        lowered = lower(owner, [node], node.all_input_nodes, [result], {node: Mode()}, gathers=False)
    except Exception:  # the user's op may do anything; one that cannot be traced alone is simply not understood
        return None
    leaves = [leaf for operand in node.all_input_nodes for leaf in tree_leaves(fake_value(operand))]
    placeholder_of = dict(zip(map(id, leaves), _placeholders(lowered), strict=True))
    return _slice(node, lowered, placeholder_of, lowered.graph.output_node().all_input_nodes)


def open_together(owner: GraphModule, nodes: Sequence[Node]) -> dict[Node, Opened | None]:
    """What each of several nodes opens into; none of them may write to an operand.

    One that writes to memory of its own is opened alone, as a whole region is: without the writes.
    """
    operands = {operand: fake_value(operand) for node in nodes for operand in node.all_input_nodes}
    leaves = {id(leaf): leaf for leaf in tree_leaves(list(operands.values()))}  # a trace tells values by identity
    counts: list[int] = []

    def run(*values: Any) -> list[Any]:
        given = dict(zip(leaves, values, strict=True))
        env = {operand: tree_map(lambda leaf: given[id(leaf)], value) for operand, value in operands.items()}
        results: list[Any] = []
        for node in nodes:
            try:
                value = execute(owner, node, env)
            except Exception:  # as above
                value = ()
            parts = [part for part in tree_leaves(value) if isinstance(part, torch.Tensor)]
            counts.append(len(parts))
            results += parts
        return results

    with tracing(list(leaves.values())):
        traced = make_fx(run, decomposition_table=openings(gathers=False))(*leaves.values())
    placeholder_of = dict(zip(leaves, _placeholders(traced), strict=True))
    returned: Any = traced.graph.output_node().args[0]
    results = iter(returned)
    opened = {
        node: _slice(node, traced, placeholder_of, list(islice(results, count)))
        for node, count in zip(nodes, counts, strict=True)
    }
    written = {operand for op in traced.graph.nodes if mutates(op) for operand in op.all_input_nodes}
    dirty = [node for node, found in opened.items() if found is not None and not written.isdisjoint(found.ops)]
    return opened | {node: open_alone(owner, node, node) for node in dirty}


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _slice(
    node: Node, module: GraphModule, placeholder_of: Mapping[int, Node], results: Sequence[Node]
) -> Opened | None:
    """The part of a traced graph that makes some results; None where there are none.

    Args:
        node: that was traced.
        module: holds the graph.
        placeholder_of: by the identity of the captured value.
        results: what the node gives.
    """
    if not results:
        return None
    found = {op for op in ancestors(results) if op.op != "placeholder"}
    position_of = {
        placeholder_of[id(leaf)]: position
        for position, operand in enumerate(node.all_input_nodes)
        for leaf in tree_leaves(fake_value(operand))
    }
    return Opened(position_of, in_order(module.graph, found))
